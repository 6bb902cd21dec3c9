"""Training on several processes: it computes what one process does, and fails as a whole."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist
from pictures import make_objects, make_pictures
from runs import OPTIONS, TINY, assert_same, checkpoint, children, launch, run, wait_for_log
from torch import nn
from torch.distributed.run import get_args_parser

from mnv2_fused import extras, weights
from mnv2_fused import trainer as train
from mnv2_fused.cli import train as command
from mnv2_fused.data import datasets
from mnv2_fused.trainer import batches, processes

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)


def train_alone(config: train.Config, steps: int | None = None) -> list[dict]:
    """A run without dropout, in which each process of a group has masks of its own."""
    trainer = train.Trainer(dataclasses.replace(config, max_steps=steps))
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return trainer.run()


def _serve(rank: int, directory: str, pipe) -> None:
    """A process of a group, which does what comes through `pipe` until None comes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    for work, arguments in iter(pipe.recv, None):
        try:
            pipe.send((work(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`both(work, *arguments)` gives what `work(*arguments)` returns in each of two processes of a group."""
    context, directory = multiprocessing.get_context("spawn"), str(tmp_path_factory.mktemp("group"))
    pipes, there = zip(*(context.Pipe() for _ in range(2)), strict=True)
    group = [context.Process(target=_serve, args=(rank, directory, end), daemon=True) for rank, end in enumerate(there)]
    for process in group:
        process.start()

    def run(work, *arguments):
        for pipe in pipes:
            pipe.send((work, arguments))
        assert all(pipe.poll(120) for pipe in pipes), "a process does not answer"
        results = [pipe.recv() for pipe in pipes]
        assert all(error is None for _, error in results), "\n".join(str(error) for _, error in results)
        return [result for result, _ in results]

    yield run
    for pipe, process in zip(pipes, group, strict=True):
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(10)
        process.kill()


def own_lines(error: str) -> list[str]:
    """The lines of standard error that the command line wrote, and not torchrun."""
    return [line for line in error.splitlines() if line.startswith("error: ")]


def assert_close(got: dict, expected: dict, tolerance: float) -> None:
    """Weights and statistics, relative to the largest of each tensor."""
    for key, value in expected.items():
        if value.is_floating_point():
            error = (got[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error < tolerance, (key, error)


def _needs(task: str) -> None:
    for name in ("pycocotools.coco", "torchmetrics.classification", "torchvision"):
        try:
            extras.use(name, task)
        except ImportError as error:
            pytest.skip(str(error))


# ---------------------------------------------------------------------------------------------- the same as one process


@pytest.fixture
def smooth(config, trained):
    """`config` with batch norms as trained. With the statistics of a few images each step multiplies every rounding."""
    return dataclasses.replace(config, weights=str(trained / train.MODEL), freeze_bn=True, lr=0.003)


def test_two_processes_follow_the_curve_of_one(smooth, both, tmp_path):
    """Over 2 epochs of 3 steps."""
    expected = train_alone(dataclasses.replace(smooth, output=str(tmp_path / "one")))
    got = both(train_alone, smooth)
    assert_same(*got)
    for a, b in zip(got[0], expected, strict=True):
        for key in ("epoch", "step", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    saved, other = checkpoint(tmp_path / "out"), checkpoint(tmp_path / "one")
    assert_close(saved["model"], other["model"], 1e-4)
    assert len(saved["rng"]) == 2 and not torch.equal(*saved["rng"])


def test_synchronised_norms_have_the_statistics_of_the_joined_batch(config, both, tmp_path):
    """A step from the initial weights, with 7 images as 3 and 4."""
    config = dataclasses.replace(config, batch=7, sync_bn=True, lr=0.01)
    expected = train_alone(dataclasses.replace(config, output=str(tmp_path / "one")), 1)
    got = both(train_alone, config, 1)
    assert_same(*got)
    for key in ("train_loss", "validation_loss"):
        assert got[0][0][key] == pytest.approx(expected[0][key], rel=1e-5), key
    assert_close(checkpoint(tmp_path / "out")["model"], checkpoint(tmp_path / "one")["model"], 1e-3)


def test_processes_without_synchronised_norms_are_parts_of_a_batch(config, both, tmp_path):
    """Uneven ones: 7 images are 3 and 4. One step gives the weights that accumulation gives in one process."""
    config = dataclasses.replace(config, batch=7, lr=0.1)
    one = dataclasses.replace(config, accumulate=2, output=str(tmp_path / "one"))
    expected = train_alone(one, 1)
    got = both(train_alone, config, 1)
    assert got[0][0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-5)
    saved, other = checkpoint(tmp_path / "out")["model"], checkpoint(tmp_path / "one")["model"]
    weights_alone = {key: value for key, value in other.items() if "running" not in key}
    assert_close(saved, weights_alone, 1e-5)
    # What is validated is what is kept: the weights with the first process's statistics.
    trainer = train.Trainer(dataclasses.replace(config, output=str(tmp_path / "validated")))
    trainer.model.load_state_dict(saved)
    assert got[0][0]["validation_loss"] == pytest.approx(trainer._validate(bool)["validation_loss"], rel=1e-5)
    whole = train_alone(dataclasses.replace(config, output=str(tmp_path / "whole")), 1)
    assert whole[0]["train_loss"] != pytest.approx(expected[0]["train_loss"], rel=1e-5)


def test_accumulation_changes_nothing_if_norms_are_frozen(smooth, tmp_path):
    config = dataclasses.replace(smooth, batch=7)
    expected = train_alone(dataclasses.replace(config, output=str(tmp_path / "whole")))
    got = train_alone(dataclasses.replace(config, accumulate=3))
    for a, b in zip(got, expected, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
    assert_close(checkpoint(tmp_path / "out")["model"], checkpoint(tmp_path / "whole")["model"], 1e-4)


def _step(config: train.Config) -> tuple[float, dict]:
    """The loss of a step with frozen norms and without dropout, and the step's change of the weights."""
    trainer = train.Trainer(config)
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer.model.train()
    for norm in trainer._norms().values():
        norm.eval()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss, *_ = trainer._step(next(trainer._shares(bool)))
    return loss, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("way", ["accumulation", "processes"])
def test_a_mean_over_boxes_or_pixels_is_one_over_the_whole_batch(task, way, both, tmp_path):
    """Parts with few of them count less."""
    _needs(task)
    options = {**TINY, "width": 0.1, "resolution": 65, "batch": 4, "lr": 1.0, "warmup": 0.0}
    data = make_objects(tmp_path / "objects")
    config = train.Config(data=data, output=str(tmp_path / "out"), task=task, seed=3, **options)
    expected, change = _step(config)
    if way == "processes":
        got, own = both(_step, config)[0]
    else:
        got, own = _step(dataclasses.replace(config, accumulate=2))
    assert got == pytest.approx(expected, rel=1e-5)
    for name, value in change.items():
        assert (own[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-7, name


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_resumes(before, after, smooth, both, tmp_path):
    """In the middle of an epoch; the curve stays the same."""

    def train_on(size, config, steps):
        return train_alone(config, steps) if size == 1 else both(train_alone, config, steps)[0]

    expected = train_alone(dataclasses.replace(smooth, output=str(tmp_path / "one")))
    train_on(before, smooth, 2)
    got = train_on(after, dataclasses.replace(smooth, resume=True), 6)
    # The first of three entries is that of the run which ended after two steps.
    assert [record["step"] for record in got] == [2, 3, 6]
    for a, b in zip(got[1:], expected, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-5)


def _interrupted(config: train.Config, step: int) -> None:
    def interrupt(now):
        if dist.get_rank() == 1 and now.step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(train.Interrupted, match=f"after step {step}"):
        train.train(config, interrupt)


def test_a_signal_to_one_process_stops_all_and_loses_nothing(config, both, tmp_path):
    """The bits are those of the run that was not interrupted, dropout's in each process included."""
    both(_interrupted, config, 2)
    assert checkpoint(tmp_path / "out")["step"] == 2
    both(train.train, dataclasses.replace(config, resume=True))
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    both(train.train, whole)
    assert_same(checkpoint(tmp_path / "out"), checkpoint(tmp_path / "whole"))


def _validated(config: train.Config) -> dict:
    return train.Trainer(config)._validate(bool)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_validation_sees_each_image_once(task, pictures, both, tmp_path):
    """With figures as of one process, also from uneven shares."""
    data = pictures
    if task != "classification":
        _needs(task)
        data = make_objects(tmp_path / "objects")
    options = {**TINY, "resolution": 33, "batch": 4}
    config = train.Config(data=data, output=str(tmp_path / "out"), task=task, **options)
    expected = train.Trainer(dataclasses.replace(config, batch=2))._validate(bool)
    got = both(_validated, config)
    assert got[0] == got[1] and got[0].keys() == expected.keys()
    for key, value in expected.items():
        assert got[0][key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), key


@pytest.mark.parametrize(("count", "parts"), [(7, 3), (2, 2), (96, 5), (3, 4)])
def test_shares_of_a_batch(count, parts):
    shares = [batches.share(list(range(count)), part, parts) for part in range(parts)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# -------------------------------------------------------------------------------------------------------------- failure


def _refused(config: train.Config, data: datasets.Data | None = None) -> tuple[str, str]:
    try:
        train.Trainer(config, data)
    except (train.TrainError, train.OtherProcessError) as error:
        return type(error).__name__, str(error)
    return "", ""


def _other_data(config: train.Config, labels: bool) -> tuple[str, str]:
    data = datasets.folder(config.data, weights.at_resolution(weights.TORCHVISION, 32))
    if dist.get_rank() == 1 and labels:
        data.labels[:] = reversed(data.labels)
    elif dist.get_rank() == 1:
        data.train.sources.pop()
        data.train.targets.pop()
    return _refused(config, data)


def test_errors_are_raised_by_one_process_and_end_all(config, both, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / train.CHECKPOINT).write_bytes(b"")
    first, second = both(_refused, config)
    assert first[0] == "TrainError" and "checkpoint.pth exists: --resume goes on from it" in first[1]
    assert second == ("OtherProcessError", f"process 0: {first[1]}")
    config = dataclasses.replace(config, output=str(tmp_path / "new"))
    first, second = both(_other_data, config, True)
    assert first[0] == "TrainError" and "3 classes (red, green, blue, names' digest " in first[1]
    first, second = both(_other_data, config, False)
    assert first[0] == "TrainError" and second[0] == "OtherProcessError"
    assert "process 1 has 23 images to train on" in first[1] and "process 0 has 24 images to train on" in first[1]
    small = dataclasses.replace(config, batch=3)
    first, _ = both(_refused, small)
    assert first[1].startswith("--batch: expected at least two images for each part of a batch")
    assert "got 3 images for 2 parts (2 processes, --accumulate 1)" in first[1]
    assert both(_refused, dataclasses.replace(small, sync_bn=True))[0] == ("", "")
    assert _refused(dataclasses.replace(config, accumulate=5))[1].startswith("--batch: expected at least two images")


def test_torchrun(tmp_path):
    """A run with an image that cannot be read: one error, a checkpoint. Mended, it resumes."""
    data, output = make_pictures(tmp_path / "data"), tmp_path / "out"
    bad = datasets.folder(data, weights.TORCHVISION).train.sources[5]
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    options = ["--data", data, "--output", str(output), *OPTIONS, "--sync-bn"]
    process = launch(*options, size=2)
    out, error = process.communicate(timeout=120)
    assert process.returncode != 0 and "/mnv2_fused/" not in error.replace(data, "")  # torchrun has a traceback
    (line,) = own_lines(error)
    assert str(bad) in line and f"{output / train.CHECKPOINT} is written, --resume goes on from it" in line
    bad.write_bytes(good)
    process = launch(*options, "--resume", size=2)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count("epoch 2, step 6") == 1 and "2 processes, synchronised batch norms" in out
    assert checkpoint(output)["step"] == 6 and (output / train.MODEL).exists()


def test_a_process_that_dies_ends_the_run_and_spares_the_checkpoint(pictures, tmp_path):
    output = tmp_path / "out"
    options = [*OPTIONS[:6], "--threads", "1", "--workers", "0", "--data", pictures, "--output", str(output)]
    process = launch(*options, "--epochs", "2000", size=2)
    wait_for_log(output, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    for line in own_lines(error):
        assert "a process of the run has died" in line and "the last good checkpoint is " in line
    step = checkpoint(output)["step"]
    resumed = ["--resume", "--threads", "1", "--workers", "0", "--max-steps", str(step + 1)]
    assert run("--data", pictures, "--output", str(output), *resumed) == 0
    assert checkpoint(output)["step"] == step + 1


def test_a_signal_to_torchrun_writes_a_checkpoint(pictures, tmp_path):
    output = tmp_path / "out"
    options = [*OPTIONS[:6], "--threads", "1", "--workers", "1", "--data", pictures, "--output", str(output)]
    process = launch(*options, "--epochs", "2000", size=2)
    wait_for_log(output, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    saved = checkpoint(output)
    (line,) = own_lines(error)
    assert f"after step {saved['step']}; " in line


def test_torchrun_leaves_the_options_alone():
    """It takes an option for its own, wherever it stands, if that is the beginning of one of its own."""
    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    (train_parser,) = parser._subparsers._group_actions[0].choices.values()
    for action in train_parser._actions:
        free = [each for each in action.option_strings if not any(other.startswith(each) for other in own)]
        assert free or action.dest == "help", action.option_strings


def test_what_a_dead_process_leaves_is_recognised():
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert processes.lost(gloo).startswith("a process of the run has died (")
    assert processes.lost(RuntimeError("shape '[2]' is invalid")) is None
