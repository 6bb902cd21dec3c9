"""Fake kernels of the training operators, their autograd formulas, and calls of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core import library as _library
from mnv2_fused._core.batching import loop_over_batches
from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused._core.specs import ConvNorm

_C = _library._C
_ops = torch.ops.mnv2_fused


def _map_like(x: Tensor, c: int, h, w) -> Tensor:
    return torch.empty((x.shape[0], c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_channels(x: Tensor, h, w) -> bool:
    """Whether `CpuPasses::by_channels()` holds for a map of this size."""
    most = min(_C.CHANNELS_PIXELS, _C.CHANNELS_PIXELS_EACH * x.shape[1])
    return x.dtype != torch.float64 and x.shape[0] * h * w <= most


# ------------------------------------------------------------------------------------------------- fake kernels


@torch.library.register_fake("mnv2_fused::train_block")
def _(
    x, expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
    project_weight, project_gamma, project_beta, running, eps, batch, block, bounds, group, recompute, save,
):  # fmt: skip
    shape = BlockShape.of(x.shape[1], block)
    h, w = shape.size_out(x.shape[2], x.shape[3])
    expand_batch, depthwise_batch, project_batch = batch
    expand_batch = expand_batch and shape.has_expand
    # As Block::saved_size() and BlockState::size() in csrc/train/block.cpp.
    c, c_hidden, c_out = x.shape[1], shape.c_hidden, shape.c_out
    by_channels = expand_batch and depthwise_batch and not group and _by_channels(x, x.shape[2], x.shape[3])
    costs = c * shape.stride**2 if shape.has_expand and not by_channels else 0
    saves = (
        save and depthwise_batch and (recompute == "least" or (recompute == "balanced" and costs >= _C.WORTH_SAVING))
    )
    chunk = 1 if x.dtype == torch.float64 else _C.CHUNK
    pixels = x.shape[0] * (x.shape[2] * x.shape[3] if by_channels else h * w)
    wide = -(-c_hidden // chunk) * chunk * pixels if saves else 0
    moments = c * (1 + c) if expand_batch and not by_channels else 0
    state = 6 * ((1 + shape.has_expand) * c_hidden + c_out) + moments + 2
    arithmetic = _arithmetic(x)
    norms = ((expand_batch, c_hidden), (depthwise_batch, c_hidden), (project_batch, c_out))
    return (
        _map_like(x, c_out, h, w),
        _map_like(x, c_out, h, w) if save else x.new_empty(0),
        x.new_empty(wide, dtype=arithmetic),
        x.new_empty(state, dtype=torch.float64),
        *(x.new_empty(channels if uses else 0, dtype=arithmetic) for uses, channels in norms for _ in range(2)),
    )


@torch.library.register_fake("mnv2_fused::train_dense")
def _(x, weight, gamma, beta, running, eps, batch, dense, bounds, group):
    c_out, c, kernel, _ = weight.shape
    shape = DenseShape.of(c, dense)
    h, w = shape.size_out(x.shape[2], x.shape[3])
    window = c * kernel * kernel
    by_channels = batch and not group and shape.is_pointwise and _by_channels(x, h, w)
    state = 6 * c_out + (window * (1 + window) if batch and not by_channels else 0) + 1
    statistics = (x.new_empty(c_out if batch else 0, dtype=_arithmetic(x)) for _ in range(2))
    return _map_like(x, c_out, h, w), x.new_empty(state, dtype=torch.float64), *statistics


def _fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    formats = (torch.channels_last, *(torch.contiguous_format,) * len(inputs))
    return [
        torch.empty_like(t, memory_format=memory_format) if need else t.new_empty(0)
        for t, need, memory_format in zip(inputs, needs, formats, strict=False)
        if t is not None
    ]


@torch.library.register_fake("mnv2_fused::train_block_backward")
def _(
    dy, x, projected, wide, state, expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma,
    depthwise_beta, project_weight, project_gamma, project_beta, eps, batch, block, bounds, group, recompute, needs,
):  # fmt: skip
    inputs = (
        x, expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
        project_weight, project_gamma, project_beta,
    )  # fmt: skip
    return _fake_gradients(inputs, needs)


@torch.library.register_fake("mnv2_fused::train_dense_backward")
def _(dy, x, state, weight, gamma, beta, eps, batch, dense, bounds, group, needs):
    return _fake_gradients((x, weight, gamma, beta), needs)


# ----------------------------------------------------------------------------------------------------- gradients


def _given(gradients: Sequence[Tensor], inputs: Sequence[object], needs: Sequence[bool]) -> list[Tensor | None]:
    """One gradient an input, from an operator that left out those of inputs that are None."""
    gradients = iter(gradients)
    found = (None if t is None else next(gradients) for t in inputs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _setup_block(ctx, inputs, output):
    x, *parameters, running, eps, batch, block, bounds, group, recompute, _ = inputs
    _, projected, wide, state, *statistics = output
    ctx.mark_non_differentiable(projected, wide, state, *statistics)
    ctx.set_materialize_grads(False)
    *_, project_gamma, _ = parameters
    *_, project_batch = batch
    # With fixed statistics only gamma of the projection's norm needs its input.
    if not project_batch and (project_gamma is None or not project_gamma.requires_grad):
        projected = projected.new_empty(0)
    ctx.save_for_backward(x, projected, wide, state, *parameters)
    ctx.running = len(running)
    ctx.settings = (eps, batch, block, bounds, group, recompute)


def _backward_block(ctx, dy, *_):
    """Gradients of x and of the parameters."""
    x, projected, wide, state, *parameters = ctx.saved_tensors
    inputs = (x, *parameters)
    if dy is None:
        return [None] * len(inputs)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_block_backward.default(dy, x, projected, wide, state, *parameters, *ctx.settings, needs)
    return _given(gradients, inputs, needs)


def _setup_dense(ctx, inputs, output):
    x, weight, gamma, beta, running, eps, batch, dense, bounds, group = inputs
    _, state, *statistics = output
    ctx.mark_non_differentiable(state, *statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, state, weight, gamma, beta)
    ctx.running = len(running)
    ctx.settings = (eps, batch, dense, bounds, group)


def _backward_dense(ctx, dy, *_):
    x, state, *parameters = ctx.saved_tensors
    inputs = (x, *parameters)
    if dy is None:
        return [None] * len(inputs)
    needs = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    gradients = _ops.train_dense_backward.default(dy, x, state, *parameters, *ctx.settings, needs)
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
        with torch._C._AutoDispatchBelowAutograd():  # not the formula of `register_autograd` again
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
        with torch._C._AutoDispatchBelowAutograd():
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
    """Output of `train_block`, and its norms' mean and variance, see the operator."""
    parameters = [t for conv in convs for t in ((None,) * 3 if conv is None else (conv.weight, conv.gamma, conv.beta))]
    eps = [0.0 if conv is None else conv.eps for conv in convs]
    y, _, _, _, *statistics = _call(
        _ops.train_block.default, _Block,
        x, *parameters, running, eps, batch, block, bounds, group, recompute, torch.is_grad_enabled(),
    )  # fmt: skip
    return y, statistics


def call_dense(
    x: Tensor, conv: ConvNorm, running: list[Tensor], batch: bool, dense: list[int], bounds: list[float], group: str
) -> tuple[Tensor, list[Tensor]]:
    """The same of `train_dense`."""
    y, _, *statistics = _call(
        _ops.train_dense.default, _Dense,
        x, conv.weight, conv.gamma, conv.beta, running, conv.eps, batch, dense, bounds, group,
    )  # fmt: skip
    return y, statistics


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
