"""Freezes models: weights are packed once, and calls do not check whether they have changed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core.checks import check_module
from mnv2_fused._core.decide import Unit, guard_of
from mnv2_fused._core.freshness import Cache
from mnv2_fused._core.run import prepare
from mnv2_fused.models.fused import FusedLayer, FusedUnit, units_in

__all__ = ["freeze", "thaw"]


def freeze(model: nn.Module, *, release: bool = False) -> nn.Module:
    """Take the weights of all fused units in ``model`` to be constant, in place, and return ``model``.

    Weights are folded and packed here, and calls do not check their contents. **A write into a tensor in place is not
    seen**: ``copy_``, ``.data``, an optimizer's step, ``load_state_dict`` or ``half`` of a plain module inside. Freeze
    again after it. `docs/freezing.md` lists what thaws a unit; `thaw` thaws all. Results are those of the live model to
    the bit. Without gradients of the input they have no gradient, also in grad mode. Copies and pickles are frozen,
    too, and pack at their first call.

    Args:
        model: any module in eval mode with fused units anywhere inside.
        release: Also give back the memory of the weights that were packed. Their parameters and buffers move to the
            meta device. Calls then only work as long as the units run fused, and whatever needs the weights raises
            RuntimeError: ``state_dict``, copies, pickles, `thaw`, `revert`, ``train``, gradients, autocast on the CPU,
            `torch.export`, and `torch.compile` of units outside a network. Weights that other references hold stay in
            memory.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no fused unit, or a module in training mode.
    """
    check_module("freeze", model)
    units = units_in(model)
    if not units:
        raise ValueError(
            f"freeze: model must contain a module that runs fused, got a {type(model).__name__} without any; "
            "mnv2_fused.convert makes them"
        )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"freeze: model must be in eval mode, got {name or 'it'} in training mode; call eval()")
    if any(unit._released for unit in units):
        return model
    for unit in units:
        for cache in unit._cache.all():
            cache.clear()
        unit.__dict__["_frozen"] = True
    with torch.no_grad():
        wholes = _pack(units)
    if release:
        _release(model, wholes)
    return model


def thaw(model: nn.Module) -> nn.Module:
    """Undo `freeze` in place: calls check again whether weights have changed. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: the weights were given back.
    """
    check_module("thaw", model)
    for unit in units_in(model):
        unit._thaw("thaw")
    return model


class _Whole(NamedTuple):
    """What runs as one operator: its unit, what `run` takes with it, the module that it computes, its tensors' ids."""

    unit: Unit
    module: Any
    owner: FusedUnit
    tensors: set[int]


def _pack(units: Iterable[FusedUnit]) -> list[_Whole]:
    """Packs the outermost units that run as one operator."""
    found: list[_Whole] = []
    done: set[int] = set()
    for module in units:  # outer ones come first
        if not module.fused or all(id(p) in done for p in module.parameters()):
            continue
        for unit, whole in module._wholes():
            if not whole._cache.readings and prepare(unit, whole) is not None:
                tensors = {id(t) for t in whole._cache.readings[None].packed.tensors if t is not None}
                found.append(_Whole(unit, whole, module, tensors))
                done |= tensors
                break
    return found


def _release(model: nn.Module, wholes: list[_Whole]) -> None:
    """Replaces the packed weights by tensors without memory."""
    packed = set().union(*(whole.tensors for whole in wholes))
    inside = {id(module) for whole in wholes for module in whole.owner.modules()}
    tables = [(m, table) for m in model.modules() for table in (m._parameters, m._buffers)]
    # A tensor that other modules share stays.
    shared = {id(t) for module, table in tables if id(module) not in inside for t in table.values()}
    on_gpu = False
    for _, table in tables:
        for name, tensor in table.items():
            if id(tensor) in packed - shared:
                on_gpu |= tensor.is_cuda
                table[name] = _on_meta(tensor)
    for unit in units_in(model):
        if any(t.is_meta for ts in (unit.parameters(), unit.buffers()) for t in ts):
            unit.__dict__["_released"] = True
            if isinstance(unit, FusedLayer):
                unit._cache.released = "all"
    for unit, module, owner, _ in wholes:
        if owner._released:
            for part in owner._cache.parts.values():
                part.released = "all"
            module._cache.released = unit
            _forget_tensors(module._cache)
    for unit in units_in(model):
        for cache in unit._cache.all():
            if not cache.readings:
                cache.clear()
    _trim(on_gpu)


def _on_meta(tensor: Tensor) -> Tensor:
    moved = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _forget_tensors(cache: Cache) -> None:
    """Makes what a cache has read hold no weights."""
    for reading in cache.readings.values():
        reading.packed.release()
    cache.refusals = {}
    cache.readings = {
        dtype: reading._replace(guard=guard_of(reading.key), spec=_hollow(reading.spec))
        for dtype, reading in cache.readings.items()
    }


def _hollow(value: Any) -> Any:
    """A spec with tensors of one element, which have the shapes, dtypes and devices of its own."""
    if isinstance(value, Tensor):
        return value.detach().new_zeros(()).expand(value.shape)
    if isinstance(value, tuple):
        entries = [_hollow(entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    return value


def _trim(on_gpu: bool) -> None:
    """Gives freed memory back to the system. The allocators would keep it for later."""
    with contextlib.suppress(AttributeError, OSError):  # the GNU C library alone has this
        ctypes.CDLL(None).malloc_trim(0)
    if on_gpu:
        torch.cuda.empty_cache()
