"""Training through fused units: batch-norm statistics and gradients without any expanded tensor kept.

The first convolution of a block is 1x1, so what its batch norm needs follows from moments of the block's input. With
z1 = W x, m = mean of x, S = its covariance over P pixels, s = 1 / sqrt(var + eps), and a hat for what is normalised:

    mean of z1 = W m,  variance of z1 = diag(W S W')

and, with h the gradient of the batch norm's output, A = sum over the pixels of h (x - m)', c = gamma s^2 dgamma / P:

    dbeta = sum h,  dgamma = s rowsum(A * W)
    dW = diag(gamma s) A - diag(c) W (P S)
    dx = h diag(gamma s) W - W' (gamma s dbeta / P) - (x - m) W' diag(c) W

Everything is centred, so no digits are lost where means are large; on a centred input the folded convolution's bias is
beta alone. The second batch norm needs a pass over the depthwise outputs of its own, forward and backward, after which
they are made again or were kept, as `recompute` says:

    most       nothing wide is ever stored; least memory
    balanced   wide tensors of one block at a time, within its forward or its backward; depthwise outputs are kept from
               the forward to the backward where they are few and dear: after a stride, or with many channels
    least      depthwise outputs are kept from the forward to the backward; most speed

With fixed statistics (eval mode) c and the term with dbeta / P vanish, and one pass either way is all there is.

Operators: `train_block`, `train_dense` (a dense convolution, batch norm and clamp: the stem, and the last 1x1) and
their backward. Vectors over channels are float64. With a process group the sums over pixels are those of all its
processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnv2_fused._core.inspect import DTYPES, BlockSpec, StemSpec, resolve_padding, shape_reason
from mnv2_fused.training.passes import (
    BETA,
    MEAN,
    NORM,
    SCALE,
    SHIFT,
    UNBIASED,
    BlockShape,
    Fused,
    Plain,
    S,
    wide_size,
    window_counts,
)

__all__ = ["RECOMPUTE", "train_block", "train_dense"]

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


def _shape(expand: Tensor | None, depthwise: Tensor, project: Tensor, stride, dilation, padding, lo, hi) -> BlockShape:
    c_hidden, kernel = depthwise.shape[0], depthwise.shape[2]
    return BlockShape(c_hidden, project.shape[0], kernel, stride, dilation, tuple(padding), expand is not None, lo, hi)


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
    x, w1, g1, b1, w2, g2, b2, w3, g3, b3, running, eps, batch, stride, dilation, padding, residual, lo, hi, group,
    recompute, keep,
):  # fmt: skip
    kernels = _kernels(x)
    shape = _shape(w1, w2, w3, stride, dilation, padding, lo, hi)
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
    passes = kernels(shape, w1, first, w2, w3)

    h, w = shape.size(x)
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
    y = passes.map_combine(z, third[SCALE], third[SHIFT], c=source if residual else None, in_place=not keep)
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
    eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute, needs,
):  # fmt: skip
    kernels = _kernels(x)
    shape = _shape(w1, w2, w3, stride, dilation, padding, lo, hi)
    needs_x, needs_w1, needs_g1, needs_b1, needs_w2, needs_g2, needs_b2, needs_w3, needs_g3, needs_b3 = needs
    grads: list[Tensor | None] = [None] * 10
    source, dy = _as_map(x, kernels.dtype), _as_map(dy, kernels.dtype)
    count_in, count = counts.tolist()
    folded = None
    if w1 is not None:
        source, folded = _centred(kernels(), source, first, mean_x if batch[0] else None, 3)
    passes = kernels(shape, w1, folded, w2, w3)

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
        shortcut = dy if residual else None
        if w1 is not None:
            moments = _Moments(products, count_in, _pixels(x) / count_in if group else 1.0, group)
            dx, *grads[1:4] = _linear_backward(
                passes, first, batch[0], w1.flatten(1), expand, dbeta, dx, source, moments, shortcut
            )
        elif needs_x and residual:
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


def _windows(passes: Fused | Plain, x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    """What the convolution is a linear map of: (n, kernel * kernel * c, h_out, w_out), channel fastest."""
    kernel = weight.shape[2]
    if kernel == 1 and stride == 1 and not any(padding):
        return _as_map(x, passes.dtype)
    return passes.windows(x.detach().to(passes.dtype), kernel, stride, tuple(padding))


def _window_matrix(weight: Tensor) -> Tensor:
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


@torch.library.impl("mnv2_fused::train_dense", "CPU")
def _train_dense(x, weight, gamma, beta, running, eps, batch, stride, padding, lo, hi, group):
    passes = _kernels(x)()
    mean, products = (x.new_empty(0, dtype=torch.float64) for _ in range(2))
    count, statistics = 0.0, running
    if batch:
        windows = _windows(passes, x, weight, stride, padding)
        count, mean, products = _joined(_pixels(windows), *passes.moments(windows), group)
        statistics = passes.linear_moments(_window_matrix(weight), mean, products)
    norm = passes.norm(gamma, beta, *statistics, count if batch else 1.0, eps)
    y = passes.dense(x.detach().to(passes.dtype), weight.detach(), norm, stride, tuple(padding), lo, hi)
    return y.to(x.dtype), mean, products, norm, torch.tensor([count], dtype=torch.float64)


@torch.library.impl("mnv2_fused::train_dense_backward", "CPU")
def _train_dense_backward(
    dy, x, mean, products, norm, counts, weight, gamma, beta, eps, batch, stride, padding, lo, hi, group, needs
):
    passes = _kernels(x)()
    windows, matrix = _windows(passes, x, weight, stride, padding), _window_matrix(weight)
    windows, folded = _centred(passes, windows, norm, mean if batch else None, 0)
    gradient = _as_map(dy, passes.dtype)
    dx, expand, dbeta = passes.linear_backward(windows, gradient, matrix, folded, lo, hi, needs[0])
    count = counts.item()
    moments = _Moments(products, count, _pixels(windows) / count if group else 1.0, group)
    dx, dw, dgamma, dbeta = _linear_backward(passes, norm, batch, matrix, expand, dbeta, dx, windows, moments, None)
    c_out, c, kernel, _ = weight.shape
    dw = dw.view(c_out, kernel, kernel, c).permute(0, 3, 1, 2).contiguous()
    if dx is not None and (kernel > 1 or stride > 1 or any(padding)):
        dx = _add_windows(dx, x.shape, kernel, stride, padding)
    return _finished([dx, dw, dgamma, dbeta], (x, weight, gamma, beta), needs)


def _add_windows(windows: Tensor, size: Sequence[int], kernel: int, stride: int, padding: Sequence[int]) -> Tensor:
    """The adjoint of `_windows`: (n, kernel * kernel * c, h_out, w_out) to (n, c, h, w)."""
    n, c, h, w = size
    top, left, bottom, right = padding
    columns = windows.reshape(n, kernel * kernel, c, -1).transpose(1, 2).reshape(n, c * kernel * kernel, -1)
    x = torch.nn.functional.fold(columns, (h + top + bottom, w + left + right), kernel, stride=stride)
    return x[:, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- the modules


def _uses_batch(norm: nn.Module) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _group_of(norms: Sequence[nn.Module]) -> str | None:
    """The process group whose batches the norms' statistics are of, or "": this process alone. None: they differ."""
    groups = set()
    for norm in norms:
        group = ""
        if type(norm) is nn.SyncBatchNorm and norm.training and dist.is_available() and dist.is_initialized():
            process_group = norm.process_group or dist.group.WORLD
            group = process_group.group_name if process_group.size() > 1 else ""
        groups.add(group)
    return groups.pop() if len(groups) == 1 else None


