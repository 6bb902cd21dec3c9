"""Instructions of block_kernel, counted in its machine code: ``python bench/cuda_issue.py [--write]``.

Compiles csrc/cuda/*.cu for sm_90a, disassembles them, and counts what a warp issues in each part of every variant of
the kernel: the table of csrc/cuda/issue.h, by which plans are made. Exits with 1 if a count there is more than 15 %
off. --write writes the table anew; csrc/cuda/NOTES.md has predictions that follow from it (bench/cuda_notes.py).

Needs nvcc and cuobjdump: of a CUDA toolkit, or cuobjdump of an installed triton.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "cuda" / "issue.h"
SOURCES = ("half", "bfloat16", "tf32", "float")  # in the order of the table
TILES, FILTERS = (2, 3, 4, 8, 12, 20), (0, 1, 2)
COLUMNS = ("start", "place", "round", "pixel", "find", "values", "row_block", "step", "window", "chunk", "tap", "copy",
           "store", "residual")  # fmt: skip
LIMIT = 0.15

Counts = dict[str, int]
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;")
_KERNEL = re.compile(r"block_kernelINS0_\d+\w+Math(?:ILb\dEE)?ELi(\d+)ELi(\d)E")


class Missing(Exception):
    """A tool is not installed, or the machine code has no such part."""


@dataclass(frozen=True)
class Loop:
    first: int  # instructions, both within
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


class Code:
    """A kernel's instructions, its loops (a jump backwards closes one), and the cheapest ways through it."""

    def __init__(self, text: str) -> None:
        found = _INSTRUCTION.findall(text)
        self.text = [instruction for _, instruction in found]
        self.index = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.after = [self._after(i) for i in range(len(found))]
        self.loops = sorted({Loop(j, i) for i, next_ in enumerate(self.after) for j in next_ if j < i}, key=self._place)

    @staticmethod
    def _place(loop: Loop) -> tuple[int, int]:
        return loop.first, -loop.last

    def _after(self, i: int) -> list[int]:
        text = self.text[i]
        always = not text.startswith("@")
        target = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)$", text)
        if target and self.index.get(int(target[1], 16), i) == i:
            return []  # the end of the kernel's code is a jump to itself
        following = [i + 1] if i + 1 < len(self.text) else []
        if target:
            sure = always and re.fullmatch(r"BRA 0x[0-9a-f]+", text)
            return [self.index[int(target[1], 16)], *([] if sure else following)]
        return [] if re.fullmatch(r"EXIT", text) else following

    def count(self, pattern: str, loop: Loop) -> int:
        return sum(bool(re.search(pattern, text)) for text in self.text[loop.first : loop.last + 1])

    def inner(self, outer: Loop) -> list[Loop]:
        return [loop for loop in self.loops if outer.holds(loop)]

    def way(self, first: int, last: int, need: str = "$^", least: int = 0, never: str = "$^", *, most: bool = False,
            free: Callable[[int], bool] = lambda i: False) -> int:  # fmt: skip
        """Instructions on the shortest (most: the longest) way from one to another, both counted, with `least` or more
        that match `need` and none that matches `never`. Loops on the way count as one pass, and not at all if `free`
        says so of their instructions."""
        best: list[dict[int, int]] = [{} for _ in range(last + 1)]
        best[first] = {0: 0}
        pick = max if most else min
        for i in range(first, last + 1):
            text = self.text[i]
            if not best[i] or re.search(never, text):
                continue
            here, cost = int(bool(re.search(need, text))), 0 if free(i) else 1
            best[i] = {min(have + here, least): value + cost for have, value in sorted(best[i].items(), reverse=most)}
            if i < last:
                for j in self.after[i]:
                    if i < j <= last:
                        for have, value in best[i].items():
                            best[j][have] = pick(best[j].get(have, value), value)
        if least not in best[last]:
            raise Missing(f"no way from instruction {first} to {last} has {least} of {need}")
        return best[last][least]


def only(loops: list[Loop], what: str) -> Loop:
    if not loops:
        raise Missing(f"no loop is {what}")
    return loops[0]


def inside(loops: list[Loop]) -> Callable[[int], bool]:
    return lambda i: any(loop.first <= i <= loop.last for loop in loops)


def count_block(code: Code, element_bytes: int, tiles: int) -> Counts:
    """Instructions of a warp; see csrc/cuda/issue.h."""
    counts = {**count_start(code), **count_chunk(code, element_bytes, tiles), **count_end(code, element_bytes, tiles)}
    return {column: counts[column] for column in COLUMNS}


def chunk_of(code: Code) -> Loop:
    """The loop over chunks. What the compiler puts behind the kernel's end may jump back into it, too."""
    loops = [loop for loop in code.loops if code.count("HMMA", loop) and code.count("BAR", loop)]
    return only([loop for loop in loops if not code.count("STG", loop)], "that of the chunks")


def start_of_round(code: Code) -> int:
    """The instruction at which a round begins; without a loop over rounds, that which lets the next kernel start."""
    rounds = [loop for loop in code.loops if loop.holds(chunk_of(code)) and code.count("LDGSTS", loop)]
    return rounds[0].first if rounds else code.text.index("PREEXIT")


