"""Options of a run that change how it computes: arithmetic, averaged weights, a recipe, curves."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import sys

import pytest
import torch
from runs import assert_same, checkpoint, run

from mnv2_fused import extras, weights
from mnv2_fused import trainer as train
from mnv2_fused.trainer.config import with_recipe


@pytest.fixture
def interrupted(tmp_path):
    """`interrupted(config, step)` stops the run of `config` after a step, and resumes it."""

    def both(config, step):
        train.train(dataclasses.replace(config, max_steps=step))
        resumed = dataclasses.replace(config, resume=True)
        return train.train(resumed)

    return both


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_training_in_half_precision(amp, config, trained, interrupted, tmp_path):
    """Its first loss is near float32's and not equal, its weights stay float32, and it resumes to the same bits."""
    config = dataclasses.replace(config, amp=amp)
    whole = train.train(config)
    exact = checkpoint(trained)["history"]
    assert whole[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.2)
    assert whole[0]["train_loss"] != exact[0]["train_loss"]
    saved = checkpoint(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in saved["model"].values() if value.is_floating_point())
    assert ("scale" in saved["scaler"]) == (amp == "fp16")
    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    interrupted(again, 3)
    for part in ("model", "optimizer", "scaler", "rng"):
        assert_same(checkpoint(tmp_path / "again")[part], saved[part])


def test_a_step_that_overflows_is_skipped(config, tmp_path, recwarn):
    """The first scale is far too high here; the run goes on with half of it, and can be resumed at once."""
    config = dataclasses.replace(config, amp="fp16", max_steps=1)
    trainer = train.Trainer(config)
    trainer._updates.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = trainer.model.features[3].conv[2].weight.clone()
    trainer.run()
    assert torch.equal(trainer.model.features[3].conv[2].weight, before)
    saved = checkpoint(tmp_path / "out")
    assert saved["scaler"]["scale"] == 2.0**39 and saved["optimizer"]["state"] == {} and saved["step"] == 1
    train.train(dataclasses.replace(config, resume=True, max_steps=2))
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


# ----------------------------------------------------------------------------------------------------- averaged weights


def test_averaged_weights(config, interrupted, tmp_path):
    """They follow every step, statistics too. They are validated and written, and resume to the same bits."""
    config = dataclasses.replace(config, ema=0.75)
    trainer = train.Trainer(config)
    expected: dict[str, torch.Tensor] = {}

    def follow(now):
        for key, value in trainer.model.state_dict().items():
            if now.record is None and value.is_floating_point():
                expected[key] = value.clone() if now.step == 1 else 0.75 * expected[key] + 0.25 * value

    history = trainer.run(follow)
    saved = checkpoint(tmp_path / "out")
    for key, value in expected.items():
        torch.testing.assert_close(saved["averaged"][key], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved["model"][key], value) or "running" in key or not value.any(), key
    model, _ = weights.load_model(str(tmp_path / "out" / train.MODEL))
    assert_same(dict(model.state_dict()), dict(saved["averaged"]))
    other = train.Trainer(dataclasses.replace(config, ema=None, output=str(tmp_path / "none")))
    other.model.load_state_dict(saved["averaged"])
    assert other._validate(bool)["validation_loss"] == pytest.approx(history[-1]["validation_loss"])

    interrupted(dataclasses.replace(config, output=str(tmp_path / "again")), 4)
    assert_same(checkpoint(tmp_path / "again")["averaged"], saved["averaged"])


def test_averaged_weights_of_another_network(config, tmp_path, capsys):
    train.train(dataclasses.replace(config, ema=0.9, max_steps=1))
    saved = checkpoint(tmp_path / "out")
    for averaged, message in {
        "nothing": ({}, "averaged does not fit this MobileNetV2: missing "),
        "NaN": ({**saved["averaged"], "classifier.1.bias": torch.full((3,), torch.nan)}, "holds NaN or infinity"),
    }.values():
        torch.save({**saved, "averaged": averaged}, tmp_path / "out" / train.CHECKPOINT)
        assert run("--data", config.data, "--output", str(tmp_path / "out"), "--resume") == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_the_paper_s_recipe(config):
    config = dataclasses.replace(config, recipe="paper", batch=None, epochs=3)
    trainer = train.Trainer(config)
    made = trainer.config
    assert (made.optimizer, made.batch, made.lr, made.weight_decay) == ("rmsprop", 96, 0.045, 4e-5)
    group = trainer._updates.optimizer.param_groups[0]
    assert (group["alpha"], group["momentum"]) == (0.9, 0.9)
    assert [trainer._updates.lr(step) for step in range(3)] == pytest.approx([0.045, 0.045 * 0.98, 0.045 * 0.98**2])
    own = train.Trainer(dataclasses.replace(config, batch=8, lr=0.1)).config
    assert (own.optimizer, own.batch, own.lr) == ("rmsprop", 8, 0.1)
    with pytest.raises(train.TrainError, match="--recipe: expected paper, got 'mine'"):
        train.Trainer(dataclasses.replace(config, recipe="mine"))


def test_the_recipe_counts_processes(config):
    """Sixteen, as the paper's workers."""
    paper = dataclasses.replace(config, recipe="paper", batch=None)
    assert with_recipe(paper, 16).batch == 16 * 96 and with_recipe(config, 16) == config


def test_steps_are_taken_at_the_rate_of_the_schedule(config):
    trainer = train.Trainer(dataclasses.replace(config, lr=0.01, epochs=3))
    taken = []

    def follow(now):
        if now.record is None:
            taken.append(trainer._updates.optimizer.param_groups[0]["lr"])

    trainer.run(follow)
    assert taken == [trainer._updates.lr(step) for step in range(9)] and len(set(taken)) > 6


def test_limits(config):
    for change, message in {
        "ema": ({"ema": 1.0}, "--ema: expected a number above 0 and at most 0.999999, got 1.0"),
        "accumulate": ({"accumulate": 0}, "--accumulate: expected a whole number from 1 to 4096, got 0"),
        "amp": ({"amp": "int8"}, "--amp: expected bf16 or fp16, got 'int8'"),
        "log": ({"log": "wandb"}, "--log: expected tensorboard, got 'wandb'"),
        "sync_bn": ({"sync_bn": 1}, "--sync-bn: expected True or False, got 1"),
    }.values():
        with pytest.raises(train.TrainError, match=message):
            train.Trainer(dataclasses.replace(config, **change))


# -------------------------------------------------------------------------------------------------------------- curves


def test_curves(config, tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(dataclasses.replace(config, log="tensorboard", max_steps=2))
    history = train.train(dataclasses.replace(config, log="tensorboard", resume=True))
    events = EventAccumulator(str(tmp_path / "out" / train.CURVES))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    drawn = {event.step: event.value for event in events.Scalars("epoch/validation_loss")}
    assert drawn == {record["step"]: pytest.approx(record["validation_loss"]) for record in history}


def test_curves_that_cannot_be_written_do_not_end_a_run(config, trained, monkeypatch):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setattr(SummaryWriter, "close", full)
    with pytest.warns(UserWarning, match="no more curves: cannot write to .*tensorboard: No space left") as warned:
        history = train.train(dataclasses.replace(config, log="tensorboard"))
    assert len([each for each in warned if "curves" in str(each.message)]) == 1
    assert_same(history, checkpoint(trained)["history"])


def test_a_missing_tensorboard_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(extras.MissingExtraError, match=r'pip install "mnv2_fused\[train\]"'):
        train.train(dataclasses.replace(config, log="tensorboard"))
    assert not (tmp_path / "out").exists()
