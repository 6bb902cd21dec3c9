"""bench/gpu_session.sh without a GPU. A fake python3 records how it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_session.sh"
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"int(60 *"*) exec {real} "$@" ;;
  *dirname\\(sys.executable*) echo {directory} ;;
  *find_spec*) case "$*" in *"'$LACKING'"*) exit 1 ;; esac ;;
  *is_available*) exit "${{NO_GPU:-0}}" ;;
  *"-c "*) ;;
  "- "*) exec {real} "$@" ;;
  *) echo "$*" >>{directory}/calls
     case "$*" in *"$SLOW"*) sleep 30 ;; *"$WRONG"*) echo "block float16: WRONG"; exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Runs the script with these steps. Returns its exit code, its output and python3's calls."""
    programs, out = tmp_path / "bin", tmp_path / "out"
    programs.mkdir()
    texts = {name: "#!/bin/sh\n" for name in ("nvcc", "cmake", "ninja", "nvidia-smi")}
    texts["compute-sanitizer"] = '#!/bin/sh\nshift 8\nexec "$@"\n'
    texts["ncu"] = '#!/bin/sh\nwhile [ "$1" != python3 ]; do shift; done\nexec "$@"\n'
    texts["python3"] = PYTHON.format(real=sys.executable, directory=programs)
    for name, text in texts.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)

    def run(*steps: str, **environment: str) -> tuple[int, str, list[str]]:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        values = {
            **os.environ,
            "PATH": path,
            "OUT": str(out),
            "LACKING": "xdist",
            "SLOW": "nothing",
            "WRONG": "nothing",
            **environment,
        }
        done = subprocess.run(["bash", SCRIPT, *steps], env=values, capture_output=True, text=True, timeout=60)
        calls = programs / "calls"
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, lines

    run.out = out
    return run


def programs_of(calls: list[str]) -> list[str]:
    """What python3 ran, in order: the script or module, with the first words of its options."""
    return [" ".join(call.replace("-m ", "").replace("bench/", "").split("--json")[0].split()[:2]) for call in calls]


def test_first_asks_whether_it_is_right_before_how_fast_it_is(session):
    session.out.mkdir()
    (session.out / "gpu.json").write_text("of an earlier run", encoding="utf-8")
    code, text, calls = session("first")
    assert code == 0, text
    assert "pip install" in calls[0] and "--no-deps" in calls[0] and "--no-build-isolation" in calls[0]
    assert programs_of(calls[1:]) == [
        "smoke_cuda.py",
        "pytest tests/cuda/test_gpu_freezing.py",
        "measure_cuda.py network",
        *["measure_cuda.py launches"] * 3,
        "smoke_cuda.py --calls",
    ]
    assert " -n " not in calls[2], "there is no xdist"
    assert not (session.out / "gpu.json").exists() and "ncu: ok" in text
    assert len(list(session.out.iterdir())) <= 8


def test_peers_and_single_steps_add_to_what_is_there(session):
    session.out.mkdir()
    (session.out / "gpu.json").write_text("of an earlier run", encoding="utf-8")
    code, text, calls = session("peers")
    assert code == 0, text
    assert programs_of(calls) == ["measure_cuda.py compiled", *["sanitize_cuda.py float16"] * 2]
    assert (session.out / "gpu.json").exists()
    code, text, calls = session("plans")
    assert code == 0 and programs_of(calls[-1:]) == ["cuda_plans.py --seconds"], text
    assert session("bench")[0] == 2


def test_two_trees_are_measured_in_turns(session, tmp_path):
    code, text, calls = session("ab", str(tmp_path))
    assert code == 0, text
    names = programs_of(calls)
    assert names[:3] == ["pip install", "smoke_cuda.py", "pip install"] and len(names) == 7
    variants = [call.split("--variant ")[1].split()[0] for call in calls if "--variant" in call]
    assert variants == ["old", "new", "old", "new"]
    assert session("ab")[0] != 0


def test_a_wrong_kernel_is_looked_at_and_not_timed(session):
    code, text, calls = session("first", WRONG="smoke_cuda")
    assert code == 1 and "smoke: FAILED with 1" in text
    assert programs_of(calls[1:]) == ["smoke_cuda.py", *["smoke_cuda.py block"] * 3]


def test_what_only_the_command_line_needs_is_no_reason_to_stop(session):
    code, text, calls = session("network", LACKING="rich")
    assert code == 0 and "python3 has no rich" in text and len(calls) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"LACKING": "pybind11"}, "python3's pybind11: missing here, and needed"), ({"NO_GPU": "1"}, "torch sees no GPU")],
)
def test_what_is_missing_is_said(session, environment, message):
    session.out.mkdir()
    (session.out / "gpu.json").write_text("of an earlier run", encoding="utf-8")
    code, text, calls = session("first", **environment)
    assert code == 1 and message in text and calls == []
    assert (session.out / "gpu.json").exists()


def test_a_step_that_hangs_is_stopped(session):
    code, text, calls = session("tests", "network", SLOW="pytest", MINUTES="0.2")
    assert code == 1 and "tests: FAILED, stopped" in text
    assert len(calls) == 1 and "network: not begun, no time left" in text


def test_compiling_takes_what_time_there_is(session):
    code, text, calls = session("compiled", SLOW="compiled", MINUTES="0.15")
    assert code == 0 and "compiled: stopped after" in text and len(calls) == 1
