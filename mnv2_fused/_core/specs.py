"""What a unit computes: its tensors, its shape, and both as its operator takes them.

A spec has `tensors`, the parameters and buffers flat in the operators' order; `eps`, one a norm; `arguments`, the
operator's lists of integers and of activation bounds; `dtype` and `device`; and `fits`, which remembers for what inputs
the kernels of a GPU were found to fit (see `fit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core.geometry import BlockShape, Bounds, DenseShape, HeadShape


class ConvNorm(NamedTuple):
    """A convolution and the batch norm behind it.

    weight (c_out, c_in / groups, k, k); bias, gamma, beta, mean, var (c_out) or None.
    """

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    norm: nn.Module | None = None  # whose statistics training keeps


# Where the norm's tensors, and what is none, begin in a ConvNorm.
CONV_TENSORS, NORM_EPS = ConvNorm._fields.index("gamma"), ConvNorm._fields.index("eps")
_TENSORS = NORM_EPS


def flatten(convs: Sequence[ConvNorm | None]) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """Tensors and epsilons as operators take them; None stands for a convolution that is not there."""
    tensors = tuple(t for conv in convs for t in (conv[:_TENSORS] if conv is not None else (None,) * _TENSORS))
    return tensors, tuple(0.0 if conv is None else conv.eps for conv in convs)


def unflatten(
    tensors: Sequence[Tensor | None], eps: Sequence[float]
) -> tuple[list[ConvNorm | None], Sequence[Tensor | None]]:
    """The convolutions that `flatten` was given, and the tensors behind theirs."""
    convs: list[ConvNorm | None] = []
    for i, e in enumerate(eps):
        six = tensors[_TENSORS * i : _TENSORS * (i + 1)]
        convs.append(None if six[0] is None else ConvNorm(*six, e))
    return convs, tensors[_TENSORS * len(eps) :]


_IN_A_BLOCK, _OF_A_CLASSIFIER = 3, 2  # convolutions; tensors


def network_parts(
    tensors: Sequence[Tensor | None], eps: Sequence[float]
) -> list[tuple[Sequence[Tensor | None], Sequence[float]]]:
    """Tensors and epsilons of each unit of a network: stem, blocks, head."""
    parts, first = [], 0
    for count in (1, *(_IN_A_BLOCK,) * ((len(eps) - 2) // _IN_A_BLOCK), 1):
        last = first + count
        parts.append((tensors[_TENSORS * first : _TENSORS * last], eps[first:last]))
        first = last
    head, head_eps = parts[-1]
    parts[-1] = ((*head, *tensors[-_OF_A_CLASSIFIER:]), head_eps)
    return parts


class BlockSpec(NamedTuple):
    """An inverted-residual block."""

    expand: ConvNorm | None
    depthwise: ConvNorm
    project: ConvNorm
    shape: BlockShape
    activation: Bounds
    dtype: torch.dtype
    channels_last: bool  # plain PyTorch's output is that whatever the input is, because of the weights
    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    arguments: tuple[list[int], list[float]]
    fits: dict[tuple, str | None]

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """Those that there are, in order."""
        return tuple(conv.norm for conv in (self.expand, self.depthwise, self.project) if conv is not None)

    def without_shortcut(self) -> BlockSpec:
        shape = self.shape._replace(residual=False)
        return self._replace(shape=shape, arguments=(shape.fields(), self.arguments[1]))


def block_spec(
    expand: ConvNorm | None,
    depthwise: ConvNorm,
    project: ConvNorm,
    shape: BlockShape,
    activation: Bounds,
    channels_last: bool,
) -> BlockSpec:
    tensors, eps = flatten((expand, depthwise, project))
    arguments = (shape.fields(), list(activation))
    dtype = project.weight.dtype
    return BlockSpec(expand, depthwise, project, shape, activation, dtype, channels_last, tensors, eps, arguments, {})


class DenseSpec(NamedTuple):
    """A dense convolution with batch norm and activation."""

    conv: ConvNorm
    shape: DenseShape
    activation: Bounds
    dtype: torch.dtype
    channels_last: bool  # as of a block
    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    arguments: tuple[list[int], list[float]]
    fits: dict[tuple, str | None]

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.conv.norm,)


def dense_spec(conv: ConvNorm, shape: DenseShape, activation: Bounds, channels_last: bool) -> DenseSpec:
    tensors, eps = flatten((conv,))
    arguments = (shape.fields(), list(activation))
    return DenseSpec(conv, shape, activation, conv.weight.dtype, channels_last, tensors, eps, arguments, {})


class HeadSpec(NamedTuple):
    """A 1x1 convolution with batch norm and activation, the mean over the pixels, a linear classifier."""

    conv: ConvNorm
    weight: Tensor  # of the classifier: (classes, c_last)
    bias: Tensor | None
    shape: HeadShape
    activation: Bounds
    dtype: torch.dtype
    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    arguments: tuple[list[int], list[float]]
    fits: dict[tuple, str | None]

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device


def head_spec(conv: ConvNorm, weight: Tensor, bias: Tensor | None, shape: HeadShape, activation: Bounds) -> HeadSpec:
    tensors, eps = flatten((conv,))
    arguments = (shape.fields(), list(activation))
    tensors = (*tensors, weight, bias)
    return HeadSpec(conv, weight, bias, shape, activation, conv.weight.dtype, tensors, eps, arguments, {})


class NetworkSpec(NamedTuple):
    """Stem, blocks and head one after the other."""

    stem: DenseSpec
    blocks: tuple[BlockSpec, ...]
    head: HeadSpec
    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    arguments: tuple[list[int], list[int], list[int], list[float]]
    fits: dict[tuple, str | None]

    @property
    def shape(self) -> DenseShape:
        """Of what takes the input."""
        return self.stem.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.dtype

    @property
    def device(self) -> torch.device:
        return self.stem.device


def network_spec(stem: DenseSpec, blocks: Sequence[BlockSpec], head: HeadSpec) -> NetworkSpec:
    units = (stem, *blocks, head)
    arguments = (
        stem.arguments[0],
        [field for block in blocks for field in block.arguments[0]],
        head.arguments[0],
        [bound for unit in units for bound in unit.activation],
    )
    tensors = tuple(t for unit in units for t in unit.tensors)
    eps = tuple(e for unit in units for e in unit.eps)
    return NetworkSpec(stem, tuple(blocks), head, tensors, eps, arguments, {})
