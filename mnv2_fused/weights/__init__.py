"""Reads weights: files of several libraries, torchvision's published checkpoints, and the conventions they follow.

Weights alone do not say how images are prepared, nor how stride-2 convolutions pad. If either is wrong, the network
gives confident nonsense. A `Convention` says both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from mnv2_fused._core.geometry import make_divisible
from mnv2_fused.models.mobilenet_v2 import SETTING, MobileNetV2
from mnv2_fused.models.units import PROJECT_ACTIVATIONS, SHORTCUTS, variant
from mnv2_fused.weights.conventions import CONVENTIONS, Convention, at_resolution
from mnv2_fused.weights.conventions import TENSORFLOW as TENSORFLOW
from mnv2_fused.weights.conventions import TORCHVISION as TORCHVISION
from mnv2_fused.weights.conventions import pads_as_tensorflow as pads_as_tensorflow
from mnv2_fused.weights.errors import WeightsError
from mnv2_fused.weights.published import PUBLISHED, download, published_name
from mnv2_fused.weights.published import Published as Published
from mnv2_fused.weights.random_statistics import randomize_batch_norm as randomize_batch_norm
from mnv2_fused.weights.reading import HEAD as HEAD
from mnv2_fused.weights.reading import named, read, tensors
from mnv2_fused.weights.reading import other_kind as other_kind
from mnv2_fused.weights.reading import unusable as unusable

MAX_RESOLUTION = 8192  # of an input, in pixels


_VARIANTS = {"project_activation": PROJECT_ACTIVATIONS, "shortcut": SHORTCUTS}

# Published widths come first, then a grid of all others. Channel counts are rounded to 8, so widths with the same
# counts are the same network.
_ROUNDINGS = (8, 4, 2, 1, 16)
_WIDTHS = (1.0, 1.4, 1.3, 0.75, 0.5, 0.35, 0.25, 0.1, *(i / 100 for i in range(5, 401)))


class Loaded(NamedTuple):
    """Weights of a `MobileNetV2`, their convention, and what the file states of `models.units.variant`'s arguments."""

    state_dict: dict[str, torch.Tensor]
    convention: Convention
    variant: dict[str, str]


def load_state_dict(weights, convention: str | None = None) -> tuple[dict[str, torch.Tensor], Convention]:
    """The first two results of `load`, for the paper's block. Raises WeightsError also for a variant of it."""
    state_dict, found, block = load(weights, convention)
    for name, value in block.items():
        if value != next(iter(_VARIANTS[name])):
            raise WeightsError(f"{weights}: {name} in its metadata: expected the paper's block, got {value!r}")
    return state_dict, found


