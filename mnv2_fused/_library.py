"""Loads the compiled parts: the operators (libmnv2_fused.so) and the introspection module ``_C``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
_NAME = "libmnv2_fused.so"


def _directory() -> Path:
    """Where the binaries are: beside this file or, for a source tree, where pip has installed them."""
    for entry in [_HERE.parent, *sys.path]:
        directory = Path(entry).resolve() / _HERE.name
        if (directory / _NAME).exists():
            return directory
    raise ImportError(
        f"mnv2_fused: {_HERE} holds no {_NAME}: this is a source tree whose binaries have not been built. "
        "Install the package (`pip install .` in the directory that holds setup.py), or build in place with "
        "`pip install --no-build-isolation -e .`."
    )


def _load():
    directory = _directory()
    if directory != _HERE:
        sys.modules[__package__].__path__.append(str(directory))  # for _C; modules of the source tree come first
    try:
        torch.ops.load_library(str(directory / _NAME))
        from mnv2_fused import _C
    except OSError as error:
        raise ImportError(
            f"mnv2_fused: {directory / _NAME} does not load beside torch {torch.__version__} ({error}). "
            "Reinstall mnv2_fused with the torch that is now installed."
        ) from error
    _C.cpu_isa()  # a wrong MNV2_FUSED_CPU_ISA is reported here, before any kernel runs
    return _C


_C = _load()
