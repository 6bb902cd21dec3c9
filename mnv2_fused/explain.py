"""Tells which units of a model run fused, which run plain, and why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnv2_fused._core.checks import check_module
from mnv2_fused._core.decide import Unit, decide
from mnv2_fused.models.fused import FusedLayer, FusedModel, FusedNetwork, FusedUnit

__all__ = ["Explanation", "explain"]


class Explanation(dict[str, str | None]):
    """Maps every unit's name to the reason why it runs plain, or to None if it runs fused. Prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no mnv2_fused unit in this model (mnv2_fused.convert makes some of torchvision's)"
        width = max(map(len, self))
        return "\n".join(f"{name:{width}}  {'fused' if why is None else 'plain: ' + why}" for name, why in self.items())


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Tell for every unit in ``model`` (stem, blocks, last convolution, head) whether a call would run it fused.

    Gradient mode, training mode, autocast and other modes count as they are during this call::

        with torch.inference_mode():
            print(mnv2_fused.explain(model))

    Args:
        model: any module.
        x: an input of ``model``. If it is given, the model runs on it once, and the dtype, device and shape of each
            unit's input count as well.

    Returns:
        None for each unit that runs fused, and the reason for each that runs plain, by the unit's name.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("explain", model)
    # Name, unit, its module, and the module whose input is the unit's input.
    asked: list[tuple[str, Unit, nn.Module, nn.Module | None]] = []
    for name, module in model.named_modules():
        if isinstance(module, FusedUnit):
            for part, unit in module._asked():
                path = ".".join(filter(None, (name, part))) or type(module).__name__
                asked.append((path, unit, module, _entry(module)))
    asked.sort(key=lambda entry: isinstance(entry[2], FusedModel))  # a network's parts come last
    inputs = {} if x is None else _inputs([entry for *_, entry in asked if entry is not None], model, x)
    found = Explanation()
    for name, unit, module, entry in asked:
        given = _stand_in(module) if x is None or entry is None else inputs.get(entry)
        if given is None and module.fused:
            found[name] = "this input does not reach it"
        else:
            found[name] = decide(unit, module, given, stands_in=x is None or entry is None).reason
    return found


def _entry(module: FusedUnit) -> nn.Module | None:
    """The module whose input is the input of the units of `module`; None if there is none."""
    if isinstance(module, FusedLayer):
        return module
    return _last(module) if isinstance(module, FusedNetwork) else None


def _last(network: FusedNetwork) -> nn.Module | None:
    features = network.features
    return features[-1] if isinstance(features, nn.Sequential) and len(features) > 0 else None


def _stand_in(module: nn.Module) -> Tensor:
    """A tensor on the device that an input of `module` would have to be on."""
    weight = next(module.parameters(), None)
    return torch.empty(0) if weight is None or weight.is_cpu else weight.detach()


def _inputs(units: list[nn.Module], model: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """The inputs that `units` get if `model` runs on `x`."""
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0]

    handles = [unit.register_forward_pre_hook(record) for unit in units]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
