"""What the `cached_*` operators compute, as PyTorch's own convolutions.

Their gradients follow from it, and tools that know no other operators can have it instead: see mnv2_fused/export.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape, Bounds, DenseShape, Pads
from mnv2_fused._core.operators import DENSE, HEAD, INVERTED_RESIDUAL, NETWORK, network_units
from mnv2_fused._core.specs import Arguments, ConvNorm, unflatten

# Stand for the infinite bounds of an activation in traced graphs, because AOTInductor's packages cannot hold those. As
# float32 they are infinite.
_LEAST, _MOST = -sys.float_info.max, sys.float_info.max


def finite(arguments: Arguments) -> Arguments:
    """A spec's arguments as `cached_*` operators take them: an exported program holds no infinite number."""
    fields, bounds = arguments
    if isinstance(fields, str):
        return arguments
    return list(fields), [max(_LEAST, min(bound, _MOST)) for bound in bounds]


def _clamp(x: Tensor, bounds: Bounds) -> Tensor:
    lo, hi = bounds
    if (lo, hi) == (0.0, 6.0):
        return F.hardtanh(x, lo, hi)
    if lo == 0.0 and hi >= _MOST:
        return F.relu(x)
    if lo <= _LEAST and hi >= _MOST:
        return x
    return torch.clamp(x, lo, hi)


def _convolve(
    x: Tensor, conv: ConvNorm, bounds: Bounds, stride: int = 1, padding: Pads = (0, 0, 0, 0), dilation: int = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    top, left, bottom, right = padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    y = F.conv2d(x, conv.weight, conv.bias, stride, (top, left), dilation, groups)
    if conv.mean is not None:
        y = F.batch_norm(y, conv.mean, conv.var, conv.gamma, conv.beta, training=False, momentum=0.0, eps=conv.eps)
    return _clamp(y, bounds)


def _block(x: Tensor, convs: Sequence[ConvNorm | None], block: list[int], bounds: Sequence[float]) -> Tensor:
    expand, depthwise, project = convs
    shape = BlockShape.of(x.shape[1], block).resolved(x.shape[2], x.shape[3])
    inside, output = tuple(bounds[:2]), tuple(bounds[2:])
    y = x if expand is None else _convolve(x, expand, inside)
    y = _convolve(y, depthwise, inside, shape.stride, shape.padding, shape.dilation, shape.c_hidden)
    y = _convolve(y, project, output)
    return x + y if shape.residual else y


def _dense(x: Tensor, convs: Sequence[ConvNorm | None], dense: list[int], bounds: Sequence[float]) -> Tensor:
    shape = DenseShape.of(x.shape[1], dense).resolved(x.shape[2], x.shape[3])
    return _convolve(x, convs[0], tuple(bounds), shape.stride, shape.padding)


def _head(x: Tensor, convs: Sequence[ConvNorm | None], head: list[int], bounds: Sequence[float]) -> Tensor:
    conv, classifier = convs
    y = F.adaptive_avg_pool2d(_convolve(x, conv, tuple(bounds)), (1, 1))
    return F.linear(torch.flatten(y, 1), classifier.weight, classifier.bias)


def _network(x: Tensor, convs: Sequence[ConvNorm | None], units: str, bounds: str) -> list[Tensor]:
    left = [float(bound) for bound in bounds.split()]
    kinds = ((_dense, 2), (_block, 4), (_head, 2))  # function and number of bounds, in the order of csrc/network.h
    outputs: list[Tensor] = []
    taps = []
    for i, unit in enumerate(network_units(x.shape, units)):
        function, count = kinds[unit.kind]
        places = convs[3 * i : 3 * i + 3]
        given = places if function is _block else [conv for conv in places if conv is not None]
        outputs.append(function(x if unit.source < 0 else outputs[unit.source], given, unit.fields, left[:count]))
        left = left[count:]
        if unit.tap:
            taps.append(outputs[-1])
    return taps


def _as_output(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


def _decomposition(function: Callable) -> Callable:
    """The decomposition of a `cached_*` operator: takes its arguments, returns its outputs."""

    def decomposed(
        x: Tensor, tensors: Sequence[Tensor | None], cache: str, eps: Sequence[float], fields: Any,
        bounds: Any,
    ) -> Tensor | list[Tensor]:  # fmt: skip
        y = function(x, unflatten(tensors, eps), fields, bounds)
        return [_as_output(t) for t in y] if isinstance(y, list) else _as_output(y)

    return decomposed


_FUNCTIONS = {INVERTED_RESIDUAL: _block, DENSE: _dense, HEAD: _head, NETWORK: _network}
DECOMPOSITIONS = {
    cached: _decomposition(function)
    for operator, function in _FUNCTIONS.items()
    for cached in (operator.cached, operator.cached_grad)
}


def gradients(
    operator: torch._ops.OpOverload,
    arguments: Sequence[object],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dys: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of those `inputs` that need one, by the decomposition of a `cached_*` operator.

    Args:
        arguments: The operator's arguments.
        inputs: All tensors among them.
        needs: Whether each of these needs a gradient.
        dys: The gradients of the outputs, or None for 0.
    """
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        y = DECOMPOSITIONS[operator](*arguments)
        pairs = [(t, dy) for t, dy in zip(y if isinstance(y, list) else [y], dys, strict=True) if dy is not None]
        sources = [t for t, need in zip(inputs, needs, strict=True) if need]
        if not pairs:
            return [None] * len(inputs)
        outputs, output_gradients = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, sources, output_gradients, create_graph=twice, allow_unused=True))
    return [next(found) if need else None for need in needs]