def _arguments(norms: Sequence[nn.Module]) -> tuple[list[Tensor], list[bool], str] | None:
    """Fixed statistics, which norms use the batch's, and the process group; None where plain PyTorch must decide."""
    batch, running = [_uses_batch(norm) for norm in norms], []
    for norm, uses in zip(norms, batch, strict=True):
        if not uses:
            if norm.running_mean is None or norm.running_var is None:
                return None
            running += [norm.running_mean, norm.running_var]
    group = _group_of(norms)
    return None if group is None else (running, batch, group)


@torch.no_grad()
def _track(norm: nn.Module, statistics: Tensor) -> None:
    """Running statistics and their count, as `nn.BatchNorm2d.forward` keeps them."""
    if not norm.training or not norm.track_running_stats:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / norm.num_batches_tracked.float()
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum = 0.0 if momentum is None else momentum
    mean, var = statistics[MEAN : UNBIASED + 1].to(norm.running_mean.dtype).unbind()
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)


def train_reason(spec: BlockSpec | StemSpec, x: Tensor | None) -> str | None:
    """Why a unit that can be read must run plain, for the input `x` where that is known; None where it trains fused."""
    dtype = _dtype(spec, x)
    if dtype not in DTYPES:
        return f"the arithmetic is {dtype}, not float32, bfloat16 or float16"
    if _arguments(spec.norms) is None:
        return "the batch norms differ in their process groups, or have no running statistics"
    return None if x is None else _input_reason(spec, x, dtype)


def _dtype(spec: BlockSpec | StemSpec, x: Tensor | None) -> torch.dtype:
    """What PyTorch's convolutions would compute in."""
    casts = torch.is_autocast_enabled("cpu") and (x is None or x.dtype != torch.float64)
    return torch.get_autocast_dtype("cpu") if casts else spec.dtype


