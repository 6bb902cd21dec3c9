"""Parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["multiply_adds", "parameters"]


def parameters(model: nn.Module) -> int:
    """The number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(function: Callable[..., object], *arguments: object) -> int:
    """Multiply-adds of `function(*arguments)`, without gradients: half of what PyTorch's `FlopCounterMode` counts.

    Convolutions and matrix products count; pooling, norms, activations and additions do not. Modules and tensors may be
    on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton if it is installed

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() // 2
