"""What the tests of training share: the smallest run, and how two runs are compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from mnv2_fused import cli, trainer

TINY = {"width": 0.1, "resolution": 32, "batch": 8, "epochs": 2, "threads": 1, "workers": 0}
OPTIONS = [text for key, value in TINY.items() for text in (f"--{key}", str(value))]


def run(*arguments: str) -> int:
    """The exit code of `train`, also if argparse exits by itself."""
    try:
        return cli.main(["train", *arguments])
    except SystemExit as stop:
        return stop.code


def launch(*options: str, size: int | None = None, **process) -> subprocess.Popen:
    """`train` with these options in a process of its own, or in `size` processes that torchrun starts. `process`:
    arguments of Popen.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    torchrun = [] if size is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [sys.executable, "-W", "ignore", *torchrun, "-m", "mnv2_fused", "train", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, **process)


def wait_for_log(directory: Path, process: subprocess.Popen) -> None:
    """Waits until a run in `directory` has written an entry of its log."""
    log, patience = directory / trainer.LOG, time.monotonic() + 120
    while not (log.exists() and log.read_text(encoding="utf-8")) and time.monotonic() < patience:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that `process` has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()]


def checkpoint(directory) -> dict:
    return torch.load(directory / trainer.CHECKPOINT, weights_only=True)


def assert_same(got, expected, path="checkpoint"):
    assert type(got) is type(expected), path
    if isinstance(got, dict):
        assert got.keys() == expected.keys(), path
        for key in got:
            if key not in ("images_per_s", "peak_memory_bytes", "arguments"):
                assert_same(got[key], expected[key], f"{path}.{key}")
    elif isinstance(got, list):
        assert len(got) == len(expected), path
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"{path}.{i}")
    else:
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected, path
