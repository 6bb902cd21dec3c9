"""Weights of segmentation networks on MobileNetV2: what their shapes, their values and their metadata tell."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused import weights as files
from mnv2_fused.models.backbone import LAST_BLOCK
from mnv2_fused.models.deeplab import RATES

__all__ = ["Loaded", "convention", "fill_backbone", "load"]

RESOLUTION = 513
_PREFIX = "backbone."
_DEEPLAB = {"classifier.logits.weight": 4, "classifier.aspp0.0.weight": 4}
_LRASPP = {"classifier.low_classifier.weight": 4, "classifier.high_classifier.weight": 4}


class Loaded(NamedTuple):
    """A file's tensors, and the arguments of the network's builder that follow from it."""

    state_dict: dict[str, Tensor]
    arguments: dict[str, Any]
    resolution: int


def convention(tf: bool, resolution: int = RESOLUTION) -> files.Convention:
    """How images are prepared: resized whole to ``resolution``, then TensorFlow's or torchvision's normalisation."""
    of = files.TENSORFLOW if tf else files.TORCHVISION
    return dataclasses.replace(of, crop=resolution, resize=None, interpolation="bilinear")


def load(
    path: str | os.PathLike[str],
    lraspp: bool = False,
    width_mult: float | None = None,
    round_nearest: int | None = None,
) -> Loaded:
    """Reads a DeepLabv3, or a LR-ASPP, from a .pth or .safetensors file.

    The class count, the width and the branches follow from shapes. ``tf`` and ``output_stride`` follow from the file's
    metadata ``convention`` and ``output_stride``, if it has them. ``width_mult`` and ``round_nearest`` are not searched
    for if they are given.

    Raises:
        mnv2_fused.weights.WeightsError: nothing readable there, another network, or metadata that cannot be.
    """
    kind = f"{'LR-ASPP' if lraspp else 'DeepLabv3'} on MobileNetV2"
    files.require_path(path, kind)
    source = os.fspath(path)
    loaded, facts = files.read(path)
    state_dict = files.tensors(loaded, source)
    ends = {f"{_PREFIX}features.0.0.weight": 4, **(_LRASPP if lraspp else _DEEPLAB)}
    files.check_shapes(state_dict, ends, source, kind)
    stated, resolution = files.stated(facts, source)
    backbone = files.below(state_dict, _PREFIX)
    width_mult, round_nearest = files.backbone_width(backbone, width_mult, round_nearest)
    arguments: dict[str, Any] = {
        "num_classes": state_dict[next(iter(_LRASPP if lraspp else _DEEPLAB))].shape[0],
        "width_mult": width_mult,
        "round_nearest": round_nearest,
        "output_stride": _output_stride(facts, source),
        "tf": files.pads_as_tensorflow(stated),
    }
    if not lraspp:
        arguments["aspp"] = "classifier.aspp1.0.weight" in state_dict
        arguments["aux_loss"] = "aux_classifier.0.weight" in state_dict
        arguments["eps"] = eps_of_identities(backbone)
    return Loaded(state_dict, arguments, resolution or RESOLUTION)


def fill_backbone(backbone: nn.Module, weights: Any) -> None:
    """Gives ``backbone`` the weights of a classification network: a file, or a published checkpoint's name.

    Raises:
        mnv2_fused.weights.WeightsError: as `mnv2_fused.weights.load_state_dict`, and if the widths differ.
    """
    state_dict, _ = files.load_state_dict(weights)
    kept = {}
    for key, value in state_dict.items():
        unit = re.match(r"features\.([0-9]+)\.", key)
        if unit is not None and int(unit[1]) <= LAST_BLOCK:
            kept[key] = value
    files.fill(backbone, kept, str(weights))


def _output_stride(facts: Mapping[str, object], source: str) -> int:
    text = str(facts.get("output_stride", max(RATES)))
    if text not in map(str, RATES):
        raise files.WeightsError(f"{source}: output_stride in its metadata: expected 8 or 16, got {text[:60]!r}")
    return int(text)


def eps_of_identities(backbone: Mapping[str, Tensor]) -> float | None:
    """The eps with which all batch norms are scales of 1, or None if they are not all such.

    Converters that meet folded batch norms write scale 1, mean 0 and variance 1 - eps. With another eps these would
    scale every layer.
    """
    norms = [key.removesuffix(".running_var") for key in backbone if key.endswith(".running_var")]
    variances = torch.cat([backbone[f"{norm}.running_var"].flatten().double() for norm in norms]) if norms else None
    if variances is None or not 0 < 1 - variances[0] < 0.1 or not (variances == variances[0]).all():
        return None
    for norm in norms:
        if not all(f"{norm}.{name}" in backbone for name in ("weight", "running_mean")):
            return None
        if not (backbone[f"{norm}.weight"] == 1).all() or not (backbone[f"{norm}.running_mean"] == 0).all():
            return None
    return float(f"{1 - variances[0].item():.2g}")  # the variance is rounded to its dtype
