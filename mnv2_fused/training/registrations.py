"""Fake kernels of the training operators, their autograd formulas, and calls of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core.batching import loop_over_batches
from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused._core.specs import ConvNorm
from mnv2_fused.training.batch_norm import BatchNorm
from mnv2_fused.training.block import Saved, saves_hidden
from mnv2_fused.training.closed_form import passes_for
from mnv2_fused.training.passes import hidden_size

_ops = torch.ops.mnv2_fused


def _double(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=torch.float64)


def _map_like(x: Tensor, c: int, h, w) -> Tensor:
    return torch.empty((x.shape[0], c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("mnv2_fused::train_block")
def _(
    x, expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
    project_weight, project_gamma, project_beta, running, eps, batch, block, bounds, group, recompute, save,
):  # fmt: skip
    shape = BlockShape.of(x.shape[1], block)
    h, w = shape.size_out(x.shape[2], x.shape[3])
    expand_batch, depthwise_batch, _ = batch
    c = x.shape[1] if expand_weight is not None and expand_batch else 0
    hidden = x.new_empty(0, dtype=passes_for(x.dtype).dtype)
    if save and saves_hidden(recompute, depthwise_batch, shape, x):
        hidden = x.new_empty(hidden_size(x, shape), dtype=hidden.dtype)
        if x.dtype == torch.float64:
            hidden = _map_like(x, shape.c_hidden, h, w)
    return _map_like(x, shape.c_out, h, w), *Saved(
        projected=_map_like(x, shape.c_out, h, w) if save else x.new_empty(0),
        hidden=hidden,
        mean=_double(x, c),
        products=_double(x, c, c) if c else _double(x, 0),
        expand_norm=_double(x, BatchNorm.ROWS, shape.c_hidden) if expand_weight is not None else _double(x, 0),
        depthwise_norm=_double(x, BatchNorm.ROWS, shape.c_hidden),
        project_norm=_double(x, BatchNorm.ROWS, shape.c_out),
        counts=_double(x, 2),
    )


@torch.library.register_fake("mnv2_fused::train_dense")
def _(x, weight, gamma, beta, running, eps, batch, dense, bounds, group):
    c_out, c, kernel, _ = weight.shape
    h, w = DenseShape.of(c, dense).size_out(x.shape[2], x.shape[3])
    k = c * kernel * kernel if batch else 0
    products = _double(x, k, k) if batch else _double(x, 0)
    return _map_like(x, c_out, h, w), _double(x, k), products, _double(x, BatchNorm.ROWS, c_out), _double(x, 1)


def _fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    formats = (torch.channels_last, *(torch.contiguous_format,) * len(inputs))
    return [
        torch.empty_like(t, memory_format=memory_format) if need else t.new_empty(0)
        for t, need, memory_format in zip(inputs, needs, formats, strict=False)
        if t is not None
    ]


@torch.library.register_fake("mnv2_fused::train_block_backward")
def _(
    dy, x, projected, hidden, mean, products, expand_norm, depthwise_norm, project_norm, counts,
    expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
    project_weight, project_gamma, project_beta, eps, batch, block, bounds, group, recompute, needs,
):  # fmt: skip
    inputs = (
        x, expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
        project_weight, project_gamma, project_beta,
    )  # fmt: skip
    return _fake_gradients(inputs, needs)


@torch.library.register_fake("mnv2_fused::train_dense_backward")
def _(dy, x, mean, products, norm, counts, weight, gamma, beta, eps, batch, dense, bounds, group, needs):
    return _fake_gradients((x, weight, gamma, beta), needs)


def _given(gradients: Sequence[Tensor], inputs: Sequence[object], needs: Sequence[bool]) -> list[Tensor | None]:
    """One gradient an input, from an operator that left out those of inputs that are None."""
    gradients = iter(gradients)
    found = (None if t is None else next(gradients) for t in inputs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _setup_block(ctx, inputs, output):
    x, *parameters, running, eps, batch, block, bounds, group, recompute, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    projected, *saved = saved
    *_, project_gamma, _ = parameters
    *_, project_batch = batch
    # With fixed statistics only gamma of the projection's norm needs its input.
    if not project_batch and (project_gamma is None or not project_gamma.requires_grad):
        projected = projected.new_empty(0)
    ctx.save_for_backward(x, projected, *saved, *parameters)
    ctx.running = len(running)
    ctx.settings = (eps, batch, block, bounds, group, recompute)


def _backward_block(ctx, dy, *_):
    """Gradients of x and of the parameters."""
    tensors = ctx.saved_tensors
    x, *rest = tensors
    inputs = (x, *rest[len(Saved._fields) :])
    if dy is None:
        return [None] * len(inputs)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_block_backward.default(dy, *tensors, *ctx.settings, needs)
    return _given(gradients, inputs, needs)


def _setup_dense(ctx, inputs, output):
    x, weight, gamma, beta, running, eps, batch, dense, bounds, group = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *saved, weight, gamma, beta)
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


# Arguments that follow the list of fixed statistics.
_BLOCK_SETTINGS, _DENSE_SETTINGS = 7, 5


class _Block(torch.autograd.Function):
    """`train_block` and its formula, for calls outside graphs. `register_autograd` would cost as much time as a small
    block, and so would a separate `setup_context`, for which PyTorch reads signatures at every call.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.train_block.default(*inputs)
        _setup_block(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return (*_backward_block(ctx, *gradients), None, *(None,) * _BLOCK_SETTINGS)


class _Dense(torch.autograd.Function):
    """The same for `train_dense`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.train_dense.default(*inputs)
        _setup_dense(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return (*_backward_dense(ctx, *gradients), None, *(None,) * _DENSE_SETTINGS)


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
    """The output of `train_block`, and the norms behind its convolutions, each of `BatchNorm` rows."""
    parameters = [t for conv in convs for t in ((None,) * 3 if conv is None else (conv.weight, conv.gamma, conv.beta))]
    eps = [0.0 if conv is None else conv.eps for conv in convs]
    y, *saved = _call(
        _ops.train_block.default, _Block,
        x, *parameters, running, eps, batch, block, bounds, group, recompute, torch.is_grad_enabled(),
    )  # fmt: skip
    saved = Saved(*saved)
    return y, [saved.expand_norm, saved.depthwise_norm, saved.project_norm]


def call_dense(
    x: Tensor, conv: ConvNorm, running: list[Tensor], batch: bool, dense: list[int], bounds: list[float], group: str
) -> tuple[Tensor, Tensor]:
    """The output of `train_dense`, and the norm behind it."""
    y, _, _, norm, _ = _call(
        _ops.train_dense.default, _Dense,
        x, conv.weight, conv.gamma, conv.beta, running, conv.eps, batch, dense, bounds, group,
    )  # fmt: skip
    return y, norm


def _register(name: str, backward, setup_context, settings: int) -> None:
    def formula(ctx, *gradients):
        return (*backward(ctx, *gradients), [None] * ctx.running, *(None,) * settings)

    torch.library.register_autograd(name, formula, setup_context=setup_context)


_register("mnv2_fused::train_block", _backward_block, _setup_block, _BLOCK_SETTINGS)
_register("mnv2_fused::train_dense", _backward_dense, _setup_dense, _DENSE_SETTINGS)
for _name in ("train_block_backward", "train_dense_backward"):
    loop_over_batches(getattr(_ops, _name).default)
    torch.library.register_autograd(
        f"mnv2_fused::{_name}", _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
