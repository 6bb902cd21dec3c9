"""Reads SSDLite's weights from files, and what they say about the network."""

from __future__ import annotations

import dataclasses
import os

import torch

from mnv2_fused import weights as files
from mnv2_fused.models.ssdlite_parts import ANCHORS, extra_channels

__all__ = ["Detector", "load_detector"]

_KIND = "SSDLite on MobileNetV2"
_CLASSES = "head.classification_head.module_list.1.1.weight"
_ENDS = {
    "backbone.features.0.0.weight": 4,
    "backbone.features.18.0.weight": 4,
    **{f"backbone.extra.{i}.2.0.weight": 4 for i in range(4)},
    _CLASSES: 4,
}


@dataclasses.dataclass(frozen=True)
class Detector:
    """What a file says about its network.

    `tf` is True if the file's metadata states a ``convention`` that pads as TensorFlow does, or states no convention
    and ``scores: sigmoid``. `size` is the side of the input in pixels that the metadata states as ``resolution``, or
    None.
    """

    num_classes: int
    width_mult: float
    tf: bool
    size: int | None


def load_detector(
    weights: str | os.PathLike[str], width_mult: float | None = None
) -> tuple[dict[str, torch.Tensor], Detector]:
    """Reads a .pth or .safetensors file with torchvision's key names.

    The width multiplier is looked for only if `width_mult` is None: the shapes tell those that are whole hundredths.

    Raises:
        mnv2_fused.weights.WeightsError: nothing readable there, or no SSDLite on MobileNetV2 in it.
    """
    files.require_path(weights, _KIND)
    loaded, facts = files.read(weights)
    source = str(weights)
    state_dict = files.check(loaded, source, _ENDS, _KIND)
    convention, size = files.stated(facts, source)
    tf = files.pads_as_tensorflow(convention) if convention else facts.get("scores") == "sigmoid"
    width = _width_mult(state_dict) if width_mult is None else width_mult
    classes, rest = divmod(state_dict[_CLASSES].shape[0], ANCHORS[1])
    if rest:
        raise files.WeightsError(
            f"{source}: {_CLASSES} has {state_dict[_CLASSES].shape[0]} outputs, expected a multiple of {ANCHORS[1]}, "
            "the anchors of a cell"
        )
    return state_dict, Detector(classes, width, tf, size)


def _width_mult(state_dict: dict[str, torch.Tensor]) -> float:
    extras = [state_dict[f"backbone.extra.{i}.2.0.weight"].shape[0] for i in range(4)]
    backbone = files.below(state_dict, "backbone.")
    return files.width_mult(backbone, lambda width: [c_out for _, c_out in extra_channels(width)] == extras)
