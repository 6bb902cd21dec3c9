"""From a module's spec to the training operators: dtypes, states of the batch norms, running statistics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnv2_fused._core.fit import shape_reason
from mnv2_fused._core.geometry import FLOATS, NO_BOUNDS
from mnv2_fused._core.kinds import is_frozen, is_synchronised
from mnv2_fused._core.specs import BlockSpec, ConvNorm, DenseSpec
from mnv2_fused.training.registrations import call_block, call_dense

RECOMPUTE = ("most", "balanced", "least")


class Prepared(NamedTuple):
    """The arithmetic's dtype, fixed statistics, which norms use the batch's, and the process group or ""."""

    dtype: torch.dtype
    running: list[Tensor]
    batch: list[bool]
    group: str


def _uses_batch(norm: nn.Module | None) -> bool:
    return (
        norm is not None
        and not is_frozen(norm)
        and (norm.training or (norm.running_mean is None and norm.running_var is None))
    )


def _group_of(norms: Sequence[nn.Module | None]) -> str | None:
    """The name of the norms' process group, "" for this process alone; None if they differ."""
    groups = set()
    for norm in filter(None, norms):
        group = ""
        if is_synchronised(norm) and norm.training and dist.is_available() and dist.is_initialized():
            process_group = norm.process_group or dist.group.WORLD
            group = process_group.group_name if process_group.size() > 1 else ""
        groups.add(group)
    return groups.pop() if len(groups) == 1 else None


def _arguments(convs: Sequence[ConvNorm | None]) -> tuple[list[Tensor], list[bool], str] | None:
    """Fixed statistics, which norms use the batch's, and the process group; None if the operators cannot take them."""
    convs = [conv for conv in convs if conv is not None]
    norms = [conv.norm for conv in convs]
    batch, running = [_uses_batch(norm) for norm in norms], []
    for conv, uses in zip(convs, batch, strict=True):
        if uses:
            continue
        mean, var = conv.mean, conv.var
        if conv.norm is None:  # a norm that changes nothing, whose beta is the convolution's bias
            mean, var = _identity(conv.weight.shape[0])
        if mean is None or var is None:
            return None
        running += [mean, var]
    group = _group_of(norms)
    return None if group is None else (running, batch, group)


@functools.cache
def _identity(channels: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels), torch.ones(channels)


def _trained(conv: ConvNorm | None) -> ConvNorm | None:
    """The convolution as the training operators take it: with a norm."""
    return conv if conv is None or conv.norm is not None else conv._replace(bias=None, beta=conv.bias)


