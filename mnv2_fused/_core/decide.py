"""What a call of a module does, here and now: `run` asks it, and `explain` prints it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core import call, fit
from mnv2_fused._core.call import GRADIENTS
from mnv2_fused._core.freshness import Cache, Guard, Packed
from mnv2_fused._core.operators import Operator

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
    spec = current_spec(unit, module, dtype)
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


def current_spec(unit: Unit, module: nn.Module, dtype: torch.dtype | None) -> Any:
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