def count_start(code: Code) -> Counts:
    """What is done once, and in every round before the chunks."""
    chunk, round_ = chunk_of(code), start_of_round(code)
    before = [loop for loop in code.loops if loop.last < chunk.first]
    pixels = [loop for loop in before if code.count("LDGSTS", loop)]
    places = max((loop for loop in before if code.count("STS", loop) and not code.count("LDG|BAR", loop)),
                 key=lambda loop: loop.last - loop.first)  # fmt: skip
    copies = inside(pixels)
    pixel = only([loop for loop in pixels if not code.inner(loop)], "the input's")
    rows = [loop for loop in before if code.count(r"LDG\.", loop) and not copies(loop.first) and not code.inner(loop)]
    found = []  # of an image whose row is near together and of others, which take more
    for row in rows:
        around = [loop for loop in before if loop.holds(row)][-1]
        found.append((around.last - around.first - (row.last - row.first), row))
    if len(found) != 2:
        raise Missing(f"{len(found)} loops load a stem's tile")
    find, row = min(found, key=lambda pair: pair[0])
    at_once = code.count("STS", row)
    return {
        "start": code.way(0, round_, free=inside(before)),
        "place": places.last - places.first + 1,
        "round": code.way(round_, chunk.first, "LDGDEPBAR", 1, free=inside(before)),
        "pixel": code.way(pixel.first, pixel.last, "LDGSTS", 1),
        "find": find,
        "values": round(code.way(row.first, row.last, r"LDG\.", 4 * at_once) / at_once),
    }


def count_chunk(code: Code, element_bytes: int, tiles: int) -> Counts:
    """What is done for every chunk."""
    sums, copies, chunk = "HFMA2|FFMA", "UBLKCP", chunk_of(code)
    innermost = [loop for loop in code.inner(chunk) if code.count("HMMA", loop) and not code.inner(loop)]
    window = only([loop for loop in innermost if code.count(r"LDS ", loop)], "that of the steps of windows")
    step = only([loop for loop in innermost if not code.count(r"LDS ", loop)], "that of a sum's steps")
    rows = [loop for loop in code.inner(chunk) if loop.holds(step) and loop.holds(window)]
    if not 1 <= len(rows) <= 2:
        raise Missing(f"{len(rows)} loops hold a sum's steps")
    halves = rows[0] if len(rows) == 2 else None  # one turn of it expands, the other filters
    rows = rows[-1]
    taps = [loop for loop in code.inner(chunk) if code.count(sums, loop) >= 8 and not code.count("HMMA", loop)]
    tap = next((loop for loop in taps if not code.inner(loop)), None)  # of a filter of any size
    free = inside([loop for loop in code.inner(chunk) if loop != halves and not code.count(copies, loop)])
    both = halves or chunk
    products = code.count("HMMA", both) - code.count("HMMA", rows)

    def chunk_way(least: int) -> int:
        """Through a chunk whose pixels are expanded, with so many copies of weights before."""
        expand = code.way(both.first if halves else chunk.first, rows.first, copies, 0 if halves else least, r"LDG\.",
                          free=free)  # fmt: skip
        if halves is None:
            return expand + code.way(rows.last, chunk.last, "HMMA", products, copies, free=free)
        before = code.way(chunk.first, halves.first, copies, least, r"LDG\.", free=free)
        expand += code.way(rows.last, halves.last, never="HMMA", free=free)
        filter_ = code.way(halves.first, halves.last, "HMMA", products, "STS", free=free)
        return before + expand + filter_ + code.way(halves.last, chunk.last, never=copies, free=free)

    whole = chunk_way(0)
    patch = 4 if element_bytes == 2 and tiles <= 4 else 2
    taps_at_once = code.count(sums, tap) / (patch * (4 if code.count("HFMA2", tap) else 8)) if tap else 1
    steps = inside(code.inner(rows))
    row_block = code.way(rows.first, step.first, free=steps) + code.way(step.last, rows.last, free=steps)
    length = step.last - step.first + 1
    return {
        "row_block": row_block - (length if element_bytes == 2 else 0),  # then the first step stands before the loop
        "step": length,
        "window": window.last - window.first + 1,
        "chunk": whole,
        "tap": round((tap.last - tap.first + 1) / taps_at_once) if tap else 0,
        "copy": chunk_way(1) - whole,
    }


