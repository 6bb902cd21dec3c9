"""Names units in profiles."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import nn

# The paths of units in the model that is profiled, see `unit_by_unit`.
names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

_NOTHING = contextlib.nullcontext()


def region(unit: Any, part: str = "") -> contextlib.AbstractContextManager:
    """A range in a profile that bears the name of `unit`, or of a part of it. Does nothing if no profiler runs.

    `unit`: a module, or a part of its `owner` with a `name`.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NOTHING
    if not isinstance(unit, nn.Module):
        unit, part = unit.owner, unit.name
    path = ".".join(filter(None, (names.get(unit), part)))
    return torch.profiler.record_function(path if unit in names and path else _described(unit) + part)


def _described(unit: nn.Module) -> str:
    """The unit's class and channels, for a unit whose path is not known."""
    convs = [module for module in unit.modules() if isinstance(module, nn.Conv2d)]
    kind = type(unit).__name__
    return f"{kind}({convs[0].in_channels}, {convs[-1].out_channels})" if convs else kind
