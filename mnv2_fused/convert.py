"""Makes modules of other libraries run fused, in place, and undoes it."""

from __future__ import annotations

from torch import nn

from mnv2_fused._core.checks import check_module
from mnv2_fused.families import convert_module, is_converted, revert_module, smp, timm, torchvision, transformers
from mnv2_fused.families.containers import find_containers
from mnv2_fused.models.fused import units_in

__all__ = ["convert", "revert"]

FAMILIES = (torchvision, timm, transformers, smp)


def convert(model: nn.Module) -> nn.Module:
    """Make networks and blocks of known libraries inside ``model`` run fused, in place, and return ``model``.

    Known are torchvision's MobileNetV2 and MNASNet; timm's EfficientNet family (MobileNetV2, EfficientNet-Lite, MnasNet
    and others, also as ``features_only``) and the blocks of other timm networks that fit; transformers' MobileNetV2,
    for classification and segmentation too; and segmentation_models_pytorch's encoders of these kinds. They may be
    anywhere in ``model``, for example in a detector. Subclasses of their classes are left alone. The class of each
    converted module becomes a subclass of itself, so ``isinstance`` stays true. Parameters, buffers, hooks and
    attributes stay the same objects. Modules that run fused already stay as they are. `explain` lists what runs fused,
    and why other units run plain. `revert` undoes it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` holds nothing to convert and nothing that runs fused already.
    """
    check_module("convert", model)
    for unit in units_in(model):
        unit._need_weights("convert")
    found = [entry for family in FAMILIES for entry in family.find(model)]
    for module, mixin in found:
        convert_module(module, mixin)
    for module, mixin in find_containers(model):
        convert_module(module, mixin)
    if not found and not units_in(model):
        names = ", or ".join(family.NAME for family in FAMILIES)
        raise ValueError(f"convert: model must contain {names}; got a {type(model).__name__} without any")
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: every converted module in ``model`` gets its own class back. Returns ``model``.

    Modules that were built from `mnv2_fused` classes stay as they are.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("revert", model)
    for unit in units_in(model):
        unit._need_weights("revert")
    for module in list(model.modules()):
        if is_converted(module):
            revert_module(module)
    return model
