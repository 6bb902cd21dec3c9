"""Loads the compiled parts: the operators (libmnv2_fused.so) and the introspection module ``_C``."""

from __future__ import annotations

from pathlib import Path

import torch

_DIRECTORY = Path(__file__).parent


def _load():
    library = _DIRECTORY / "libmnv2_fused.so"
    if not library.exists():
        raise ImportError(
            f"mnv2_fused: {library} does not exist: this is a source tree whose binaries have not been built. "
            "Install the package (`pip install .` in the directory that holds setup.py) and import it from elsewhere, "
            "or build in place with `pip install --no-build-isolation --no-deps -e .`."
        )
    try:
        torch.ops.load_library(str(library))
        from mnv2_fused import _C
    except OSError as error:
        raise ImportError(
            f"mnv2_fused: {library.name} does not load beside torch {torch.__version__} ({error}). "
            "Reinstall mnv2_fused with the torch that is now installed."
        ) from error
    _C.cpu_isa()  # a wrong MNV2_FUSED_CPU_ISA is reported here, before any kernel runs
    return _C


_C = _load()
