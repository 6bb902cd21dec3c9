"""Memory formats, by PyTorch's rules."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch would give a convolution of the 4-dimensional ``x`` a channels_last output.

    This is the rule of ``Tensor.suggest_memory_format``: strides must be in the order n, h, w, c; ambiguous strides
    count as contiguous.
    """
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if sc == 0:
        return False
    least = 0
    for size, stride in ((c, sc), (w, sw), (h, sh)):
        if size == 0 or stride < least:
            return False
        least = stride * size if size > 1 else stride
    return n > 0 and sn >= least and least != sc


def as_input(y: Tensor, x: Tensor) -> Tensor:
    """The channels_last ``y`` in the memory format of ``x``."""
    return y if is_channels_last(x) else to_contiguous(y)


def to_contiguous(y: Tensor) -> Tensor:
    """`y` in contiguous format, always with the strides of a new contiguous tensor, also for dimensions of size 1."""
    canonical = y.stride() == (y.shape[1] * y.shape[2] * y.shape[3], y.shape[2] * y.shape[3], y.shape[3], 1)
    return y if canonical else y.clone(memory_format=torch.contiguous_format)
