"""Ablations: the same training of several variants of the block, and how the variants differ.

Runs of one seed differ in the block alone: initial weights, order of the images, augmentation and dropout follow from
the seed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mnv2_fused.trainer import checkpoint, files
from mnv2_fused.trainer.config import Config, TrainError, merged
from mnv2_fused.trainer.loop import Interrupted, Progress, Trainer

VARIANTS: Mapping[str, dict[str, str]] = {
    "linear": {"project_activation": "linear", "shortcut": "bottleneck"},
    "relu6": {"project_activation": "relu6", "shortcut": "bottleneck"},
    "no-shortcut": {"project_activation": "linear", "shortcut": "none"},
    "expansion-shortcut": {"project_activation": "linear", "shortcut": "expansion"},
}
ACCURACY, LOSS, TRAIN_LOSS = "validation_accuracy", "validation_loss", "train_loss"
MOST_SEEDS = 1000
Report = Callable[[str, int, Trainer, Progress], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant trained with a seed: its log's entries, and whether they were there before."""

    variant: str
    seed: int
    history: list[dict]
    kept: bool


class Estimate(NamedTuple):
    """A mean over seeds and its standard error; no error for a single seed."""

    mean: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a variant ended.

    `figures` are the means of `ACCURACY`, `LOSS` and `TRAIN_LOSS` after the last epoch. `differences` are the means of
    the differences to the reference with the same seed; empty for the reference itself. `below`, `equal` and `above`
    count the seeds by the sign of the difference of the accuracies.
    """

    variant: str
    seeds: int
    figures: dict[str, Estimate]
    differences: dict[str, Estimate]
    below: int
    equal: int
    above: int


def ablate(
    config: Config,
    variants: Sequence[str],
    seeds: int,
    report: Report = lambda variant, seed, trainer, progress: None,
    done: Callable[[Run, Trainer], None] = lambda run, trainer: None,
) -> list[Run]:
    """Trains each of `variants` with `seeds` seeds, from `config.seed` on, as `config` says.

    Every run has the directory `config.output`/VARIANT/seed-SEED, with the files that `train` writes. A run that ended
    there is kept, and one that was interrupted goes on. What `config` leaves open is taken from the runs that are
    there. All entries of the runs' logs go into `config.output`/log.jsonl, with the variant and the seed.

    Args:
        config: the training; its `output` must be given, and its `project_activation` and `shortcut` be left open.
        variants: names in `VARIANTS`.
        seeds: how many.
        report: called after every step.
        done: called after every run.

    Raises:
        Interrupted: SIGINT or SIGTERM came. The same call goes on.
        TrainError: `config` contradicts the runs that are there, another process writes to the directory, and as
            `Trainer` and `Trainer.run`.
    """
    directory = Path(config.output)
    config = _as_before(dataclasses.replace(config, data=_absolute(config.data)), directory)
    first = config.seed or 0
    order = [(variant, seed) for seed in range(first, first + seeds) for variant in variants]
    runs: list[Run] = []
    lock = None
    try:
        for variant, seed in order:
            place = directory / variant / f"seed-{seed}"
            resumes = (place / files.CHECKPOINT).exists()
            own = {**VARIANTS[variant], "seed": seed, "output": str(place), "resume": resumes}
            trainer = Trainer(dataclasses.replace(config, **own))
            if lock is None:  # not earlier: what cannot be trained leaves no directory behind
                lock = _lock(directory)
            kept = resumes and trainer.step >= trainer.steps
            runs.append(Run(variant, seed, _train(trainer, variant, seed, directory, report), kept))
            done(runs[-1], trainer)
    finally:
        if lock is not None:
            lock.release()
    return runs


def _train(trainer: Trainer, variant: str, seed: int, directory: Path, report: Report) -> list[dict]:
    """The entries of a run's log, which also go into that of the ablation."""
    about = {"variant": variant, "seed": seed}
    for record in trainer.history:
        files.append_to_log(directory, about | record)

    def each(progress: Progress) -> None:
        if progress.record is not None:
            files.append_to_log(directory, about | progress.record)
        report(variant, seed, trainer, progress)

    try:
        return list(trainer.run(each))
    except Interrupted:
        raise Interrupted(
            f"interrupted in {trainer.directory} after step {trainer.step} of {trainer.steps}; the same command goes on"
        ) from None


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """A summary for each variant. The reference is the first variant. All must have the same seeds."""
    ends: dict[str, dict[int, dict]] = {}
    for run in runs:
        ends.setdefault(run.variant, {})[run.seed] = run.history[-1]
    reference = next(iter(ends))
    found = []
    for variant, records in ends.items():
        pairs = [(records[seed], ends[reference][seed]) for seed in records]
        names = (ACCURACY, LOSS, TRAIN_LOSS)
        differences = {name: [own[name] - other[name] for own, other in pairs] for name in names}
        signs = [(difference > 0) - (difference < 0) for difference in differences[ACCURACY]]
        found.append(
            Summary(
                variant,
                len(records),
                {name: estimate([record[name] for record in records.values()]) for name in names},
                {} if variant == reference else {name: estimate(each) for name, each in differences.items()},
                *(signs.count(sign) for sign in (-1, 0, 1)),
            )
        )
    return found


def curves(runs: Sequence[Run]) -> dict[str, tuple[list[int], list[Estimate]]]:
    """For each variant the steps after which all its runs were validated, and the accuracies there."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        by_step = found.setdefault(run.variant, {})
        for record in run.history:
            if ACCURACY in record:
                by_step.setdefault(record["step"], []).append(record[ACCURACY])
    counts = {variant: sum(run.variant == variant for run in runs) for variant in found}
    full = {
        variant: {step: values for step, values in sorted(by_step.items()) if len(values) == counts[variant]}
        for variant, by_step in found.items()
    }
    return {variant: (list(steps), [estimate(values) for values in steps.values()]) for variant, steps in full.items()}


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its standard error: the sample's standard deviation over the root of its size."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def _absolute(data: str) -> str:
    return data if data == "digits" else str(Path(data).absolute())


def _as_before(config: Config, directory: Path) -> Config:
    """`config` with what it leaves open taken from a run in `directory`, if there is one. Raises TrainError."""
    for variant in VARIANTS:
        for path in sorted(directory.glob(f"{variant}/seed-*/{files.CHECKPOINT}")):
            saved = checkpoint.read(path)["arguments"]
            own = {"seed": config.seed, "project_activation": None, "shortcut": None}
            try:
                return dataclasses.replace(merged(config, saved | own), **own)
            except TrainError as error:
                raise TrainError(f"{directory} holds other runs: {error}") from None
    return config


def _lock(directory: Path) -> files.Lock:
    """Makes the directory and an empty log in it, for this process alone. Raises TrainError."""
    files.make(directory)
    lock = files.Lock(directory)
    files.write_whole(directory / files.LOG, lambda path: path.write_text("", "utf-8"))
    return lock
