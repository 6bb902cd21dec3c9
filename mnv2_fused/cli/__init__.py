"""The command line: `python -m mnv2_fused COMMAND`; without a command it runs `compare`.

A command is a module with `add(commands)`, which declares its options, and `run(arguments)`. To add a command, write
such a module and list it in `COMMANDS`.

Exit codes: 0 done; 2 wrong usage or bad input; 1 the machine could not do it (memory); 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys

from mnv2_fused import _C, extras, trainer, weights
from mnv2_fused.cli import ablate, classify, compare, detect, evaluate, info, plan, segment, tables, train
from mnv2_fused.cli.options import InputError
from mnv2_fused.data import datasets, images

COMMANDS = (compare, classify, detect, segment, evaluate, train, ablate, plan, tables, info)
_BAD_INPUT = (
    InputError,
    weights.WeightsError,
    images.ImageError,
    datasets.DataError,
    trainer.TrainError,
    extras.MissingExtraError,
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the encoding does not
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv.insert(0, "compare")
    arguments = _parser().parse_args(argv)
    try:
        _check_instruction_set()
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except _BAD_INPUT as error:
        return _fail(2, error)
    except trainer.OtherProcessError:  # which prints it
        return 2
    except KeyboardInterrupt as error:
        return _fail(130, str(error) or "interrupted")
    except BrokenPipeError:  # `... | head`: nobody reads on, and the interpreter must not try to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _fail(1, f"not enough memory {error}")
    except RuntimeError as error:
        if "allocate memory" in str(error):
            return _fail(1, f"not enough memory; try a smaller --batch or --resolution ({str(error).splitlines()[0]})")
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mnv2_fused",
        description="MobileNetV2 with fused inverted-residual blocks. Without a command it runs `compare`.",
        epilog="MNV2_FUSED_CPU_ISA=scalar|avx2|avx512 forces a lower instruction set than the machine's best.",
    )
    parser.add_argument("--version", action="version", version=f"mnv2_fused {_C.build_info()['version']}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _check_instruction_set() -> None:
    try:
        _C.cpu_isa()
    except RuntimeError as error:  # MNV2_FUSED_CPU_ISA names none that the machine has
        raise InputError(str(error)) from None


def _fail(code: int, message: object) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
