"""`train_dense` on the CPU: a dense convolution with batch norm and clamp, a linear map of its windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core.geometry import DenseShape
from mnv2_fused.training.closed_form import (
    Conv,
    Moments,
    Passes,
    as_map,
    centre,
    finish,
    fixed_norm,
    linear_backward,
    linear_norm,
    no_moments,
    passes_for,
)
from mnv2_fused.training.passes import Slot


def _is_pointwise(shape: DenseShape) -> bool:
    return shape.kernel == 1 and shape.stride == 1 and not any(shape.padding)


def _windows(passes: Passes, x: Tensor, shape: DenseShape) -> Tensor:
    """What each output pixel reads: (n, kernel * kernel * c, h_out, w_out), channel fastest."""
    return as_map(x, passes.dtype) if _is_pointwise(shape) else passes.windows(x.detach().to(passes.dtype), shape)


def _add_windows(windows: Tensor, size: Sequence[int], shape: DenseShape) -> Tensor:
    """The adjoint of `_windows`: (n, kernel * kernel * c, h_out, w_out) to (n, c, h, w)."""
    n, c, h, w = size
    (top, left, bottom, right), taps = shape.padding, shape.kernel**2
    columns = windows.reshape(n, taps, c, -1).transpose(1, 2).reshape(n, c * taps, -1)
    x = torch.nn.functional.fold(columns, (h + top + bottom, w + left + right), shape.kernel, stride=shape.stride)
    return x[:, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)


def _window_matrix(weight: Tensor) -> Tensor:
    """The weights as a linear map of windows: (c_out, kernel * kernel * c)."""
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


@torch.library.impl("mnv2_fused::train_dense", "CPU")
def _train_dense(x, weight, gamma, beta, running, eps, batch, dense, bounds, group):
    conv, shape = Conv(weight, gamma, beta, eps, batch), DenseShape.of(x.shape[1], dense)
    passes = passes_for(x.dtype)()
    if batch:
        windows, matrix = _windows(passes, x, shape), _window_matrix(weight)
        norm, moments, centred = linear_norm(passes, conv, matrix, windows, group)
    else:
        norm, moments, centred = fixed_norm(passes, conv, *running), no_moments(x), False
    if centred:
        windows, folded = centre(passes, windows, norm, moments, Slot.WINDOWS)
        pointwise = DenseShape(matrix.shape[1], matrix.shape[0], 1, 1, (0, 0, 0, 0))
        y = passes.dense(windows, matrix[:, :, None, None], folded, pointwise, bounds)
    else:
        y = passes.dense(x.detach().to(passes.dtype), weight.detach(), norm, shape, bounds)
    counts = torch.tensor([moments.count], dtype=torch.float64)
    return y.to(x.dtype), moments.mean, moments.products, norm, counts


@torch.library.impl("mnv2_fused::train_dense_backward", "CPU")
def _train_dense_backward(
    dy, x, mean, products, norm, counts, weight, gamma, beta, eps, batch, dense, bounds, group, needs
):
    needs_x, *_ = needs
    conv, shape = Conv(weight, gamma, beta, eps, batch), DenseShape.of(x.shape[1], dense)
    moments = Moments(mean, products, counts.item())
    passes = passes_for(x.dtype)()
    windows, matrix, folded = _windows(passes, x, shape), _window_matrix(weight), norm
    if batch:
        windows, folded = centre(passes, windows, norm, moments, Slot.WINDOWS)
    d_windows, *sums = passes.linear_backward(windows, as_map(dy, passes.dtype), matrix, folded, *bounds, needs_x)
    d_windows, gradients = linear_backward(passes, conv, norm, matrix, *sums, d_windows, windows, moments, group)
    d_x = d_windows
    if d_windows is not None and not _is_pointwise(shape):
        d_x = _add_windows(d_windows, x.shape, shape)
    c_out, c, kernel, _ = weight.shape
    d_weight = gradients.d_weight.view(c_out, kernel, kernel, c).permute(0, 3, 1, 2)
    d_weight = d_weight.flatten().view(weight.shape)  # the usual strides, also of the sides of length 1
    return finish([d_x, *gradients._replace(d_weight=d_weight)], (x, weight, gamma, beta), needs)
