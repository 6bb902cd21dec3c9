"""Decides what a call of a module does: infer, train or run plain. `run` follows the decision; `explain` prints it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core import call, fit
from mnv2_fused._core.call import GRADIENTS
from mnv2_fused._core.freshness import Cache, Guard, Packed, Refusal
from mnv2_fused._core.operators import Operator
from mnv2_fused._core.specs import Arguments

INFER, TRAIN, PLAIN = "infer", "train", "plain"
RELEASED = "its weights are packed in another shape, or in the network around it"


class Unit(NamedTuple):
    """A kind of module that can run fused: a stem or other dense convolution, a block, a head, a network.

    operator: The operator that computes it in inference.
    read: `read(module, train)` returns the module's spec, or the reason why it must run plain.
    key: `key(module)` returns everything that a reading depends on. Modules in it count with their state and children.
    prepare: `prepare(spec, x)` returns what `train` needs besides the spec, or the reason why the module must train
        plain. `x` is None if there is no input yet. None for a kind without `train`.
    train: `train(x, spec, prepared, module)` returns the output, with gradients. None if the kind does not train as one
        operator.
    alongside: If True, the CPU checks whether weights have changed while the operator already computes.
    """

    operator: Operator
    read: Callable[[nn.Module, bool], Any]
    key: Callable[[nn.Module], tuple[Any, ...]]
    prepare: Callable[[Any, Tensor | None], Any] | None = None
    train: Callable[[Tensor, Any, Any, nn.Module], Tensor] | None = None
    alongside: bool = False


def guard_of(key: tuple[Any, ...]) -> Guard:
    """Tells whether the modules in a unit's key, and what is inside them, are what they are now."""
    return Guard(entry for entry in key if isinstance(entry, nn.Module))


class Decision(NamedTuple):
    """What a call does. `path` is INFER, TRAIN or PLAIN. PLAIN comes with a reason; the other two come with a spec."""

    path: str
    reason: str | None = None
    spec: Any = None
    dtype: torch.dtype | None = None  # INFER: the dtype that autocast casts the input to; None without autocast
    prepared: Any = None  # TRAIN: what `Unit.prepare` returned


class Reading(NamedTuple):
    """A spec in a module's cache, with the state that tells whether it still holds."""

    unit: Unit
    key: tuple[Any, ...]
    guard: Guard
    spec: Any
    arguments: Arguments
    packed: Packed
    taps: Any = None  # of a network whose maps depend on the call

    def is_of(self, unit: Unit, module: nn.Module) -> bool:
        """Whether `module` was read as this unit, and has the modules that it had then."""
        return self.unit is unit and self.key == unit.key(module)

    def is_current(self, unit: Unit, module: nn.Module) -> bool:
        """Whether it is the reading of `module` as this unit, but for its tensors' contents and places."""
        return self.is_of(unit, module) and self.guard.same.holds()

    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.packed.tensors)


def decide(unit: Unit, module: nn.Module, x: Tensor, stands_in: bool = False) -> Decision:
    """What a call of `module` with `x` does, given the modes that are active now.

    With `stands_in`, `x` is no input but some tensor on the input's device, and its shape and dtype are not checked.
    """
    if not module.fused:
        return Decision(PLAIN, "fused is False")
    reason = call.call_reason(x)
    if reason is not None:
        return Decision(PLAIN, reason)
    # The likelier path first: reading a module takes time.
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
    if infer.spec is not None:  # the module could be read, so the reason is about the input
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
    spec = _read(unit, module, True)
    if isinstance(spec, str):
        return Decision(PLAIN, spec)
    prepared = unit.prepare(spec, None if stands_in else x)
    if isinstance(prepared, str):
        return Decision(PLAIN, prepared, spec)
    return Decision(TRAIN, None, spec, None, prepared)


def current_spec(unit: Unit, module: nn.Module, dtype: torch.dtype | None) -> Any:
    """The spec of `module` in inference, from its cache if it still holds; or the reason why it must run plain."""
    if torch.compiler.is_compiling():
        return unit.read(module, False)
    cache: Cache = module._cache
    reading: Reading | None = cache.readings.get(dtype)
    if reading is not None and reading.is_of(unit, module):
        if not reading.guard.same.holds():
            if module._frozen:
                module._thaw()  # something inside was replaced
        elif module._frozen:
            return reading.spec
        elif reading.needs_gradients():
            return GRADIENTS
        elif reading.packed.holds():  # an assignment to `data` may have given a tensor another shape or dtype
            return reading.spec
    spec = _read(unit, module, False)
    # Its packed weights are not needed any more.
    if isinstance(spec, str) and reading is not None and reading.unit is unit:
        cache.readings = {d: r for d, r in cache.readings.items() if d != dtype}
    return spec


def is_released(unit: Unit, module: nn.Module) -> bool:
    """Whether the weights of `module` as this unit are gone, see `freezing`."""
    return module._cache.released is unit or module._cache.released == "all"


def _read(unit: Unit, module: nn.Module, train: bool) -> Any:
    """What `unit.read` returns. A reason is remembered until something changes that a reading depends on."""
    if torch.compiler.is_compiling():
        return unit.read(module, train)
    cache, key = module._cache, unit.key(module)
    if is_released(unit, module):
        return RELEASED
    casts = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    mode = unit.operator.name, train, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), casts
    refusal: Refusal | None = cache.refusals.get(mode)
    if refusal is not None and refusal.holds(key, places=not module._frozen):
        return refusal.reason
    spec = unit.read(module, train)
    if isinstance(spec, str) and spec != GRADIENTS:  # nobody watches requires_grad
        cache.refusals = cache.refusals | {mode: Refusal(spec, key)}
    elif refusal is not None:
        cache.refusals = {m: r for m, r in cache.refusals.items() if m != mode}
    return spec
