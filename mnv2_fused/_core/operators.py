"""The inference operators: how each packs a unit's tensors, runs, and sizes its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnv2_fused._core import library as _library  # noqa: F401  (loads the operators)
from mnv2_fused._core import packing
from mnv2_fused._core.geometry import BlockShape, DenseShape

Pack = Callable[[Sequence[Tensor | None], Sequence[float], torch.dtype], Tensor]

_ops = torch.ops.mnv2_fused


class Operator(NamedTuple):
    """`run(x, packed, *lists, bounds, tf32)` computes a unit on packed weights, without gradients.

    `cached(x, tensors, cache, eps, *lists, bounds)` is the operator in traced graphs. It takes parameters and buffers
    unpacked, keeps packed weights in the cache of that name, and packs again if a tensor has changed.
    """

    name: str
    lists: tuple[str, ...]  # names of its lists of integers
    pack: Pack
    size: Callable[..., tuple]  # size(x, *lists): the output's shape
    channels_last: bool  # whether x must be channels_last
    run: Callable[..., Tensor]

    @property
    def cached(self) -> Callable[..., Tensor]:
        return getattr(_ops, f"cached_{self.name}").default


def _block_size(x: Tensor, block: list[int]) -> tuple:
    shape = BlockShape.of(x.shape[1], block)
    return (x.shape[0], shape.c_out, *shape.size_out(x.shape[2], x.shape[3]))


def _dense_size(x: Tensor, dense: list[int]) -> tuple:
    shape = DenseShape.of(x.shape[1], dense)
    return (x.shape[0], shape.c_out, *shape.size_out(x.shape[2], x.shape[3]))


def _classes(x: Tensor, *lists: list[int]) -> tuple:
    head = lists[-1]
    return x.shape[0], head[1]


def _operator(name: str, lists: tuple[str, ...], pack: Pack, size: Callable, channels_last: bool) -> Operator:
    return Operator(name, lists, pack, size, channels_last, getattr(_ops, name).default)


INVERTED_RESIDUAL = _operator("inverted_residual", ("block",), packing.pack_block, _block_size, True)
DENSE = _operator("dense", ("dense",), packing.pack_dense, _dense_size, False)
HEAD = _operator("head", ("head",), packing.pack_head, _classes, True)
NETWORK = _operator("network", ("stem", "blocks", "head"), packing.pack_network, _classes, False)

OPERATORS = (INVERTED_RESIDUAL, DENSE, HEAD, NETWORK)
