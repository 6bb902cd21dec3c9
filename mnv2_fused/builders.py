"""Functions that build networks, with weights if asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from mnv2_fused import weights as files
from mnv2_fused.models.deeplab import DeepLabV3
from mnv2_fused.models.lraspp import lraspp
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.models.units import variant
from mnv2_fused.weights import segmentation as segmentation_files
from mnv2_fused.weights.detection import load_detector

if TYPE_CHECKING:
    from mnv2_fused.models.ssdlite import SSDLite

__all__ = ["deeplabv3_mobilenet_v2", "lraspp_mobilenet_v2", "mobilenet_v2", "ssdlite320_mobilenet_v2"]


def mobilenet_v2(
    *, weights: str | os.PathLike[str] | Any | None = None, progress: bool = True, **kwargs: Any
) -> MobileNetV2:
    """Build a `MobileNetV2`, in training mode, with weights if asked for.

    Args:
        weights: a file with the names of torchvision, timm, transformers or Keras (see `mnv2_fused.weights.load`), the
            name of a published checkpoint (``"IMAGENET1K_V1"``, ``"IMAGENET1K_V2"``, ``"DEFAULT"``) or torchvision's
            enumeration member for it. Class count, width, padding, batch norm's eps and momentum and the variant of the
            block follow from the weights, unless given. None keeps the initial weights.
        progress: ignored; torchvision's function takes it.
        **kwargs: arguments of `MobileNetV2`.

    Raises:
        mnv2_fused.weights.WeightsError: the weights cannot be read or do not fit.
        ValueError: ``num_classes`` contradicts the weights, or `MobileNetV2` refuses an argument.
    """
    if weights is None:
        return MobileNetV2(**kwargs)
    state_dict, convention, block = files.load(weights)
    num_classes = files.num_classes(state_dict)
    _check_classes("mobilenet_v2", kwargs.setdefault("num_classes", num_classes), num_classes)
    if not {"width_mult", "inverted_residual_setting", "block"} & kwargs.keys():
        kwargs["width_mult"] = files.width_mult(state_dict)
    model = MobileNetV2(**(convention.network() | variant(**block) | kwargs))
    files.fill(model, state_dict, str(weights))
    return model


def ssdlite320_mobilenet_v2(
    weights: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    num_classes: int | None = None,
    width_mult: float | None = None,
    tf: bool | None = None,
    fused: bool = True,
    weights_backbone: str | os.PathLike[str] | Any | None = None,
    trainable_backbone_layers: int = 6,
    **ssd_arguments: Any,
) -> SSDLite:
    """Build SSDLite on MobileNetV2, in training mode. It needs torchvision: ``pip install "mnv2_fused[detection]"``.

    Args:
        weights: a .pth or .safetensors file with torchvision's names. None keeps the initial weights.
        progress: ignored; torchvision's function takes it.
        num_classes: classes, with the background as class 0; those of `weights`, or 91.
        width_mult: width multiplier; that of `weights` or `weights_backbone`, or 1.0.
        tf: follow TensorFlow's object detection API, not torchvision (see `models.ssdlite.SSDLite`); by default what
            the metadata of `weights` states, or False.
        fused: False always runs plain PyTorch.
        weights_backbone: weights of a classification network, as `mobilenet_v2` takes them, for the backbone. Ignored
            if `weights` is given.
        trainable_backbone_layers: stages of the backbone that train, from the last; 0 to 6.
        **ssd_arguments: other arguments of `models.ssdlite.SSDLite`.

    Raises:
        mnv2_fused.weights.WeightsError: the weights cannot be read or do not fit.
        mnv2_fused.extras.MissingExtraError: torchvision is missing.
        ValueError, TypeError: ``num_classes`` contradicts the weights, or `SSDLite` refuses an argument.
    """
    from mnv2_fused.models.ssdlite import SSDLite  # imports torchvision

    state_dict, backbone = None, None
    if weights is not None:
        state_dict, found = load_detector(weights, width_mult)
        if num_classes is not None:
            _check_classes("ssdlite320_mobilenet_v2", num_classes, found.num_classes)
        num_classes = found.num_classes
        width_mult = found.width_mult
        tf = found.tf if tf is None else tf
        if found.size is not None:
            ssd_arguments.setdefault("size", found.size)
    elif weights_backbone is not None:
        backbone, _ = files.load_state_dict(weights_backbone)
        width_mult = files.width_mult(backbone) if width_mult is None else width_mult
    model = SSDLite(
        91 if num_classes is None else num_classes,
        1.0 if width_mult is None else width_mult,
        tf=bool(tf),
        fused=fused,
        trainable_backbone_layers=trainable_backbone_layers,
        **ssd_arguments,
    )
    if state_dict is not None:
        files.fill(model, state_dict, str(weights))
    elif backbone is not None:
        features = files.below(backbone, "features.")
        files.fill(model.backbone.features, features, str(weights_backbone), "MobileNetV2")
    return model


def deeplabv3_mobilenet_v2(
    weights: str | os.PathLike[str] | None = None,
    *,
    weights_backbone: str | os.PathLike[str] | Any | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    width_mult: float | None = None,
    round_nearest: int | None = None,
    output_stride: int | None = None,
    aspp: bool | None = None,
    tf: bool | None = None,
    aux_loss: bool | None = None,
    **kwargs: Any,
) -> DeepLabV3:
    """Build a `DeepLabV3`, in training mode, with weights if asked for.

    An argument that is None follows from the file ``weights``. Without a file it has `DeepLabV3`'s default. The
    attribute ``preprocessing`` is the `mnv2_fused.weights.Convention` of the images.

    Args:
        weights: a .pth or .safetensors file. ``num_classes``, ``width_mult``, ``round_nearest``, ``aspp`` and
            ``aux_loss`` follow from its shapes, ``tf`` and ``output_stride`` from its metadata ``convention``
            (``"tensorflow"``) and ``output_stride``.
        weights_backbone: weights of a classification network for the backbone, as `mobilenet_v2` takes them.
        progress: ignored; torchvision's function takes it.
        num_classes, width_mult, round_nearest, output_stride, aspp, tf, aux_loss: see `DeepLabV3`.
        **kwargs: further arguments of `DeepLabV3`.

    Raises:
        mnv2_fused.weights.WeightsError: the weights cannot be read or do not fit.
        ValueError: ``num_classes`` contradicts the weights, or `DeepLabV3` refuses an argument.
    """
    given = {
        "num_classes": num_classes,
        "width_mult": width_mult,
        "round_nearest": round_nearest,
        "output_stride": output_stride,
        "aspp": aspp,
        "tf": tf,
        "aux_loss": aux_loss,
    }
    return _segmentation("deeplabv3_mobilenet_v2", DeepLabV3, weights, weights_backbone, given, kwargs)


def lraspp_mobilenet_v2(
    weights: str | os.PathLike[str] | None = None,
    *,
    weights_backbone: str | os.PathLike[str] | Any | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    width_mult: float | None = None,
    round_nearest: int | None = None,
    output_stride: int | None = None,
    tf: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build torchvision's LR-ASPP on MobileNetV2, in training mode, with weights if asked for.

    Its head takes block 6 (stride 8) and block 17. Assigning to ``model.backbone.fused`` switches the backbone.
    The attribute ``preprocessing`` and the arguments are those of `deeplabv3_mobilenet_v2`.

    Args:
        tf: TensorFlow's padding, and its normalisation of images.
        **kwargs: further arguments of `MobileNetV2`, such as ``fused``.

    Shapes: (n, 3, h, w) to ``{"out": (n, num_classes, h, w)}``.

    Raises:
        mnv2_fused.extras.MissingExtraError: torchvision is not installed.
        mnv2_fused.weights.WeightsError, ValueError: as `deeplabv3_mobilenet_v2`.
    """
    given = {
        "num_classes": num_classes,
        "width_mult": width_mult,
        "round_nearest": round_nearest,
        "output_stride": output_stride,
        "tf": tf,
    }
    return _segmentation("lraspp_mobilenet_v2", lraspp, weights, weights_backbone, given, kwargs)


def _check_classes(function: str, given: object, found: int) -> None:
    if given != found:
        raise ValueError(f"{function}: num_classes must be that of the weights, {found}; got {given}")


def _segmentation(
    function: str, make: Callable[..., nn.Module], weights: Any, backbone: Any, given: dict[str, Any], others: Any
) -> Any:
    """The network of `make`, whose arguments are those `given` that are not None, those of the file, and `others`."""
    given = {name: value for name, value in given.items() if value is not None}
    resolution = segmentation_files.RESOLUTION
    if weights is not None:
        sizes = (given.get("width_mult"), given.get("round_nearest"))
        state_dict, found, resolution = segmentation_files.load(weights, make is lraspp, *sizes)
        given = found | given
        _check_classes(function, given["num_classes"], found["num_classes"])
    arguments = given | others
    model = make(**arguments)
    model.preprocessing = segmentation_files.convention(arguments.get("tf", False), resolution)
    if weights is not None:
        files.fill(model, state_dict, os.fspath(weights))
    if backbone is not None:
        segmentation_files.fill_backbone(model.backbone, backbone)
    return model
