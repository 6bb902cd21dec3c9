"""Modules and inputs for tests in which the CPU stands in for a GPU."""

from __future__ import annotations

import torch
from oracle import randomize
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mnv2_fused import InvertedResidual, MobileNetV2

SMALL = [[1, 8, 1, 1], [6, 8, 1, 1], [6, 16, 1, 2]]


def make_block(*channels: int, stride: int = 1) -> InvertedResidual:
    channels = channels or (8, 8)
    return randomize(InvertedResidual(*channels, stride, 6), torch.randn(2, channels[0], 9, 9))


def make_model() -> MobileNetV2:
    return randomize(MobileNetV2(7, 0.5, SMALL), torch.randn(4, 3, 33, 33))


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def on_gpu(module: nn.Module) -> nn.Module:
    """`module` as if it were on a GPU."""
    for m in module.modules():
        for name, t in m.named_parameters(recurse=False):
            setattr(m, name, nn.Parameter(image(*t.shape, dtype=t.dtype)))
        for name, t in m.named_buffers(recurse=False):
            setattr(m, name, image(*t.shape, dtype=t.dtype))
    return module


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")
