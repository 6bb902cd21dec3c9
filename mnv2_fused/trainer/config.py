"""What to train and how: the options of a run, their limits and their defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from mnv2_fused.models.units import PROJECT_ACTIVATIONS, SHORTCUTS
from mnv2_fused.tools import measure
from mnv2_fused.training import RECOMPUTE
from mnv2_fused.weights import CONVENTIONS, MAX_RESOLUTION

OPTIMIZERS = ("sgd", "rmsprop")
TASK_NAMES = ("classification", "detection", "segmentation")


class TrainError(ValueError):
    """A run that cannot be started, or that has to stop; the message says what was expected and what was got."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how. None stands for the default, or for the checkpoint's value with `resume`.

    Args:
        data: `digits`, or the path of a folder with a directory of images for each class.
        output: directory for checkpoint, weights, labels and log; `runs/` and the data's name by default.
        epochs: passes over the data; 30 for digits, 90 for folders.
        batch: images a step, at least 2, which batch norm needs; 64 by default. An incomplete last batch is left out.
        optimizer: `sgd` (momentum 0.9; a warm-up, then a cosine to 0) or `rmsprop` (the paper's: decay and momentum
            0.9, times 0.98 after every epoch).
        lr: the highest learning rate; 0.03 for a batch of 64, in proportion for others, and a tenth of it if `weights`
            are given.
        warmup: epochs until the learning rate of `sgd` is reached; 1 by default.
        weight_decay: 4e-5 by default.
        label_smoothing: 0 to 1; 0 by default. The validation loss goes without.
        width: width multiplier; by default the width of `weights`, or else 0.35 for digits and 1.0 for folders.
        resolution: input size in pixels; what `weights` expect, or else 48 for digits and 224 for folders.
        weights: file or published name to start from; the classifier is a new one if the class counts differ.
        convention: padding, preprocessing and batch norm, as in `weights.load_state_dict`.
        freeze_bn: whether statistics, scales and biases of batch norm stay as in `weights`.
        seed: of initial weights, order, augmentation and dropout; 0 by default.
        fused, recompute: as for `MobileNetV2`.
        threads: of PyTorch in each process; all processors by default, shared by the processes of this machine.
        workers: processes that decode images for each process of the run; by default none for digits and up to 4 for
            folders.
        max_steps: stop after this many steps in all, if the epochs have more.
        resume: go on from the checkpoint in `output`. Only `output`, `log` and the five arguments before this one may
            differ from it, and are not taken from it.
        task: `classification` (the default), `detection` (SSDLite) or `segmentation` (DeepLabv3). The defaults above
            are those of classification; each task has its own in `tasks/`.
        augment: whether photographs are cropped and mirrored at random, for detection and segmentation; True by
            default.
        evaluate_every: epochs from one validation to the next; the last epoch always has one. 1 by default.
        output_stride, aspp, round_nearest: of DeepLabv3; by default 16, False and 8, or as in `weights`.
        project_activation, shortcut: the classifier's blocks, by a name in `models.units.PROJECT_ACTIVATIONS` and one
            in `SHORTCUTS`; by default the paper's, or as in `weights`.
        recipe: `paper` sets what the MobileNetV2 paper trained with, in place of the defaults: RMSProp with a
            learning rate of 0.045, times 0.98 an epoch, and 96 images a process.
        accumulate: parts of a process's share of each batch that pass through the network one after the other, to save
            memory; 1 by default. Each part has batch statistics of its own.
        sync_bn: whether batch norm takes its statistics from all processes; False by default.
        amp: `bf16` or `fp16`: arithmetic of the forward pass in training; by default float32.
        ema: decay of a moving average of the weights and statistics. If it is given, the average is validated and
            written in place of the last weights.
        log: `tensorboard` writes curves for it beside the other files.

    `batch`, and what follows from it, counts the images of all processes and parts together. So a run is the same on
    any number of processes, but for dropout and, without `sync_bn`, batch statistics.
    """

    data: str
    output: str | None = None
    epochs: int | None = None
    batch: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    width: float | None = None
    resolution: int | None = None
    weights: str | None = None
    convention: str | None = None
    freeze_bn: bool | None = None
    seed: int | None = None
    fused: bool = True
    recompute: str = "balanced"
    threads: int | None = None
    workers: int | None = None
    max_steps: int | None = None
    resume: bool = False
    task: str | None = None
    augment: bool | None = None
    evaluate_every: int | None = None
    output_stride: int | None = None
    aspp: bool | None = None
    round_nearest: int | None = None
    project_activation: str | None = None
    shortcut: str | None = None
    recipe: str | None = None
    accumulate: int | None = None
    sync_bn: bool | None = None
    amp: str | None = None
    ema: float | None = None
    log: str | None = None


class Limit(NamedTuple):
    """Numbers from `least` to `most`; whole ones if `whole`, and `least` itself not if `above`."""

    least: float
    most: float
    whole: bool = True
    above: bool = False

    def __str__(self) -> str:
        if self.above:
            return f"a number above {self.least} and at most {self.most}"
        return f"a {'whole ' if self.whole else ''}number from {self.least} to {self.most}"

    def allows(self, value: object) -> bool:
        if not isinstance(value, int if self.whole else (int, float)) or isinstance(value, bool):
            return False
        return math.isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)


LIMITS = {
    "epochs": Limit(1, 100_000),
    "batch": Limit(2, 4096),
    "lr": Limit(0, 1000, whole=False, above=True),
    "warmup": Limit(0, 1000, whole=False),
    "weight_decay": Limit(0, 1, whole=False),
    "label_smoothing": Limit(0, 1, whole=False),
    "width": Limit(0, 16, whole=False, above=True),
    "resolution": Limit(1, MAX_RESOLUTION),
    "seed": Limit(0, 2**32 - 1),
    "threads": Limit(1, 1024),
    "workers": Limit(0, 1024),
    "max_steps": Limit(1, 2**31),
    "evaluate_every": Limit(1, 100_000),
    "round_nearest": Limit(1, 64),
    "accumulate": Limit(1, 4096),
    "ema": Limit(0, 0.999999, whole=False, above=True),
}
AMP = {"bf16": "bfloat16", "fp16": "float16"}  # the dtype of each value of `amp`
CHOICES = {
    "optimizer": OPTIMIZERS,
    "convention": tuple(CONVENTIONS),
    "recompute": RECOMPUTE,
    "task": TASK_NAMES,
    "output_stride": (8, 16),
    "project_activation": tuple(PROJECT_ACTIVATIONS),
    "shortcut": SHORTCUTS,
    "recipe": ("paper",),
    "amp": tuple(AMP),
    "log": ("tensorboard",),
}
_FLAGS = ("freeze_bn", "fused", "resume", "augment", "aspp", "sync_bn")
# These change nothing in what a run computes but rounding and its end, so they may change when it is resumed.
_FREE = ("output", "fused", "recompute", "threads", "workers", "max_steps", "resume", "log")
# None means that the run goes without.
MAY_BE_NONE = {"weights", "max_steps", "recipe", "amp", "ema", "log"}


def broken_rule(field: dataclasses.Field, value: object) -> str | None:
    """What is expected of `field` of a `Config`, if `value` is not that; else None."""
    if value is None and field.default is None:
        return None
    if field.name in LIMITS:
        return None if LIMITS[field.name].allows(value) else str(LIMITS[field.name])
    if field.name in CHOICES:
        return None if value in CHOICES[field.name] else " or ".join(map(str, CHOICES[field.name]))
    if field.name in _FLAGS:
        return None if isinstance(value, bool) else "True or False"
    return None if isinstance(value, str) else "a text"


def check(config: Config) -> None:
    """Raises TrainError for a value outside its limits."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        rule = broken_rule(field, value)
        if rule is not None:
            raise TrainError(f"{option(field.name)}: expected {rule}, got {value!r}")


