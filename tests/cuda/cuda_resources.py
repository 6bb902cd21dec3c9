"""Registers and stack of every CUDA kernel, as the compiler reports them; fails if a kernel leaves the registers.

Reads the output of ``nvcc -Xptxas -v``, also inside the output of a whole build, and writes a table::

    nvcc -std=c++20 -arch=sm_90a -Xptxas -v -c csrc/cuda/half.cu -o /dev/null 2>&1 | python tests/cuda/cuda_resources.py

Exits with 1 if a kernel, or a function that it calls, has a stack frame (local memory is part of it) or spills, if the
output names no kernel, or if it names none for one of ``--architectures``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\S+)'")
_FUNCTION = re.compile(r"ptxas info\s*: Function properties for (\S+)")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"ptxas info\s*: Used (\d+) registers")


@dataclass
class Kernel:
    """A kernel's resources on one architecture; registers a thread, all else bytes a thread."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    def leaves_the_registers(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def read(lines: Iterable[str]) -> list[Kernel]:
    """The kernels in `lines`. Stack and spills of the functions that a kernel calls are added to its own."""
    kernels: list[Kernel] = []
    complete = True
    for line in lines:
        if entry := _ENTRY.search(line):
            if not complete:
                raise ValueError(f"nothing is said of the registers of {kernels[-1].name}")
            kernels.append(Kernel(*entry.groups()))
            complete = False
        elif (memory := _MEMORY.search(line)) and kernels:
            stack, stores, loads = map(int, memory.groups())
            kernels[-1].stack += stack
            kernels[-1].spill_stores += stores
            kernels[-1].spill_loads += loads
        elif (used := _REGISTERS.search(line)) and kernels:
            kernels[-1].registers = int(used[1])
            complete = True
    if not complete:
        raise ValueError(f"nothing is said of the registers of {kernels[-1].name}")
    return kernels


def readable(names: list[str]) -> list[str]:
    """The names as in the source, if c++filt is installed."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.replace("(anonymous namespace)::", "").splitlines()


def table(kernels: list[Kernel]) -> str:
    heads = ("registers", "stack", "spilled", "architecture", "kernel")
    rows = [
        (str(k.registers), str(k.stack), str(k.spill_stores + k.spill_loads), k.architecture, name)
        for k, name in zip(kernels, readable([k.name for k in kernels]), strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
        + f"  {row[3]:{widths[3]}}  {row[4]}"
        for row in (heads, *sorted(rows, key=lambda row: by_number(f"{row[4]} {row[3]}")))
    )


def by_number(text: str) -> list:
    """A key that sorts texts, and numbers in them by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default="", metavar="A,B", help="that must be there, such as sm_80,sm_90a")
    options = parser.parse_args(arguments)
    lines = list(sys.stdin)
    kernels = read(lines)
    if not kernels:
        print("".join(lines), end="")
        print("cuda_resources: the output speaks of no kernel")
        return 1
    print(table(kernels))
    missing = set(filter(None, options.architectures.split(","))) - {kernel.architecture for kernel in kernels}
    wrong = [kernel for kernel in kernels if kernel.leaves_the_registers()]
    print(f"{len(kernels)} kernels, {len(wrong)} with a stack frame or spills")
    if missing:
        print(f"cuda_resources: no kernel for {', '.join(sorted(missing))}")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
