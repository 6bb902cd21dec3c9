"""Checkpoints: every field is checked before it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mnv2_fused import weights
from mnv2_fused.trainer.config import MAY_BE_NONE, Config, TrainError, broken_rule
from mnv2_fused.trainer.tasks import TASKS
from mnv2_fused.trainer.updates import Updates

# Sums over the steps of an epoch, and the learning rate of its last step.
NOTHING_YET = {"steps": 0, "images": 0, "loss": 0.0, "correct": 0, "lr": 0.0}
# The tensors that an optimizer keeps for a parameter, of the parameter's shape.
_SLOTS = {"sgd": ("momentum_buffer",), "rmsprop": ("square_avg", "momentum_buffer")}


def read(path: Path) -> dict:
    """The checkpoint in `path`, its fields checked as far as they need no model.

    Raises:
        TrainError: no such file, or a field that `train` does not write like that; the message names the field.
        weights.WeightsError: as `weights.read`.
    """
    if not path.exists():
        raise TrainError(f"--resume: there is no {path}")
    saved, _ = weights.read(path)
    if not isinstance(saved, dict):
        raise TrainError(f"--resume: {path}: expected a checkpoint that train wrote, got {_short(saved)}")
    if "arguments" not in saved:
        raise TrainError(f"--resume: {path} holds weights alone; --weights starts a new run from them")
    _check_arguments(path, saved["arguments"])
    for name, (rule, holds) in _RULES.items():
        if name not in saved:
            raise _unfit(path, f"{name} is missing")
        if not holds(saved[name]):
            raise _unfit(path, f"{name}: expected {rule}, got {_short(saved[name])}")
    for name in ("model", "averaged"):
        for key, tensor in saved[name].items():
            kind = weights.unusable(tensor)
            if kind is not None:
                raise _unfit(path, f"{name}: expected dense tensors, but {key} is {kind}")
    for name in ("convention", "resolution"):
        if saved[name] != saved["arguments"][name]:
            expected = f"{saved['arguments'][name]} as in its arguments"
            raise _unfit(path, f"{name}: expected {expected}, got {_short(saved[name])}")
    return saved


def restore(
    path: Path,
    saved: dict,
    model: nn.Module,
    updates: Updates,
) -> None:
    """Loads what `read` gave into a new model and its new `updates`.

    Raises:
        TrainError: the state of the optimizer or of the loss's scale belongs to another run.
        weights.WeightsError: the model is another one.
    """
    weights.fill(model, saved["model"], f"--resume: {path}")
    group = _optimizer_group(path, saved, updates.optimizer)
    state = _optimizer_state(path, saved, updates)
    updates.optimizer.load_state_dict({"state": state, "param_groups": [group]})
    _restore_scale(path, saved, updates.scaler)
    if updates.averaged is not None:
        weights.fill(updates.averaged.module, saved["averaged"], f"--resume: {path}: averaged")
        updates.averaged.n_averaged.fill_(saved["step"])


def check_data(path: Path, saved: dict, given: str, labels: list[str], images: list[int]) -> None:
    """Checks that the data `given`, with these labels and numbers of images, are those of the checkpoint's run.

    Raises:
        TrainError: they are others.
    """
    if saved["labels"] != labels:
        raise TrainError(
            f"{given} does not have the classes that {path} was trained on: expected {len(saved['labels'])} "
            f"({', '.join(saved['labels'][:5])}...), got {len(labels)} ({', '.join(labels[:5])}...)"
        )
    if saved["images"] != images:
        expected, got = (
            f"{train} to train on and {held_out} held out" for train, held_out in (saved["images"], images)
        )
        raise TrainError(f"{given} does not have the images that {path} was trained on: expected {expected}, got {got}")


def check_steps(path: Path, saved: dict, steps_per_epoch: int, images: int, most: int) -> None:
    """Checks the counters of a checkpoint against a run of `most` steps on so many images.

    Raises:
        TrainError: the counters contradict one another, or the run is already over.
    """
    step, epoch, sums, arguments = saved["step"], saved["epoch"], saved["in_epoch"], saved["arguments"]
    if epoch > arguments["epochs"] + 1:
        raise _unfit(path, f"epoch: expected at most {arguments['epochs'] + 1}, one after the last, got {epoch}")
    if sums["steps"] > steps_per_epoch:
        raise _unfit(path, f"in_epoch: steps: expected at most {steps_per_epoch}, got {sums['steps']}")
    expected = (epoch - 1) * steps_per_epoch + sums["steps"]
    if step != expected:
        raise _unfit(path, f"step: expected {expected}, from {epoch - 1} whole epochs and {sums['steps']}, got {step}")
    seen = sums["steps"] * min(arguments["batch"], images)
    if sums["images"] != seen:
        raise _unfit(path, f"in_epoch: images: expected {seen} after {sums['steps']} steps, got {sums['images']}")
    if step > most:
        raise TrainError(f"--max-steps: {path} is already at step {step}, expected at most {most}")


def frozen(path: Path, saved: dict, norms: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `norms`, all batch norms of the model by name, that the checkpoint's run keeps as they are.

    Raises:
        TrainError: the checkpoint names others.
    """
    unknown = sorted(set(saved["frozen"]) - norms.keys())
    if unknown:
        raise _unfit(path, f"frozen: expected names of batch norms, got {_short(unknown[0])}")
    return {name: norm for name, norm in norms.items() if name in saved["frozen"]}


