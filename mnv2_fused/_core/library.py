"""Loads the compiled parts: the operators (libmnv2_fused.so, and libmnv2_fused_cuda.so if there is a GPU) and the
introspection module ``_C``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent.parent
_NAME = "libmnv2_fused.so"
_CUDA_NAME = "libmnv2_fused_cuda.so"


def _directory() -> Path:
    """The directory that holds the binaries: this package's own or, if this is a source tree, the installed one."""
    for entry in [_HERE.parent, *sys.path]:
        directory = Path(entry).resolve() / _HERE.name
        if (directory / _NAME).exists():
            return directory
    raise ImportError(
        f"mnv2_fused: {_HERE} holds no {_NAME}: this is a source tree whose binaries have not been built. "
        "Install the package (`pip install .` in the directory that holds setup.py), or build in place with "
        "`pip install --no-build-isolation -e .`."
    )


def _load(directory: Path):
    if directory != _HERE:
        sys.modules["mnv2_fused"].__path__.append(str(directory))  # to find _C; the source tree's modules come first
    try:
        torch.ops.load_library(str(directory / _NAME))
        from mnv2_fused import _C
    except OSError as error:
        raise ImportError(
            f"mnv2_fused: {directory / _NAME} does not load beside torch {torch.__version__} ({error}). "
            "Reinstall mnv2_fused with the torch that is now installed."
        ) from error
    # Chooses the instruction set. A wrong MNV2_FUSED_CPU_ISA raises again when a kernel is first used.
    with contextlib.suppress(RuntimeError):
        _C.cpu_isa()
    return _C


def _load_cuda(path: Path) -> str | None:
    """Loads the CUDA operators. Returns why they are missing, or None if they are loaded."""
    if not path.exists():
        return "not built"
    # Not torch.cuda.is_available(): it would initialise the driver, and forked processes could then not use CUDA.
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(
            f"mnv2_fused: {path} does not load beside torch {torch.__version__} ({error}); GPUs run plain PyTorch. "
            "Reinstall mnv2_fused with the torch that is now installed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"does not load: {error}"
    return None


@functools.cache
def gpu_reason(index: int) -> str | None:
    """Why the loaded CUDA operators cannot run on GPU `index`; None if they can."""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"its compute capability is {major}.{minor}, below 8.0"
    refused = torch.ops.mnv2_fused.cuda_kernels_refused.default(index)
    if refused:
        built = _C.build_info()["cuda"]
        return f"none of the kernels that were built ({built}) runs on compute capability {major}.{minor}: {refused}"
    return None


_C = _load(_directory())
cuda_missing = _load_cuda(_directory() / _CUDA_NAME)
