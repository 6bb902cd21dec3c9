"""What a run starts from: its options, the checkpoint to resume, the weights to begin with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from mnv2_fused import weights
from mnv2_fused.trainer import checkpoint, files
from mnv2_fused.trainer.config import Config, TrainError, check, merged, option, with_recipe
from mnv2_fused.trainer.tasks import TASKS, Task
from mnv2_fused.trainer.tasks.base import State
from mnv2_fused.trainer.tasks.classification import Classification


class Start(NamedTuple):
    """The options, with everything but the defaults; the checkpoint to resume; the weights to begin with."""

    config: Config
    saved: dict | None
    weights: State | None


def checked(config: Config) -> Config:
    """`config` with texts for all paths, an absolute one for the data, and the default of `output`.

    Raises:
        TrainError: a value outside its limits.
    """
    config = _with_texts(config)
    check(config)
    return config


def read(config: Config, processes: int) -> Start:
    """Reads what `config` names, for a run of so many processes.

    Raises:
        TrainError: options that contradict each other or the checkpoint; a checkpoint that does not fit.
        weights.WeightsError: weights that cannot be read.
    """
    directory = Path(config.output)
    saved = initial = None
    if config.resume:
        saved = checkpoint.read(directory / files.CHECKPOINT)
        config = merged(config, saved["arguments"])
    else:
        check_new(directory)
    task = TASKS[config.task or Classification.name]
    _check_task(config, task)
    if saved is None:
        config = with_recipe(config, processes)
        if config.weights is not None:
            initial, config = task.read_start(config)
    if config.sync_bn and (not config.fused or config.shortcut == "expansion"):
        raise TrainError("--sync-bn needs fused units: PyTorch's own synchronised batch norm does not run on a CPU")
    if config.freeze_bn and config.weights is None:
        raise TrainError("--freeze-bn needs --weights: a new network has no batch-norm statistics to keep")
    return Start(config, saved, initial)


def check_new(directory: Path) -> None:
    """Raises TrainError if a run has left its checkpoint in `directory`."""
    if (directory / files.CHECKPOINT).exists():
        raise TrainError(
            f"{directory / files.CHECKPOINT} exists: --resume goes on from it, another --output starts a new run"
        )


def _check_task(config: Config, task: Task) -> None:
    """Raises TrainError for an option that the task does not have."""
    for name in task.without:
        if getattr(config, name) is not None:
            raise TrainError(f"{option(name)} is no option of --task {task.name}")


def _with_texts(config: Config) -> Config:
    """`config` with texts for all paths, an absolute one for the data, and the default of `output`."""
    digits = config.data == "digits" and config.task in (None, Classification.name)
    name = config.data if digits else str(Path(config.data).absolute())
    output = os.fspath(config.output or f"runs/{Path(name).name}")
    start = config.weights
    if not isinstance(start, (str, type(None))):
        start = weights.published_name(start) or os.fspath(start)
    return dataclasses.replace(config, data=name, output=output, weights=start)
