"""A linear map with a batch norm behind it: its statistics and gradients in closed form. docs/training.md derives them.

Blocks and dense convolutions share this. Vectors over channels and sums over pixels are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnv2_fused.training.batch_norm import BatchNorm
from mnv2_fused.training.passes import FusedPasses
from mnv2_fused.training.processes import join_moments, sum_over_processes
from mnv2_fused.training.reference_passes import ReferencePasses

Passes = FusedPasses | ReferencePasses

# Pixels of which the gradients of a batch norm are small differences of large sums.
_FEW = 64


class Conv(NamedTuple):
    """A convolution and the batch norm behind it, as a training operator gets them."""

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    batch: bool  # the batch's statistics, not fixed ones


class Needs(NamedTuple):
    """Which gradients of a `Conv` are wanted."""

    weight: bool
    gamma: bool
    beta: bool


class Gradients(NamedTuple):
    """The gradients of a `Conv`; None if they were not computed."""

    d_weight: Tensor | None = None
    d_gamma: Tensor | None = None
    d_beta: Tensor | None = None


class Moments(NamedTuple):
    """Of a convolution's input, over the pixels of all processes. Without statistics of the batch nothing is known."""

    mean: Tensor  # (c), or empty
    products: Tensor  # (c, c): sums of products of the centred input; or empty
    count: float  # pixels, or 0


def passes_for(dtype: torch.dtype) -> type[Passes]:
    """The passes that compute on inputs of `dtype`."""
    return ReferencePasses if dtype == torch.float64 else FusedPasses


def as_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as passes take it: dense, channels_last."""
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def no_moments(x: Tensor) -> Moments:
    """Tensors of its own each time: an operator must not return one twice."""
    return Moments(x.new_empty(0, dtype=torch.float64), x.new_empty(0, dtype=torch.float64), 0.0)


def norm_of(passes: Passes, conv: Conv, mean: Tensor, squares: Tensor, count: float) -> Tensor:
    """The `BatchNorm` rows of an input with this mean and sum of centred squares over `count` pixels."""
    return passes.norm(conv.gamma, conv.beta, mean, squares, count, conv.eps)


def fixed_norm(passes: Passes, conv: Conv, mean: Tensor, var: Tensor) -> Tensor:
    """The `BatchNorm` rows with fixed statistics."""
    return passes.norm(conv.gamma, conv.beta, mean, var, 1.0, conv.eps)


def linear_norm(passes: Passes, conv: Conv, matrix: Tensor, x: Tensor, group: str) -> tuple[Tensor, Moments, bool]:
    """The batch norm with the batch's statistics behind `matrix` (c_out, c) times x; the moments of x; and whether the
    forward must use the centred x, as the backward does: if not, the two round differently.
    """
    for exact in (False, True):
        count, mean, products = join_moments(pixels(x), *passes.moments(x, exact), group)
        mean_z, squares, cancels = passes.linear_moments(matrix, mean, products, count * conv.eps)
        if not cancels:
            break
    return norm_of(passes, conv, mean_z, squares, count), Moments(mean, products, count), cancels or pixels(x) <= _FEW


def centre(passes: Passes, x: Tensor, norm: Tensor, moments: Moments, slot: int) -> tuple[Tensor, Tensor]:
    """`x` minus its mean, in this slot of the workspace, and scale and shift of `norm` behind a linear map of it."""
    mean = moments.mean
    return passes.map_combine(x, torch.ones_like(mean), -mean, slot=slot), norm[BatchNorm.CENTRED]


def linear_backward(
    passes: Passes,
    conv: Conv,
    norm: Tensor,
    matrix: Tensor,
    d_folded: Tensor | None,
    sum_dy: Tensor,
    sum_dy_linear: Tensor,
    d_x: Tensor | None,
    x: Tensor,
    moments: Moments,
    group: str,
    shortcut: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Gradients of x and of the parameters of a linear map with batch norm.

    matrix: the weights (c_out, c). dy is the gradient of the norm's output.
    d_folded: (c_out, c), the gradient of the folded weights: the sum over pixels of dy x'; None if no parameter needs
    it and statistics are fixed.
    sum_dy_linear: (c_out), the sum over pixels of dy * (folded weights x).
    d_x: the gradient of x through the folded weights alone, None if not wanted; written.
    x: centred if the statistics are the batch's. shortcut: added to d_x.
    """
    d_weight = d_gamma = None
    if d_folded is not None:
        d_weight, d_gamma = passes.linear_gradients(norm, matrix, d_folded, sum_dy, sum_dy_linear, conv.batch)
    if conv.batch:
        total_d_gamma, total_d_beta = sum_over_processes([d_gamma, sum_dy], group)
        share = pixels(x) / moments.count if group else 1.0
        d_weight, d_x = passes.linear_correction(
            d_weight, d_x, norm, matrix, total_d_gamma, total_d_beta, moments.products, moments.count, share, x,
            shortcut,
        )  # fmt: skip
    elif d_x is not None and shortcut is not None:
        d_x = d_x.add_(shortcut)
    return d_x, Gradients(d_weight, d_gamma, sum_dy)


def _like(gradient: Tensor, t: Tensor) -> Tensor:
    if gradient.dtype != t.dtype:
        gradient = gradient.to(t.dtype)
    return gradient if gradient.shape == t.shape else gradient.view(t.shape)


def finish(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients as an operator returns them: of each given input, in its dtype and shape, or empty if not needed."""
    return tuple(
        _like(gradient, t) if need else t.new_empty(0)
        for gradient, t, need in zip(gradients, inputs, needs, strict=True)
        if t is not None
    )
