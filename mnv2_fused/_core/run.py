"""The one road from a module to its kernel: `run` does what `decide` says."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import call, fit, library
from mnv2_fused._core.decide import PLAIN, TRAIN, Reading, Unit, current_spec, decide, guard_of, is_released
from mnv2_fused._core.decompositions import finite
from mnv2_fused._core.freshness import Cache
from mnv2_fused._core.layout import is_channels_last, to_contiguous
from mnv2_fused._core.specs import Arguments

_C = library._C
_CHANNELS_LAST = torch.channels_last
_FROZEN = torch.ops.mnv2_fused.frozen_network.default


def run(
    unit: Unit, module: nn.Module, x: Tensor, inside: bool = False, more: tuple[Tensor, ...] = ()
) -> Tensor | list[Tensor] | None:
    """The output of `module`, or None if it must run plain. A list if the unit's operator has several outputs.

    The output has the memory format of the plain output; `inside` a network it is channels_last. `more`: arguments of
    the operator in inference that follow tf32; not for traced graphs.
    """
    if unit.alongside:
        if module._unit_by_unit:
            return None
        y = None if module._frozen else _run_alongside(unit, module, x, inside)
        if y is not None:
            return y
    found = _run(unit, module, x, more)
    if found is None:
        return None
    y, spec = found
    return y if inside else _in_plain_format(x, y, spec)


def run_inside(unit: Unit, module: nn.Module, x: Tensor, channels_last: bool) -> tuple[Tensor, bool] | None:
    """The channels_last output of `module`, and whether its plain output would be channels_last. None if it must run
    plain. `channels_last`: whether its plain input would be.
    """
    found = _run(unit, module, x)
    if found is None:
        return None
    y, spec = found
    return y, channels_last or _weights_decide(y, spec.channels_last)


def _run(unit: Unit, module: nn.Module, x: Tensor, more: tuple[Tensor, ...] = ()) -> tuple[Any, Any] | None:
    """The channels_last output of `module` and its spec, or None if it must run plain."""
    if not module._frozen:
        return _decide_and_run(unit, module, x, more)
    if torch.compiler.is_compiling():
        found = _trace_frozen(unit, module, x)
        return _decide_and_run(unit, module, x, more) if found is None else found
    found = _run_frozen(unit, module, x, more)
    if found is not None:
        return found
    with torch.set_grad_enabled(call.asks_gradients(x)):  # its weights are constants
        return _decide_and_run(unit, module, x, more)


def _run_frozen(unit: Unit, module: nn.Module, x: Tensor, more: tuple[Tensor, ...]) -> tuple[Any, Any] | None:
    """As `_run`, if the frozen module has been read before; else None. Short, because networks can be small."""
    reading: Reading | None = module._cache.readings.get(None)
    if (
        reading is None
        or not module.fused
        or call.eager_call_reason(x) is not None
        or call.asks_gradients(x)
        or call.casts(x)
        or not reading.is_current(unit, module)
        or not fit.known_to_fit(unit.operator.name, reading.spec, x)
    ):
        return None
    packed = reading.packed.data if x.is_cpu else module._cache.use(reading.packed)
    return execute(unit, x, reading.arguments, packed, *more), reading.spec


def _trace_frozen(unit: Unit, module: nn.Module, x: Tensor) -> tuple[Any, Any] | None:
    """As `_run_frozen`, in a graph that torch.compile traces: one operator that calls `run_traced`. None for exported
    graphs, which take weights, and for units outside a network.
    """
    reading: Reading | None = module._cache.readings.get(None)
    if (
        not unit.alongside
        or reading is None
        or reading.unit is not unit
        or reading.taps != _taps(module)
        or not module.fused
        or call.is_exporting()
        or call.call_reason(x) is not None
        or call.asks_gradients(x)
        or call.casts(x)
        or fit.shape_reason(unit.operator.name, reading.spec, x) is not None
    ):
        return None
    return _FROZEN(x, module._cache.name, reading.arguments[0]), reading.spec


def run_traced(cache: Cache, x: Tensor, units: str) -> list[Tensor] | None:
    """The outputs of the network with these units, which had them and this cache when a graph was traced; None if it
    cannot run as one operator or has changed. The graph was traced for the modes of the call.
    """
    unit, network = cache.networks.get(units, (None, lambda: None))
    module = network()
    if module is None or not module.fused or module._unit_by_unit:
        return None
    with torch.no_grad():
        spec = current_spec(unit, module, None)
        if isinstance(spec, str) or not fit.known_to_fit(unit.operator.name, spec, x):
            return None
        arguments, packed = _packed(unit, module, spec, None)
        return execute(unit, x, arguments, packed) if arguments[0] == units else None


def _decide_and_run(unit: Unit, module: nn.Module, x: Tensor, more: tuple[Tensor, ...]) -> tuple[Any, Any] | None:
    decision = decide(unit, module, x)
    if decision.path == PLAIN:
        if is_released(unit, module):
            raise RuntimeError(
                f"{type(module).__name__}: freeze(release=True) gave its weights back, so it can only run fused, but "
                f"{call.GRADIENTS if call.asks_gradients(x) else decision.reason}"
            )
        return None
    spec = decision.spec
    if decision.path == TRAIN:
        y = unit.train(x, spec, decision.prepared, module)
    elif decision.dtype is None or decision.dtype == x.dtype:
        y = _infer(unit, module, x, spec, decision.dtype, more=more)
    elif getattr(spec.shape, "residual", False):
        # The input has another dtype than the block's output, so PyTorch's own addition decides the result's dtype.
        y = x + _infer(unit, module, x.to(decision.dtype), spec, decision.dtype, shortcut=False)
    else:
        y = _infer(unit, module, x.to(decision.dtype), spec, decision.dtype, more=more)
    return y, spec


def execute(unit: Unit, x: Tensor, arguments: Arguments, packed: Tensor, *more: Tensor) -> Tensor | list[Tensor]:
    """Calls the unit's operator. `x` must have the arithmetic's dtype. `more` arguments of the operator follow tf32."""
    operator = unit.operator
    if operator.channels_last:
        x = x.contiguous(memory_format=_CHANNELS_LAST)
    return operator.run(x, packed, *arguments, call.tf32(x), *more)


def prepare(unit: Unit, module: nn.Module) -> tuple[Arguments, Tensor] | None:
    """Arguments and packed weights for `execute`; None if `module` must run plain."""
    spec = current_spec(unit, module, None)
    return None if isinstance(spec, str) else _packed(unit, module, spec, None)


def _infer(
    unit: Unit,
    module: nn.Module,
    x: Tensor,
    spec: Any,
    dtype: torch.dtype | None,
    shortcut: bool = True,
    more: tuple[Tensor, ...] = (),
) -> Tensor | list[Tensor]:
    """The output for an input of the arithmetic's dtype. A traced graph gets the `cached_*` operator."""
    if torch.compiler.is_compiling():
        tensors, eps, arguments = (spec if shortcut else spec.without_shortcut()).flat()
        operator = unit.operator.cached_grad if torch.is_grad_enabled() else unit.operator.cached
        return operator(x, list(tensors), module._cache.name, list(eps), *finite(arguments))
    arguments, packed = _packed(unit, module, spec, dtype)
    if not shortcut:
        arguments = spec.without_shortcut().arguments
    return execute(unit, x, arguments, packed, *more)


