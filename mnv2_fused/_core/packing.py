"""Folds batch norm into convolutions and packs the result for an operator.

Each function takes a spec's `flat()` tensors and epsilons and the activations' dtype, and returns a byte tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core import library as _library  # noqa: F401  (loads the operators)
from mnv2_fused._core.fold import fold_bn, weight_and_bias
from mnv2_fused._core.specs import ConvNorm, network_parts, unflatten


def fold_conv_norm(conv: ConvNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float32, of a convolution with its batch norm folded in."""
    return fold_bn(conv.weight, conv.bias, conv.gamma, conv.beta, conv.mean, conv.var, conv.eps)


def pack_block(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.BlockSpec`."""
    convs, _ = unflatten(tensors, eps)
    folded = [t for conv in convs for t in ((None, None) if conv is None else fold_conv_norm(conv))]
    return torch.ops.mnv2_fused.pack_block.default(*folded, dtype)


def pack_dense(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.DenseSpec`."""
    (conv,), _ = unflatten(tensors, eps)
    return torch.ops.mnv2_fused.pack_dense.default(*fold_conv_norm(conv), dtype)


def pack_head(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.HeadSpec`."""
    (conv,), (weight, bias) = unflatten(tensors, eps)
    classifier = weight_and_bias(weight, bias)
    return torch.ops.mnv2_fused.pack_head.default(*fold_conv_norm(conv), *classifier, dtype)


def pack_network(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.NetworkSpec` unit by unit, one after the other."""
    parts = network_parts(tensors, eps)
    packs = (pack_dense, *(pack_block,) * (len(parts) - 2), pack_head)
    packed = [pack(*part, dtype) for pack, part in zip(packs, parts, strict=True)]
    return torch.ops.mnv2_fused.pack_network.default(packed)
