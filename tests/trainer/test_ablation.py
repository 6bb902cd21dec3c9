"""Ablations: runs that differ in the block alone, kept and resumed, and the arithmetic of their comparison."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from runs import TINY, assert_same, checkpoint

from mnv2_fused import trainer
from mnv2_fused.trainer import ablation
from mnv2_fused.trainer.ablation import ACCURACY, LOSS, TRAIN_LOSS, VARIANTS, Estimate, Run
from mnv2_fused.trainer.tasks.classification import Classification

TWO = ["linear", "expansion-shortcut"]


@pytest.fixture
def config(pictures, tmp_path):
    return trainer.Config(data=str(pictures), output=str(tmp_path / "out"), **TINY)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The directory and the runs of an ablation of two variants with two seeds, uninterrupted."""
    output = tmp_path_factory.mktemp("ablation") / "out"
    config = trainer.Config(data=str(pictures), output=str(output), **TINY)
    return output, ablation.ablate(config, TWO, 2)


def figures(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("images_per_s", "peak_memory_bytes")} for record in history]


def assert_log(output: Path, runs: list[Run]) -> None:
    log = [json.loads(line) for line in (output / trainer.LOG).read_text(encoding="utf-8").splitlines()]
    assert log == [{"variant": run.variant, "seed": run.seed, **record} for run in runs for record in run.history]


def test_runs_and_files(whole):
    output, runs = whole
    assert [(run.variant, run.seed, run.kept) for run in runs] == [(v, s, False) for s in (0, 1) for v in TWO]
    assert_log(output, runs)
    for run in runs:
        saved = checkpoint(output / run.variant / f"seed-{run.seed}")
        assert saved["history"] == run.history and saved["arguments"]["seed"] == run.seed
        assert {key: saved["arguments"][key] for key in VARIANTS[run.variant]} == VARIANTS[run.variant]
    ends = [run.history[-1][TRAIN_LOSS] for run in runs]
    assert len(set(ends)) == len(ends)


def test_a_seed_gives_all_variants_the_same_weights_order_and_augmentation(config, monkeypatch):
    seen: list[list[torch.Tensor]] = []
    loss = Classification.loss

    def spy(self, model, x, target, given):
        seen[-1] += [x.clone(), target.clone()]
        return loss(self, model, x, target, given)

    monkeypatch.setattr(Classification, "loss", spy)
    states = []
    for variant in VARIANTS:
        seen.append([])
        run = trainer.Trainer(dataclasses.replace(config, output=f"{config.output}/{variant}", **VARIANTS[variant]))
        states.append({key: value.clone() for key, value in run.model.state_dict().items()})
        run.run()
    for state, batches in zip(states[1:], seen[1:], strict=True):
        assert_same(state, states[0])
        assert_same(batches, seen[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_ablation_goes_on_where_it_was(whole, config, number):
    def interrupt(variant, seed, training, progress):
        if (variant, seed, progress.step) == (TWO[1], 0, 4) and progress.record is None:
            os.kill(os.getpid(), number)

    with pytest.raises(trainer.Interrupted, match=r"seed-0 after step 4 of 6; the same command goes on"):
        ablation.ablate(config, TWO, 2, interrupt)
    steps = []
    runs = ablation.ablate(
        config, TWO, 2, lambda variant, seed, training, progress: steps.append((variant, seed, progress.step))
    )
    assert steps[0] == (TWO[1], 0, 5)
    assert [run.kept for run in runs] == [True, False, False, False]
    assert_log(Path(config.output), runs)
    output, right = whole
    for got, expected in zip(runs, right, strict=True):
        assert (got.variant, got.seed) == (expected.variant, expected.seed)
        assert figures(got.history) == figures(expected.history)
        place = f"{got.variant}/seed-{got.seed}"
        assert_same(checkpoint(Path(config.output) / place)["model"], checkpoint(output / place)["model"])


def test_more_seeds_and_variants_keep_what_is_there(config):
    ablation.ablate(dataclasses.replace(config, lr=0.01), ["linear"], 1)
    steps = []
    runs = ablation.ablate(config, ["linear", "relu6"], 2, lambda *arguments: steps.append(arguments[:2]))
    assert [run.kept for run in runs] == [True, False, False, False]
    assert set(steps) == {("relu6", 0), ("linear", 1), ("relu6", 1)}
    for run in runs:  # what the second call left open
        assert checkpoint(Path(config.output) / run.variant / f"seed-{run.seed}")["arguments"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "holds other runs: --epochs 3 contradicts the checkpoint to resume, which has 2"),
        ({"lr": 1.0}, "--lr 1.0 contradicts"),
        ({"width": 0.35}, "--width 0.35 contradicts"),
        ({"data": "digits"}, "--data digits contradicts"),
    ],
)
def test_contradictions_are_refused(whole, config, change, message):
    output, _ = whole
    with pytest.raises(trainer.TrainError, match=message):
        ablation.ablate(dataclasses.replace(config, output=str(output), **change), TWO, 3)
    assert sorted(path.name for path in output.iterdir()) == sorted([*TWO, trainer.LOG])


def test_a_second_process_is_refused(config):
    output = Path(config.output)

    def second(*arguments):
        with pytest.raises(trainer.TrainError, match="another run is writing to"):
            ablation.ablate(config, TWO, 1)
        assert len((output / trainer.LOG).read_text(encoding="utf-8").splitlines()) >= 2

    ablation.ablate(config, TWO, 1, done=second)
    assert len(ablation.ablate(config, TWO, 1)) == 2


def run(variant: str, seed: int, *accuracies: float) -> Run:
    history = [
        {"step": 10 * (i + 1), ACCURACY: each, LOSS: 1 - each, TRAIN_LOSS: 2 * each}
        for i, each in enumerate(accuracies)
    ]
    return Run(variant, seed, history, False)


def test_differences_are_of_runs_with_the_same_seed():
    runs = [
        run("linear", 0, 0.1, 0.5),
        run("relu6", 0, 0.1, 0.4),
        run("linear", 1, 0.2, 0.9),
        run("relu6", 1, 0.3, 0.7),
    ]
    runs += [run("linear", 2, 0.2, 0.7), run("relu6", 2, 0.3, 0.7)]
    linear, relu6 = ablation.summarise(runs)
    assert linear.figures[ACCURACY] == Estimate(pytest.approx(0.7), pytest.approx(0.2 / math.sqrt(3)))
    assert relu6.figures[LOSS] == Estimate(pytest.approx(0.4), pytest.approx(0.1))
    assert linear.differences == {}
    # -0.1, -0.2 and 0: their standard error is far below those of the two means.
    assert relu6.differences[ACCURACY] == Estimate(pytest.approx(-0.1), pytest.approx(0.1 / math.sqrt(3)))
    assert relu6.differences[TRAIN_LOSS].mean == pytest.approx(-0.2)
    assert (relu6.below, relu6.equal, relu6.above) == (2, 1, 0) and relu6.seeds == 3
    assert ablation.summarise(runs[:2])[1].differences[ACCURACY].error is None


def test_curves():
    runs = [run("linear", 0, 0.1, 0.5), run("linear", 1, 0.3, 0.5)]
    del runs[0].history[0][ACCURACY]  # not validated there
    assert ablation.curves(runs) == {"linear": ([20], [Estimate(0.5, 0.0)])}
    assert ablation.curves([run("relu6", 0, 0.25, 0.5)]) == {
        "relu6": ([10, 20], [Estimate(0.25, None), Estimate(0.5, None)])
    }
