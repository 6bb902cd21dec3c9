"""FLOP formulas of the operators, for `torch.utils.flop_counter`.

An operator counts what PyTorch's own formulas give for the convolutions and linear layers that it computes. What a
fused backward recomputes does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from mnv2_fused._core import registrations as _registrations  # noqa: F401  (defines the cached_* operators)
from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused._core.operators import OPERATORS, network_units
from mnv2_fused._core.when_imported import when_imported

Size = Sequence[int]


class _Convolution(NamedTuple):
    """Sizes of a convolution's input, weight and output."""

    x: Size
    weight: Size
    y: Size

    def forward(self, counter: ModuleType) -> int:
        return counter.conv_flop_count(self.x, self.weight, self.y)

    def backward(self, counter: ModuleType, needs_x: bool, needs_weight: bool) -> int:
        formula = counter.flop_registry[torch.ops.aten.convolution_backward]
        settings = (None, None, None, None, False, None, None)  # bias to groups; only `transposed` counts
        mask = [needs_x, needs_weight, False]
        return formula(self.y, self.x, self.weight, *settings, mask, out_val=(self.x, self.weight, None))


def _of_block(x: Size, block: list[int]) -> Iterator[_Convolution]:
    """The convolutions of a block: expand if it has one, depthwise, project."""
    n, c, h, w = x
    shape = BlockShape.of(c, block)
    expanded = (n, shape.c_hidden, h, w)
    filtered = (n, shape.c_hidden, *shape.size_out(h, w))
    if shape.has_expand:
        yield _Convolution(x, (shape.c_hidden, c, 1, 1), expanded)
    yield _Convolution(expanded, (shape.c_hidden, 1, shape.kernel, shape.kernel), filtered)
    yield _Convolution(filtered, (shape.c_out, shape.c_hidden, 1, 1), (n, shape.c_out, *filtered[2:]))


def _of_dense(x: Size, dense: list[int]) -> _Convolution:
    n, c, h, w = x
    shape = DenseShape.of(c, dense)
    return _Convolution(x, (shape.c_out, c, shape.kernel, shape.kernel), (n, shape.c_out, *shape.size_out(h, w)))


# ------------------------------------------------------------------------------------- formulas, by the fields' names


def _block(counter: ModuleType, *, x: Size, block: list[int], **_: object) -> int:
    return sum(convolution.forward(counter) for convolution in _of_block(x, block))


def _dense(counter: ModuleType, *, x: Size, dense: list[int], **_: object) -> int:
    return _of_dense(x, dense).forward(counter)


def _head(counter: ModuleType, *, x: Size, head: list[int], **_: object) -> int:
    n, c, h, w = x
    c_last, classes = head
    convolution = _Convolution(x, (c_last, c, 1, 1), (n, c_last, h, w))
    return convolution.forward(counter) + counter.mm_flop((n, c_last), (c_last, classes))


def _network(counter: ModuleType, *, x: Size, units: str, **_: object) -> int:
    kinds = ((_dense, "dense"), (_block, "block"), (_head, "head"))  # in the order of csrc/network.h
    total = 0
    for unit in network_units(x, units):
        formula, fields = kinds[unit.kind]
        total += formula(counter, x=unit.x, **{fields: unit.fields})
    return total


def _block_backward(counter: ModuleType, *, x: Size, block: list[int], needs: list[bool], **_: object) -> int:
    needs_x, *parameters = needs
    total, reached = 0, needs_x  # reached: whether a gradient is needed in front of the convolution
    expand, depthwise, project = parameters[:3], parameters[3:6], parameters[6:]
    convolutions = list(_of_block(x, block))
    for convolution, own in zip(convolutions, (expand, depthwise, project)[-len(convolutions) :], strict=True):
        total += convolution.backward(counter, reached, own[0])
        reached = reached or any(own)
    return total


def _dense_backward(counter: ModuleType, *, x: Size, dense: list[int], needs: list[bool], **_: object) -> int:
    needs_x, needs_weight, *_others = needs
    return _of_dense(x, dense).backward(counter, needs_x, needs_weight)


def _cached(formula: Callable[..., int], fields: str) -> Callable[..., int]:
    """The formula of an operator in traced graphs."""
    return lambda counter, *, x, **named: formula(counter, x=x, **{fields: named[fields]})


_FORMULAS = {
    "inverted_residual": _block,
    "dense": _dense,
    "head": _head,
    "network": _network,
    "train_block": _block,
    "train_block_backward": _block_backward,
    "train_dense": _dense,
    "train_dense_backward": _dense_backward,
}
_FORMULAS |= {
    f"cached_{o.name}{suffix}": _cached(_FORMULAS[o.name], o.fields) for o in OPERATORS for suffix in ("", "_grad")
}
_FORMULAS["frozen_network"] = _cached(_network, "units")


# ------------------------------------------------------------------------------------------------------- registration


def _register(counter: ModuleType) -> None:
    """Registers the formulas in `counter`, the module `torch.utils.flop_counter`."""
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.mnv2_fused, name)
        names = [argument.name for argument in operator.default._schema.arguments]

        def by_name(*given, formula=formula, names=names, out_shape=None, **named) -> int:
            return formula(counter, **dict(zip(names, given, strict=False)), **named)

        counter.register_flop_formula(operator)(by_name)


# Not imported here: that imports triton if it is installed, which takes 130 ms.
when_imported("torch.utils.flop_counter", _register)
