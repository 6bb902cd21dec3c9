"""Fixtures that put the CPU in the place of a GPU: the emulator of kernels, and operators and modules on the CPU."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import standin
import torch
from emulator import emulator_call
from torch import Tensor, nn

from mnv2_fused._core import call, freshness, registrations


@pytest.fixture(scope="session")
def cuda_emulator(tmp_path_factory):
    """`cuda_emulator(name, *arguments)` calls a function of the library that tests/cuda_emulator builds.

    Contiguous tensors and texts are passed as pointers, ints and floats as they are. Raises RuntimeError with what the
    function reports.
    """
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("the CUDA emulator is written for Linux on x86-64")
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("the CUDA emulator needs a C++ compiler")
    build = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        build = build.parent  # shared by all workers
    build = build / "cuda_emulator"
    build.mkdir(exist_ok=True)
    sanitize = "ON" if os.environ.get("MNV2_FUSED_SANITIZE") else "OFF"
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    environment.pop("LD_PRELOAD", None)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source = Path(__file__).parents[1] / "cuda_emulator"
        for command in (
            ["cmake", "-G", "Ninja", "-S", source, "-B", build, f"-DSANITIZE={sanitize}"],
            ["cmake", "--build", build],
        ):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return emulator_call(build / "libcuda_emulator.so")


@pytest.fixture
def capture(monkeypatch):
    """`capture(module, x)` calls `module(x)` as if a graph were captured, and returns what the graph would read."""
    capturing = False
    monkeypatch.setattr(freshness, "_capturing", lambda device: capturing)
    monkeypatch.setattr(freshness, "_synchronize", lambda device: None)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        nonlocal capturing
        used = []
        with monkeypatch.context() as patch, torch.no_grad():
            use = freshness.Cache.use
            patch.setattr(freshness.Cache, "use", lambda *a, **options: used.append(use(*a, **options)) or used[-1])
            capturing = True
            try:
                module(x)
            finally:
                capturing = False
        return used[-1]

    # On the CPU stand the kernels of CUDA, which alone know captured graphs.
    with torch.library._scoped_library("mnv2_fused", "IMPL") as library:
        for operator, kernel in registrations.CUDA_KERNELS.items():
            library.impl(operator.name(), kernel, "CPU", allow_override=True)
        yield call


@pytest.fixture
def autocast_infers(monkeypatch):
    """Makes the CPU's autocast act as a GPU's does in inference."""
    monkeypatch.setattr(call, "autocast_dtype", standin.autocast_dtype)
    monkeypatch.setattr(call, "training_call", standin.training_call)
