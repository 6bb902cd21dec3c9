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
    """A convolution, or a linear layer, and the batch norm behind it.

    weight (c_out, c_in / groups, k, k) or (c_out, c_in); bias, gamma, beta, mean, var (c_out) or None. Without a norm
    the last four are None.
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


def unflatten(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> list[ConvNorm | None]:
    """Undoes `flatten`."""
    convs: list[ConvNorm | None] = []
    for i, e in enumerate(eps):
        six = tensors[_TENSORS * i : _TENSORS * (i + 1)]
        convs.append(None if six[0] is None else ConvNorm(*six, e))
    return convs


# Integers, then the bounds of the activations; of a network in text, see NetworkArguments in csrc/network.h.
Arguments = tuple[list[int], list[float]] | tuple[str, str]


class Flat(NamedTuple):
    """A unit as its operator takes it."""

    tensors: tuple[Tensor | None, ...]  # parameters and buffers
    eps: tuple[float, ...]  # one a convolution
    arguments: Arguments


class BlockSpec(NamedTuple):
    """An inverted-residual block."""

    expand: ConvNorm | None
    depthwise: ConvNorm
    project: ConvNorm
    shape: BlockShape
    activation: Bounds
    output: Bounds  # of the projection, before the shortcut
    channels_last: bool  # whether the weights make plain PyTorch's output channels_last for any input
    fits: dict[tuple, str | None]

    @property
    def dtype(self) -> torch.dtype:
        return self.project.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    @property
    def norms(self) -> tuple[nn.Module | None, ...]:
        """The norms of its convolutions, in order; None for a convolution without one."""
        return tuple(conv.norm for conv in self.convs if conv is not None)

    @property
    def convs(self) -> tuple[ConvNorm | None, ...]:
        return self.expand, self.depthwise, self.project

    @property
    def bounds(self) -> list[float]:
        return [*self.activation, *self.output]

    @property
    def arguments(self) -> Arguments:
        return self.shape.fields(), self.bounds

    def flat(self) -> Flat:
        return Flat(*flatten(self.convs), self.arguments)

    def without_shortcut(self) -> BlockSpec:
        return self._replace(shape=self.shape._replace(residual=False))


class DenseSpec(NamedTuple):
    """A dense convolution, its batch norm and its activation. Each of the latter two may be missing."""

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
    def norms(self) -> tuple[nn.Module | None, ...]:
        return (self.conv.norm,)

    @property
    def convs(self) -> tuple[ConvNorm | None, ...]:
        return (self.conv,)

    @property
    def bounds(self) -> list[float]:
        return list(self.activation)

    @property
    def arguments(self) -> Arguments:
        return self.shape.fields(), self.bounds

    def flat(self) -> Flat:
        return Flat(*flatten(self.convs), self.arguments)


class HeadSpec(NamedTuple):
    """A 1x1 convolution with batch norm and activation, the mean over the pixels, a linear classifier."""

    conv: ConvNorm
    classifier: ConvNorm  # without a norm
    shape: HeadShape
    activation: Bounds
    fits: dict[tuple, str | None]

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device

    @property
    def convs(self) -> tuple[ConvNorm | None, ...]:
        return self.conv, self.classifier

    @property
    def bounds(self) -> list[float]:
        return list(self.activation)

    @property
    def arguments(self) -> Arguments:
        return self.shape.fields(), self.bounds

    def flat(self) -> Flat:
        return Flat(*flatten(self.convs), self.arguments)


UnitSpec = DenseSpec | BlockSpec | HeadSpec
KINDS = (DenseSpec, BlockSpec, HeadSpec)  # in the order of csrc/network.h
IMAGES = -1  # the source of a unit that takes the network's input


class Step(NamedTuple):
    """A unit of a network: it takes the output of unit `source`. With `tap` its output is an output of the network."""

    spec: UnitSpec
    source: int
    tap: bool


class Output(NamedTuple):
    """An output of a network. `channels_last` as in BlockSpec."""

    channels_last: bool


class NetworkSpec(NamedTuple):
    """Units, each of which takes the input or the output of a unit before it."""

    steps: tuple[Step, ...]
    fits: dict[tuple, str | None]

    @property
    def shape(self) -> DenseShape:
        """The shape of the unit that takes the input."""
        return self.steps[0].spec.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.steps[0].spec.dtype

    @property
    def device(self) -> torch.device:
        return self.steps[0].spec.device

    @property
    def outputs(self) -> tuple[Output, ...]:
        """For each tapped unit whether some unit on the way to it is `channels_last`."""
        found: list[bool] = []
        for spec, source, _ in self.steps:
            before = source != IMAGES and found[source]
            found.append(before or (not isinstance(spec, HeadSpec) and spec.channels_last))
        return tuple(Output(each) for each, step in zip(found, self.steps, strict=True) if step.tap)

    @property
    def arguments(self) -> Arguments:
        units: list[int] = []
        bounds: list[float] = []
        for spec, source, tap in self.steps:
            units += (KINDS.index(type(spec)), source, int(tap), *spec.shape.fields())
            bounds += spec.bounds
        return " ".join(map(str, units)), " ".join(map(str, bounds))

    def flat(self) -> Flat:
        return Flat(*flatten([conv for step in self.steps for conv in places(step.spec)]), self.arguments)


def places(spec: UnitSpec) -> tuple[ConvNorm | None, ConvNorm | None, ConvNorm | None]:
    """The convolutions of a unit in the three places that each unit of a network has; see `kind_at`."""
    if isinstance(spec, BlockSpec):
        return spec.convs
    return (spec.conv, None, None) if isinstance(spec, DenseSpec) else (spec.conv, None, spec.classifier)


def kind_at(places: Sequence[ConvNorm | None]) -> type[UnitSpec]:
    """Which kind of unit has its convolutions in these `places`."""
    _, second, third = places
    if second is not None:
        return BlockSpec
    return DenseSpec if third is None else HeadSpec
