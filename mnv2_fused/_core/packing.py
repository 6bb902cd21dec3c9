"""Folds batch norm into convolutions and packs the result for an operator.

Each function takes a spec's `flat()` tensors and epsilons and the activations' dtype, and returns a byte tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnv2_fused._core import library as _library  # noqa: F401  (loads the operators)
from mnv2_fused._core.fold import fold_bn, weight_and_bias
from mnv2_fused._core.specs import BlockSpec, ConvNorm, DenseSpec, HeadSpec, flatten, kind_at, unflatten


def fold_conv_norm(conv: ConvNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float32, of a convolution with its batch norm folded in, if it has one."""
    if conv.mean is None:
        return weight_and_bias(conv.weight, conv.bias)
    return fold_bn(conv.weight, conv.bias, conv.gamma, conv.beta, conv.mean, conv.var, conv.eps)


def pack_block(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.BlockSpec`."""
    folded = [t for conv in unflatten(tensors, eps) for t in ((None, None) if conv is None else fold_conv_norm(conv))]
    return torch.ops.mnv2_fused.pack_block.default(*folded, dtype)


def pack_dense(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.DenseSpec`."""
    (conv,) = unflatten(tensors, eps)
    return torch.ops.mnv2_fused.pack_dense.default(*fold_conv_norm(conv), dtype)


def pack_head(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.HeadSpec`."""
    conv, classifier = unflatten(tensors, eps)
    return torch.ops.mnv2_fused.pack_head.default(*fold_conv_norm(conv), *fold_conv_norm(classifier), dtype)


def pack_network(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pack the tensors of a `specs.NetworkSpec` unit by unit, one after the other."""
    convs, packed = unflatten(tensors, eps), []
    for i in range(0, len(convs), 3):
        places = convs[i : i + 3]
        kind = kind_at(places)
        given = places if kind is BlockSpec else [conv for conv in places if conv is not None]
        packed.append(_PACK[kind](*flatten(given), dtype))
    return torch.ops.mnv2_fused.pack_network.default(packed)


_PACK = {DenseSpec: pack_dense, BlockSpec: pack_block, HeadSpec: pack_head}
