"""Profiles of networks, unit by unit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from mnv2_fused._core.checks import check_module
from mnv2_fused._core.profile import names
from mnv2_fused.models.fused import FusedModel, FusedUnit

__all__ = ["unit_by_unit"]


@contextlib.contextmanager
def unit_by_unit(model: nn.Module) -> Iterator[None]:
    """Make the networks in ``model`` run unit by unit, with the units' paths as names in profiles::

        with mnv2_fused.unit_by_unit(model), torch.profiler.profile() as profile:
            model(x)
        print(profile.key_averages().table(sort_by="cpu_time_total"))

    A network is otherwise one operator, and one row of a profile. Units that run by themselves have a row without this,
    too, with their class and channels as its name. Values stay the same. A network takes a little longer than as one
    operator.

    Args:
        model: any module.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("unit_by_unit", model)
    units = {module: name for name, module in model.named_modules() if isinstance(module, FusedUnit)}
    networks = [unit for unit in units if isinstance(unit, FusedModel) and not unit._unit_by_unit]
    before = {unit: names[unit] for unit in units if unit in names}
    try:
        for network in networks:
            network.__dict__["_unit_by_unit"] = True
        names.update(units)
        yield
    finally:
        for network in networks:
            network.__dict__.pop("_unit_by_unit", None)
        for unit in units:
            names.pop(unit, None)
        names.update(before)
