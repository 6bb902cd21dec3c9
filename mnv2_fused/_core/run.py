"""The one road from a module to its kernel: `run` does what `decide` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import call, fit, library
from mnv2_fused._core.decide import PLAIN, TRAIN, Reading, Unit, current_spec, decide
from mnv2_fused._core.freshness import Cache, Guard
from mnv2_fused._core.layout import is_channels_last, to_contiguous

_C = library._C
_CHANNELS_LAST = torch.channels_last


def run(unit: Unit, module: nn.Module, x: Tensor, inside: bool = False) -> Tensor | None:
    """The output of `module`; None if it must run plain.

    The memory format is that of the plain output; `inside` a network it is channels_last.
    """
    if unit.alongside:
        y = _run_alongside(unit, module, x)
        if y is not None:
            return y
    decision = decide(unit, module, x)
    if decision.path == PLAIN:
        return None
    spec = decision.spec
    if decision.path == TRAIN:
        y = unit.train(x, spec, module)
    elif decision.dtype is None or decision.dtype == x.dtype:
        y = _infer(unit, module, x, spec, decision.dtype)
    elif getattr(spec.shape, "residual", False):
        # A shortcut from an input of another dtype is added as PyTorch adds it.
        y = x + _infer(unit, module, x.to(decision.dtype), spec, decision.dtype, shortcut=False)
    else:
        y = _infer(unit, module, x.to(decision.dtype), spec, decision.dtype)
    return y if inside or y.dim() != 4 else _in_plain_format(x, y, spec)


def execute(unit: Unit, x: Tensor, spec: Any, packed: Tensor) -> Tensor:
    """The unit's operator on an input of the arithmetic's dtype, and nothing else."""
    operator = unit.operator
    if operator.channels_last:
        x = x.contiguous(memory_format=_CHANNELS_LAST)
    return operator.run(x, packed, *spec.arguments, call.tf32(x))


def prepare(unit: Unit, module: nn.Module, dtype: torch.dtype | None = None) -> tuple[Any, Tensor] | None:
    """What `module` computes in inference, and its packed weights; None if it must run plain."""
    spec = current_spec(unit, module, dtype)
    return None if isinstance(spec, str) else (spec, _packed(unit, module, spec, dtype))


def _infer(
    unit: Unit, module: nn.Module, x: Tensor, spec: Any, dtype: torch.dtype | None, shortcut: bool = True
) -> Tensor:
    """The output for an input of the arithmetic's dtype; in a graph by the operator that checks weights as it runs."""
    if not torch.compiler.is_compiling():
        packed = _packed(unit, module, spec, dtype)
        return execute(unit, x, spec if shortcut else spec.without_shortcut(), packed)
    if not shortcut:
        spec = spec.without_shortcut()
    lists = [list(argument) for argument in spec.arguments]
    return unit.operator.cached(x, list(spec.tensors), module._cache.name, list(spec.eps), *lists)


def _packed(unit: Unit, module: nn.Module, spec: Any, dtype: torch.dtype | None) -> Tensor:
    """The packed weights of what has just been decided."""
    cache: Cache = module._cache
    reading: Reading | None = cache.readings.get(dtype)
    if reading is not None and reading.spec is spec:
        return cache.use(reading.packed)
    packed = None if reading is None else reading.packed
    if packed is None or not packed.is_of(spec.tensors, spec.eps) or not packed.holds():
        packed = cache.pack(spec.tensors, spec.eps, dtype or spec.dtype, unit.operator.pack)
    if not packed.in_graph:
        key = unit.key(module)
        guard = Guard(entry for entry in key if isinstance(entry, nn.Module))
        others = {d: r for d, r in cache.readings.items() if d != dtype and r.packed.same.holds()}
        cache.readings = others | {dtype: Reading(key, guard, spec, packed)}
    return cache.use(packed)


def _run_alongside(unit: Unit, module: nn.Module, x: Tensor) -> Tensor | None:
    """The output, if nothing has changed since the last call.

    That is checked while other threads compute. A result from weights that have changed is thrown away.
    """
    if torch.compiler.is_compiling() or not module.fused or call.call_reason(x) is not None or call.training_call(x):
        return None
    reading: Reading | None = module._cache.readings.get(None)
    if (
        reading is None
        or not x.is_cpu
        or reading.key != unit.key(module)
        or reading.packed.exact
        or reading.needs_gradients()
        or fit.shape_reason(unit.operator.name, reading.spec, x) is not None
    ):
        return None
    _C.check_alongside(reading.guard.same, reading.packed.same)
    try:
        y = execute(unit, x, reading.spec, reading.packed.data)
    finally:
        held = _C.check_held()
    return y if held else None


def _in_plain_format(x: Tensor, y: Tensor, spec: Any) -> Tensor:
    """The channels_last `y` in the memory format that PyTorch's convolutions would have given it."""
    if is_channels_last(x):
        return y
    n, _, h, w = y.shape
    return y if spec.channels_last and n > 0 and h * w > 1 else to_contiguous(y)
