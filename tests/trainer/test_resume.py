"""Runs that are interrupted or resumed: they go on where they stopped, and refuse checkpoints that do not fit."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pictures import make_pictures
from runs import OPTIONS, TINY, assert_same, checkpoint, launch, run, wait_for_log

from mnv2_fused import MobileNetV2
from mnv2_fused import trainer as train
from mnv2_fused.trainer import files

# -------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer, stop, config, tmp_path):
    """After an epoch, and in the middle of one: dropout, order, augmentation, learning rate and sums go on."""
    config = dataclasses.replace(config, optimizer=optimizer)

    def interrupt(now):
        if now.step == stop and now.record is None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(train.Interrupted, match=f"after step {stop}; .*out/checkpoint.pth is written, --resume"):
        train.train(config, interrupt)
    assert not (tmp_path / "out" / train.MODEL).exists()
    resumed = train.train(train.Config(data=config.data, output=config.output, threads=1, workers=0, resume=True))
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    assert_same(resumed, train.train(whole))
    assert_same(checkpoint(tmp_path / "out"), checkpoint(tmp_path / "whole"))
    log = (tmp_path / "out" / train.LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in log] == resumed


def test_interrupted_while_validating(config, trained, monkeypatch, tmp_path):
    real = train.Trainer._validate

    def interrupt(self, stopping):
        signal.raise_signal(signal.SIGINT)
        return real(self, stopping)

    monkeypatch.setattr(train.Trainer, "_validate", interrupt)
    with pytest.raises(train.Interrupted, match="in epoch 1 after step 3;"):
        train.train(config)
    monkeypatch.undo()
    resumed = train.train(dataclasses.replace(config, resume=True))
    assert_same(resumed, checkpoint(trained)["history"])


def test_max_steps_ends_early_and_can_be_raised(config, trained, tmp_path):
    first = train.train(dataclasses.replace(config, max_steps=2))
    assert [(record["epoch"], record["step"]) for record in first] == [(1, 2)]
    assert (tmp_path / "out" / train.MODEL).exists()
    train.train(dataclasses.replace(config, resume=True))
    assert_same(checkpoint(tmp_path / "out")["model"], checkpoint(trained)["model"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_all_processes(number, pictures, tmp_path):
    """As a terminal's Ctrl-C and a service manager send them, with workers that decode images."""
    output = tmp_path / "out"
    options = [*OPTIONS[:6], "--threads", "1", "--workers", "2", "--data", pictures, "--output", str(output)]
    process = launch(*options, "--epochs", "2000", start_new_session=True)
    wait_for_log(output, process)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.startswith("error: interrupted in epoch ") and "--resume goes on from it\n" in error
    saved = checkpoint(output)
    assert f"after step {saved['step']};" in error
    resumed = ["--resume", "--threads", "1", "--workers", "0", "--max-steps", str(saved["step"] + 1)]
    assert run("--data", pictures, "--output", str(output), *resumed) == 0
    assert checkpoint(output)["step"] == saved["step"] + 1


def test_a_signal_ends_a_worker_without_error(config):
    """PyTorch would raise in the parent, wherever that is, for one that died of it."""
    trainer = train.Trainer(dataclasses.replace(config, workers=1))
    batches = trainer._shares(bool)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    worker.join(0.2)
    assert worker.exitcode is None, "the parent finishes its step first"
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(30)
    assert worker.exitcode == 0


def test_a_checkpoint_is_written_whole_or_not_at_all(config, monkeypatch, tmp_path):
    train.train(dataclasses.replace(config, max_steps=1))
    before = (tmp_path / "out" / train.CHECKPOINT).read_bytes()

    def fill_the_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(train.TrainError, match=r"cannot write .*checkpoint\.pth: No space left on device"):
        train.train(dataclasses.replace(config, resume=True))
    assert (tmp_path / "out" / train.CHECKPOINT).read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


# ----------------------------------------------------------------------------------------- checkpoints that do not fit


def other_width(saved):
    saved["model"] = MobileNetV2(3, 0.25).state_dict()


def put(*path):
    """A change of a checkpoint: the value at `path[:-1]` becomes `path[-1]`."""

    def change(saved):
        for key in path[:-2]:
            saved = saved[key]
        saved[path[-2]] = path[-1]

    return change


def drop(*path):
    """A change of a checkpoint: the value at `path` is gone."""

    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


