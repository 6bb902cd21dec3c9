"""Fixtures of all tests."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnv2_fused import _C, extras

sys.path.insert(0, str(Path(__file__).parent))  # for `import oracle`


# One thread a test process: pytest -n runs several processes, and threads that wait for each other would spin.
torch.set_num_threads(1)
# Tests on several threads use them, also if other tests keep the processors busy.
_C.watch_crowding(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def exact_float32():
    """TF32 is off unless a test allows it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def torchvision_mobilenetv2():
    """torchvision.models.mobilenetv2, or a skip with the reason."""
    try:
        return extras.use("torchvision.models.mobilenetv2", "detection")
    except ImportError as error:
        pytest.skip(str(error))


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
        source = Path(__file__).parent / "cuda_emulator"
        for command in (
            ["cmake", "-G", "Ninja", "-S", source, "-B", build, f"-DSANITIZE={sanitize}"],
            ["cmake", "--build", build],
        ):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return emulator_call(build / "libcuda_emulator.so")


def emulator_call(path: Path):
    """The function that the fixture `cuda_emulator` gives, for the library at `path`."""
    library = ctypes.CDLL(str(path))
    convert = {
        torch.Tensor: lambda t: ctypes.c_void_p(t.data_ptr()),
        int: ctypes.c_int64,
        float: ctypes.c_float,
        str: str.encode,
    }

    def call(name: str, *arguments: torch.Tensor | int | float | str) -> None:
        function = library[name]
        function.restype = ctypes.c_char_p
        message = function(*[convert[type(a)](a) for a in arguments])
        if message is not None:
            raise RuntimeError(message.decode())

    call.path = library._name
    return call
