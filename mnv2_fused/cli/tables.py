"""`tables`: the paper's tables, counted and measured on this machine."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, TimeElapsedColumn

from mnv2_fused import _C, extras
from mnv2_fused.cli import options, output
from mnv2_fused.cli.options import InputError
from mnv2_fused.cli.sheets import sheets
from mnv2_fused.paper import chart, printed, tables
from mnv2_fused.tools import measure

NAMES = ("3", "4", "6", "7", "figure5")
PICTURE = "figure5.png"
_LIBRARIES = ("timm", "pytorchcv", "torchvision")


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "tables",
        help="the paper's tables, counted and measured on this machine",
        description="Prints Tables 3, 4, 6 and 7 and Figure 5 of the MobileNetV2 paper: what the paper has, what is "
        "counted and measured here, and the difference. Networks of other libraries need "
        'pip install "mnv2_fused[tables]". Nothing is downloaded.',
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--only",
        type=_names,
        default=list(NAMES),
        metavar="NAME[,NAME...]",
        help=f"tables to print (default: all: {','.join(NAMES)})",
    )
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure latencies and memory; --no-measure only counts (default: yes)",
    )
    options.add_measuring(parser, [1], "thread counts of latencies; Table 3 has the first (default: 1, as the paper)")
    parser.add_argument("--markdown", action="store_true", help="print a page in Markdown")
    parser.add_argument("--plot", metavar="DIR", help=f"also draw Figure 5, as {PICTURE} in this directory")
    parser.add_argument(
        "--note", metavar="TEXT", help="printed behind the processor's name, for example its generation"
    )
    options.add_json(parser)


def _names(text: str) -> list[str]:
    """The type of a list of tables. They keep the paper's order."""
    given = [part.strip() for part in text.split(",")]
    if not set(given) <= set(NAMES):
        raise argparse.ArgumentTypeError(f"expected names from {', '.join(NAMES)} separated by commas, got {text!r}")
    return [name for name in NAMES if name in given]


def run(arguments: argparse.Namespace) -> None:
    """Counts and measures, then prints all tables."""
    output.check_json(arguments.json)
    picture = _picture(arguments)
    console = output.console(arguments, least_width=184)
    facts = measure.environment()
    versions = {package: measure.version_of(package) for package in _LIBRARIES}
    facts["versions"] |= {package: version for package, version in versions.items() if version is not None}
    peak = _C.cpu_fma_peak() if arguments.measure else 0.0
    with _measuring(arguments) as measuring:
        results = {name: _MAKERS[name](measuring, arguments) for name in arguments.only}
    if arguments.measure:
        facts["peak_gmacs_per_second"] = max(peak, _C.cpu_fma_peak()) / 1e9
    if picture is not None:
        try:
            chart.draw(results["figure5"]["rows"], picture, _machine(facts, arguments.note))
        except OSError as error:
            raise InputError(f"--plot: cannot write {picture}: {error.strerror}") from None
    found = list(sheets(results))
    if arguments.markdown:
        output.say(console, _page(found, facts, arguments, picture))
    else:
        output.say(console, f"{_machine(facts, arguments.note)}; paper: {printed.SOURCE}")
        for sheet in found:
            sheet.draw(console)
    keys = ("measure", "threads", "seconds", "seed", "note")
    settings = {key: getattr(arguments, key) for key in keys}
    output.write_json(arguments.json, {**facts, "settings": settings, "tables": results})


_MAKERS: dict[str, Callable[[tables.Measuring | None, argparse.Namespace], dict]] = {
    "3": lambda measuring, arguments: tables.table_3(measuring, arguments.threads[0]),
    "4": lambda measuring, arguments: tables.table_4(measuring),
    "6": lambda measuring, arguments: tables.table_6(),
    "7": lambda measuring, arguments: tables.table_7(),
    "figure5": lambda measuring, arguments: tables.figure_5(measuring),
}


