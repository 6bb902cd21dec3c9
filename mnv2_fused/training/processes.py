"""Sums over the processes of a group, for synchronised batch norms. Process groups are known to Python, by name."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.library.impl("mnv2_fused::sum_over_processes", "CPU")
def _sum_over_processes(sums: Tensor, group: str) -> None:
    # Not _c10d_functional::all_reduce from C++: its group is a str in torch 2.11 and Any in torch 2.13.
    dist.all_reduce(sums, group=dist.distributed_c10d._resolve_process_group(group))
