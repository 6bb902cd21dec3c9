"""Makes other libraries' modules fused units. Each library has a file here, its family.

A family has `NAME`, which error messages print, and `find(model)`, which returns the modules that it can convert, each
with its mixin from `models.fused`. It knows classes by module and name, so that no library is imported.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from mnv2_fused._core.freshness import Cache
from mnv2_fused.models.fused import FusedUnit

# Attributes that only a fused unit has in its __dict__.
OWN = ("_cache", "fused", "recompute")
_BEFORE = "_before_conversion"


@functools.cache
def fused_class(kind: type[nn.Module], mixin: type[FusedUnit]) -> type[FusedUnit]:
    """A subclass of `kind` that runs fused. Its plain path is `kind`'s own forward."""
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"A {kind.__name__} that runs fused.",
        "_forward_plain": _renamed(getattr(kind, mixin._plain_method), "_forward_plain"),
        "_kind": kind,
        "__reduce_ex__": lambda self, protocol: (_rebuild, (kind, mixin), self.__getstate__()),
    }
    return type(f"Fused{kind.__name__}", (mixin, kind), namespace)


def _renamed(method: types.FunctionType, name: str) -> types.FunctionType:
    """The same method under another name. TorchScript compiles a method under the name of its function."""
    made = types.FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    made.__kwdefaults__ = method.__kwdefaults__
    made.__dict__.update(method.__dict__)
    made.__annotations__ = method.__annotations__
    return made


def _rebuild(kind: type[nn.Module], mixin: type[FusedUnit]) -> nn.Module:
    """An instance without state, which pickles and copies then fill."""
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