@contextlib.contextmanager
def _measuring(arguments: argparse.Namespace) -> Iterator[tables.Measuring | None]:
    """How to measure, with a progress bar; None with --no-measure."""
    if not arguments.measure:
        yield None
        return
    columns = ("{task.description}", BarColumn(), "{task.percentage:.0f}%", TimeElapsedColumn())
    with output.progress(None, *columns) as progress:
        task = progress.add_task("counting", total=tables.steps(arguments.only, arguments.threads))
        begun = 0

        def step(description: str) -> None:
            nonlocal begun
            progress.update(task, description=description, completed=begun)
            begun += 1

        def advance(share: float) -> None:
            progress.update(task, completed=begun - 1 + share)

        yield tables.Measuring(arguments.threads, arguments.seconds, arguments.seed, step, advance)


def _picture(arguments: argparse.Namespace) -> Path | None:
    """The file of the picture, or None. Raises InputError or MissingExtraError before the work begins."""
    if arguments.plot is None:
        return None
    if "figure5" not in arguments.only:
        raise InputError(f"--plot: draws Figure 5, which --only {','.join(arguments.only)} leaves out")
    extras.use("matplotlib.figure", "tables")
    directory = Path(arguments.plot)
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--plot: expected a directory, got {directory}: {error.strerror}") from None
    output.check_plot(directory)
    return directory / PICTURE


def _machine(facts: dict, note: str | None) -> str:
    machine, versions = facts["machine"], facts["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", *_LIBRARIES) if name in versions)
    name = machine["cpu"] + (f" ({note})" if note else "")
    peak = facts.get("peak_gmacs_per_second")
    speed = "" if peak is None else f"; {peak:.0f} G multiply-adds a second on the registers of a core"
    return f"{facts['date'][:10]}, {name}, {machine['cpus']} cores, {machine['isa']}; {libraries}{speed}"


_INTRODUCTION = f"""# The paper's tables

What the MobileNetV2 paper ({printed.SOURCE}) prints, beside what is counted and measured here. This command wrote the
page:
"""

_CONVENTIONS = """## How it is counted

Multiply-adds are half of what `torch.utils.flop_counter.FlopCounterMode` counts for one image: convolutions and matrix
products. Parameters are the elements of all parameters. Other libraries' networks are built on the meta device, with
new weights. A difference is (here - paper) / paper; the paper rounds to two or three digits.

Latencies follow the clock of the machine, which changes from day to day if it is a virtual one. The rate on registers,
measured beside them, tells how fast it was.

The paper's figures are in `mnv2_fused/paper/printed.py`. Those of Tables 3, 4, 6 and 7 were compared with two
transcriptions of the text, and agree. A third, of another version of the paper, has 1/O(1) in the first row of Table 3,
and 800K, 200K and 600K as its maxima.

`FlopCounterMode` counts the same for fused and plain modules, also in exported graphs and in training. What the fused
backward recomputes does not count. For the gradient of depthwise weights PyTorch's formula counts each channel with
every other, so both counts of a training step are too high. `DeepLabV3` alone counts less fused than plain (71 M at
513 x 513 and output stride 16), because its head never makes the concatenation with the pooled branch; Table 7 has the
plain network.
"""


def _page(found: list[output.Sheet], facts: dict, arguments: argparse.Namespace, picture: Path | None) -> str:
    """The tables as a page in Markdown. It names the picture as a file in a directory beside the page."""
    parts = [
        _INTRODUCTION,
        f"```sh\n{facts['command']}\n```\n",
        output.paragraph(f"{_machine(facts, arguments.note)}."),
    ]
    parts += [sheet.markdown() for sheet in found]
    if picture is not None:
        parts.append(f"![Accuracy and latency over multiply-adds]({picture.absolute().parent.name}/{picture.name})\n")
    return "\n".join([*parts, _CONVENTIONS]).rstrip("\n")
