"""Functions that build networks, with weights if asked for."""

from __future__ import annotations

import os
from typing import Any

from mnv2_fused import weights as files
from mnv2_fused.models.mobilenet_v2 import MobileNetV2

__all__ = ["mobilenet_v2"]


def mobilenet_v2(
    *, weights: str | os.PathLike[str] | Any | None = None, progress: bool = True, **kwargs: Any
) -> MobileNetV2:
    """Build a `MobileNetV2`, in training mode, with weights if asked for.

    Args:
        weights: a .pth or .safetensors file with torchvision's names, the name of a published checkpoint
            (``"IMAGENET1K_V1"``, ``"IMAGENET1K_V2"``, ``"DEFAULT"``) or torchvision's enumeration member for it.
            Class count, width and padding follow from the weights, unless given. None keeps the initial weights.
        progress: ignored; torchvision's function takes it.
        **kwargs: arguments of `MobileNetV2`.

    Raises:
        mnv2_fused.weights.WeightsError: the weights cannot be read or do not fit.
        ValueError: ``num_classes`` contradicts the weights, or `MobileNetV2` refuses an argument.
    """
    if weights is None:
        return MobileNetV2(**kwargs)
    state_dict, convention = files.load_state_dict(weights)
    num_classes = files.num_classes(state_dict)
    if kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ValueError(
            f"mobilenet_v2: num_classes must be that of the weights, {num_classes}; got {kwargs['num_classes']}"
        )
    if not {"width_mult", "inverted_residual_setting", "block"} & kwargs.keys():
        kwargs["width_mult"] = files.width_mult(state_dict)
    kwargs.setdefault("tf_padding", convention.tf_padding)
    model = MobileNetV2(**kwargs)
    files.fill(model, state_dict, str(weights))
    return model
