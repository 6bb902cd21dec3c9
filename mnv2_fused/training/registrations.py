"""Fake kernels of the training operators and their autograd formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused._core.specs import ConvNorm
from mnv2_fused.training.operators import _kernels, _lasts
from mnv2_fused.training.passes import NORM, wide_size

_ops = torch.ops.mnv2_fused


def _double(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=torch.float64)


def _map_like(x: Tensor, c: int, h, w) -> Tensor:
    return torch.empty((x.shape[0], c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("mnv2_fused::train_block")
def _(
    x, w1, g1, b1, w2, g2, b2, w3, g3, b3, running, eps, batch, block, bounds, group, recompute, keep,
):  # fmt: skip
    shape = BlockShape.of(x.shape[1], block)
    h, w = shape.size_out(x.shape[2], x.shape[3])
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
def _(x, weight, gamma, beta, running, eps, batch, dense, bounds, group):
    c_out, c, kernel, _ = weight.shape
    h, w = DenseShape.of(c, dense).size_out(x.shape[2], x.shape[3])
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
    eps, batch, block, bounds, group, recompute, needs,
):  # fmt: skip
    return _fake_gradients((x, w1, g1, b1, w2, g2, b2, w3, g3, b3), needs)


@torch.library.register_fake("mnv2_fused::train_dense_backward")
def _(dy, x, mean, products, statistics, counts, weight, gamma, beta, eps, batch, dense, bounds, group, needs):
    return _fake_gradients((x, weight, gamma, beta), needs)


def _given(gradients: Sequence[Tensor], inputs: Sequence[object], needs: Sequence[bool]) -> list[Tensor | None]:
    """One gradient an input: those of inputs that are None were left out, those not needed are empty."""
    gradients = iter(gradients)
    found = (None if t is None else next(gradients) for t in inputs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _setup_block(ctx, inputs, output):
    x, *parameters, running, eps, batch, block, bounds, group, recompute, _ = inputs
    z, hidden, *statistics = output[1:]
    ctx.mark_non_differentiable(z, hidden, *statistics)
    ctx.set_materialize_grads(False)
    # With fixed statistics only gamma and beta of the third batch norm look at its input.
    wants_z = batch[2] or any(t is not None and t.requires_grad for t in parameters[7:])
    ctx.save_for_backward(x, z if wants_z else z.new_empty(0), hidden, *statistics, *parameters)
    ctx.running = len(running)
    ctx.settings = (eps, batch, block, bounds, group, recompute)


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
    x, weight, gamma, beta, running, eps, batch, dense, bounds, group = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *statistics, weight, gamma, beta)
    ctx.running = len(running)
    ctx.settings = (eps, batch, dense, bounds, group)


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
        return (*_backward_block(ctx, *gradients), *(None,) * 8)


class _Dense(torch.autograd.Function):
    """The same of `train_dense`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.train_dense.default(*inputs)
        _setup_dense(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return (*_backward_dense(ctx, *gradients), *(None,) * 6)


def _call(operator, function: type[_Block] | type[_Dense], *inputs):
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return operator(*inputs)
    return function.apply(*inputs)


def call_block(
    x: Tensor,
    convs: Sequence[ConvNorm | None],  # expand, depthwise, project
    running: list[Tensor],
    batch: list[bool],
    block: list[int],
    bounds: list[float],
    group: str,
    recompute: str,
) -> tuple[Tensor, list[Tensor]]:
    """The output of `train_block`, and the batch norms (see `passes.NORM`) behind its convolutions."""
    parameters = [t for conv in convs for t in ((None,) * 3 if conv is None else (conv.weight, conv.gamma, conv.beta))]
    eps = [0.0 if conv is None else conv.eps for conv in convs]
    y, _, _, _, _, *norms, _ = _call(
        _ops.train_block.default, _Block,
        x, *parameters, running, eps, batch, block, bounds, group, recompute, torch.is_grad_enabled(),
    )  # fmt: skip
    return y, norms


def call_dense(
    x: Tensor, conv: ConvNorm, running: list[Tensor], batch: bool, dense: list[int], bounds: list[float], group: str
) -> tuple[Tensor, Tensor]:
    """The output of `train_dense`, and the batch norm behind it."""
    y, _, _, norm, _ = _call(
        _ops.train_dense.default, _Dense,
        x, conv.weight, conv.gamma, conv.beta, running, conv.eps, batch, dense, bounds, group,
    )  # fmt: skip
    return y, norm


def _register(name: str, backward, setup_context, after: int) -> None:
    """`after`: arguments that follow the list of fixed statistics."""

    def formula(ctx, *gradients):
        return (*backward(ctx, *gradients), [None] * ctx.running, *(None,) * after)

    torch.library.register_autograd(name, formula, setup_context=setup_context)


_register("mnv2_fused::train_block", _backward_block, _setup_block, 7)
_register("mnv2_fused::train_dense", _backward_dense, _setup_dense, 5)
for _name in ("train_block_backward", "train_dense_backward"):
    torch.library.register_autograd(
        f"mnv2_fused::{_name}", _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
