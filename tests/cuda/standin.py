"""Modules and inputs for tests in which the CPU stands in for a GPU."""

from __future__ import annotations

import torch
from oracle import randomize
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused._core.geometry import FLOATS

SMALL = [[1, 8, 1, 1], [6, 8, 1, 1], [6, 16, 1, 2]]


def make_block(*channels: int, stride: int = 1) -> InvertedResidual:
    channels = channels or (8, 8)
    return randomize(InvertedResidual(*channels, stride, 6), torch.randn(2, channels[0], 9, 9))


def make_model() -> MobileNetV2:
    return randomize(MobileNetV2(7, 0.5, SMALL), torch.randn(4, 3, 33, 33))


# Of the fixture `autocast_infers`. They are here because a tracer looks their globals up by their module's name, and
# several modules are called conftest.


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    casts = torch.is_autocast_enabled("cpu") and x.dtype in FLOATS
    return torch.get_autocast_dtype("cpu") if casts else None


def training_call(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


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
