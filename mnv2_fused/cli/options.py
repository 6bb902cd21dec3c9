"""Options that several commands share, and the types of their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from mnv2_fused import weights
from mnv2_fused._core.geometry import DTYPES
from mnv2_fused.data import images
from mnv2_fused.data.datasets import text_lines
from mnv2_fused.tools import measure
from mnv2_fused.trainer.config import LIMITS

MAX_WIDTH, MAX_BATCH, MAX_THREADS = (LIMITS[name].most for name in ("width", "batch", "threads"))
CORES = measure.usable_cpus()


class InputError(ValueError):
    """Options or files that cannot be used, alone or together. The command line exits with code 2."""


def count(most: int, least: int = 1) -> Callable[[str], int]:
    """The type of a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return value

    return parse


def counts(most: int) -> Callable[[str], list[int]]:
    """The type of a list of whole numbers from 1 to `most`, separated by commas."""
    one = count(most)

    def parse(text: str) -> list[int]:
        try:
            return [one(part.strip()) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"expected whole numbers from 1 to {most} separated by commas, got {text!r}"
            ) from None

    return parse


def positive(most: float) -> Callable[[str], float]:
    """The type of a number above 0 and at most `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"expected a number above 0 and at most {most:g}, got {text!r}")
        return value

    return parse


def from_zero(most: float) -> Callable[[str], float]:
    """The type of a number from 0 to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a number from 0 to {most:g}, got {text!r}")
        return value

    return parse


def add_weights(parser: argparse.ArgumentParser, required: bool = False, note: str = "") -> None:
    """Adds --weights and --convention. `note` ends the help of --weights."""
    parser.add_argument(
        "--weights",
        metavar="FILE|NAME",
        required=required,
        help="file with the key names of torchvision, timm, transformers or Keras, or a published checkpoint "
        f"[{', '.join(weights.PUBLISHED)}]{note}",
    )
    parser.add_argument(
        "--convention",
        choices=sorted(weights.CONVENTIONS),
        help="padding, preprocessing and batch norm of the weights (default: what the file states or its key names "
        "tell, else tensorflow for 1001 classes and torchvision for others)",
    )


def add_network(parser: argparse.ArgumentParser, network: str) -> None:
    """Adds what the commands for detection and segmentation share: --weights, --tf, --resolution, --fused."""
    parser.add_argument(
        "--weights", metavar="FILE", required=True, help=f".pth or .safetensors file of {network} on MobileNetV2"
    )
    parser.add_argument(
        "--tf",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="TensorFlow's padding, preprocessing and scores (default: what the file states; if it states none, no)",
    )
    add_resolution(parser, None, "what the file states; if it states none, that of the network")
    add_fused(parser)


def add_output_stride(parser: argparse.ArgumentParser, described: str) -> None:
    """Adds --output-stride. `described` is the default in words."""
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16),
        help=f"of DeepLabv3's backbone (default: what the file states; if it states none, {described})",
    )


def add_fused(parser: argparse.ArgumentParser) -> None:
    """Adds --fused and --no-fused."""
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="fused units or plain PyTorch"
    )


def add_width(parser: argparse.ArgumentParser, default: float | None, described: str = "1.0") -> None:
    """Adds --width. `described` is the default in words."""
    parser.add_argument(
        "--width",
        type=positive(MAX_WIDTH),
        default=default,
        metavar="MULT",
        help=f"width multiplier (default: {described})",
    )


def add_resolution(parser: argparse.ArgumentParser, default: int | None, described: str) -> None:
    """Adds --resolution. `described` is the default in words."""
    parser.add_argument(
        "--resolution",
        type=count(weights.MAX_RESOLUTION),
        default=default,
        metavar="PIXELS",
        help=f"input size (default: {described})",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, a key of `DTYPES`."""
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of activations (default: float32)")


def add_threads(parser: argparse.ArgumentParser, default: int | None = CORES) -> None:
    """Adds --threads, a single number."""
    parser.add_argument(
        "--threads", type=count(MAX_THREADS), default=default, metavar="N", help=f"threads (default: {CORES})"
    )


def add_measuring(parser: argparse.ArgumentParser, threads: list[int], described: str) -> None:
    """Adds --threads, a list, --seconds and --seed. `threads` is the default of the first, `described` its help."""
    parser.add_argument("--threads", type=counts(MAX_THREADS), default=threads, metavar="N[,N...]", help=described)
    parser.add_argument(
        "--seconds", type=positive(600), default=1.0, help="time to spend on each measurement (default: 1)"
    )
    parser.add_argument(
        "--seed", type=count(2**64 - 1, -(2**63)), default=0, help="of random weights and inputs (default: 0)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json, for `output.check_json` and `output.write_json`."""
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON; - is standard output")


def readable(paths: Sequence[str], failures: list[images.ImageError]) -> Iterator[tuple[str, Image.Image]]:
    """Path and image of all `paths` that can be read. The errors of the others go to `failures`."""
    for path in paths:
        try:
            image = images.read(path)
        except images.ImageError as error:
            failures.append(error)
        else:
            yield path, image


def read_labels(path: str, classes: int, background: bool = False) -> list[str]:
    """The lines of a text file, one for each of `classes`. Raises InputError.

    With `background` the file may leave out class 0.
    """
    try:
        labels = text_lines(path)
    except FileNotFoundError:
        raise InputError(f"no such labels file: {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read labels from {path}: {error}") from None
    if background and len(labels) == classes - 1:
        return ["background", *labels]
    if len(labels) != classes:
        hint = "; one of the two counts a background class at 0" if abs(len(labels) - classes) == 1 else ""
        raise InputError(f"{path} has {len(labels)} labels, but the weights have {classes} classes{hint}")
    return labels
