"""Tells which units of a model run fused, which run plain, and why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnv2_fused._core.call import asks_gradients
from mnv2_fused._core.checks import check_module
from mnv2_fused._core.decide import decide
from mnv2_fused.models.fused import Asked, FusedModel, FusedUnit

__all__ = ["Explanation", "explain"]


class Explanation(dict[str, str | None]):
    """Maps every unit's name to the reason why it runs plain, or to None if it runs fused. Prints as a table.

    frozen: names of the units that are frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: set[str] = set()

    def __str__(self) -> str:
        if not self:
            return "no mnv2_fused unit in this model (mnv2_fused.convert makes units of modules that it knows)"
        width = max(map(len, self))
        return "\n".join(
            f"{name:{width}}  {'fused' if why is None else 'plain: ' + why}{', frozen' if name in self.frozen else ''}"
            for name, why in self.items()
        )


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Tell for every unit in ``model`` (stem, blocks, last convolution, head) whether a call would run it fused, and
    whether it is frozen.

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
    asked: list[tuple[str, Asked, nn.Module]] = []
    order = {module: i for i, module in enumerate(model.modules())}
    for name, module in model.named_modules():
        if isinstance(module, FusedUnit):
            for part in module._asked():
                path = ".".join(filter(None, (name, part.name))) or type(module).__name__
                asked.append((path, part, module))

    def place(entry: tuple[str, Asked, nn.Module]) -> tuple[bool, int]:
        _, part, module = entry
        return isinstance(part.module, FusedModel), order.get(part.entry, order[module])  # a network's own come last

    asked.sort(key=place)
    inputs = {} if x is None else _inputs([part.entry for _, part, _ in asked if part.entry is not None], model, x)
    found = Explanation()
    for name, part, module in asked:
        stands_in = x is None or part.entry is None
        given = _stand_in(module) if stands_in else inputs.get(part.entry)
        if given is None and module.fused:
            found[name] = "this input does not reach it"
        else:
            found[name] = _reason(part, given, stands_in)
        if module._frozen:
            found.frozen.add(name)
    return found


def _reason(part: Asked, x: Tensor, stands_in: bool) -> str | None:
    if part.module._cache.released is not None:
        return None
    with torch.set_grad_enabled(asks_gradients(x) if part.module._frozen else torch.is_grad_enabled()):
        return decide(part.unit, part.module, x, stands_in=stands_in).reason


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