@torch.no_grad()
def _track(norms: Sequence[nn.Module | None], batch: Sequence[bool], statistics: Sequence[Tensor]) -> None:
    """Updates running statistics and their counts as `nn.BatchNorm2d.forward` does, of norms that use the batch's.
    statistics: mean and unbiased variance of each norm, one after the other.
    """
    norms = [
        (norm, *found)
        for norm, uses, *found in zip(norms, batch, statistics[::2], statistics[1::2], strict=True)
        if uses and norm.training and norm.track_running_stats
    ]
    counts = [norm.num_batches_tracked for norm, *_ in norms if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    by_momentum: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, *found in norms:
        if norm.running_mean is None or norm.running_var is None:
            continue
        # nn.BatchNorm2d counts no version: a plain call of the norm before this one may still need its backward.
        running = [t if torch.compiler.is_compiling() else t.data for t in (norm.running_mean, norm.running_var)]
        found = [new if new.dtype == to.dtype else new.to(to.dtype) for new, to in zip(found, running, strict=True)]
        if norm.momentum is None and norm.num_batches_tracked is not None:  # the mean of all batches so far
            for to, new in zip(running, found, strict=True):
                to.lerp_(new, (1.0 / norm.num_batches_tracked.float()).to(to.dtype))
            continue
        to, new = by_momentum.setdefault(norm.momentum or 0.0, ([], []))
        to += running
        new += found
    for momentum, (to, new) in by_momentum.items():
        torch._foreach_lerp_(to, new, momentum)


def prepare(spec: BlockSpec | DenseSpec, x: Tensor | None) -> Prepared | str:
    """What training needs besides the spec, or the reason why the unit must run plain. `x`: its input, if known."""
    dtype = _dtype(spec, x)
    if dtype not in FLOATS:
        return f"the arithmetic is {dtype}, not float32, bfloat16 or float16"
    arguments = _arguments(spec.convs)
    if arguments is None:
        return "the batch norms differ in their process groups, or have no running statistics"
    prepared = Prepared(dtype, *arguments)
    reason = None if x is None else _input_reason(spec, x, dtype) or _count_reason(spec, x, prepared)
    return prepared if reason is None else reason


def _dtype(spec: BlockSpec | DenseSpec, x: Tensor | None) -> torch.dtype:
    """In which PyTorch's convolutions would compute."""
    casts = torch.is_autocast_enabled("cpu") and (x is None or x.dtype != torch.float64)
    return torch.get_autocast_dtype("cpu") if casts else spec.dtype


def _input_reason(spec: BlockSpec | DenseSpec, x: Tensor, dtype: torch.dtype) -> str | None:
    """Why `x` does not fit the unit, which computes in `dtype`. Autocast casts x to that first."""
    casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    operator = "inverted_residual" if isinstance(spec, BlockSpec) else "dense"
    reason = shape_reason(operator, spec, x, x.dtype if casts else dtype)
    return reason or ("the batch is empty" if x.shape[0] == 0 else None)


def _count_reason(spec: BlockSpec | DenseSpec, x: Tensor, prepared: Prepared) -> str | None:
    """PyTorch refuses statistics of a single value. Running plain leaves the error to it."""
    n, _, h, w = x.shape
    if n > 1 or prepared.group:
        return None
    h_out, w_out = spec.shape.size_out(h, w)
    pixels = [h_out * w_out] * len(prepared.batch)
    if isinstance(spec, BlockSpec) and spec.shape.has_expand:
        pixels[0] = h * w
    if any(uses and count == 1 for uses, count in zip(prepared.batch, pixels, strict=True)):
        return "a batch norm would have one value a channel"
    return None


def train_block(x: Tensor, spec: BlockSpec, prepared: Prepared, module: nn.Module) -> Tensor:
    """A block's output, channels_last, with gradients; updates its batch norms' statistics."""
    dtype, running, batch, group = prepared
    source = x if x.dtype == dtype else x.to(dtype)
    # PyTorch adds a shortcut in the dtype of x, so one of another dtype cannot be part of the operator. Neither can one
    # that is added behind an activation.
    apart = spec.shape.residual and (source is not x or spec.output != NO_BOUNDS)
    shape = spec.shape.resolved(x.shape[2], x.shape[3])
    if apart:
        shape = shape._replace(residual=False)
    batch = batch if spec.shape.has_expand else [False, *batch]
    y, statistics = call_block(
        source.contiguous(memory_format=torch.channels_last),
        [_trained(conv) for conv in spec.convs],
        running,
        batch,
        shape.fields(),
        list(spec.activation),
        group,
        module.recompute,
    )
    if any(batch):
        _track([None if conv is None else conv.norm for conv in spec.convs], batch, statistics)
    if spec.output != NO_BOUNDS:
        y = torch.clamp(y, *spec.output)
    return x + y if apart else y


def train_dense(x: Tensor, spec: DenseSpec, prepared: Prepared, module: nn.Module) -> Tensor:
    """The same for a dense convolution with batch norm and activation."""
    dtype, running, (batch,), group = prepared
    shape = spec.shape.resolved(x.shape[2], x.shape[3])
    y, statistics = call_dense(
        x.to(dtype), _trained(spec.conv), running, batch, shape.fields(), list(spec.activation), group
    )
    if batch:
        _track([spec.conv.norm], [True], statistics)
    return y