def load(weights, convention: str | None = None) -> Loaded:
    """Reads `weights` and tells which convention they follow, and which variant of the block they belong to.

    Args:
        weights: path of a file, or the name of a published checkpoint (`IMAGENET1K_V1`, `IMAGENET1K_V2`, `DEFAULT`),
            or torchvision's enumeration member for it. Files are .pth, .bin or .safetensors with the key names of
            torchvision, timm, transformers or tonylins/pytorch-mobilenet-v2, and Keras' .h5 and .keras.
        convention: a name in `CONVENTIONS`. The default is what the file states (files that `train` writes do), then
            that of the library whose key names it has. With torchvision's names the number of classes decides: 1001,
            with the background at 0, is TensorFlow's; any other is torchvision's.

    Raises:
        WeightsError: nothing readable there, no MobileNetV2 in it, keys that the library's MobileNetV2 does not have, a
            stated convention, resolution or variant that does not exist, or `convention` contradicts a published
            checkpoint.
        mnv2_fused.extras.MissingExtraError: a Keras file, and h5py is not installed.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise WeightsError(f"unknown convention {convention!r}: expected one of {', '.join(CONVENTIONS)}")
    name = published_name(weights)
    if name is not None:
        published = PUBLISHED[name]
        if convention not in (None, published.convention.name):
            raise WeightsError(
                f"{name} was trained with the {published.convention.name} convention: "
                f"it cannot be run with the {convention} convention"
            )
        return Loaded(check(download(name, published.url), name), published.convention, {})
    loaded, facts = read(weights)
    state_dict, library = named(loaded, str(weights))
    check_shapes(state_dict, _ENDS, str(weights), "MobileNetV2")
    stated_name, resolution = stated(facts, str(weights))
    if convention is None:
        classes = "tensorflow" if num_classes(state_dict) == 1001 else "torchvision"
        convention = stated_name or library or classes
    found = CONVENTIONS[convention]
    choices = {key: _stated_choice(facts, key, known, str(weights)) for key, known in _VARIANTS.items()}
    found = found if resolution is None else at_resolution(found, resolution)
    return Loaded(state_dict, found, {key: value for key, value in choices.items() if value is not None})


def stated(facts: Mapping[str, object], source: str) -> tuple[str | None, int | None]:
    """The convention and the resolution that a file states beside its weights, each None if it states none."""
    convention, resolution = _stated_choice(facts, "convention", CONVENTIONS, source), facts.get("resolution")
    if resolution is None:
        return convention, None
    text = str(resolution)
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_RESOLUTION:
        rule = f"a whole number from 1 to {MAX_RESOLUTION}"
        raise WeightsError(f"{source}: resolution in its metadata: expected {rule}, got {_short(resolution)}")
    return convention, int(text)


def _stated_choice(facts: Mapping[str, object], name: str, known: Iterable[str], source: str) -> str | None:
    value = facts.get(name)
    if value is not None and not (isinstance(value, str) and value in known):
        rule = f"one of {', '.join(known)}"
        raise WeightsError(f"{source}: {name} in its metadata: expected {rule}, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_path(weights, kind: str) -> None:
    """Raises WeightsError if `weights` can only be the name of a published checkpoint. Networks of this `kind` have
    none.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise WeightsError(f"weights must be the path of a file, got {weights!r}")
    name = os.fspath(weights)
    if not os.path.exists(name) and not os.path.splitext(name)[1]:
        raise WeightsError(f"no such weights file: {name} (no weights of {kind} are published)")


def below(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose keys begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def num_classes(state_dict: Mapping[str, torch.Tensor]) -> int:
    """Number of classes of a checked state dict."""
    return state_dict["classifier.1.weight"].shape[0]


def width_mult(state_dict: Mapping[str, torch.Tensor], fits: Callable[[float], bool] = lambda width: True) -> float:
    """The width multiplier that gives the channel counts of `state_dict`, and that `fits` accepts.

    Raises:
        WeightsError: no width multiplier of the standard network (17 blocks, rounded to 8) gives them.
    """
    got = (*_channels(state_dict), state_dict["features.18.0.weight"].shape[0])
    for width in _WIDTHS:
        if _standard_channels(width) == got and fits(width):
            return width
    raise WeightsError(
        "no width multiplier of the standard MobileNetV2 gives these channel counts (stem, 17 blocks, last layer): "
        + " ".join(map(str, got))
    )


def backbone_width(
    state_dict: Mapping[str, torch.Tensor], width_mult: float | None = None, round_nearest: int | None = None
) -> tuple[float, int]:
    """The width multiplier and the rounding that give the channel counts of the stem and the 17 blocks.

    Args:
        state_dict: weights with the keys of `MobileNetV2`.
        width_mult, round_nearest: not searched for if they are given.

    Raises:
        WeightsError: there are none, or not with those given.
    """
    got = _channels(state_dict)
    for rounding in _ROUNDINGS if round_nearest is None else (round_nearest,):
        for width in _WIDTHS if width_mult is None else (width_mult,):
            if _standard_channels(width, rounding)[:-1] == got:
                return width, rounding
    given = {"width_mult": width_mult, "round_nearest": round_nearest}
    stated = " and ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    raise WeightsError(
        f"no standard MobileNetV2{' with ' + stated if stated else ''} has these channel counts (stem, 17 blocks): "
        + " ".join(map(str, got))
    )


