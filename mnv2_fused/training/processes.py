"""Sums over the processes of a group, for synchronised batch norms. Process groups are known to Python, by name."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.library.impl("mnv2_fused::sum_over_processes", "CPU")
def _sum_over_processes(sums: Tensor, group: str) -> None:
    # Not _c10d_functional::all_reduce from C++: its schema takes Any for the group from torch 2.13 on, which the stable
    # ABI cannot pass.
    dist.all_reduce(sums, group=dist.distributed_c10d._resolve_process_group(group))