def count_end(code: Code, element_bytes: int, tiles: int) -> Counts:
    """What is done in every round after the chunks."""
    chunk = chunk_of(code)

    def end_way(need: str, least: int) -> int:
        """From the last chunk to an end without a split's sums, with so many of those stores or loads."""
        ways = []
        for i in range(chunk.last + 1, len(code.text)):
            if code.text[i].endswith("EXIT"):
                with contextlib.suppress(Missing):
                    ways.append(code.way(chunk.last + 1, i, need, least, "BAR|ATOM"))
        if not ways:
            raise Missing(f"no way to the end has {least} of {need}")
        return min(ways)

    patch = 4 if element_bytes == 2 and tiles <= 4 else 2
    vectors = patch * (tiles // 4 + (tiles % 4 >= 2) + tiles % 2)
    store = end_way(r"STG\.E(\.64|\.128)? ", vectors)  # the compiler may take vectors of fp32 apart
    return {"store": store, "residual": end_way(r"LDS", vectors) - store}


def disassembler() -> str:
    """cuobjdump: beside nvcc's, on the path, or of an installed triton."""
    beside = Path(shutil.which("nvcc") or "nvcc").resolve().with_name("cuobjdump")
    triton = importlib.util.find_spec("triton")
    packages = (triton and triton.submodule_search_locations) or ()
    for place in (beside, *(Path(package) / "backends" / "nvidia" / "bin" / "cuobjdump" for package in packages)):
        if place.is_file():
            return str(place)
    if found := shutil.which("cuobjdump"):
        return found
    raise Missing("cuobjdump is not installed: neither beside nvcc, nor on the path, nor in a triton package")


def count(source: str, directory: Path) -> dict[tuple[int, int], Counts]:
    """The counts of csrc/cuda/SOURCE.cu, by tiles and filter."""
    cuobjdump = disassembler()
    cubin = directory / f"{source}.cubin"
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    path = ROOT / "csrc" / "cuda" / f"{source}.cu"
    subprocess.run(["nvcc", "-std=c++20", architecture, "-cubin", str(path), "-o", str(cubin)], check=True)
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    element_bytes = 2 if source in ("half", "bfloat16") else 4
    counts = {}
    for function in done.stdout.split("Function : ")[1:]:
        if kernel := _KERNEL.search(function.partition("\n")[0]):
            tiles, filter_ = map(int, kernel.groups())
            try:
                counts[tiles, filter_] = count_block(Code(function), element_bytes, tiles)
            except Missing as error:
                raise Missing(f"block_kernel of {source}.cu, {tiles} tiles, filter {filter_}: {error}") from error
    if set(counts) != {(tiles, filter_) for tiles in TILES for filter_ in FILTERS}:
        raise Missing(f"{source}.cu: the disassembly lacks variants of block_kernel, it has {sorted(counts)}")
    return counts


def table() -> dict[str, dict[tuple[int, int], Counts]]:
    """What csrc/cuda/issue.h says, as count() returns it, by source."""
    rows = re.findall(r"\{([\d, ]+)\},?  // (\w+), (\d+) tiles, filter (\d)", HEADER.read_text(encoding="utf-8"))
    counts: dict[str, dict[tuple[int, int], Counts]] = {source: {} for source in SOURCES}
    for numbers, source, tiles, filter_ in rows:
        values = map(int, numbers.split(","))
        counts[source][int(tiles), int(filter_)] = dict(zip(COLUMNS, values, strict=True))
    return counts


def differences(known: dict[tuple[int, int], Counts], counted: dict[tuple[int, int], Counts]) -> list[str]:
    """A line for each count that is too far from the one in the table; a few instructions are never."""
    return [
        f"{tiles} tiles, filter {filter_}, {column}: {known[tiles, filter_][column]} in issue.h, {value} counted"
        for (tiles, filter_), counts in counted.items()
        for column, value in counts.items()
        if abs(known[tiles, filter_][column] - value) > max(LIMIT * value, 3)
    ]


def release() -> str:
    """nvcc's, such as 13.0."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Missing("nvcc is not on the path")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def table_release() -> str:
    """The release of nvcc whose machine code csrc/cuda/issue.h counts."""
    return re.search(r"// counts: begin, nvcc ([\d.]+)\n", HEADER.read_text(encoding="utf-8"))[1]


def write(counts: dict[str, dict[tuple[int, int], Counts]]) -> None:
    """Puts the counts between the header's markers."""
    before, rest = HEADER.read_text(encoding="utf-8").split("// counts: begin")
    rows = ""
    for source in SOURCES:
        rows += "    {\n"
        for tiles in TILES:
            lines = [
                f"{{{', '.join(str(counts[source][tiles, filter_][column]) for column in COLUMNS)}}},"
                f"  // {source}, {tiles} tiles, filter {filter_}"
                for filter_ in FILTERS
            ]
            rows += f"        {{{lines[0]}\n" + "".join(f"         {line}\n" for line in lines[1:]) + "        },\n"
        rows += "    },\n"
    after = rest.split("    // counts: end\n")[1]
    HEADER.write_text(
        f"{before}// counts: begin, nvcc {release()}\n{rows}    // counts: end\n{after}", encoding="utf-8"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the counts to csrc/cuda/issue.h")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as directory:
            counts = {source: count(source, Path(directory)) for source in SOURCES}
    except Missing as error:
        print(f"cuda_issue: {error}")
        return 1
    if options.write:
        write(counts)
    wrong = [f"{source}.cu, {line}" for source in SOURCES for line in differences(table()[source], counts[source])]
    print("\n".join(wrong) or "all counts are within 15 % of those in csrc/cuda/issue.h")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