def _input_reason(spec: BlockSpec | StemSpec, x: Tensor, dtype: torch.dtype) -> str | None:
    """Why `x` does not fit the unit that computes in `dtype`, to which autocast casts it first."""
    casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return shape_reason(spec, x, x.dtype if casts else dtype) or ("the batch is empty" if x.shape[0] == 0 else None)


def _input(x: Tensor, spec: BlockSpec | StemSpec) -> Tensor | None:
    """`x` in the dtype that PyTorch's convolutions would compute in; None where `x` does not fit."""
    dtype = _dtype(spec, x)
    return x.to(dtype) if dtype in DTYPES and _input_reason(spec, x, dtype) is None else None


def train_block(x: Tensor, spec: BlockSpec, recompute: str) -> Tensor | None:
    """A block's output, channels_last, with gradients; keeps its batch norms' statistics. None where plain PyTorch must
    run (or has an error to report).
    """
    source, arguments = _input(x, spec), _arguments(spec.norms)
    if source is None or arguments is None:
        return None
    running, batch, group = arguments
    padding = resolve_padding(spec, x.shape[2], x.shape[3])
    weights = [t for i in (0, 6, 12) for t in (spec.tensors[i], *spec.tensors[i + 2 : i + 4])]
    shape = _shape(*weights[::3], spec.stride, spec.dilation, padding, spec.lo, spec.hi)
    h, w = shape.size(source)
    pixels = [x.shape[0] * h * w] * len(batch)
    if spec.has_expand:
        pixels[0] = x.shape[0] * x.shape[2] * x.shape[3]
    if not group and any(uses and count == 1 for uses, count in zip(batch, pixels, strict=True)):
        return None
    # A shortcut from an input of another dtype is added as PyTorch adds it.
    residual = spec.residual and source is x
    source = source.contiguous(memory_format=torch.channels_last)
    batch = batch if spec.has_expand else [False, *batch]
    y, _, _, _, _, *norms, _ = _call(
        _ops.train_block.default, _Block,
        source, *weights, running, list(spec.eps), batch, spec.stride, spec.dilation, list(padding), residual,
        spec.lo, spec.hi, group, recompute, torch.is_grad_enabled(),
    )  # fmt: skip
    for i, norm in enumerate(reversed(spec.norms)):
        if batch[2 - i]:
            _track(norm, norms[2 - i])
    return x + y if spec.residual and not residual else y


def train_dense(x: Tensor, spec: StemSpec) -> Tensor | None:
    """The same of a dense convolution with batch norm and activation."""
    source, arguments = _input(x, spec), _arguments(spec.norms)
    if source is None or arguments is None:
        return None
    running, (batch,), group = arguments
    padding = list(resolve_padding(spec, x.shape[2], x.shape[3]))
    weight, _, gamma, beta, _, _ = spec.tensors
    h, w = window_counts(source, spec.kernel, spec.stride, padding)
    if batch and not group and x.shape[0] * h * w == 1:
        return None
    y, _, _, norm, _ = _call(
        _ops.train_dense.default, _Dense,
        source, weight, gamma, beta, running, spec.eps[0], batch, spec.stride, padding, spec.lo, spec.hi, group,
    )  # fmt: skip
    if batch:
        _track(spec.norms[0], norm)
    return y


# ------------------------------------------------------------------------------------------------ registrations


def _double(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=torch.float64)


