"""`ablate`: the paper's ablations (section 6.4, Figure 6): variants of the block trained alike and compared."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TimeRemainingColumn

from mnv2_fused import extras, trainer
from mnv2_fused.cli import options, output, train
from mnv2_fused.cli.options import InputError
from mnv2_fused.tools import measure
from mnv2_fused.trainer import ablation
from mnv2_fused.trainer.ablation import ACCURACY, LOSS, Estimate, Run, Summary
from mnv2_fused.trainer.processes import launched

# What the paper says of ImageNet. Figure 6 shows curves; the paper prints no number of them.
PAPER = {
    "linear": "the paper's network",
    "relu6": 'lower "by several percent" (3.2, Figure 6a)',
    "no-shortcut": "lower (Figure 6b)",
    "expansion-shortcut": "lower (6.4, Figure 6b)",
}
# The two halves of Figure 6.
PANELS = {
    "behind the projection": ("linear", "relu6"),
    "shortcut": ("linear", "expansion-shortcut", "no-shortcut"),
}
LEGEND = {
    "linear": "linear, shortcut between bottlenecks",
    "relu6": "ReLU6 in bottleneck",
    "no-shortcut": "no shortcut",
    "expansion-shortcut": "shortcut between expansions",
}


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options: its own, and those of `train` that ablations have."""
    parser = commands.add_parser(
        "ablate",
        help="train variants of the block alike, and compare them",
        description="Trains variants of the block (the paper's section 6.4 and Figure 6) with the same seeds, which "
        "decide on initial weights, order, augmentation and dropout. Prints accuracies, and the differences between "
        f"runs of one seed, with standard errors. A run's files are in DIR/VARIANT/seed-SEED; DIR/{trainer.LOG} has "
        "the entries of all. The same command goes on where it was interrupted; a larger --seeds adds runs.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        required=True,
        metavar="digits|FOLDER",
        help="digits, or a folder with a directory of images for each class, as for train",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for all files")
    parser.add_argument(
        "--variants",
        type=_variants,
        default=list(ablation.VARIANTS),
        metavar="NAME,...",
        help=f"what to train; differences are to the first (default: {','.join(ablation.VARIANTS)})",
    )
    parser.add_argument(
        "--seeds", type=options.count(ablation.MOST_SEEDS), default=5, metavar="N", help="runs a variant (default: 5)"
    )
    train.add_recipe(parser)
    options.add_width(parser, None, "0.35 for digits and 1.0 for folders")
    options.add_resolution(parser, None, "48 for digits, 224 for folders")
    options.add_fused(parser)
    train.add_machine(parser)
    options.add_json(parser)
    parser.add_argument(
        "--plot",
        metavar="DIR",
        help="also draw accuracy by step as in Figure 6, into this directory, as a .png with the name of --output",
    )
    parser.add_argument("--markdown", action="store_true", help="print the result in Markdown")


def _variants(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= ablation.VARIANTS.keys() or len(set(names)) != len(names):
        known = ", ".join(ablation.VARIANTS)
        raise argparse.ArgumentTypeError(f"expected different ones of {known}, separated by commas, got {text!r}")
    return names


def run(arguments: argparse.Namespace) -> None:
    """Trains what is still to be trained, with a progress bar on terminals and a line for each run; then compares."""
    if launched():
        raise InputError("ablate runs in one process, not behind torchrun")
    output.check_json(arguments.json)
    _check_plot(arguments.plot)
    console = output.console(arguments)
    runs, settings = _train(train.config_of(arguments), arguments, console)
    found = ablation.summarise(runs)
    facts = measure.environment()
    columns, rows = _rows(found)
    notes = [*_notes(found), _where(facts, settings)] if arguments.markdown else _notes(found)
    sheet = output.Sheet(f"Ablation on {Path(arguments.data).name}", columns, rows, notes)
    if arguments.markdown:
        output.say(console, sheet.markdown())
    else:
        sheet.draw(console)
    content = {
        **facts,
        "settings": {**settings, "variants": arguments.variants, "seeds": arguments.seeds},
        "runs": [dataclasses.asdict(each) for each in runs],
        "summary": [_as_json(each) for each in found],
    }
    output.write_json(arguments.json, content)
    if arguments.plot is not None:
        _plot(runs, Path(arguments.plot, f"{Path(arguments.output).absolute().name}.png"))


def _train(
    config: trainer.Config, arguments: argparse.Namespace, console: Console
) -> tuple[list[Run], dict[str, object]]:
    """All runs, and the settings that they share."""
    total = len(arguments.variants) * arguments.seeds
    ended: list[Run] = []
    settings: dict[str, object] = {}
    columns = (
        "run {task.fields[number]} of {task.total:.0f}",
        BarColumn(),
        "{task.description}",
        TimeRemainingColumn(),
    )
    with output.progress(console, *columns) as bar:
        task = bar.add_task("", total=total, number=1)

        def report(variant: str, seed: int, training: trainer.Trainer, now: trainer.Progress) -> None:
            text = f"{variant}, seed {seed}, epoch {now.epoch}: loss {now.loss:.4f}, {now.images_per_s:.0f} images/s"
            share = min(1.0, now.step / training.steps)
            bar.update(task, completed=len(ended) + share, number=len(ended) + 1, description=text)

        def done(each: Run, training: trainer.Trainer) -> None:
            if not ended:
                own = {"output", "seed", "project_activation", "shortcut", "resume"}
                settings.update((k, v) for k, v in dataclasses.asdict(training.config).items() if k not in own)
                if not arguments.markdown:
                    for line in train.introduction(training)[:2]:
                        output.say(console, line)
            ended.append(each)
            bar.update(task, completed=len(ended))
            if not arguments.markdown:
                end, before = each.history[-1], "; was there already" if each.kept else ""
                figures = f"accuracy {end[ACCURACY]:.2%}, loss {end[LOSS]:.4f}"
                output.say(console, f"{each.variant}, seed {each.seed}: {figures}{before}")

        return ablation.ablate(config, arguments.variants, arguments.seeds, report, done), settings


def _check_plot(directory: str | None) -> None:
    """Raises InputError or extras.MissingExtraError before the work if the plot could not be written after it."""
    if directory is None:
        return
    extras.use("matplotlib.figure", "ablate")
    output.check_plot(directory)


def _rows(found: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """The table's columns, as `output.table` takes them, and its cells."""
    reference = found[0].variant
    columns = [
        "<variant",
        "seeds",
        "accuracy, %",
        f"- {reference}",
        "below, equal, above",
        "loss",
        f"- {reference}",
        "<the paper, on ImageNet",
    ]
    rows = []
    for each in found:
        cells = [each.variant, str(each.seeds)]
        for name, scale, digits in ((ACCURACY, 100, 2), (LOSS, 1, 4)):
            cells.append(_text(each.figures[name], scale, digits))
            cells.append(_text(each.differences[name], scale, digits, "+") if each.differences else "")
            if name == ACCURACY:
                cells.append(f"{each.below}, {each.equal}, {each.above}" if each.differences else "")
        rows.append([*cells, PAPER[each.variant]])
    return columns, rows


def _text(estimate: Estimate, scale: float, digits: int, sign: str = "") -> str:
    """The mean and its standard error, as 97.21 ± 0.13."""
    mean = f"{scale * estimate.mean:{sign}.{digits}f}"
    return mean if estimate.error is None else f"{mean} ± {scale * estimate.error:.{digits}f}"


def _notes(found: Sequence[Summary]) -> list[str]:
    """How to read the table, and what it shows."""
    reference, *others = found
    order = sorted(found, key=lambda each: each.figures[ACCURACY].mean, reverse=True)
    by_accuracy = f"By mean accuracy: {', '.join(each.variant for each in order)}."
    if reference.seeds == 1:
        return ["After the last epoch, on the held-out images. One seed has no standard errors.", by_accuracy]
    reading = (
        f"After the last epoch, on the held-out images: mean over {reference.seeds} seeds ± its standard error. "
        f"- {reference.variant}: the mean of the differences between runs of one seed ± its standard error; below, "
        "equal, above: seeds by the sign of that difference in accuracy."
    )
    findings = []
    for each in others:
        mean, error = each.differences[ACCURACY]
        size = f"{abs(mean) / error:.1f} standard errors" if error else "the same in all seeds"
        direction = "below" if mean < 0 else "above"
        findings.append(f"{each.variant}: {100 * abs(mean):.2f} points {direction} {reference.variant}, {size}.")
    return [reading, " ".join([*findings, by_accuracy])]


def _where(facts: dict, settings: dict[str, object]) -> str:
    machine = facts["machine"]
    return (
        f"{facts['date'][:10]}, {machine['cpu']}, {machine['cpus']} processors, {machine['isa']}, "
        f"torch {facts['versions']['torch']}; width {settings['width']:g}, {settings['resolution']}x"
        f"{settings['resolution']}, {settings['epochs']} epochs, batch {settings['batch']}, {settings['optimizer']}, "
        f"learning rate {settings['lr']:g}. `{facts['command']}`"
    )


def _as_json(summary: Summary) -> dict:
    content = dataclasses.asdict(summary)
    for key in ("figures", "differences"):
        content[key] = {name: estimate._asdict() for name, estimate in getattr(summary, key).items()}
    return content


def _plot(runs: Sequence[Run], path: Path) -> None:
    """Draws accuracy by step, a line a variant with a band of one standard error to each side, as in Figure 6."""
    found = ablation.curves(runs)
    panels = {title: [name for name in names if name in found] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if len(names) > 1} or {"variants": list(found)}
    seeds = len({run.seed for run in runs})
    figure = extras.use("matplotlib.figure", "ablate").Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    several = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    colors = {name: f"C{i}" for i, name in enumerate(ablation.VARIANTS)}
    for axes, (title, names) in zip(several[0], panels.items(), strict=True):
        for name in names:
            steps, estimates = found[name]
            means = [100 * each.mean for each in estimates]
            errors = [100 * (each.error or 0.0) for each in estimates]
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axes.plot(steps, means, color=colors[name], label=LEGEND[name])
            axes.fill_between(steps, low, high, color=colors[name], alpha=0.25, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    several[0][0].set_ylabel(f"accuracy on held-out images, %, mean of {seeds} seed{'s' if seeds > 1 else ''}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"--plot: cannot write {path}: {error.strerror or error}") from error
