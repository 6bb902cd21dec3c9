"""Whether an input fits a unit, and whether the unit fits the kernels of the input's device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mnv2_fused._core import call, library
from mnv2_fused._core.call import when_traced
from mnv2_fused._core.geometry import NAMES, reach
from mnv2_fused._core.specs import BlockSpec, DenseSpec, HeadSpec, NetworkSpec

Spec = BlockSpec | DenseSpec | HeadSpec | NetworkSpec


def shape_reason(operator: str, spec: Spec, x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why `x` does not fit the unit that `operator` computes; None if it fits. The plain path then raises PyTorch's own
    error. `dtype` is the dtype of the arithmetic, if it differs from the weights' dtype.
    """
    if x.dtype != (dtype or spec.dtype):
        return f"the input is {x.dtype}, the weights are {spec.dtype}"
    if x.device != spec.device:
        return f"the input is on {x.device}, the weights are on {spec.device}"
    if x.dim() != 4:
        return "the input is not 4-dimensional"
    _, c, h, w = x.shape
    shape = spec.shape
    if c != shape.c_in:
        return f"the input has {c} channels, the weights take {shape.c_in}"
    if h < 1 or w < 1:
        return "the input has no pixels"
    if operator != "head" and shape.padding is not None:
        top, left, bottom, right = shape.padding
        span = reach(shape.kernel, shape.dilation) + 1
        if h + top + bottom < span or w + left + right < span:
            return "the input is smaller than the kernel"
    return None if x.is_cpu else _remembered(operator, spec, x)


def known_to_fit(operator: str, spec: Spec, x: Tensor) -> bool:
    """Whether `shape_reason` is None, in less time for an input like an earlier one. Not for traced graphs."""
    key = (operator, x.shape, x.dtype, x.device)
    if key in spec.fits:
        return True
    fits = shape_reason(operator, spec, x) is None
    if fits and len(spec.fits) < 64:
        spec.fits[key] = None
    return fits


def _remembered(operator: str, spec: Spec, x: Tensor) -> str | None:
    if torch.compiler.is_compiling():  # a tracer would watch what is kept
        return gpu_reason(operator, spec.arguments[0], x)
    key = (_size(x), x.dtype, x.device)
    reason = spec.fits.get(key, "")  # kept here because a network's text takes time
    if reason == "":
        reason = gpu_reason(operator, spec.arguments[0], x)
        if len(spec.fits) < 64:
            spec.fits[key] = reason
    return reason


def gpu_reason(operator: str, fields: list[int] | str, x: Tensor) -> str | None:
    """Why the kernels of `operator` cannot run on the GPU of `x`; None if they can. `fields` are its integers."""
    key = (
        operator,
        (*_size(x), x.shape[1]),
        fields if isinstance(fields, str) else tuple(fields),
        NAMES.get(x.dtype, "float32"),
    )
    return _gpu_reason(key, x.device)


def _size(x: Tensor) -> tuple[int, int, int]:
    # A traced graph serves other sizes as well, so a map larger than any kernel's reach stands for all of them.
    return (1, 1 << 14, 1 << 14) if torch.compiler.is_compiling() else (x.shape[0], x.shape[2], x.shape[3])


@when_traced
def _gpu_reason(key: tuple, device: torch.device) -> str | None:
    reason = _unfit(key, call.shared_memory(device.index))
    return None if reason is None else f"it does not fit {device}: {reason}"


@functools.lru_cache(4096)
def _unfit(key: tuple, shared_memory: int) -> str | None:
    operator, size, fields, dtype = key
    return library._C.cuda_unfit(operator, size, fields, dtype, shared_memory)
