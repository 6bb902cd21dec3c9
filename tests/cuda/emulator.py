"""The library that tests/cuda_emulator builds: the CUDA kernels on the host."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


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
