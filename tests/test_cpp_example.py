"""The C++ program in examples/cpp: built, and run without Python on a package of a model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CPP = Path(__file__).resolve().parent.parent / "examples" / "cpp"


def printed(*command: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("g++"), reason="needs cmake and g++")
def test_a_package_runs_without_python(tmp_path):
    printed("cmake", "-S", CPP, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release")
    printed("cmake", "--build", tmp_path)
    package, program = tmp_path / "model.pt2", tmp_path / "run"
    eager = printed(sys.executable, CPP / "export.py", package)
    assert re.fullmatch(r"(class \d+: \S+\n){3}", eager)
    lines = printed(program, package)
    assert lines.startswith(eager) and re.fullmatch(r"\d+\.\d\d ms\n", lines.removeprefix(eager))
    wrong = subprocess.run([program], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "usage: run MODEL.pt2\n")


def test_sources_are_short():
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 40 for path in CPP.iterdir())