GROUP = ("optimizer", "param_groups", 0)
UNFIT = {
    "model of another width": (other_width, "does not fit this MobileNetV2: features.7.conv.2.weight has shape"),
    "model of numbers": (put("model", {"a": 1}), "model: expected a dictionary of tensors, got a dict of 1"),
    "model with NaN": (
        lambda saved: saved["model"]["classifier.1.bias"].fill_(float("nan")),
        "classifier.1.bias holds NaN or infinity",
    ),
    "model without data": (
        put("model", "classifier.1.bias", torch.zeros(3, device="meta")),
        "model: expected dense tensors, but classifier.1.bias is without data",
    ),
    "model of float8": (
        put("model", "classifier.1.bias", torch.zeros(3, dtype=torch.float8_e5m2)),
        "model: expected dense tensors, but classifier.1.bias is of torch.float8_e5m2",
    ),
    "state with NaN": (
        lambda saved: saved["optimizer"]["state"][0]["momentum_buffer"].fill_(float("nan")),
        "optimizer: momentum_buffer of parameter 0 holds NaN or infinity",
    ),
    "sparse state": (
        put("optimizer", "state", 0, "momentum_buffer", torch.zeros(8, 3, 3, 3).to_sparse()),
        "expected a floating-point tensor (8, 3, 3, 3), got a tensor that is sparse",
    ),
    "rng without data": (
        put("rng", [torch.zeros(5056, dtype=torch.uint8, device="meta")]),
        "rng: expected the state of PyTorch's generator in each process, got a list of 1",
    ),
    "no optimizer": (drop("optimizer"), "optimizer is missing"),
    "groups": (put("optimizer", "param_groups", []), "optimizer: expected one group of parameters, got []"),
    "group of others": (put(*GROUP, "params", [0, 1]), "optimizer: params: expected a list of 158, got [0, 1]"),
    "momentum": (put(*GROUP, "momentum", 0.5), "optimizer: momentum: expected 0.9, got 0.5"),
    "rate as text": (put(*GROUP, "lr", "a"), "optimizer: lr: expected a number from 0 to 0.00375, got 'a'"),
    "rate too high": (put(*GROUP, "lr", 9.0), "optimizer: lr: expected a number from 0 to 0.00375, got 9.0"),
    "state of fewer": (drop("optimizer", "state", 5), "optimizer: expected the state of 158 parameters, got a dict of"),
    "state of another shape": (
        put("optimizer", "state", 0, "momentum_buffer", torch.zeros(2)),
        "momentum_buffer of parameter 0: expected a floating-point tensor (8, 3, 3, 3), got a tensor (2,) of",
    ),
    "state with more": (put("optimizer", "state", 0, "step", "a"), "optimizer: step: expected a number, got 'a'"),
    "scale of the loss": (put("scaler", {"scale": 1.0}), "scaler: expected nothing, got a dict of 1"),
    "scale as text": (put("scaler", "x"), "scaler: expected a dictionary of numbers from 0, got 'x'"),
    "averaged weights of numbers": (
        put("averaged", {"a": 1}),
        "averaged: expected a dictionary of tensors, got a dict",
    ),
    "no rng": (drop("rng"), "rng is missing"),
    "short rng": (put("rng", [torch.zeros(5, dtype=torch.uint8)]), "rng: expected the state of PyTorch's generator in"),
    "rng of zeros": (put("rng", [torch.zeros(5056, dtype=torch.uint8)]), "rng: expected the state of PyTorch's gen"),
    "rng of numbers": (
        put("rng", [1, 2]),
        "rng: expected the state of PyTorch's generator in each process, got [1, 2]",
    ),
    "rng of no process": (put("rng", []), "rng: expected the state of PyTorch's generator in each process, got []"),
    "rng of another kind": (put("rng", torch.zeros(5)), "in each process, got a tensor (5,)"),
    "step below 0": (put("step", -5), "step: expected a whole number from 0, got -5"),
    "step too small": (put("step", 0), "step: expected 3, from 1 whole epochs and 0, got 0"),
    "step far beyond": (put("step", 10**6), "step: expected 3, from 1 whole epochs and 0, got 1000000"),
    "steps of more epochs": (put("epoch", 3), "step: expected 6, from 2 whole epochs and 0, got 3"),
    "too many steps of an epoch": (put("in_epoch", "steps", 4), "in_epoch: steps: expected at most 3, got 4"),
    "images of no step": (put("in_epoch", "images", 8), "in_epoch: images: expected 0 after 0 steps, got 8"),
    "no images": (put("images", [0, 6]), "images: expected two whole numbers from 1, got [0, 6]"),
    "epoch 0": (put("epoch", 0), "epoch: expected a whole number from 1, got 0"),
    "epoch after the end": (put("epoch", 4), "epoch: expected at most 3, one after the last, got 4"),
    "epoch True": (put("epoch", True), "epoch: expected a whole number from 1, got True"),
    "sums": (put("in_epoch", {"steps": 1}), "in_epoch: expected numbers from 0 for steps, images, loss, correct, lr"),
    "sum of a fraction": (put("in_epoch", "steps", 0.5), "in_epoch: expected numbers from 0"),
    "history of text": (put("history", ["a"]), "history: expected a list of dictionaries of numbers, got ['a']"),
    "history of a tensor": (put("history", 0, "lr", torch.zeros(1)), "history: expected a list of dictionaries of"),
    "frozen of another model": (
        put("frozen", ["features.99.1"]),
        "frozen: expected names of batch norms, got 'features.99.1'",
    ),
    "frozen layers without names": (put("frozen", [1]), "frozen: expected a list of texts, got [1]"),
    "no labels": (put("labels", []), "labels: expected a list of texts, got []"),
    "convention": (put("convention", "tensorflow"), "convention: expected torchvision as in its arguments, got 'tens"),
    "resolution": (put("resolution", 64), "resolution: expected 32 as in its arguments, got 64"),
    "arguments": (put("arguments", 3), "arguments: expected a dictionary, got 3"),
    "other arguments": (drop("arguments", "lr"), "another version has written them, the difference is lr"),
    "wide": (put("arguments", "width", 1e9), "arguments: width: expected a number above 0 and at most 16, got 1000000"),
    "size": (
        put("arguments", "resolution", 10**6),
        "arguments: resolution: expected a whole number from 1 to 8192, got",
    ),
    "optimizer's name": (put("arguments", "optimizer", "adam"), "arguments: optimizer: expected sgd or rmsprop, got"),
    "flag": (put("arguments", "freeze_bn", 1), "arguments: freeze_bn: expected True or False, got 1"),
    "no seed": (put("arguments", "seed", None), "arguments: seed is None"),
}


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory):
    """A run with a checkpoint after its first epoch of two."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    train.train(train.Config(data=pictures, output=str(output), **{**TINY, "max_steps": 3}))
    return output


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_checkpoint_that_does_not_fit(change, message, stopped, pictures, tmp_path, capsys):
    saved = checkpoint(stopped)
    change(saved)
    torch.save(saved, tmp_path / train.CHECKPOINT)
    before = (tmp_path / train.CHECKPOINT).read_bytes()
    assert run("--data", pictures, "--output", str(tmp_path), "--resume", "--threads", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --resume: {tmp_path / train.CHECKPOINT} ") and error.count("\n") == 1
    assert message in error
    assert (tmp_path / train.CHECKPOINT).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_checkpoint(pictures, tmp_path, capsys):
    file = tmp_path / train.CHECKPOINT
    for content, message in {
        b"": f"expected weights in {file}, got an empty file",
        b"hello, world": f"{file} is not a file of weights",
        b"PK\x03\x04rest": f"{file} is a damaged PyTorch weights file",
    }.items():
        file.write_bytes(content)
        assert run("--data", pictures, "--output", str(tmp_path), "--resume") == 2
        assert message in capsys.readouterr().err
    torch.save([1, 2], file)
    assert run("--data", pictures, "--output", str(tmp_path), "--resume") == 2
    assert "expected a checkpoint that train wrote, got [1, 2]" in capsys.readouterr().err


def test_a_run_that_is_beyond_its_end(config, tmp_path):
    train.train(dataclasses.replace(config, max_steps=4))
    with pytest.raises(train.TrainError, match=r"--max-steps: .* is already at step 4, expected at most 2"):
        train.train(dataclasses.replace(config, resume=True, max_steps=2))
    train.train(dataclasses.replace(config, resume=True, max_steps=4))


def test_resumed_with_other_images(config, tmp_path):
    """Their order, and what an epoch is, would be another one."""
    data = make_pictures(tmp_path / "data")
    train.train(dataclasses.replace(config, data=data, max_steps=1))
    next((tmp_path / "data" / "red").iterdir()).unlink()
    with pytest.raises(train.TrainError, match=r"does not have the images .* expected 24 to train on"):
        train.train(dataclasses.replace(config, data=data, resume=True))


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_a_checkpoint_before_the_first_step_fits(optimizer, config, trained, tmp_path):
    """As an image that cannot be read leaves one."""
    config = dataclasses.replace(config, optimizer=optimizer)
    trainer = train.Trainer(config)
    (tmp_path / "out").mkdir()
    torch.set_rng_state(trainer._rng)
    trainer._lock = files.Lock(tmp_path / "out")
    trainer._save()
    del trainer
    resumed = train.train(dataclasses.replace(config, resume=True))
    assert_same(resumed, train.train(dataclasses.replace(config, output=str(tmp_path / "whole"))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs: expected a whole number from 1 to 100000, got 0"),
        ({"batch": 1}, "--batch: expected a whole number from 2 to 4096, got 1"),
        ({"lr": float("nan")}, "--lr: expected a number above 0 and at most 1000, got nan"),
        ({"width": "1.0"}, "--width: expected a number above 0 and at most 16, got '1.0'"),
        ({"optimizer": "adam"}, "--optimizer: expected sgd or rmsprop, got 'adam'"),
        ({"recompute": "all"}, "--recompute: expected most or balanced or least, got 'all'"),
    ],
)
def test_limits_of_a_config(change, message, config):
    with pytest.raises(train.TrainError, match=re.escape(message)):
        train.Trainer(dataclasses.replace(config, **change))


def test_paths_of_a_config(config, pictures, trained, tmp_path):
    """Paths as pathlib's, and a run from weights whose file is gone when it is resumed."""
    shutil.copy(trained / train.MODEL, tmp_path / "w.safetensors")
    paths = {"data": Path(pictures), "output": tmp_path / "out", "weights": tmp_path / "w.safetensors"}
    train.train(dataclasses.replace(config, **paths, max_steps=1))
    (tmp_path / "w.safetensors").unlink()
    train.train(dataclasses.replace(config, **paths, max_steps=2, resume=True))