def _check_arguments(path: Path, arguments: object) -> None:
    if not isinstance(arguments, dict):
        raise _unfit(path, f"arguments: expected a dictionary, got {_short(arguments)}")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if arguments.keys() != fields.keys():
        different = sorted(map(str, arguments.keys() ^ fields.keys()))
        raise _unfit(path, f"arguments: another version has written them, the difference is {', '.join(different)}")
    for name, field in fields.items():
        rule = broken_rule(field, arguments[name])
        if rule is not None:
            raise _unfit(path, f"arguments: {name}: expected {rule}, got {_short(arguments[name])}")
    task = arguments["task"]
    if task is None:
        raise _unfit(path, "arguments: task is None")
    for name in fields.keys() - MAY_BE_NONE - {*TASKS[task].without}:
        if arguments[name] is None:
            raise _unfit(path, f"arguments: {name} is None")


def _optimizer_group(path: Path, saved: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The checkpoint's hyperparameters, which must be those of `optimizer`, except for the learning rate."""
    groups = saved["optimizer"].get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise _unfit(path, f"optimizer: expected one group of parameters, got {_short(groups)}")
    (group,), (fresh,) = groups, optimizer.state_dict()["param_groups"]
    for key, expected in fresh.items():
        got = group.get(key, expected)
        if key == "lr":
            if not _is_number(got) or got > expected * (1 + 1e-9):
                raise _unfit(path, f"optimizer: lr: expected a number from 0 to {expected:g}, got {_short(got)}")
        elif type(got) is not type(expected) or got != expected:
            raise _unfit(path, f"optimizer: {key}: expected {_short(expected)}, got {_short(got)}")
    return {key: group.get(key, expected) for key, expected in fresh.items()}


def _optimizer_state(path: Path, saved: dict, updates: Updates) -> dict:
    parameters = [parameter for group in updates.optimizer.param_groups for parameter in group["params"]]
    state, count = saved["optimizer"].get("state"), len(parameters) if saved["step"] else 0
    if state == {} and updates.scaler.is_enabled():
        return state  # so far every step was skipped
    if not isinstance(state, dict) or state.keys() != set(range(count)):
        raise _unfit(path, f"optimizer: expected the state of {count} parameters, got {_short(state)}")
    slots = _SLOTS[saved["arguments"]["optimizer"]]
    for index, entry in state.items():
        shape = parameters[index].shape
        for slot in slots:
            got = entry.get(slot) if isinstance(entry, dict) else entry
            if not _is_usable(got) or got.shape != shape or not got.is_floating_point():
                expected = f"a floating-point tensor {tuple(shape)}"
                raise _unfit(path, f"optimizer: {slot} of parameter {index}: expected {expected}, got {_short(got)}")
            if not torch.isfinite(got).all():
                raise _unfit(path, f"optimizer: {slot} of parameter {index} holds NaN or infinity")
        for key in entry.keys() - set(slots):
            if not _is_number(entry[key].item() if _is_scalar(entry[key]) else entry[key]):
                raise _unfit(path, f"optimizer: {key}: expected a number, got {_short(entry[key])}")
    return state


def _restore_scale(path: Path, saved: dict, scaler: torch.amp.GradScaler) -> None:
    names = scaler.state_dict().keys()
    if saved["scaler"].keys() != names or (names and not saved["scaler"]["scale"] > 0):
        expected = f"numbers for {', '.join(names)}" if names else "nothing"
        raise _unfit(path, f"scaler: expected {expected}, got {_short(saved['scaler'])}")
    if names:
        scaler.load_state_dict(saved["scaler"])


def _unfit(path: Path, what: str) -> TrainError:
    return TrainError(f"--resume: {path} cannot be resumed: {what}")


def _short(value: object) -> str:
    """`value` in a few words."""
    if isinstance(value, torch.Tensor):
        kind = weights.unusable(value)
        if kind is not None:
            return f"a tensor that is {kind}"
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = repr(value) if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else ""
    if text and len(text) <= 60:
        return text
    size = f" of {len(value)}" if isinstance(value, (dict, list, tuple, str)) else ""
    return f"a {type(value).__name__}{size}"


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_scalar(value: object) -> bool:
    return _is_usable(value) and value.numel() == 1


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items()
    )


