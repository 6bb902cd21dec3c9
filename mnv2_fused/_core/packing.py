"""Folds batch norm into convolutions and packs what an operator takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused.functional import fold_bn


def _fold(tensors: Sequence[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    weight, bias, gamma, beta, mean, var = tensors
    return fold_bn(weight, bias, gamma, beta, mean, var, eps)


def pack_block(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack a block's 18 unfolded tensors (see `_inspect.BlockSpec`)."""
    expand = (None, None) if tensors[0] is None else _fold(tensors[:6], eps[0])
    depthwise = _fold(tensors[6:12], eps[1])
    project = _fold(tensors[12:], eps[2])
    return torch.ops.mnv2_fused.pack_block.default(*expand, *depthwise, *project, dtype)


def pack_stem(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the stem's six unfolded tensors."""
    return torch.ops.mnv2_fused.pack_stem.default(*_fold(tensors, eps[0]), dtype)


def pack_head(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the last convolution's six unfolded tensors and the classifier's two."""
    weight, bias = tensors[6], tensors[7]
    weight = weight.detach().float().contiguous()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float().contiguous()
    return torch.ops.mnv2_fused.pack_head.default(*_fold(tensors[:6], eps[0]), weight, bias, dtype)


def pack_network(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of stem, blocks and head one after the other."""
    packed = [pack_stem(tensors[:6], eps[:1], dtype)]
    for i in range((len(eps) - 2) // 3):
        packed.append(pack_block(tensors[6 + 18 * i : 24 + 18 * i], eps[1 + 3 * i : 4 + 3 * i], dtype))
    packed.append(pack_head(tensors[-8:], eps[-1:], dtype))
    return torch.ops.mnv2_fused.pack_network.default(packed)
