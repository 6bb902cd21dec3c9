"""The inference operators: how each packs a unit's tensors, runs, and sizes its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnv2_fused._core import packing
from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused._core.library import _C

Pack = Callable[[Sequence[Tensor | None], Sequence[float], torch.dtype], Tensor]

_ops = torch.ops.mnv2_fused


class Operator(NamedTuple):
    """`run(x, packed, fields, bounds, tf32)` computes a unit on packed weights, without gradients.

    `cached(x, tensors, cache, eps, fields, bounds)` is the operator in traced graphs. It takes parameters and buffers
    unpacked, keeps packed weights in the cache of that name, and packs again if a tensor has changed. If `several`, the
    operator returns a list of outputs.
    """

    name: str
    fields: str  # the name of its argument with integers
    pack: Pack
    sizes: Callable[[Tensor, Any], list[tuple]]  # sizes(x, fields): the outputs' shapes
    channels_last: bool  # whether x must be channels_last
    several: bool
    run: Callable[..., Tensor | list[Tensor]]

    @property
    def cached(self) -> Callable[..., Tensor]:
        return getattr(_ops, f"cached_{self.name}").default

    @property
    def cached_grad(self) -> Callable[..., Tensor]:
        """`cached` with gradients, for graphs that are exported in grad mode."""
        return getattr(_ops, f"cached_{self.name}_grad").default


class _Size(NamedTuple):
    """A map's size."""

    n: int
    c: int
    h: int
    w: int


def _block_size(x: _Size, block: list[int]) -> _Size:
    shape = BlockShape.of(x.c, block)
    return _Size(x.n, shape.c_out, *shape.size_out(x.h, x.w))


def _dense_size(x: _Size, dense: list[int]) -> _Size:
    shape = DenseShape.of(x.c, dense)
    return _Size(x.n, shape.c_out, *shape.size_out(x.h, x.w))


def _head_size(x: _Size, head: list[int]) -> tuple:
    return x.n, head[-1]


# Size and number of fields of each kind of unit, in the order of csrc/network.h.
_KINDS = (
    (_dense_size, len(_C.DENSE_FIELDS)),
    (_block_size, len(_C.BLOCK_FIELDS)),
    (_head_size, len(_C.HEAD_FIELDS)),
)


class UnitCall(NamedTuple):
    """A unit of a network for one input: its kind is an index in the order of csrc/network.h."""

    kind: int
    source: int  # index of the unit whose output it takes; below 0 for the network's input
    x: _Size
    fields: list[int]
    y: _Size | tuple
    tap: bool


def network_units(x: Sequence[int], units: str) -> Iterator[UnitCall]:
    """The units of a network for an input of size `x`, in their order."""
    numbers = [int(number) for number in units.split()]
    outputs = []
    first = 0
    while first < len(numbers):
        kind, source, tap = numbers[first : first + 3]
        size, count = _KINDS[kind]
        fields = numbers[first + 3 : first + 3 + count]
        given = _Size(*x) if source < 0 else outputs[source]
        outputs.append(size(given, fields))
        yield UnitCall(kind, source, given, fields, outputs[-1], bool(tap))
        first += 3 + count


def _network_sizes(x: Tensor, units: str) -> list[tuple]:
    return [tuple(unit.y) for unit in network_units(x.shape, units) if unit.tap]


def _operator(
    name: str, fields: str, pack: Pack, sizes: Callable, channels_last: bool, several: bool = False
) -> Operator:
    return Operator(name, fields, pack, sizes, channels_last, several, getattr(_ops, name).default)


def _one(size: Callable) -> Callable:
    return lambda x, fields: [tuple(size(_Size(*x.shape), fields))]


INVERTED_RESIDUAL = _operator("inverted_residual", "block", packing.pack_block, _one(_block_size), True)
DENSE = _operator("dense", "dense", packing.pack_dense, _one(_dense_size), False)
HEAD = _operator("head", "head", packing.pack_head, _one(_head_size), True)
NETWORK = _operator("network", "units", packing.pack_network, _network_sizes, False, several=True)

OPERATORS = (INVERTED_RESIDUAL, DENSE, HEAD, NETWORK)
