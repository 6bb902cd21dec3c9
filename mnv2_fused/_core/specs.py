"""Specs: what a unit computes, as tensors, shape and activation. `flat()` gives them as the unit's operator takes them.

`fits` caches for which inputs the GPU kernels fit: the reason why not, or None, by input (see the module `fit`).
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
    norm: nn.Module | None = None  # the module that keeps running statistics in training


# Indices in a ConvNorm: the first tensor of the norm, and the first field that is no tensor.
CONV_TENSORS, NORM_EPS = ConvNorm._fields.index("gamma"), ConvNorm._fields.index("eps")
_TENSORS = NORM_EPS


def flatten(convs: Sequence[ConvNorm | None]) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """Tensors and epsilons as operators take them. None stands for a missing convolution."""
    tensors = tuple(t for conv in convs for t in (conv[:_TENSORS] if conv is not None else (None,) * _TENSORS))
    return tensors, tuple(0.0 if conv is None else conv.eps for conv in convs)


def unflatten(
    tensors: Sequence[Tensor | None], eps: Sequence[float]
) -> tuple[list[ConvNorm | None], Sequence[Tensor | None]]:
    """Undoes `flatten`: the convolutions, and any tensors that follow theirs."""
    convs: list[ConvNorm | None] = []
    for i, e in enumerate(eps):
        six = tensors[_TENSORS * i : _TENSORS * (i + 1)]
        convs.append(None if six[0] is None else ConvNorm(*six, e))
    return convs, tensors[_TENSORS * len(eps) :]


class Flat(NamedTuple):
    """A unit as its operator takes it."""

    tensors: tuple[Tensor | None, ...]  # parameters and buffers
    eps: tuple[float, ...]  # one a convolution
    arguments: tuple[list, ...]  # lists of integers, then the bounds of the activations


_IN_A_BLOCK, _OF_A_CLASSIFIER = 3, 2  # convolutions in a block; tensors of a classifier


def network_parts(
    tensors: Sequence[Tensor | None], eps: Sequence[float]
) -> list[tuple[Sequence[Tensor | None], Sequence[float]]]:
    """Tensors and epsilons of each unit of a network, in order: stem, blocks, head."""
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
    channels_last: bool  # whether the weights make plain PyTorch's output channels_last for any input
    fits: dict[tuple, str | None]

    @property
    def dtype(self) -> torch.dtype:
        return self.project.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """The norms of its convolutions, in order."""
        return tuple(conv.norm for conv in (self.expand, self.depthwise, self.project) if conv is not None)

    def flat(self) -> Flat:
        return Flat(*flatten((self.expand, self.depthwise, self.project)), (self.shape.fields(), list(self.activation)))

    def without_shortcut(self) -> BlockSpec:
        return self._replace(shape=self.shape._replace(residual=False))


class DenseSpec(NamedTuple):
    """A dense convolution with batch norm and activation."""

    conv: ConvNorm
    shape: DenseShape
    activation: Bounds
    channels_last: bool  # as in BlockSpec
    fits: dict[tuple, str | None]

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.conv.norm,)

    def flat(self) -> Flat:
        return Flat(*flatten((self.conv,)), (self.shape.fields(), list(self.activation)))


class HeadSpec(NamedTuple):
    """A 1x1 convolution with batch norm and activation, the mean over the pixels, a linear classifier."""

    conv: ConvNorm
    weight: Tensor  # the classifier's, (classes, c_last)
    bias: Tensor | None  # the classifier's, (classes)
    shape: HeadShape
    activation: Bounds
    fits: dict[tuple, str | None]

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device

    def flat(self) -> Flat:
        tensors, eps = flatten((self.conv,))
        return Flat((*tensors, self.weight, self.bias), eps, (self.shape.fields(), list(self.activation)))


class NetworkSpec(NamedTuple):
    """Stem, blocks and head one after the other."""

    stem: DenseSpec
    blocks: tuple[BlockSpec, ...]
    head: HeadSpec
    fits: dict[tuple, str | None]

    @property
    def shape(self) -> DenseShape:
        """The shape of the unit that takes the input."""
        return self.stem.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.dtype

    @property
    def device(self) -> torch.device:
        return self.stem.device

    def flat(self) -> Flat:
        stem, *blocks, head = units = [unit.flat() for unit in (self.stem, *self.blocks, self.head)]
        arguments = (
            stem.arguments[0],
            [field for block in blocks for field in block.arguments[0]],
            head.arguments[0],
            [bound for unit in units for bound in unit.arguments[1]],
        )
        tensors = tuple(t for unit in units for t in unit.tensors)
        return Flat(tensors, tuple(e for unit in units for e in unit.eps), arguments)
