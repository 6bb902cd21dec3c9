"""Registers fake kernels of the inference operators, and the `cached_*` operators.

A traced graph cannot hold Python code that inspects data, so it holds `cached_*` operators. They take a unit's
parameters and buffers unpacked, and check at run time whether the packed weights in the cache of that name are up to
date. A captured CUDA graph would skip that check, so these operators are tagged cudagraph_unsafe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnv2_fused._core.call import tf32
from mnv2_fused._core.freshness import by_name
from mnv2_fused._core.geometry import FLOATS
from mnv2_fused._core.operators import OPERATORS, Operator


def _check_input(x: Tensor, operator: str) -> None:
    torch._check(x.dim() == 4, lambda: f"{operator}: x must have 4 dimensions (n, c, h, w); got {x.dim()}")
    torch._check(x.dtype in FLOATS, lambda: f"{operator}: x must be float32, bfloat16 or float16; got {x.dtype}")


def _empty(x: Tensor, size: tuple) -> Tensor:
    if len(size) == 2:
        return x.new_empty(size)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _register(operator: Operator) -> None:
    name, cached = operator.name, f"cached_{operator.name}"
    result = "Tensor[]" if operator.several else "Tensor"
    # tensors and eps: as `flat()` of a spec gives them.
    torch.library.define(
        f"mnv2_fused::{cached}",
        f"(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] {operator.fields}, float[] bounds) -> {result}",
        tags=torch.Tag.cudagraph_unsafe,
    )

    def empty(x: Tensor, fields: list[int]) -> Tensor | list[Tensor]:
        outputs = [_empty(x, size) for size in operator.sizes(x, fields)]
        return outputs if operator.several else outputs[0]

    @torch.library.register_fake(f"mnv2_fused::{name}")
    def _(x, packed, *arguments, **named):
        _check_input(x, name)
        return empty(x, named[operator.fields] if operator.fields in named else arguments[0])

    @torch.library.register_fake(f"mnv2_fused::{cached}")
    def _(x, tensors, cache, eps, fields, bounds):
        _check_input(x, cached)
        return empty(x, fields)

    @torch.library.impl(f"mnv2_fused::{cached}", ("cpu", "cuda"))
    def _(x, tensors, cache, eps, fields, bounds):
        packed = by_name(cache).packed(tensors, eps, x.dtype, operator.pack)
        if operator.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return operator.run(x, packed, fields, bounds, tf32(x))


for _operator in OPERATORS:
    _register(_operator)
