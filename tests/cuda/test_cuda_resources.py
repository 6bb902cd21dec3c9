"""The reader of nvcc's report on registers, on text and, if there is an nvcc, on a kernel that spills."""

from __future__ import annotations

import io
import subprocess
import sys

import cuda_resources
import pytest
from test_packaging import ROOT, build_tool

MEMORY = "    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
NOTHING = MEMORY.format(0, 0, 0)
FIRST = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3oneILi8EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z3oneILi8EEvPf
{NOTHING}ptxas info    : Used 20 registers, used 1 barriers, 360 bytes cmem[0]
"""
SECOND = f"""  [3/9] Building CXX object run.cpp.o
ptxas info    : Compiling entry function '_Z3oneILi8EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z3oneILi8EEvPf
{NOTHING}ptxas info    : Used 24 registers
"""
GOOD = FIRST + SECOND
CALLED = f"ptxas info    : Function properties for helper\n{MEMORY}"

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float* p) {
  float a[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) a[i] = p[i * 7 + threadIdx.x];
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int i = 0; i < 80; ++i) a[i] = a[i] * a[(i + 1) % 80] + round;
  }
#pragma unroll
  for (int i = 0; i < 80; ++i) p[i] = a[i];
}
"""


def run(monkeypatch, capsys, text: str, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = cuda_resources.main(list(arguments))
    return code, capsys.readouterr().out


def test_table(monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, GOOD, "--architectures", "sm_80,sm_90a")
    assert code == 0
    assert [line.split()[:4] for line in out.splitlines()[1:3]] == [
        ["20", "0", "0", "sm_80"],
        ["24", "0", "0", "sm_90a"],
    ]
    assert out.endswith("2 kernels, 0 with a stack frame or spills\n")


@pytest.mark.parametrize("numbers", [(8, 0, 0), (0, 4, 0), (0, 0, 4)])
@pytest.mark.parametrize("where", [MEMORY, CALLED + NOTHING], ids=["kernel", "called function"])
def test_what_fails(monkeypatch, capsys, numbers, where):
    code, out = run(monkeypatch, capsys, FIRST + SECOND.replace(NOTHING, where.format(*numbers)))
    assert code == 1 and "2 kernels, 1 with a stack frame or spills" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [("nvcc fatal: no\n", "speaks of no kernel"), (GOOD.replace("sm_80", "sm_86"), "no kernel for sm_80")],
)
def test_output_without_what_was_to_be_seen(monkeypatch, capsys, text, message):
    code, out = run(monkeypatch, capsys, text, "--architectures", "sm_80")
    assert code == 1 and message in out


def test_mixed_up_output_is_an_error():
    first, second = FIRST.splitlines(), SECOND.splitlines()
    for order in (first[:4], [*first[:4], *second, first[4]]):
        with pytest.raises(ValueError, match="nothing is said of the registers of _Z3oneILi8EEvPf"):
            cuda_resources.read(order)


@pytest.mark.parametrize(("bounds", "wrong"), [("__launch_bounds__(1024, 2)", 2), ("", 0)])
def test_with_the_compiler(monkeypatch, capsys, tmp_path, bounds, wrong):
    nvcc = build_tool(ROOT / "build_tools" / "cuda_build.py").find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING.replace("__launch_bounds__(1024, 2)", bounds), encoding="utf-8")
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ("80", "90a")]
    command = [nvcc, *codes, "--threads=0", "-Xptxas=-v", "-c", source, "-o", tmp_path / "spilling.o"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    code, out = run(monkeypatch, capsys, said.stdout + said.stderr, "--architectures", "sm_80,sm_90a")
    assert code == (1 if wrong else 0)
    assert f"2 kernels, {wrong} with a stack frame or spills" in out