def load_model(weights, *, convention: str | None = None, fused: bool = True) -> tuple[nn.Module, Convention]:
    """The MobileNetV2 for `weights`, in eval mode. Width, class count, padding and variant follow from them.

    Raises:
        WeightsError: as `load`, and for keys, shapes or values that do not fit.
    """
    state_dict, found, block = load(weights, convention)
    with torch.device("meta"):  # no time for an initialisation that is overwritten anyway
        sizes = num_classes(state_dict), width_mult(state_dict)
        model = MobileNetV2(*sizes, fused=fused, **found.network(), **variant(**block)).eval()
    fill(model, state_dict, str(weights))
    return model, found


def fill(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str = "the weights", kind: str | None = None
) -> None:
    """`model.load_state_dict` for a model that may be on the meta device, with messages for people. They call the
    model `kind`, by default by the name of its class.

    Raises:
        WeightsError: keys, shapes, dtypes or values that do not fit.
    """
    expected = model.state_dict()
    counters = {key: torch.tensor(0) for key in expected if key.endswith(".num_batches_tracked")}
    state_dict = {**counters, **state_dict}  # checkpoints older than these counters lack them
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in expected]
    values = {}
    for key, value in expected.items():
        got = state_dict.get(key)
        if got is None:
            continue
        if got.shape != value.shape:
            problems.append(f"{key} has shape {tuple(got.shape)}, expected {tuple(value.shape)}")
        elif value.is_floating_point() and not got.is_floating_point():
            problems.append(f"{key} has dtype {got.dtype}, expected a floating-point one")
        elif got.is_floating_point() and not torch.isfinite(got.to(value.dtype)).all():
            problems.append(f"{key} holds NaN or infinity")
        elif key.endswith(".running_var") and (got < 0).any():
            problems.append(f"{key} holds negative values, expected variances")
        else:
            values[key] = got.to(value.dtype, copy=True)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{source} does not fit this {kind or type(model).__name__}: {'; '.join(problems[:3])}{more}"
        )
    model.load_state_dict(values, assign=any(value.is_meta for value in expected.values()))


_ENDS = {"features.0.0.weight": 4, "features.18.0.weight": 4, "classifier.1.weight": 2}


def check(
    loaded: object, source: str, ends: Mapping[str, int] = _ENDS, kind: str = "MobileNetV2"
) -> dict[str, torch.Tensor]:
    """The state dict in `loaded`, as `tensors`, with the keys of `ends`, as `check_shapes`. Raises WeightsError."""
    state_dict = tensors(loaded, source)
    check_shapes(state_dict, ends, source, kind)
    return state_dict


def check_shapes(state_dict: Mapping[str, torch.Tensor], ends: Mapping[str, int], source: str, network: str) -> None:
    """Checks that the keys of `ends` are there with so many dimensions. `network` is its name in the error.

    Raises:
        WeightsError: a key is missing, or its tensor has other dimensions or no elements.
    """
    for key, dims in ends.items():
        if key not in state_dict:
            raise WeightsError(
                f"{source} holds no {network} with torchvision's key names: {key} is missing "
                f"(got {len(state_dict)} tensors{', such as ' + next(iter(state_dict)) if state_dict else ''})"
            )
        shape = tuple(state_dict[key].shape)
        if len(shape) != dims or 0 in shape:
            raise WeightsError(f"{source}: {key} has shape {shape}, expected {dims} dimensions, none of them 0")


def _channels(state_dict: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Output channels of the stem and the 17 blocks (their project convolutions)."""
    keys = ["features.0.0.weight", "features.1.conv.1.weight"]
    keys += [f"features.{i}.conv.2.weight" for i in range(2, 18)]
    missing = [key for key in keys if key not in state_dict]
    if missing:
        raise WeightsError(f"not the standard MobileNetV2 of 17 blocks: {missing[0]} is missing")
    return tuple(state_dict[key].shape[0] if state_dict[key].dim() else 0 for key in keys)


def _standard_channels(width: float, rounding: int = 8) -> tuple[int, ...]:
    blocks = [make_divisible(c * width, rounding) for _, c, repeats, _ in SETTING for _ in range(repeats)]
    return (make_divisible(32 * width, rounding), *blocks, make_divisible(1280 * max(1.0, width), rounding))
