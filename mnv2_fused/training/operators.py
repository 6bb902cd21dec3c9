"""The training operators on the CPU: the closed form of batch norm over the passes of `passes`; see `training`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused.training.passes import BETA, MEAN, SCALE, SHIFT, Fused, Plain, S

RECOMPUTE = ("most", "balanced", "least")

_ops = torch.ops.mnv2_fused


# ------------------------------------------------------------------------------------------------ processes


def _add_up(tensors: Sequence[Tensor], group: str) -> list[Tensor]:
    """The sums of float64 tensors over the processes of a group."""
    if not group:
        return list(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=dist.distributed_c10d._resolve_process_group(group))
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _joined(count: int, mean: Tensor, products: Tensor, group: str) -> tuple[float, Tensor, Tensor]:
    """Count, mean, and centred squares (c) or products (c, c) of the pixels of all processes."""
    if not group:
        return float(count), mean, products
    outer = (lambda v: v.square()) if products.dim() == 1 else (lambda v: torch.outer(v, v))
    total, sums, raw = _add_up([mean.new_tensor(float(count)), mean * count, products + outer(mean) * count], group)
    joined = sums / total
    rest = raw - outer(joined) * total
    return total.item(), joined, rest.clamp_min(0) if rest.dim() == 1 else rest


# ------------------------------------------------------------------------------------------------- the block


def _kernels(x: Tensor) -> type[Fused] | type[Plain]:
    return Plain if x.dtype == torch.float64 else Fused


def _as_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as the passes take it: dense, channels_last."""
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _centred(
    passes: Fused | Plain, x: Tensor, norm: Tensor, mean: Tensor | None, passing: int
) -> tuple[Tensor, Tensor]:
    """`x` minus its mean, and scale and shift of the batch norm behind a linear map of that; else as they are."""
    if mean is None:
        return x, norm
    return passes.map_combine(x, torch.ones_like(mean), -mean, passing=passing), norm[:: BETA - SCALE]


class _Moments(NamedTuple):
    """Of the input of a convolution that a batch norm with batch statistics follows; nothing is known otherwise."""

    products: Tensor  # (c, c), centred
    count: float  # pixels of all processes
    share: float  # of them, in this process
    group: str