def _packed(unit: Unit, module: nn.Module, spec: Any, dtype: torch.dtype | None) -> tuple[Arguments, Tensor]:
    """The operator's arguments and the packed weights for a spec that `decide` has just returned."""
    cache: Cache = module._cache
    reading: Reading | None = cache.readings.get(dtype)
    if reading is not None and reading.spec is spec:
        return reading.arguments, cache.use(reading.packed)
    tensors, eps, arguments = spec.flat()
    packed = None if reading is None else reading.packed
    if packed is None or not packed.is_of(tensors, eps) or not packed.holds():
        packed = cache.pack(tensors, eps, dtype or spec.dtype, unit.operator.pack)
    if not packed.in_graph:
        key = unit.key(module)
        if unit.alongside and arguments[0] not in cache.networks:
            cache.networks = cache.networks | {arguments[0]: (unit, _weakly(module))}
        others = {d: r for d, r in cache.readings.items() if d != dtype and r.packed.same.holds()}
        cache.readings = others | {dtype: Reading(unit, key, guard_of(key), spec, arguments, packed, _taps(module))}
    return arguments, cache.use(packed)


def _taps(module: Any) -> Any:
    """The maps of a network that is no module, which depend on the call."""
    return None if isinstance(module, nn.Module) else getattr(module, "taps", None)


def _weakly(network: Any) -> Callable[[], Any]:
    """Returns `network`, or None if it is gone."""
    return weakref.ref(network) if isinstance(network, nn.Module) else network._weakly()


def _run_alongside(unit: Unit, module: nn.Module, x: Tensor, inside: bool) -> Tensor | list[Tensor] | None:
    """The output as `run` returns it if nothing has changed since the last call, else None.

    The check runs while other threads compute. If it fails, their result is thrown away.
    """
    if torch.compiler.is_compiling() or not module.fused:
        return None
    if call.eager_call_reason(x) is not None or call.training_call(x):
        return None
    reading: Reading | None = module._cache.readings.get(None)
    if (
        reading is None
        or not x.is_cpu
        or not reading.packed.data.is_cpu  # the module was on a GPU
        or reading.packed.layout[1] != x.dtype  # the spec has the dtype that the weights have by now
        or not reading.is_of(unit, module)
        or reading.packed.exact
        or reading.needs_gradients()
        or not fit.known_to_fit(unit.operator.name, reading.spec, x)
    ):
        return None
    _C.check_alongside(reading.guard.same, reading.packed.same)
    try:
        y = execute(unit, x, reading.arguments, reading.packed.data)
    finally:
        held = _C.check_held()
    if not held:
        return None
    return y if inside else _in_plain_format(x, y, reading.spec)


def _in_plain_format(x: Tensor, y: Tensor | list[Tensor], spec: Any) -> Tensor | list[Tensor]:
    """The channels_last `y` in the memory format that PyTorch's convolutions would give it."""
    if isinstance(y, list):
        if len(y) == 1 and y[0].dim() == 2:  # a classifier's, which has one format
            return y
        return [_in_plain_format(x, each, one) for each, one in zip(y, spec.outputs, strict=True)]
    if y.dim() != 4 or is_channels_last(x) or _weights_decide(y, spec.channels_last):
        return y
    return to_contiguous(y)


def _weights_decide(y: Tensor, channels_last: bool) -> bool:
    """Whether weights that are `channels_last` make the plain output `y` so, too."""
    n, _, h, w = y.shape
    return channels_last and n > 0 and h * w > 1
