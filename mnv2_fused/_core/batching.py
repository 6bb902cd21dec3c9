"""Operators under `torch.vmap` and in batched gradients: called once for each part of the batch.

PyTorch has no rule of its own for operators that return lists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def loop_over_batches(operator: torch._ops.OpOverload) -> None:
    """Registers batching rules for the operator."""

    def batched(info, in_dims, *arguments):
        y = _loop(operator, arguments, in_dims, info.batch_size)
        return y, [0] * len(y) if isinstance(y, list) else 0

    def batched_gradients(*arguments):
        # `torch.autograd.grad(is_grads_batched=True)` has a vmap of its own.
        level = torch._C._vmapmode_decrement_nesting() + 1
        try:
            batches = [torch._remove_batch_dim(a, level, 1, 0) if _is_batched(a) else a for a in arguments]
            dims = [0 if _is_batched(a) else None for a in arguments]
            size = next(batch.shape[0] for batch, dim in zip(batches, dims, strict=True) if dim == 0)
            y = _loop(operator, batches, dims, size)
        finally:
            torch._C._vmapmode_increment_nesting()
        if isinstance(y, list):
            return [torch._add_batch_dim(t, 0, level) for t in y]
        return torch._add_batch_dim(y, 0, level)

    torch.library.register_vmap(operator, batched)
    torch.library.impl(operator.name(), "Batched", batched_gradients)


def _is_batched(argument: Any) -> bool:
    return isinstance(argument, Tensor) and torch._C._functorch.is_legacy_batchedtensor(argument)


def _loop(operator: Any, arguments: Any, dims: Any, size: int) -> Tensor | list[Tensor]:
    ys = [operator(*(_part(a, dim, i) for a, dim in zip(arguments, dims, strict=True))) for i in range(size)]
    if isinstance(ys[0], Tensor):
        return torch.stack(ys)
    return [torch.stack(parts) for parts in zip(*ys, strict=True)]


def _part(argument: Any, dim: Any, i: int) -> Any:
    """Part `i` of an operator's argument. `dim`: along which dimension it is batched, or None; a list for a list."""
    if dim is None:
        return argument
    if isinstance(argument, list | tuple):
        return [_part(a, d, i) for a, d in zip(argument, dim, strict=True)]
    return argument.select(dim, i)
