"""The one road from a module to its kernel: `run` asks `decide` and does what that says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core import call, fit, library
from mnv2_fused._core.call import GRADIENTS
from mnv2_fused._core.freshness import Cache, Guard, Packed
from mnv2_fused._core.layout import is_channels_last, to_contiguous
from mnv2_fused._core.operators import Operator

_C = library._C
_CHANNELS_LAST = torch.channels_last

INFER, TRAIN, PLAIN = "infer", "train", "plain"


class Unit(NamedTuple):
    """What can run fused, as a kind: a stem, a block, a head, a network.

    read: (module, train) to the spec of what the module computes, or the reason why it must run plain.
    key: what a reading rests on besides the state of those of its entries that are modules, and of their children.
    train: (x, spec, module) to the output, with gradients. None if the kind has no training of its own.
    train_reason: (spec, x or None) to the reason why it must train plain.
    alongside: check in the kernel's first moments, beside the other threads' work, whether weights have changed.
    """

    operator: Operator
    read: Callable[[nn.Module, bool], Any]
    key: Callable[[nn.Module], tuple[Any, ...]]
    train: Callable[[Tensor, Any, nn.Module], Tensor] | None = None
    train_reason: Callable[[Any, Tensor | None], str | None] | None = None
    alongside: bool = False


class Decision(NamedTuple):
    """What a call does: `path` is INFER, TRAIN or PLAIN. A PLAIN one has a reason, another a spec."""

    path: str
    reason: str | None = None
    spec: Any = None
    dtype: torch.dtype | None = None  # to which autocast casts the input of inference


class Reading(NamedTuple):
    """A spec in a module's cache, and what tells that it still holds."""

    key: tuple[Any, ...]
    guard: Guard
    spec: Any
    packed: Packed

    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.packed.tensors)


# --------------------------------------------------------------------------------------------------------- deciding


def decide(unit: Unit, module: nn.Module, x: Tensor, stands_in: bool = False) -> Decision:
    """What a call of `module` with `x` does here and now. With `stands_in` only the device of `x` is an input's."""
    if not module.fused:
        return Decision(PLAIN, "fused is False")
    reason = call.call_reason(x)
    if reason is not None:
        return Decision(PLAIN, reason)
    # What is likelier first.
    if module.training:
        train = _decide_training(unit, module, x, stands_in)
        if train.reason is None:
            return train
        infer = _decide_inference(unit, module, x, stands_in)
    else:
        infer = _decide_inference(unit, module, x, stands_in)
        if infer.reason is None:
            return infer
        train = _decide_training(unit, module, x, stands_in)
    if infer.reason is None:
        return infer
    if train.reason is None:
        return train
    if infer.spec is not None:  # it could be read: it is the input that does not fit
        return infer
    if not x.is_cpu:
        return Decision(PLAIN, f"{infer.reason}, and training has kernels for the CPU alone")
    return train if unit.train is not None else infer


def _decide_inference(unit: Unit, module: nn.Module, x: Tensor, stands_in: bool) -> Decision:
    if call.training_call(x):
        return Decision(PLAIN, GRADIENTS)
    dtype = call.autocast_dtype(x)
    spec = _current_spec(unit, module, dtype)
    if isinstance(spec, str):
        return Decision(PLAIN, spec)
    given = x if dtype is None else x.to(dtype)
    reason = None if stands_in else fit.shape_reason(unit.operator.name, spec, given, dtype)
    return Decision(INFER if reason is None else PLAIN, reason, spec, dtype)


def _decide_training(unit: Unit, module: nn.Module, x: Tensor, stands_in: bool) -> Decision:
    if unit.train is None:
        return Decision(PLAIN, "it does not train in one piece")
    if not x.is_cpu:
        return Decision(PLAIN, "training has kernels for the CPU alone")
    spec = unit.read(module, True)
    if isinstance(spec, str):
        return Decision(PLAIN, spec)
    reason = unit.train_reason(spec, None if stands_in else x)
    return Decision(TRAIN if reason is None else PLAIN, reason, spec)


def _current_spec(unit: Unit, module: nn.Module, dtype: torch.dtype | None) -> Any:
    """What `module` computes in inference, or the reason why it must run plain."""
    if torch.compiler.is_compiling():
        return unit.read(module, False)
    cache: Cache = module._cache
    reading: Reading | None = cache.readings.get(dtype)
    if reading is not None and reading.key == unit.key(module) and reading.guard.same.holds():
        if reading.needs_gradients():
            return GRADIENTS
        # A tensor may have got another shape or dtype by an assignment to its `data`.
        if reading.packed.holds():
            return reading.spec
    spec = unit.read(module, False)
    if isinstance(spec, str) and reading is not None:  # what it had packed is not needed any more
        cache.readings = {d: r for d, r in cache.readings.items() if d != dtype}
    return spec


# ---------------------------------------------------------------------------------------------------------- running


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
    spec = _current_spec(unit, module, dtype)
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
