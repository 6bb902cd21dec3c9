"""Makes other libraries' modules fused units. Each library has a file here, its family.

A family has `NAME`, which error messages print, and `find(model)`, which returns the modules that it can convert, each
with its mixin. It knows a class by module, name and the names in its forward (`Kind`), so that no library is imported
and another class with the same attributes is left alone. `find_kinds` does the search.

A mixin is one of these, and reads the module's children at every call, because users rewrite them in place:

- a block: a subclass of `models.fused.FusedBlock`, whose `_parts()` returns `BlockParts` or the reason why the block
  runs plain, and whose `_key()` lists everything that this depends on;
- a dense convolution: a subclass of `models.fused.FusedDense`, in the same way with `ConvParts`;
- a network: a subclass of `chain.Chain`, whose `_links()` lists its units in order: modules that are units themselves,
  and `chain.Part`s, which are units that are no modules of their own, such as a stem whose convolution and norm are
  children of the network.

`_plain_methods` names the methods of the original class that a mixin replaces, and how the mixin calls the original.
Norms with an activation, frozen norms and convolutions with TensorFlow's padding are known to `_core.kinds`;
`ConvParts.same` tells of a padding that the caller of the convolution adds.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from mnv2_fused._core.kinds import class_name
from mnv2_fused.models.fused import FusedUnit

# Attributes that only a fused unit has in its __dict__.
OWN = ("_cache", "_frozen", "fused", "recompute")
_BEFORE = "_before_conversion"


class Kind(NamedTuple):
    """How a class of another library becomes a unit.

    mixin: what makes it one.
    forwards: for methods whose code the mixin relies on, the names of attributes and functions in it. A class with
        other names in these is of a version that is not known, and is left alone.
    optional: names that these need not have, because older versions lack them.
    """

    mixin: type[FusedUnit]
    forwards: Mapping[str, frozenset[str]] = types.MappingProxyType({})
    optional: frozenset[str] = frozenset()


Kinds = Mapping[tuple[str, str], Kind]


def kind_of(module: nn.Module, kinds: Kinds) -> Kind | None:
    """The entry of the module's exact class. No subclasses: they may have another forward."""
    kind = kinds.get(class_name(module))
    if kind is None:
        return None
    for method, names in kind.forwards.items():
        function = getattr(type(module), method, None)
        if not isinstance(function, types.FunctionType):
            return None
        if frozenset(function.__code__.co_names) - kind.optional != names - kind.optional:
            return None
    return kind


def find_kinds(model: nn.Module, kinds: Kinds) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` whose exact class is one of `kinds`, each with its mixin."""
    return [(module, kind.mixin) for module in model.modules() if (kind := kind_of(module, kinds)) is not None]


@functools.cache
def fused_class(kind: type[nn.Module], mixin: type[FusedUnit]) -> type[FusedUnit]:
    """A subclass of `kind` that runs fused. Its plain path is `kind`'s own forward."""
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"A {kind.__name__} that runs fused.",
        "_kind": kind,
        "__reduce_ex__": lambda self, protocol: (_rebuild, (kind, mixin), self.__getstate__()),
    }
    for method, plain in mixin._plain_methods:
        if hasattr(kind, method):  # older versions lack some
            namespace[plain] = _renamed(getattr(kind, method), plain)
    name = kind.__name__ if mixin._keeps_name else f"Fused{kind.__name__}"
    return type(name, (mixin, kind), namespace)


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
    module.__class__ = fused_class(type(module), mixin)
    attributes["_cache"] = module._new_cache()


def revert_module(module: nn.Module) -> None:
    attributes = module.__dict__
    for name in OWN:
        attributes.pop(name, None)
    attributes.update(attributes.pop(_BEFORE, {}))
    module.__class__ = type(module)._kind