def _map_like(x: Tensor, c: int, h, w) -> Tensor:
    return torch.empty((x.shape[0], c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("mnv2_fused::train_block")
def _(
    x, w1, g1, b1, w2, g2, b2, w3, g3, b3, running, eps, batch, stride, dilation, padding, residual, lo, hi, group,
    recompute, keep,
):  # fmt: skip
    shape = _shape(w1, w2, w3, stride, dilation, padding, lo, hi)
    h, w = shape.size(x)
    c = x.shape[1] if w1 is not None and batch[0] else 0
    wide = x.new_empty(0, dtype=_kernels(x).dtype)
    if keep and _lasts(recompute, batch, shape, x):
        wide = x.new_empty(wide_size(x, shape), dtype=wide.dtype)
        if x.dtype == torch.float64:
            wide = _map_like(x, shape.c_hidden, h, w)
    return (
        _map_like(x, shape.c_out, h, w),
        _map_like(x, shape.c_out, h, w) if keep else x.new_empty(0),
        wide,
        _double(x, c),
        _double(x, c, c) if c else _double(x, 0),
        _double(x, len(NORM), shape.c_hidden) if w1 is not None else _double(x, 0),
        _double(x, len(NORM), shape.c_hidden),
        _double(x, len(NORM), shape.c_out),
        _double(x, 2),
    )


@torch.library.register_fake("mnv2_fused::train_dense")
def _(x, weight, gamma, beta, running, eps, batch, stride, padding, lo, hi, group):
    c_out, c, kernel, _ = weight.shape
    h, w = window_counts(x, kernel, stride, padding)
    k = c * kernel * kernel if batch else 0
    products = _double(x, k, k) if batch else _double(x, 0)
    return _map_like(x, c_out, h, w), _double(x, k), products, _double(x, len(NORM), c_out), _double(x, 1)


def _fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    formats = (torch.channels_last, *(torch.contiguous_format,) * len(inputs))
    return [
        torch.empty_like(t, memory_format=memory_format) if need else t.new_empty(0)
        for t, need, memory_format in zip(inputs, needs, formats, strict=False)
        if t is not None
    ]


@torch.library.register_fake("mnv2_fused::train_block_backward")
def _(
    dy, x, z, hidden, mean_x, products, first, second, third, counts, w1, g1, b1, w2, g2, b2, w3, g3, b3,
    eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute, needs,
):  # fmt: skip
    return _fake_gradients((x, w1, g1, b1, w2, g2, b2, w3, g3, b3), needs)


@torch.library.register_fake("mnv2_fused::train_dense_backward")
def _(
    dy, x, mean, products, statistics, counts, weight, gamma, beta, eps, batch, stride, padding, lo, hi, group, needs
):
    return _fake_gradients((x, weight, gamma, beta), needs)


def _given(gradients: Sequence[Tensor], inputs: Sequence[object], needs: Sequence[bool]) -> list[Tensor | None]:
    """One gradient an input: those of inputs that are None were left out, those not needed are empty."""
    gradients = iter(gradients)
    found = (None if t is None else next(gradients) for t in inputs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _setup_block(ctx, inputs, output):
    x, *parameters, running, eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute, _ = inputs
    z, hidden, *statistics = output[1:]
    ctx.mark_non_differentiable(z, hidden, *statistics)
    ctx.set_materialize_grads(False)
    # With fixed statistics only gamma and beta of the third batch norm look at its input.
    wants_z = batch[2] or any(t is not None and t.requires_grad for t in parameters[7:])
    ctx.save_for_backward(x, z if wants_z else z.new_empty(0), hidden, *statistics, *parameters)
    ctx.running = len(running)
    ctx.settings = (eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute)


def _backward_block(ctx, dy, *_):
    """Gradients of x and the nine parameters."""
    x, z, hidden, *rest = ctx.saved_tensors
    norms, inputs = rest[:6], (x, *rest[6:])
    if dy is None:
        return [None] * len(inputs)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_block_backward.default(dy, x, z, hidden, *norms, *inputs[1:], *ctx.settings, needs)
    return _given(gradients, inputs, needs)


def _setup_dense(ctx, inputs, output):
    x, weight, gamma, beta, running, eps, batch, stride, padding, lo, hi, group = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *statistics, weight, gamma, beta)
    ctx.running = len(running)
    ctx.settings = (eps, batch, stride, padding, lo, hi, group)


def _backward_dense(ctx, dy, *_):
    """Gradients of x, weight, gamma and beta."""
    x, mean, products, norm, counts, *parameters = ctx.saved_tensors
    inputs = (x, *parameters)
    if dy is None:
        return [None] * len(inputs)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_dense_backward.default(
        dy, x, mean, products, norm, counts, *parameters, *ctx.settings, needs
    )
    return _given(gradients, inputs, needs)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "mnv2_fused: the gradient of a fused unit cannot be differentiated again (create_graph=True); "
        "set model.fused = False for second derivatives"
    )


class _Block(torch.autograd.Function):
    """`train_block` with its formula, as a call outside graphs takes it: what `register_autograd` does besides costs as
    much time as a small block, and so does a `setup_context` of its own, for which PyTorch reads signatures.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.train_block.default(*inputs)
        _setup_block(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return (*_backward_block(ctx, *gradients), *(None,) * 12)


class _Dense(torch.autograd.Function):
    """The same of `train_dense`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.train_dense.default(*inputs)
        _setup_dense(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return (*_backward_dense(ctx, *gradients), *(None,) * 8)


def _call(operator, function: type[_Block] | type[_Dense], *inputs):
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return operator(*inputs)
    return function.apply(*inputs)


def _register(name: str, backward, setup_context, after: int) -> None:
    """`after`: arguments that follow the list of fixed statistics."""

    def formula(ctx, *gradients):
        return (*backward(ctx, *gradients), [None] * ctx.running, *(None,) * after)

    torch.library.register_autograd(name, formula, setup_context=setup_context)


_register("mnv2_fused::train_block", _backward_block, _setup_block, 11)
_register("mnv2_fused::train_dense", _backward_dense, _setup_dense, 7)
for _name in ("train_block_backward", "train_dense_backward"):
    torch.library.register_autograd(
        f"mnv2_fused::{_name}", _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
