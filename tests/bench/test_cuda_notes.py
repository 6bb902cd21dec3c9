"""The tables of csrc/cuda/NOTES.md."""

from __future__ import annotations

import shutil

import cuda_counters
import cuda_notes
import pytest

NAMES = ("_ZN4mnv24cuda12block_kernelINS0_8HalfMathELi2ELi1EEEvNS0_9BlockArgsE",
         "_ZN4mnv24cuda12block_kernelINS0_8HalfMathELi12ELi1EEEvNS0_9BlockArgsE",
         "_ZN4mnv24cuda11stem_kernelINS0_9FloatMathILb1EEEEEvNS0_8StemArgsE")  # fmt: skip


@pytest.mark.parametrize("name", ["predictions", "measured", "compiled", "bars"])
def test_the_notes_have_the_tables_of_the_plan_and_of_the_results(name):
    text = cuda_notes.NOTES.read_text(encoding="utf-8")
    assert cuda_notes.put(text, name, getattr(cuda_notes, name)()) == text, "run bench/cuda_notes.py"


def test_counters_are_reduced():
    stalls = [cuda_counters.STALL + name + cuda_counters.PER_ISSUE for name in ("selected", "wait", "gmma", "barrier")]
    names = ["ID", *cuda_counters.NAMES.values(), *stalls, "launch__block_size"]
    values = [[str(i), *["50.25"] * len(cuda_counters.NAMES), "1.00", f"{2 + i}", "0", "0.5", "256"] for i in range(3)]
    units = [[""] * len(names)]
    rows = cuda_counters.reduced(["==PROF== Connected", *(",".join(cells) for cells in [names, *units, *values])])
    assert [row["launch"] for row in rows] == ["block 1", "pool", "classify"]
    kept = set(names) - {"ID", "launch__block_size", stalls[2]}
    assert all(row.keys() == kept | {"launch"} for row in rows)
    assert [cuda_counters.largest_stalls(row) for row in rows] == [f"wait {2 + i}.0, barrier 0.5" for i in range(3)]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")
def test_registers_by_kernel_and_arithmetic():
    log = [
        line
        for i, name in enumerate(NAMES)
        for j, architecture in enumerate(("sm_90a", "sm_80"))
        for line in (
            f"ptxas info    : Compiling entry function '{name}' for '{architecture}'",
            f"    {4 * (i == j == 1)} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
            f"ptxas info    : Used {10 * i + j + 20} registers",
        )
    ]
    head, _, table = cuda_notes.resources(log).partition("\n\n")
    assert head == "Registers a thread on sm_80 and sm_90a; 6 kernels, 1 with a stack frame or spills:"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["kernel", "HalfMath", "FloatMath<true>"]
    assert rows[2:] == [["block_kernel, 2, 1", "21/20", ""], ["block_kernel, 12, 1", "31/30", ""],
                        ["stem_kernel", "", "41/40"]]  # fmt: skip


def test_what_is_between_markers_is_replaced():
    text = "a <!-- x:begin --> old <!-- x:end --> b"
    assert cuda_notes.put(text, "x", "new") == "a <!-- x:begin -->\n\nnew\n\n<!-- x:end --> b"
