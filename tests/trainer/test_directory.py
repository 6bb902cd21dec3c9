"""A run's directory: one run at a time, files that are whole at any moment, disks and permissions that fail."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import OPTIONS, assert_same, checkpoint, children, launch, run, wait_for_log

from mnv2_fused import trainer as train
from mnv2_fused import weights
from mnv2_fused.data import datasets
from mnv2_fused.trainer import files

# -------------------------------------------------------------------------------------------------------- one at a time


def test_a_second_run_in_a_directory_is_refused(pictures, tmp_path, capsys):
    """A killed run leaves no lock behind, even while its workers still live."""
    output = tmp_path / "out"
    options = ["--data", pictures, "--output", str(output), "--threads", "1"]
    first = launch(*options, *OPTIONS[:6], "--workers", "2", "--epochs", "2000")
    wait_for_log(output, first)
    for more in (["--resume"], [*OPTIONS[:6]]):
        assert run(*options, *more, "--workers", "0") == 2
        error = capsys.readouterr().err
        assert f"another run is writing to {output}\n" in error or "exists: --resume goes on from it" in error
    assert run(*options, "--resume") == 2
    assert capsys.readouterr().err == f"error: another run is writing to {output}\n"
    first.kill()
    first.wait(30)
    time.sleep(0.5)  # its workers look for it every 5 s
    steps = str(checkpoint(output)["step"] + 1)
    assert run(*options, "--resume", "--workers", "0", "--max-steps", steps) == 0
    assert not [path for path in output.iterdir() if "lock" in path.name]


def test_two_runs_that_start_together(config):
    """Both found an empty directory; the one that comes first has it."""
    first, second = train.Trainer(config), train.Trainer(config)

    def other(now):
        if now.step == 1:
            with pytest.raises(train.TrainError, match="another run is writing to"):
                second.run()

    first.run(other)
    with pytest.raises(train.TrainError, match=r"checkpoint\.pth exists: --resume goes on from it"):
        second.run()
    assert train.train(dataclasses.replace(config, resume=True)) == first.history


def test_a_directory_that_is_replaced(config, tmp_path):
    """The run does not write into the new one, which may be another run's."""
    output = tmp_path / "out"

    def replace(now):
        if now.step == 1 and now.record is None:
            shutil.rmtree(output)
            output.mkdir()

    with pytest.raises(train.TrainError, match=f"{output} was removed or replaced while the run was writing to it"):
        train.train(config, replace)
    assert not list(output.iterdir())


# ---------------------------------------------------------------------------------------------------------- killed runs


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.13])
def test_a_killed_run_goes_on_to_the_same_bits(delay, config, trained, tmp_path):
    output = tmp_path / "out"
    options = ["--data", config.data, "--output", str(output), *OPTIONS]
    process = launch(*options)
    wait_for_log(output, process)
    time.sleep(delay)
    process.kill()
    process.wait(30)
    resumed = train.train(dataclasses.replace(config, resume=True))
    assert_same(resumed, checkpoint(trained)["history"])
    assert_same(checkpoint(output), checkpoint(trained))
    assert [json.loads(line) for line in (output / train.LOG).read_text("utf-8").splitlines()] == resumed


def test_a_worker_that_dies_is_an_error_by_name(pictures, tmp_path):
    output = tmp_path / "out"
    options = ["--data", pictures, "--output", str(output), *OPTIONS[:6], "--threads", "1", "--workers", "1"]
    process = launch(*options, "--epochs", "2000")
    wait_for_log(output, process)
    patience = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < patience:
        for worker in children(process):
            try:
                os.kill(worker, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    assert re.fullmatch(
        r"error: a process that decodes images has died \(DataLoader worker \(pid.*\); "
        rf"the last good checkpoint is {output / train.CHECKPOINT}\n",
        error,
    ), error
    steps = str(checkpoint(output)["step"] + 1)
    assert run(*options[:4], "--resume", "--workers", "0", "--max-steps", steps) == 0


# ------------------------------------------------------------------------------------------------------ disks that fail


@pytest.mark.parametrize("name", [train.CHECKPOINT, train.MODEL, train.LABELS, train.LOG])
def test_a_full_disk(name, config, trained, monkeypatch, tmp_path, capsys):
    """The run ends with the file's name, and goes on from the last checkpoint as if nothing had been."""
    output = tmp_path / "out"
    train.train(dataclasses.replace(config, max_steps=1))
    before = checkpoint(output)
    real = os.replace
    fails = []

    def full(source, target):
        if Path(target).name == name:
            fails.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    options = ["--data", config.data, "--output", str(output), "--resume", "--threads", "1", "--workers", "0"]
    assert run(*options, "--max-steps", "2") == 2
    error = capsys.readouterr().err
    assert fails and error.startswith(f"error: cannot write {output / name}: ") and "No space left" in error
    assert not list(output.glob("*.tmp"))
    if name != train.MODEL:
        assert_same(checkpoint(output), before)
    monkeypatch.undo()
    assert run(*options, "--max-steps", "6") == 0
    assert_same(checkpoint(output)["model"], checkpoint(trained)["model"])


def test_a_log_that_cannot_be_written(config, tmp_path):
    trainer = train.Trainer(config)

    def block(now):
        if now.step == 1 and now.record is None:
            (tmp_path / "out" / train.LOG).unlink()
            (tmp_path / "out" / train.LOG).mkdir()

    with pytest.raises(train.TrainError, match=r"cannot write to .*out: Is a directory"):
        trainer.run(block)


def test_a_directory_that_cannot_be_listed(pictures, tmp_path, monkeypatch):
    """It is named: to pass over it would train on fewer images in silence."""
    closed = str(Path(pictures) / "red" / "more")
    Path(closed).mkdir(exist_ok=True)
    real = os.scandir

    def scandir(path="."):
        if os.fspath(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    try:
        with pytest.raises(datasets.DataError, match=f"cannot list {closed}: Permission denied"):
            datasets.folder(pictures, weights.TORCHVISION)
    finally:
        Path(closed).rmdir()


def test_interrupted_runs_leave_threads_and_locks_alone(config, tmp_path):
    threads = torch.get_num_threads()
    train.train(dataclasses.replace(config, max_steps=1))
    lock = files.Lock(tmp_path / "out")
    with pytest.raises(train.TrainError, match="another run is writing"):
        train.Trainer(dataclasses.replace(config, resume=True))
    lock.release()
    lock.release()
    train.Trainer(dataclasses.replace(config, resume=True))
    assert torch.get_num_threads() == threads
