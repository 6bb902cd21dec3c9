"""What the C++ library leaves to Python: fake kernels of all operators, and the `cached_*` operators.

A traced graph must not hold Python that looks at data, so it holds `cached_*` operators instead: they take a unit's
parameters and buffers as they are, and see at run time whether the packed weights in the cache of that name still hold.
What looks at run time has no place in a CUDA graph, which would go on with the weights of its first run: their tag has
the compiler leave them out of the graphs it captures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core.freshness import by_name
from mnv2_fused._core.inspect import tf32
from mnv2_fused._core.packing import pack_block, pack_head, pack_network, pack_stem
from mnv2_fused.reference import same_padding

_ops = torch.ops.mnv2_fused

# parameters: those of the unit, unfolded, as in _inspect.BlockSpec; cache: the name of where they are kept packed. The
# rest is that of the operator without `cached_`.
for _schema in (
    "cached_inverted_residual(Tensor x, Tensor?[] parameters, str cache, float[] eps, int kernel, int stride, "
    "int dilation, int[] padding, bool has_expand, bool residual, float lo, float hi) -> Tensor",
    "cached_stem(Tensor x, Tensor?[] parameters, str cache, float[] eps, int kernel, int stride, int[] padding, "
    "float lo, float hi) -> Tensor",
    "cached_head(Tensor x, Tensor?[] parameters, str cache, float[] eps, float lo, float hi) -> Tensor",
    "cached_network(Tensor x, Tensor?[] parameters, str cache, float[] eps, int[] stem, int[] blocks, int[] head, "
    "float[] bounds) -> Tensor",
):
    _name, _, _signature = _schema.partition("(")
    torch.library.define(f"mnv2_fused::{_name}", f"({_signature}", tags=torch.Tag.cudagraph_unsafe)


def _conv_out(size, before, after, kernel, stride, dilation):
    return (size + before + after - (kernel - 1) * dilation - 1) // stride + 1


def _empty(x: Tensor, c_out, kernel, stride, dilation, padding) -> Tensor:
    n, _, h, w = x.shape
    if padding:
        top, left, bottom, right = padding
        h, w = _conv_out(h, top, bottom, kernel, stride, dilation), _conv_out(w, left, right, kernel, stride, dilation)
    else:  # "SAME"
        h, w = (h + stride - 1) // stride, (w + stride - 1) // stride
    return torch.empty((n, c_out, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("mnv2_fused::inverted_residual")
def _(x, packed, c_hidden, c_out, kernel, stride, dilation, padding, has_expand, residual, lo, hi, tf32=False):
    _check_input(x, "inverted_residual")
    return _empty(x, c_out, kernel, stride, dilation, padding)


@torch.library.register_fake("mnv2_fused::stem")
def _(x, packed, c_out, kernel, stride, padding, lo, hi, tf32=False):
    _check_input(x, "stem")
    return _empty(x, c_out, kernel, stride, 1, padding)


@torch.library.register_fake("mnv2_fused::head")
def _(x, packed, c_last, num_classes, lo, hi, tf32=False):
    _check_input(x, "head")
    return x.new_empty((x.shape[0], num_classes))


@torch.library.register_fake("mnv2_fused::network")
def _(x, packed, stem, blocks, head, bounds, tf32=False):
    _check_input(x, "network")
    return x.new_empty((x.shape[0], head[1]))


@torch.library.register_fake("mnv2_fused::cached_inverted_residual")
def _(x, parameters, cache, eps, kernel, stride, dilation, padding, has_expand, residual, lo, hi):
    _check_input(x, "cached_inverted_residual")
    return _empty(x, parameters[-6].shape[0], kernel, stride, dilation, padding)


@torch.library.register_fake("mnv2_fused::cached_stem")
def _(x, parameters, cache, eps, kernel, stride, padding, lo, hi):
    _check_input(x, "cached_stem")
    return _empty(x, parameters[0].shape[0], kernel, stride, 1, padding)


@torch.library.register_fake("mnv2_fused::cached_head")
def _(x, parameters, cache, eps, lo, hi):
    _check_input(x, "cached_head")
    return x.new_empty((x.shape[0], parameters[6].shape[0]))


@torch.library.register_fake("mnv2_fused::cached_network")
def _(x, parameters, cache, eps, stem, blocks, head, bounds):
    _check_input(x, "cached_network")
    return x.new_empty((x.shape[0], head[1]))


def _check_input(x: Tensor, operator: str) -> None:
    torch._check(x.dim() == 4, lambda: f"{operator}: x must have 4 dimensions (n, c, h, w); got {x.dim()}")
    torch._check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"{operator}: x must be float32, bfloat16 or float16; got {x.dtype}",
    )


@torch.library.impl("mnv2_fused::cached_inverted_residual", ("cpu", "cuda"))
def _cached_inverted_residual(
    x: Tensor,  # (n, c_in, h, w)
    parameters: Sequence[Tensor | None],  # see _inspect.BlockSpec
    cache: str,
    eps: Sequence[float],
    kernel: int,
    stride: int,
    dilation: int,
    padding: Sequence[int],  # empty: "SAME"
    has_expand: bool,
    residual: bool,
    lo: float,
    hi: float,
) -> Tensor:  # (n, c_out, h_out, w_out), channels_last
    packed = by_name(cache).packed(parameters, eps, x.dtype, pack_block)
    c_hidden, c_out = parameters[-12].shape[0], parameters[-6].shape[0]
    return _ops.inverted_residual.default(
        x.contiguous(memory_format=torch.channels_last), packed, c_hidden, c_out, kernel, stride, dilation,
        padding or same_padding(x.shape[2], x.shape[3], kernel, stride, dilation), has_expand, residual, lo, hi,
        tf32(x),
    )  # fmt: skip


@torch.library.impl("mnv2_fused::cached_stem", ("cpu", "cuda"))
def _cached_stem(
    x: Tensor,  # (n, c_in, h, w)
    parameters: Sequence[Tensor | None],  # see _inspect.StemSpec
    cache: str,
    eps: Sequence[float],
    kernel: int,
    stride: int,
    padding: Sequence[int],  # empty: "SAME"
    lo: float,
    hi: float,
) -> Tensor:  # (n, c_out, h_out, w_out), channels_last
    packed = by_name(cache).packed(parameters, eps, x.dtype, pack_stem)
    padding = padding or same_padding(x.shape[2], x.shape[3], kernel, stride)
    return _ops.stem.default(x, packed, parameters[0].shape[0], kernel, stride, padding, lo, hi, tf32(x))


@torch.library.impl("mnv2_fused::cached_head", ("cpu", "cuda"))
def _cached_head(
    x: Tensor,  # (n, c_in, h, w)
    parameters: Sequence[Tensor | None],  # see _inspect.HeadSpec
    cache: str,
    eps: Sequence[float],
    lo: float,
    hi: float,
) -> Tensor:  # (n, classes)
    packed = by_name(cache).packed(parameters, eps, x.dtype, pack_head)
    x = x.contiguous(memory_format=torch.channels_last)
    return _ops.head.default(x, packed, parameters[0].shape[0], parameters[6].shape[0], lo, hi, tf32(x))


@torch.library.impl("mnv2_fused::cached_network", ("cpu", "cuda"))
def _cached_network(
    x: Tensor,  # (n, c_in, h, w)
    parameters: Sequence[Tensor | None],  # see _inspect.NetworkSpec
    cache: str,
    eps: Sequence[float],
    stem: Sequence[int],
    blocks: Sequence[int],
    head: Sequence[int],
    bounds: Sequence[float],
) -> Tensor:  # (n, classes)
    packed = by_name(cache).packed(parameters, eps, x.dtype, pack_network)
    return _ops.network.default(x, packed, stem, blocks, head, bounds, tf32(x))
