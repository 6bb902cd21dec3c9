"""Training through fused units: batch-norm statistics and gradients without any expanded tensor kept.

The first convolution of a block is 1x1, so what its batch norm needs follows from moments of the block's input. With
z1 = W x, m = mean of x, S = its covariance over P pixels, s = 1 / sqrt(var + eps), and a hat for what is normalised:

    mean of z1 = W m,  variance of z1 = diag(W S W')

and, with h the gradient of the batch norm's output, A = sum over the pixels of h (x - m)', c = gamma s^2 dgamma / P:

    dbeta = sum h,  dgamma = s rowsum(A * W)
    dW = diag(gamma s) A - diag(c) W (P S)
    dx = h diag(gamma s) W - W' (gamma s dbeta / P) - (x - m) W' diag(c) W

Everything is centred, so no digits are lost where means are large. In eval mode c and the term with dbeta / P vanish. The
second batch norm needs a pass over the depthwise outputs forward and one backward, in which they are made again or were
kept, as `recompute` says:

    most       nothing wide is ever stored; least memory
    balanced   wide tensors of one block at a time, within its forward or its backward
    least      depthwise outputs are kept from the forward to the backward; most speed

Operators: `train_block`, `train_dense` (a dense convolution, batch norm and clamp: the stem, and the last 1x1) and their
backward. Vectors over channels are float64. With a process group the sums over pixels are those of all its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._passes import Affine, BlockShape, BlockWeights, Fused, Plain

__all__ = ["RECOMPUTE"]

RECOMPUTE = ("most", "balanced", "least")

_ops = torch.ops.mnv2_fused


class _Norm(NamedTuple):
    """One batch norm with known statistics: gamma (z - mean) s + beta. (c) each, float64."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    s: Tensor  # 1 / sqrt(var + eps)
    batch: bool  # the statistics depend on the input

    @staticmethod
    def of(gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, eps: float, batch: bool) -> _Norm:
        mean, var = statistics
        gamma = torch.ones_like(mean) if gamma is None else gamma.detach().double()
        beta = torch.zeros_like(mean) if beta is None else beta.detach().double()
        return _Norm(gamma, beta, mean, torch.rsqrt(var + eps), batch)

    @property
    def scale(self) -> Tensor:
        return self.gamma * self.s

    @property
    def shift(self) -> Tensor:
        return self.beta - self.mean * self.scale

    def backward(self, dbeta: Tensor, dgamma: Tensor, count: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of z is [0] * that of the output + [1] * z + [2]; dbeta and dgamma are of all `count` pixels."""
        scale = self.scale
        if not self.batch:
            return scale, torch.zeros_like(scale), torch.zeros_like(scale)
        b = -scale * self.s * dgamma / count
        return scale, b, -scale * dbeta / count - b * self.mean


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
    return total.item(), joined, raw - outer(joined) * total


def _statistics(count: int, mean: Tensor, squares: Tensor, group: str) -> tuple[float, Tensor]:
    """Count of all processes; mean and biased variance (2, c)."""
    total, mean, squares = _joined(count, mean, squares, group)
    return total, torch.stack([mean, squares.clamp_min(0) / total])


# ------------------------------------------------------------------------------------------------- the block


def _kernels(x: Tensor) -> type[Fused] | type[Plain]:
    return Plain if x.dtype == torch.float64 else Fused


def _as_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as the passes take it: dense, channels_last."""
    return x.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _matrix(weight: Tensor) -> Tensor:
    return weight.detach().double().reshape(weight.shape[0], -1)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _weights(
    expand: Tensor | None, first: _Norm | None, depthwise: Tensor, project: Tensor, dtype: torch.dtype
) -> BlockWeights:
    depthwise, project = (_matrix(w).to(dtype) for w in (depthwise, project))
    if first is None:
        return BlockWeights(None, None, depthwise, project)
    return BlockWeights(
        (_matrix(expand) * first.scale.unsqueeze(1)).to(dtype), first.shift.to(dtype), depthwise, project
    )


def _shape(expand: Tensor | None, depthwise: Tensor, project: Tensor, stride, dilation, padding, lo, hi) -> BlockShape:
    c_hidden, kernel = depthwise.shape[0], depthwise.shape[2]
    return BlockShape(c_hidden, project.shape[0], kernel, stride, dilation, tuple(padding), expand is not None, lo, hi)


@torch.library.impl("mnv2_fused::train_block", "CPU")
def _train_block(
    x, w1, g1, b1, w2, g2, b2, w3, g3, b3, running, eps, batch, stride, dilation, padding, residual, lo, hi, group,
    recompute,
):  # fmt: skip
    kernels = _kernels(x)
    dtype = kernels.dtype
    shape = _shape(w1, w2, w3, stride, dilation, padding, lo, hi)
    source = _as_map(x, dtype)
    nothing = source.new_empty(0, dtype=torch.float64)
    running = iter(running)

    def fixed():
        return torch.stack([next(running), next(running)]).double()

    first = first_statistics = mean_x = products = None
    count = count_in = 0.0
    if w1 is not None:
        if batch[0]:
            count_in, mean_x, products = _joined(_pixels(x), *kernels().moments(source), group)
            matrix = _matrix(w1)
            var = ((matrix @ products) * matrix).sum(1).clamp_min(0) / count_in
            first_statistics = torch.stack([matrix @ mean_x, var])
        else:
            first_statistics = fixed()
        first = _Norm.of(g1, b1, first_statistics, eps[0], batch[0])
    passes = kernels(shape, _weights(w1, first, w2, w3, dtype))

    h, w = shape.size(x)
    pixels = x.shape[0] * h * w
    keep = recompute == "least" or (recompute == "balanced" and batch[1])
    hidden = None
    if batch[1] or keep:
        hidden, mean, squares = passes.hidden(source, keep)
    if batch[1]:
        count, second_statistics = _statistics(pixels, mean, squares, group)
    else:
        second_statistics = fixed()
    second = _Norm.of(g2, b2, second_statistics, eps[1], batch[1])
    z = passes.project(source, hidden if keep else None, Affine(second.scale, second.shift, second.mean))

    if batch[2]:
        count, third_statistics = _statistics(pixels, *passes.map_moments(z), group)
    else:
        third_statistics = fixed()
    third = _Norm.of(g3, b3, third_statistics, eps[2], batch[2])
    y = passes.map_combine(z, third.scale, third.shift, None, None, source if residual else None)
    counts = torch.tensor([count_in, count], dtype=torch.float64)
    return (
        y.to(x.dtype),
        z.to(x.dtype),
        hidden if recompute == "least" else source.new_empty(0),
        nothing if mean_x is None else mean_x,
        nothing.view(0, 0) if products is None else products,
        nothing.view(2, 0) if first_statistics is None else first_statistics,
        second_statistics,
        third_statistics,
        counts,
    )


@torch.library.impl("mnv2_fused::train_block_backward", "CPU")
def _train_block_backward(
    dy, x, z, hidden, mean_x, products, first_statistics, second_statistics, third_statistics, counts,
    w1, g1, b1, w2, g2, b2, w3, g3, b3, eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute, needs,
):  # fmt: skip
    kernels = _kernels(x)
    dtype = kernels.dtype
    shape = _shape(w1, w2, w3, stride, dilation, padding, lo, hi)
    needs_x, needs_w1, needs_g1, needs_b1, needs_w2, needs_g2, needs_b2, needs_w3, needs_g3, needs_b3 = needs
    grads: list[Tensor | None] = [None] * 10
    source, dy = _as_map(x, dtype), _as_map(dy, dtype)
    count_in, count = counts.tolist()
    first = None if w1 is None else _Norm.of(g1, b1, first_statistics, eps[0], batch[0])
    second = _Norm.of(g2, b2, second_statistics, eps[1], batch[1])
    third = _Norm.of(g3, b3, third_statistics, eps[2], batch[2])
    affine = Affine(second.scale, second.shift, second.mean)
    weights = _weights(w1, first, w2, w3, dtype)
    passes = kernels(shape, weights)

    # The third batch norm. With fixed statistics its scale is left to the weights behind it.
    project, dz, weight_scale = weights.project, dy, third.scale
    if needs_g3 or needs_b3 or batch[2]:
        z = _as_map(z, dtype)
        db3, product = passes.map_products(dy, z, third.mean)
        dg3 = third.s * product
        grads[8], grads[9] = dg3, db3
        if batch[2]:
            dg3, db3 = _add_up([dg3, db3], group)
            a, b, c = third.backward(db3, dg3, count)
            dz, weight_scale = passes.map_combine(dy, a, c, z, b, None), None
        z = None
    if weight_scale is not None:
        project = (project * weight_scale.unsqueeze(1)).to(dtype)

    deeper = needs_x or needs_w1 or needs_g1 or needs_b1 or needs_w2
    if deeper or needs_w3 or needs_g2 or needs_b2:
        # The projection, and the second batch norm. With fixed statistics nothing has to be known of all pixels before
        # the way back goes on, but kept it is faster still.
        keep = recompute != "most" and deeper
        hidden = hidden if hidden.numel() > 0 else None
        hidden, gradient, dw3, db2, product = passes.project_backward(
            source, hidden, dz, project, affine, keep, needs_w3
        )
        dg2 = second.s * product
        grads[5], grads[6] = dg2, db2
        if needs_w3:
            grads[7] = dw3 if weight_scale is None else dw3 * weight_scale.unsqueeze(1)
        if batch[1]:
            dg2, db2 = _add_up([dg2, db2], group)

    if deeper:
        has_expand = w1 is not None
        centred = None
        if has_expand and (needs_w1 or needs_g1 or batch[0]):
            centred = passes.map_combine(source, *_centring(mean_x), None, None, None) if batch[0] else source
        dx, grads[4], expand, db1 = passes.hidden_backward(
            source, centred, hidden, gradient, dz, project, affine, second.backward(db2, dg2, count), needs_x
        )
        hidden = gradient = centred = None
        shortcut = dy if residual else None
        if has_expand:
            moments = _Moments(mean_x, products, count_in, _pixels(x) / count_in if group else 1.0, group)
            dx, *grads[1:4] = _linear_backward(passes, first, _matrix(w1), expand, db1, dx, source, moments, shortcut)
        elif needs_x and residual:
            dx = dx.add_(shortcut)
        grads[0] = dx
    return _finished(grads, (x, w1, g1, b1, w2, g2, b2, w3, g3, b3), needs)


class _Moments(NamedTuple):
    """Of the input of a convolution that a batch norm with batch statistics follows; nothing is known otherwise."""

    mean: Tensor  # (c)
    products: Tensor  # (c, c), centred
    count: float  # pixels of all processes
    share: float  # of them, in this process
    group: str


def _linear_backward(
    passes: Fused | Plain,
    norm: _Norm,
    matrix: Tensor,  # (c_out, c): the weights
    products: Tensor | None,  # (c_out, c): A; None where no parameter wants it and the statistics are fixed
    dbeta: Tensor,
    dx: Tensor | None,  # through the folded weights alone; None where not wanted
    x: Tensor,
    moments: _Moments,
    shortcut: Tensor | None,  # added to dx
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, weights, gamma and beta of a linear map with batch norm: the closed form."""
    dw = dgamma = None
    if products is not None:
        products = products.double()
        dgamma = (products * matrix).sum(1)
        dgamma = norm.s * (dgamma if norm.batch else dgamma - norm.mean * dbeta)
        dw = products * norm.scale.unsqueeze(1)
    if not norm.batch:
        if dx is not None and shortcut is not None:
            dx = dx.add_(shortcut)
        return dx, dw, dgamma, dbeta
    of_gamma, of_beta = _add_up([dgamma, dbeta], moments.group)
    c = (norm.scale * norm.s * of_gamma / moments.count).unsqueeze(1)
    dw -= c * (matrix @ moments.products) * moments.share
    if dx is not None:
        vector = matrix.t() @ (norm.scale * of_beta / moments.count)
        dx = passes.input_backward(dx, x, moments.mean, matrix.t() @ (c * matrix), vector, shortcut)
    return dx, dw, dgamma, dbeta


def _centring(mean: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(mean), -mean


def _finished(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients in dtype and shape of their inputs; empty where not needed."""
    return tuple(
        grad.to(t.dtype).reshape(t.shape) if i > 0 and need else grad.to(t.dtype) if need else t.new_empty(0)
        for i, (grad, t, need) in enumerate(zip(grads, inputs, needs, strict=True))
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
    return weight.detach().double().permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _folded_dense(weight: Tensor, norm: _Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (weight.detach().double() * norm.scale.view(-1, 1, 1, 1)).to(dtype), norm.shift.to(dtype)


@torch.library.impl("mnv2_fused::train_dense", "CPU")
def _train_dense(x, weight, gamma, beta, running, eps, batch, stride, padding, lo, hi, group):
    passes = _kernels(x)()
    nothing = x.new_empty(0, dtype=torch.float64)
    mean, products, count = nothing, nothing.view(0, 0), 0.0
    if batch:
        windows = _windows(passes, x, weight, stride, padding)
        count, mean, products = _joined(_pixels(windows), *passes.moments(windows), group)
        matrix = _window_matrix(weight)
        var = ((matrix @ products) * matrix).sum(1).clamp_min(0) / count
        statistics = torch.stack([matrix @ mean, var])
        windows = None
    else:
        statistics = torch.stack(list(running)).double()
    norm = _Norm.of(gamma, beta, statistics, eps, batch)
    folded = _folded_dense(weight, norm, passes.dtype)
    y = passes.dense(x.detach().to(passes.dtype), *folded, weight.shape[2], stride, tuple(padding), lo, hi)
    return y.to(x.dtype), mean, products, statistics, torch.tensor([count], dtype=torch.float64)


@torch.library.impl("mnv2_fused::train_dense_backward", "CPU")
def _train_dense_backward(
    dy, x, mean, products, statistics, counts, weight, gamma, beta, eps, batch, stride, padding, lo, hi, group, needs
):
    passes = _kernels(x)()
    windows = _windows(passes, x, weight, stride, padding)
    norm = _Norm.of(gamma, beta, statistics, eps, batch)
    folded, bias = _folded_dense(weight, norm, passes.dtype)
    folded = folded.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()
    centred = passes.map_combine(windows, *_centring(mean), None, None, None) if batch else windows
    dx, products_a, dbeta = passes.linear_backward(
        windows, centred, _as_map(dy, passes.dtype), folded, bias, lo, hi, needs[0]
    )
    count = counts.item()
    moments = _Moments(mean, products, count, _pixels(windows) / count if group else 1.0, group)
    matrix = _window_matrix(weight)
    dx, dw, dgamma, dbeta = _linear_backward(passes, norm, matrix, products_a, dbeta, dx, windows, moments, None)
    c_out, c, kernel, _ = weight.shape
    dw = dw.view(c_out, kernel, kernel, c).permute(0, 3, 1, 2)
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


# ------------------------------------------------------------------------------------------------ registrations


def _double(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=torch.float64)


def _map_like(x: Tensor, c: int, h, w) -> Tensor:
    return torch.empty((x.shape[0], c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("mnv2_fused::train_block")
def _(
    x, w1, g1, b1, w2, g2, b2, w3, g3, b3, running, eps, batch, stride, dilation, padding, residual, lo, hi, group,
    recompute,
):  # fmt: skip
    shape = _shape(w1, w2, w3, stride, dilation, padding, lo, hi)
    h, w = shape.size(x)
    has_moments, c = w1 is not None and batch[0], x.shape[1]
    wide = ()
    if recompute == "least":
        chunks = (shape.c_hidden + 47) // 48
        wide = (chunks, x.shape[0] * h * w, 48) if x.dtype != torch.float64 else (x.shape[0], shape.c_hidden, h, w)
    hidden = x.new_empty(wide or (0,), dtype=_kernels(x).dtype)
    return (
        _map_like(x, shape.c_out, h, w),
        _map_like(x, shape.c_out, h, w),
        hidden,
        _double(x, c if has_moments else 0),
        _double(x, *(c, c) if has_moments else (0, 0)),
        _double(x, 2, shape.c_hidden if w1 is not None else 0),
        _double(x, 2, shape.c_hidden),
        _double(x, 2, shape.c_out),
        _double(x, 2),
    )


@torch.library.register_fake("mnv2_fused::train_dense")
def _(x, weight, gamma, beta, running, eps, batch, stride, padding, lo, hi, group):
    c_out, c, kernel, _ = weight.shape
    top, left, bottom, right = padding
    h = (x.shape[2] + top + bottom - kernel) // stride + 1
    w = (x.shape[3] + left + right - kernel) // stride + 1
    k = c * kernel * kernel if batch else 0
    return _map_like(x, c_out, h, w), _double(x, k), _double(x, k, k), _double(x, 2, c_out), _double(x, 1)


def _fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [
        (
            torch.empty_like(t, memory_format=torch.channels_last)
            if i == 0
            else torch.empty_like(t, memory_format=torch.contiguous_format)
        )
        if need
        else t.new_empty(0)
        for i, (t, need) in enumerate(zip(inputs, needs, strict=True))
        if t is not None
    ]


@torch.library.register_fake("mnv2_fused::train_block_backward")
def _(
    dy, x, z, hidden, mean_x, products, first_statistics, second_statistics, third_statistics, counts,
    w1, g1, b1, w2, g2, b2, w3, g3, b3, eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute, needs,
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
    x, *parameters, running, eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute = inputs
    z, hidden, *statistics = output[1:]
    ctx.mark_non_differentiable(z, hidden, *statistics)
    ctx.set_materialize_grads(False)
    # With fixed statistics only gamma and beta of the third batch norm look at its input.
    wants_z = batch[2] or any(t is not None and t.requires_grad for t in parameters[7:])
    ctx.save_for_backward(x, z if wants_z else z.new_empty(0), hidden, *statistics, *parameters)
    ctx.running = len(running)
    ctx.settings = (eps, batch, stride, dilation, padding, residual, lo, hi, group, recompute)


def _backward_block(ctx, dy, *_):
    x, z, hidden, *rest = ctx.saved_tensors
    statistics, parameters = rest[:6], rest[6:]
    inputs = (x, *parameters)
    if dy is None:
        return (*(None,) * 10, [None] * ctx.running, *(None,) * 10)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_block_backward.default(dy, x, z, hidden, *statistics, *parameters, *ctx.settings, needs)
    return (*_given(gradients, inputs, needs), [None] * ctx.running, *(None,) * 10)


def _setup_dense(ctx, inputs, output):
    x, weight, gamma, beta, running, eps, batch, stride, padding, lo, hi, group = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *statistics, weight, gamma, beta)
    ctx.running = len(running)
    ctx.settings = (eps, batch, stride, padding, lo, hi, group)


def _backward_dense(ctx, dy, *_):
    x, mean, products, statistics, counts, *parameters = ctx.saved_tensors
    inputs = (x, *parameters)
    if dy is None:
        return (*(None,) * 4, [None] * ctx.running, *(None,) * 7)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_dense_backward.default(
        dy, x, mean, products, statistics, counts, *parameters, *ctx.settings, needs
    )
    return (*_given(gradients, inputs, needs), [None] * ctx.running, *(None,) * 7)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "mnv2_fused: the gradient of a fused unit cannot be differentiated again (create_graph=True); "
        "set model.fused = False for second derivatives"
    )


torch.library.register_autograd("mnv2_fused::train_block", _backward_block, setup_context=_setup_block)
torch.library.register_autograd("mnv2_fused::train_dense", _backward_dense, setup_context=_setup_dense)
for _name in ("train_block_backward", "train_dense_backward"):
    torch.library.register_autograd(
        f"mnv2_fused::{_name}", _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
