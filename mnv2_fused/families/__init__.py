"""Other libraries' modules as fused units: a file a library.

A family says which classes it knows (`kinds`) and where in a model they count (`find`). A class is known by its module
and name, so that no library is imported for it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from mnv2_fused._core.freshness import Cache
from mnv2_fused.models.fused import FusedUnit

# Attributes that a fused unit may have in its __dict__ and a plain module has not.
OWN = ("_cache", "fused", "recompute")
_BEFORE = "_before_conversion"


@functools.cache
def fused_class(kind: type[nn.Module], mixin: type[FusedUnit]) -> type[FusedUnit]:
    """A subclass of `kind` that runs fused, and whose plain path is that of `kind`."""
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"A {kind.__name__} that runs fused.",
        "_forward_plain": _renamed(getattr(kind, mixin._plain_method), "_forward_plain"),
        "_kind": kind,
        "__reduce_ex__": lambda self, protocol: (_rebuild, (kind, mixin), self.__getstate__()),
    }
    return type(f"Fused{kind.__name__}", (mixin, kind), namespace)


def _renamed(method: types.FunctionType, name: str) -> types.FunctionType:
    """The same method under another name, which is what TorchScript calls it by."""
    made = types.FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    made.__kwdefaults__ = method.__kwdefaults__
    made.__dict__.update(method.__dict__)
    made.__annotations__ = method.__annotations__
    return made


def _rebuild(kind: type[nn.Module], mixin: type[FusedUnit]) -> nn.Module:
    """An instance without state, for pickles and copies."""
    made = fused_class(kind, mixin)
    return made.__new__(made)


def is_converted(module: nn.Module) -> bool:
    return "_kind" in type(module).__dict__


def convert_module(module: nn.Module, mixin: type[FusedUnit]) -> None:
    """Makes `module` a fused unit in place; `revert_module` undoes it."""
    attributes = module.__dict__
    before = {name: attributes.pop(name) for name in OWN if name in attributes}
    if before:
        attributes[_BEFORE] = before
    attributes["_cache"] = Cache()
    module.__class__ = fused_class(type(module), mixin)


def revert_module(module: nn.Module) -> None:
    attributes = module.__dict__
    for name in OWN:
        attributes.pop(name, None)
    attributes.update(attributes.pop(_BEFORE, {}))
    module.__class__ = type(module)._kind