def merged(config: Config, saved: dict) -> Config:
    """`config` with what it leaves open taken from the checkpoint's arguments. Raises TrainError if they differ."""
    taken = {}
    for field in dataclasses.fields(config):
        given, known = getattr(config, field.name), saved[field.name]
        if field.name in _FREE:
            continue
        if given is not None and given != known:
            raise TrainError(f"{option(field.name)} {given} contradicts the checkpoint to resume, which has {known}")
        taken[field.name] = known
    return dataclasses.replace(config, **taken)


def with_recipe(config: Config, processes: int) -> Config:
    """`config` with what its recipe says in place of None, for a number of processes."""
    if config.recipe is None:
        return config
    # The paper's workers take 96 images each.
    values = {"optimizer": "rmsprop", "batch": 96 * processes, "lr": 0.045, "weight_decay": 4e-5}
    return _filled(config, values)


def complete(config: Config, defaults: Mapping[str, object], local_processes: int = 1) -> Config:
    """`config` with `defaults`, and those of every task, in place of None, except if None has a meaning of its own."""
    common = {
        "task": TASK_NAMES[0],
        "optimizer": "sgd",
        "weight_decay": 4e-5,
        "convention": "torchvision",
        "seed": 0,
        "threads": max(1, measure.usable_cpus() // local_processes),
        "evaluate_every": 1,
        "accumulate": 1,
    }
    return _filled(config, {**common, **defaults})


def _filled(config: Config, values: Mapping[str, object]) -> Config:
    return dataclasses.replace(config, **{key: value for key, value in values.items() if getattr(config, key) is None})


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
