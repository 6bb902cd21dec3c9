"""Sums over the processes of a group, for synchronised batch norms. A group's name is "" if there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(tensors: Sequence[Tensor], group: str) -> Sequence[Tensor]:
    """Each float64 tensor summed over the processes of `group`, in one exchange."""
    if not group:
        return tensors
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=dist.distributed_c10d._resolve_process_group(group))
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def join_moments(count: int, mean: Tensor, products: Tensor, group: str) -> tuple[float, Tensor, Tensor]:
    """Count, mean (c) and centred squares (c) or products (c, c) over the pixels of all processes, from those of this
    process's `count` pixels.
    """
    if not group:
        return float(count), mean, products
    outer = (lambda v: v.square()) if products.dim() == 1 else (lambda v: torch.outer(v, v))
    sums = [mean.new_tensor(float(count)), mean * count, products + outer(mean) * count]
    total, sums, raw = sum_over_processes(sums, group)
    joined = sums / total
    centred = raw - outer(joined) * total
    return total.item(), joined, centred.clamp_min(0) if centred.dim() == 1 else centred
