"""The counts of csrc/cuda/issue.h against the kernels' machine code, and how they are counted."""

from __future__ import annotations

import cuda_issue
import pytest

# A loop around a loop, and before it a branch around two loads.
LOOPS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   LDG.E R2, desc[UR8][R2.64] ;
        /*0030*/                   LDG.E R3, desc[UR8][R4.64] ;
        /*0040*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0050*/                   FADD R2, R2, R3 ;
        /*0060*/               @P1 BRA 0x50 ;
        /*0070*/              @!P2 BRA 0x40 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_ways_through_the_machine_code():
    code = cuda_issue.Code(LOOPS)
    inner, outer = cuda_issue.Loop(5, 6), cuda_issue.Loop(4, 7)
    assert code.loops == [outer, inner] and code.inner(outer) == [inner]
    assert code.way(0, 8) == 7 and code.way(0, 8, "LDG", 2) == code.way(0, 8, most=True) == 9
    assert code.way(0, 8, free=lambda i: 5 <= i <= 6) == 5
    with pytest.raises(cuda_issue.Missing, match="no way from instruction 0 to 8 has 3 of LDG"):
        code.way(0, 8, "LDG", 3)
    with pytest.raises(cuda_issue.Missing):
        code.way(0, 8, never="FADD")


def test_the_table_has_every_variant():
    for counts in cuda_issue.table().values():
        assert set(counts) == {(tiles, filter_) for tiles in cuda_issue.TILES for filter_ in cuda_issue.FILTERS}
        # The taps of a filter that is known are counted with its chunk.
        assert all((count > 0) == (column != "tap" or not filter_)
                   for (_, filter_), variant in counts.items() for column, count in variant.items())  # fmt: skip


def test_what_is_too_far_off():
    known = cuda_issue.table()["half"]
    for column, factor, wrong in (("step", 1.1, 0), ("step", 1.3, 1), ("row_block", 0.8, 1)):
        counted = {(2, 1): {**known[2, 1], column: round(known[2, 1][column] * factor)}}
        lines = cuda_issue.differences(known, counted)
        assert len(lines) == wrong and all(f"2 tiles, filter 1, {column}: " in line for line in lines)


def test_counts_of_the_machine_code(tmp_path):
    """fp16 alone; bench/cuda_issue.py compares all. Another compiler's code may differ by more."""
    try:
        cuda_issue.disassembler()
        if cuda_issue.release() != cuda_issue.table_release():
            pytest.skip(f"issue.h counts the code of nvcc {cuda_issue.table_release()}")
    except cuda_issue.Missing as error:
        pytest.skip(str(error))
    found = cuda_issue.differences(cuda_issue.table()["half"], cuda_issue.count("half", tmp_path))
    assert not found, "run bench/cuda_issue.py --write, then bench/cuda_notes.py"
