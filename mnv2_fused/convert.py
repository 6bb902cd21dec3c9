"""Makes an existing torchvision MobileNetV2 run fused, undoes that, and tells what runs fused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from mnv2_fused._core import freshness as _freshness
from mnv2_fused._core import inspect as _inspect
from mnv2_fused.models.mobilenet_v2 import MobileNetV2, runs_as_module
from mnv2_fused.models.units import FusedUnit, InvertedResidual, Stem
from mnv2_fused.training import operators as training

__all__ = ["Explanation", "convert", "explain", "revert"]

_ORIGINAL = "_torchvision_class"


def convert(model: nn.Module) -> nn.Module:
    """Make the torchvision MobileNetV2 blocks inside ``model`` run fused, in place, and return ``model``.

    Swaps the classes of torchvision's ``MobileNetV2``, its blocks and its first convolution, wherever in ``model`` they
    are (a segmentation backbone, say); subclasses of them are left alone. Parameters, buffers, hooks and attributes
    stay the same objects. `revert` undoes it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is nothing in it to convert.
    """
    _check_module("convert", model)
    found = False
    for module in list(model.modules()):
        kind = type(module)
        if kind.__module__ == "torchvision.models.mobilenetv2" and kind.__qualname__ == "MobileNetV2":
            _swap(module, MobileNetV2)
        elif kind.__module__ == "torchvision.models.mobilenetv2" and kind.__qualname__ == "InvertedResidual":
            _swap(module, InvertedResidual)
        else:
            found = found or isinstance(module, (MobileNetV2, InvertedResidual))
            continue
        found = True
    # The stem is known by its place: before a block.
    for parent in list(model.modules()):
        for child, following in pairwise(parent.children()):
            if type(child).__module__ == "torchvision.ops.misc" and isinstance(following, InvertedResidual):
                if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
                    _swap(child, Stem)
    if not found:
        raise ValueError(
            "convert: model must contain torchvision's MobileNetV2 or its InvertedResidual blocks "
            f"(torchvision.models.mobilenetv2); got a {type(model).__name__} without any"
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: everything it converted in ``model`` has its torchvision class again. Returns ``model``.

    Modules that were built as `mnv2_fused` ones stay what they are.
    """
    _check_module("revert", model)
    for module in list(model.modules()):
        original = module.__dict__.pop(_ORIGINAL, None)
        if original is not None:
            module.__dict__.pop("_cache", None)
            module.__dict__.pop("fused", None)
            module.__class__ = original
    return model


def _swap(module: nn.Module, kind: type[FusedUnit]) -> None:
    module.__dict__[_ORIGINAL] = type(module)
    module.__dict__["_cache"] = _freshness.Cache()
    module.__class__ = kind


class Explanation(dict[str, str | None]):
    """The name of every unit and the reason why it runs plain, or None where it runs fused. Prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no mnv2_fused unit in this model (mnv2_fused.convert makes some of torchvision's)"
        width = max(map(len, self))
        return "\n".join(f"{name:{width}}  {'fused' if why is None else 'plain: ' + why}" for name, why in self.items())


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """For every unit in ``model`` (stem, blocks, head): None where a call would run it fused, else why it runs plain.

    Gradient mode, training mode, autocast and the like count as they are at the time of this call::

        with torch.inference_mode():
            print(mnv2_fused.explain(model))

    Args:
        model: any module.
        x: an input of ``model``, to have its dtype, device and shape considered as well (it is run through the model).
    """
    _check_module("explain", model)
    networks = {name: module for name, module in model.named_modules() if isinstance(module, MobileNetV2)}
    units: dict[str, nn.Module] = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, (Stem, InvertedResidual))
    }
    inputs = {} if x is None else _inputs([*units.values(), *(n.features[-1] for n in networks.values())], model, x)
    found = Explanation()
    for name, unit in units.items():
        found[name] = _reason(
            unit, _inspect.read_stem if isinstance(unit, Stem) else _inspect.read_block, (unit,), x, inputs
        )
    for name, network in networks.items():
        last = network.features[-1]
        features = network.features
        hooked = type(features).forward is not nn.Sequential.forward or runs_as_module(features)
        why = "features has hooks or a forward of its own" if hooked else None
        found[f"{name}.head" if name else "head"] = why or _head_reason(network, last, x, inputs)
    return found


def _head_reason(
    network: MobileNetV2, last: nn.Module, x: Tensor | None, inputs: dict[nn.Module, Tensor]
) -> str | None:
    def read(*modules: nn.Module, train: bool = False) -> object:
        if not train:
            return _inspect.read_head(*modules)
        # Only the last convolution trains fused, and what follows is plain: that is no reason where there is training.
        trains = torch.is_grad_enabled() or modules[0][1].training or torch.is_autocast_enabled("cpu")
        return _inspect.read_last(modules[0]) if trains else _inspect.read_head(*modules)

    return _reason(network, read, (last, network.classifier), x, inputs)


def _reason(
    unit: FusedUnit,
    read: Callable[..., object],
    modules: tuple[nn.Module, ...],
    x: Tensor | None,
    inputs: dict[nn.Module, Tensor],
) -> str | None:
    """Why a call of `unit` would run plain: neither of its two readings, for inference and to train, serves."""
    if not unit.fused:
        return "fused is False"
    given = _stand_in(modules[0]) if x is None else inputs.get(modules[0])
    if given is None:
        return "this input does not reach it"
    reason = _inspect.call_reason(given)
    if reason is not None:
        return reason
    why = _inspect.GRADIENTS
    if not _inspect.training_call(given):
        spec = read(*modules)
        if not isinstance(spec, str):
            dtype = _inspect.autocast_dtype(given)
            return None if x is None else _inspect.shape_reason(spec, given.to(dtype or given.dtype), dtype)
        why = spec
    spec = read(*modules, train=True)
    if isinstance(spec, str):
        return spec
    if not given.is_cpu:
        return f"{why}, and training has kernels for the CPU alone"
    return training.train_reason(spec, None if x is None else given)


def _stand_in(module: nn.Module) -> Tensor:
    """Is where an input of `module` would have to be."""
    weight = next(module.parameters(), None)
    return torch.empty(0) if weight is None or weight.is_cpu else weight.detach()


def _inputs(units: list[nn.Module], model: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """The input of each unit when `model` runs on `x`."""
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


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module; got a {type(model).__name__}")