def _is_usable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and weights.unusable(value) is None


def _is_generator_state(value: object) -> bool:
    try:
        torch.Generator().set_state(value if _is_usable(value) else None)
    except (TypeError, RuntimeError):
        return False
    return True


def _is_record(value: object, keys: object = None) -> bool:
    return (
        isinstance(value, dict)
        and (keys is None or value.keys() == keys)
        and all(isinstance(key, str) and _is_number(number) for key, number in value.items())
    )


def _is_sums(value: object) -> bool:
    return _is_record(value, NOTHING_YET.keys()) and all(
        _is_whole(value[key], 0) for key in ("steps", "images", "correct")
    )


# For each field, what is expected of it, and whether a value is that.
_RULES = {
    "model": ("a dictionary of tensors", _is_state_dict),
    "optimizer": ("a dictionary", lambda value: isinstance(value, dict)),
    "scaler": ("a dictionary of numbers from 0", _is_record),
    "averaged": ("a dictionary of tensors", _is_state_dict),
    "rng": (
        "the state of PyTorch's generator in each process",
        lambda value: isinstance(value, list) and value and all(map(_is_generator_state, value)),
    ),
    "step": ("a whole number from 0", lambda value: _is_whole(value, 0)),
    "epoch": ("a whole number from 1", lambda value: _is_whole(value, 1)),
    "in_epoch": (f"numbers from 0 for {', '.join(NOTHING_YET)}", _is_sums),
    "history": (
        "a list of dictionaries of numbers",
        lambda value: isinstance(value, list) and all(map(_is_record, value)),
    ),
    "labels": (
        "a list of texts",
        lambda value: isinstance(value, list) and value and all(isinstance(label, str) for label in value),
    ),
    "images": (
        "two whole numbers from 1",
        lambda value: isinstance(value, list) and len(value) == 2 and all(_is_whole(count, 1) for count in value),
    ),
    "frozen": (
        "a list of texts",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
    "convention": ("a text", lambda value: isinstance(value, str)),
    "resolution": ("a whole number from 1", lambda value: _is_whole(value, 1)),
}