def _linear_backward(
    passes: Fused | Plain,
    norm: Tensor,
    batch: bool,
    matrix: Tensor,  # (c_out, c): the weights
    products: Tensor | None,  # (c_out, c): A; None where no parameter wants it and the statistics are fixed
    dbeta: Tensor,
    dx: Tensor | None,  # through the folded weights alone; None where not wanted
    x: Tensor,  # centred where the statistics are the batch's
    moments: _Moments,
    shortcut: Tensor | None,  # added to dx
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, weights, gamma and beta of a linear map with batch norm: the closed form."""
    dw = dgamma = None
    if products is not None:
        dw, dgamma = passes.linear_gradients(norm, matrix, products, dbeta, batch)
    if not batch:
        if dx is not None and shortcut is not None:
            dx = dx.add_(shortcut)
        return dx, dw, dgamma, dbeta
    of_gamma, of_beta = _add_up([dgamma, dbeta], moments.group)
    dw, dx = passes.linear_correction(
        dw, dx, norm, matrix, of_gamma, of_beta, moments.products, moments.count, moments.share, x, shortcut
    )
    return dx, dw, dgamma, dbeta


@torch.library.impl("mnv2_fused::train_block", "CPU")
def _train_block(
    x, w1, g1, b1, w2, g2, b2, w3, g3, b3, running, eps, batch, block, bounds, group, recompute, keep,
):  # fmt: skip
    kernels = _kernels(x)
    shape = BlockShape.of(x.shape[1], block)
    source = _as_map(x, kernels.dtype)
    # No two outputs may be the same tensor.
    nothing, mean_x, products = (source.new_empty(0, dtype=torch.float64) for _ in range(3))
    running, first, maps = iter(running), None, kernels()
    count_in = count = 0.0
    if w1 is not None:
        if batch[0]:
            count_in, mean_x, products = _joined(_pixels(x), *maps.moments(source), group)
            first = maps.norm(g1, b1, *maps.linear_moments(w1.flatten(1), mean_x, products), count_in, eps[0])
        else:
            first = maps.norm(g1, b1, next(running), next(running), 1.0, eps[0])
    passes = kernels(shape, bounds, w1, first, w2, w3)

    h, w = shape.size_out(x.shape[2], x.shape[3])
    pixels, lasting = x.shape[0] * h * w, keep and _lasts(recompute, batch, shape, x)
    hidden = None
    if batch[1]:
        hidden, mean, squares = passes.hidden(source, _keeps(recompute, w1), lasting)
        count, mean, squares = _joined(pixels, mean, squares, group)
        second = maps.norm(g2, b2, mean, squares, count, eps[1])
    else:
        second = maps.norm(g2, b2, next(running), next(running), 1.0, eps[1])
    z = passes.project(source, hidden, second)

    if batch[2]:
        count, mean, squares = _joined(pixels, *passes.map_moments(z), group)
        third = maps.norm(g3, b3, mean, squares, count, eps[2])
    else:
        third = maps.norm(g3, b3, next(running), next(running), 1.0, eps[2])
    y = passes.map_combine(z, third[SCALE], third[SHIFT], c=source if shape.residual else None, in_place=not keep)
    return (
        y.to(x.dtype),
        z.to(x.dtype) if keep else x.new_empty(0),
        hidden if lasting else source.new_empty(0),
        mean_x,
        products,
        nothing if first is None else first,
        second,
        third,
        torch.tensor([count_in, count], dtype=torch.float64),
    )


@torch.library.impl("mnv2_fused::train_block_backward", "CPU")
def _train_block_backward(
    dy, x, z, hidden, mean_x, products, first, second, third, counts, w1, g1, b1, w2, g2, b2, w3, g3, b3,
    eps, batch, block, bounds, group, recompute, needs,
):  # fmt: skip
    kernels = _kernels(x)
    shape = BlockShape.of(x.shape[1], block)
    needs_x, needs_w1, needs_g1, needs_b1, needs_w2, needs_g2, needs_b2, needs_w3, needs_g3, needs_b3 = needs
    grads: list[Tensor | None] = [None] * 10
    source, dy = _as_map(x, kernels.dtype), _as_map(dy, kernels.dtype)
    count_in, count = counts.tolist()
    folded = None
    if w1 is not None:
        source, folded = _centred(kernels(), source, first, mean_x if batch[0] else None, 3)
    passes = kernels(shape, bounds, w1, folded, w2, w3)

    # The third batch norm. With fixed statistics its scale is left to the weights behind it.
    dz, project_norm = dy, third
    if needs_g3 or needs_b3 or batch[2]:
        z = _as_map(z, kernels.dtype)
        grads[9], product = passes.map_products(dy, z, third[MEAN])
        grads[8] = third[S] * product
        if batch[2]:
            rows = passes.norm_backward(third, *_add_up([grads[9], product], group), count)
            dz, project_norm = passes.map_combine(dy, rows[3], rows[5], z, rows[4], passing=2), None
        z = None

    deeper = needs_x or needs_w1 or needs_g1 or needs_b1 or needs_w2
    if deeper or needs_w3 or needs_g2 or needs_b2:
        # The projection and the second batch norm; unless its statistics are fixed, in a pass of their own.
        hidden = hidden if hidden.numel() > 0 else None
        gradient = None
        wants = w1 is not None and (batch[0] or needs_w1 or needs_g1)
        passes.turn_back(project_norm)
        if batch[1] or not deeper:
            hidden, gradient, projection = passes.project_backward(
                source, hidden, dz, second, deeper and _keeps(recompute, w1), needs_w3
            )
            if deeper:
                sums = _add_up([projection.of_gradient, projection.of_product], group)
                rows = passes.norm_backward(second, *sums, count)
                dx, grads[4], expand, dbeta, _ = passes.hidden_backward(
                    source, hidden, gradient, dz, rows, needs_x, wants
                )
        else:
            dx, grads[4], expand, dbeta, projection = passes.hidden_backward(
                source, hidden, None, dz, passes.norm_backward(second), needs_x, wants, True, needs_w3
            )
        grads[5], grads[6] = second[S] * projection.of_product, projection.of_gradient
        if needs_w3:
            grads[7] = projection.weight
            if project_norm is not None:
                grads[7] = grads[7] * project_norm[SCALE].unsqueeze(1)

    if deeper:
        # The first batch norm and the expansion.
        shortcut = dy if shape.residual else None
        if w1 is not None:
            moments = _Moments(products, count_in, _pixels(x) / count_in if group else 1.0, group)
            dx, *grads[1:4] = _linear_backward(
                passes, first, batch[0], w1.flatten(1), expand, dbeta, dx, source, moments, shortcut
            )
        elif needs_x and shape.residual:
            dx = dx.add_(shortcut)
        grads[0] = dx
    return _finished(grads, (x, w1, g1, b1, w2, g2, b2, w3, g3, b3), needs)


# Multiply-adds that making a depthwise output again must cost for `balanced` to keep it until the backward.
_WORTH_KEEPING = 128


def _keeps(recompute: str, expand: Tensor | None) -> bool:
    """Whether wide maps are kept between the passes of a block. Without an expansion, making them again is faster."""
    return recompute == "least" or (recompute == "balanced" and expand is not None)


def _lasts(recompute: str, batch: Sequence[bool], shape: BlockShape, x: Tensor) -> bool:
    """Whether the depthwise outputs are kept from the forward to the backward: never with fixed statistics, where one
    pass either way is all there is.
    """
    costs = x.shape[1] * shape.stride**2 if shape.has_expand else 0
    return batch[1] and (recompute == "least" or (recompute == "balanced" and costs >= _WORTH_KEEPING))


def _finished(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients in dtype and shape of their inputs; empty where not needed."""
    return tuple(
        (grad if grad.dtype == t.dtype else grad.to(t.dtype)).view(t.shape) if need else t.new_empty(0)
        for grad, t, need in zip(grads, inputs, needs, strict=True)
        if t is not None
    )


# ------------------------------------------------------------------------------------------- a dense convolution


def _is_pointwise(shape: DenseShape) -> bool:
    return shape.kernel == 1 and shape.stride == 1 and not any(shape.padding)


def _windows(passes: Fused | Plain, x: Tensor, shape: DenseShape) -> Tensor:
    """What the convolution is a linear map of: (n, kernel * kernel * c, h_out, w_out), channel fastest."""
    return _as_map(x, passes.dtype) if _is_pointwise(shape) else passes.windows(x.detach().to(passes.dtype), shape)


def _window_matrix(weight: Tensor) -> Tensor:
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


@torch.library.impl("mnv2_fused::train_dense", "CPU")
def _train_dense(x, weight, gamma, beta, running, eps, batch, dense, bounds, group):
    passes, shape = _kernels(x)(), DenseShape.of(x.shape[1], dense)
    mean, products = (x.new_empty(0, dtype=torch.float64) for _ in range(2))
    count, statistics = 0.0, running
    if batch:
        windows = _windows(passes, x, shape)
        count, mean, products = _joined(_pixels(windows), *passes.moments(windows), group)
        statistics = passes.linear_moments(_window_matrix(weight), mean, products)
    norm = passes.norm(gamma, beta, *statistics, count if batch else 1.0, eps)
    y = passes.dense(x.detach().to(passes.dtype), weight.detach(), norm, shape, bounds)
    return y.to(x.dtype), mean, products, norm, torch.tensor([count], dtype=torch.float64)


@torch.library.impl("mnv2_fused::train_dense_backward", "CPU")
def _train_dense_backward(
    dy, x, mean, products, norm, counts, weight, gamma, beta, eps, batch, dense, bounds, group, needs
):
    passes, shape = _kernels(x)(), DenseShape.of(x.shape[1], dense)
    windows, matrix = _windows(passes, x, shape), _window_matrix(weight)
    windows, folded = _centred(passes, windows, norm, mean if batch else None, 0)
    gradient = _as_map(dy, passes.dtype)
    dx, expand, dbeta = passes.linear_backward(windows, gradient, matrix, folded, *bounds, needs[0])
    count = counts.item()
    moments = _Moments(products, count, _pixels(windows) / count if group else 1.0, group)
    dx, dw, dgamma, dbeta = _linear_backward(passes, norm, batch, matrix, expand, dbeta, dx, windows, moments, None)
    c_out, c, kernel, _ = weight.shape
    dw = dw.view(c_out, kernel, kernel, c).permute(0, 3, 1, 2).contiguous()
    if dx is not None and not _is_pointwise(shape):
        dx = _add_windows(dx, x.shape, shape)
    return _finished([dx, dw, dgamma, dbeta], (x, weight, gamma, beta), needs)


def _add_windows(windows: Tensor, size: Sequence[int], shape: DenseShape) -> Tensor:
    """The adjoint of `_windows`: (n, kernel * kernel * c, h_out, w_out) to (n, c, h, w)."""
    n, c, h, w = size
    (top, left, bottom, right), taps = shape.padding, shape.kernel**2
    columns = windows.reshape(n, taps, c, -1).transpose(1, 2).reshape(n, c * taps, -1)
    x = torch.nn.functional.fold(columns, (h + top + bottom, w + left + right), shape.kernel, stride=shape.stride)
    return x[:, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
