"""Reading weights: .pth and .safetensors files, torchvision's published checkpoints, and the conventions they follow.

Weights alone do not say how images are to be prepared or how stride-2 convolutions pad; getting either wrong gives
confident nonsense. A `Convention` says both.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import urllib.error
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn


class WeightsError(ValueError):
    """Weights that cannot be found, read or used; the message says what was expected and what was got."""


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a set of weights expects of its surroundings.

    `resize` is the length of the shorter side before a central crop to `crop`, or None for a plain resize of the whole
    image to `crop` x `crop`. Pixels in 0..1 become `(pixel - mean) / std`.
    """

    name: str
    tf_padding: bool
    crop: int
    resize: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


TORCHVISION = Convention(
    name="torchvision",
    tf_padding=False,
    crop=224,
    resize=256,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
TENSORFLOW = Convention(
    name="tensorflow",
    tf_padding=True,
    crop=224,
    resize=None,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
CONVENTIONS = {c.name: c for c in (TORCHVISION, TENSORFLOW)}


def at_resolution(convention: Convention, resolution: int) -> Convention:
    """`convention` for inputs of `resolution` x `resolution`; the resize before the crop keeps its proportion."""
    resize = None if convention.resize is None else round(convention.resize * resolution / convention.crop)
    return dataclasses.replace(convention, crop=resolution, resize=resize)


@dataclasses.dataclass(frozen=True)
class Published:
    """A checkpoint that torch.hub downloads; the file name carries the first digits of its SHA-256."""

    url: str
    convention: Convention


PUBLISHED = {
    "IMAGENET1K_V1": Published("https://download.pytorch.org/models/mobilenet_v2-b0353104.pth", TORCHVISION),
    "IMAGENET1K_V2": Published(
        "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth", dataclasses.replace(TORCHVISION, resize=232)
    ),
}
DEFAULT = "IMAGENET1K_V2"

# Widths that people publish come first; the grid behind them finds the rest (channel counts are rounded to 8, so any
# width with the same counts is the same network).
_WIDTHS = (1.0, 1.4, 1.3, 0.75, 0.5, 0.35, 0.25, 0.1, *(i / 100 for i in range(5, 401)))


def load_state_dict(weights, convention: str | None = None) -> tuple[dict[str, torch.Tensor], Convention]:
    """Reads `weights` and tells which convention they follow.

    Args:
        weights: path of a .pth or .safetensors file with torchvision's key names, or the name of a published
            checkpoint (`IMAGENET1K_V1`, `IMAGENET1K_V2`, `DEFAULT`), or torchvision's enumeration member for it.
        convention: `"torchvision"` or `"tensorflow"` instead of what the file states (those that `train` writes do),
            or else the number of classes suggests (1001, with the background at 0: TensorFlow; any other: torchvision).

    Raises:
        WeightsError: nothing readable there, no MobileNetV2 in it, or `convention` contradicts a published checkpoint.
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
        return _check(_download(name, published.url), name), published.convention
    loaded, facts = read(Path(weights))
    state_dict = _check(loaded, str(weights))
    stated, resolution = facts.get("convention"), str(facts.get("resolution", ""))
    if convention is None:
        convention = "tensorflow" if num_classes(state_dict) == 1001 else "torchvision"
        if isinstance(stated, str) and stated in CONVENTIONS:
            convention = stated
    found = CONVENTIONS[convention]
    return state_dict, at_resolution(found, int(resolution)) if resolution.isdecimal() and int(resolution) else found


def published_name(weights) -> str | None:
    """The name in `PUBLISHED` that `weights` stands for, or None for a path."""
    if isinstance(weights, os.PathLike):
        return None
    if not isinstance(weights, str):  # torchvision's MobileNet_V2_Weights.IMAGENET1K_V1
        name = getattr(weights, "name", None)
        if name in PUBLISHED:
            return name
        raise WeightsError(f"weights must be a path or one of {', '.join(PUBLISHED)}, got {weights!r}")
    name = weights.removeprefix("MobileNet_V2_Weights.")
    name = DEFAULT if name == "DEFAULT" else name
    if name in PUBLISHED:
        return name
    if os.path.exists(weights):
        return None
    if os.path.dirname(weights) == "" and os.path.splitext(weights)[1] == "":
        raise WeightsError(f"no such file, and no published checkpoint of that name: {weights} ({_known_names()})")
    return None


def num_classes(state_dict: Mapping[str, torch.Tensor]) -> int:
    """Number of classes of a checked state dict."""
    return state_dict["classifier.1.weight"].shape[0]


def width_mult(state_dict: Mapping[str, torch.Tensor]) -> float:
    """The width multiplier that gives the channel counts of `state_dict`.

    Raises:
        WeightsError: no width multiplier of the standard network (17 blocks, rounded to 8) gives them.
    """
    got = _channels(state_dict)
    for width in _WIDTHS:
        if _standard_channels(width) == got:
            return width
    raise WeightsError(
        "no width multiplier of the standard MobileNetV2 gives these channel counts (stem, 17 blocks, last layer): "
        + " ".join(map(str, got))
    )


def load_model(weights, *, convention: str | None = None, fused: bool = True) -> tuple[nn.Module, Convention]:
    """The MobileNetV2 for `weights`, in eval mode, with its width, class count and padding taken from them.

    Raises:
        WeightsError: as `load_state_dict`, and for keys, shapes or values that do not fit.
    """
    from mnv2_fused.models.mobilenet_v2 import MobileNetV2

    state_dict, found = load_state_dict(weights, convention)
    with torch.device("meta"):  # no time for an initialisation that is overwritten anyway
        model = MobileNetV2(
            num_classes(state_dict), width_mult(state_dict), tf_padding=found.tf_padding, fused=fused
        ).eval()
    fill(model, state_dict, str(weights))
    return model, found


def fill(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str = "the weights") -> None:
    """`model.load_state_dict` for a model that may be on the meta device, with messages for people.

    Raises:
        WeightsError: keys, shapes, dtypes or values that do not fit.
    """
    expected = model.state_dict()
    counters = {key: torch.tensor(0) for key in expected if key.endswith(".num_batches_tracked")}
    state_dict = {**counters, **state_dict}  # checkpoints older than these counters lack them
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in expected]
    for key, value in expected.items():
        got = state_dict.get(key)
        if got is None:
            continue
        if got.shape != value.shape:
            problems.append(f"{key} has shape {tuple(got.shape)}, expected {tuple(value.shape)}")
        elif value.is_floating_point() and not got.is_floating_point():
            problems.append(f"{key} has dtype {got.dtype}, expected a floating-point one")
        elif got.is_floating_point() and not torch.isfinite(got).all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(f"{source} does not fit this MobileNetV2: {'; '.join(problems[:3])}{more}")
    values = {key: state_dict[key].to(value.dtype, copy=True) for key, value in expected.items()}
    model.load_state_dict(values, assign=any(value.is_meta for value in expected.values()))


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> None:
    """Random statistics and affine parameters for every batch norm of `model`, the same for equal seeds.

    With the statistics of a new model the outputs are so small that a network returning zeros looks right. Scales
    are such that activations keep their size from block to block.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator).mul_(high - low).add_(low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(uniform(module.running_var, 0.2, 0.6))
                module.weight.copy_(uniform(module.weight, 0.6, 1.4))
                module.bias.copy_(uniform(module.bias, -0.3, 0.7))


def _known_names() -> str:
    return f"known names: {', '.join(PUBLISHED)}"


def _download(name: str, url: str) -> dict[str, torch.Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise WeightsError(
            f"{name} could not be downloaded ({reason}). It needs a network the first time; "
            f"without one, put {url.rsplit('/', 1)[1]} into {Path(torch.hub.get_dir(), 'checkpoints')} "
            "or give the path of a file"
        ) from error
    except OSError as error:
        raise WeightsError(f"{name} could not be stored in {torch.hub.get_dir()}: {error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:  # a wrong hash; a damaged file in the cache
        raise WeightsError(
            f"{name}: the downloaded or cached file is damaged ({_first_line(error)}). "
            f"Remove it from {Path(torch.hub.get_dir(), 'checkpoints')} and try again"
        ) from error


def read(path: Path) -> tuple[object, Mapping[str, object]]:
    """What the file holds, and what it states beside the weights. Raises WeightsError."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise WeightsError(f"no such weights file: {path} ({_known_names()})") from None
    except OSError as error:
        raise WeightsError(f"cannot read weights from {path}: {error.strerror or error}") from None
    if path.suffix == ".safetensors" or head[8:] == b"{":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        if head.startswith(b"PK") and not isinstance(error, pickle.UnpicklingError):
            raise WeightsError(f"{path} is a damaged PyTorch weights file: {_first_line(error)}") from error
        raise WeightsError(
            f"{path} is not a file of weights, or holds more than weights (which is not loaded: it could run code). "
            "Expected a state dict written by torch.save, or a .safetensors file"
        ) from error
    return loaded, loaded if isinstance(loaded, Mapping) else {}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _check(loaded: object, source: str) -> dict[str, torch.Tensor]:
    """The state dict in `loaded`, also where a training script wrapped it."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{source}: expected a dictionary of tensors, got {type(loaded).__name__}")
    state_dict = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    others = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(f"{source}: expected a dictionary of tensors, but {others[0]!r} is none")
    ends = {"features.0.0.weight": 4, "features.18.0.weight": 4, "classifier.1.weight": 2}
    for key, dims in ends.items():
        if key not in state_dict:
            raise WeightsError(
                f"{source} holds no MobileNetV2 with torchvision's key names: {key} is missing "
                f"(got {len(state_dict)} tensors{', such as ' + next(iter(state_dict)) if state_dict else ''})"
            )
        if state_dict[key].dim() != dims:
            raise WeightsError(f"{source}: {key} has shape {tuple(state_dict[key].shape)}, expected {dims} dimensions")
    return state_dict


def _channels(state_dict: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Output channels of the stem, the 17 blocks (their project convolutions) and the last 1x1 convolution."""
    keys = ["features.0.0.weight", "features.1.conv.1.weight"]
    keys += [f"features.{i}.conv.2.weight" for i in range(2, 18)]
    keys += ["features.18.0.weight"]
    missing = [key for key in keys if key not in state_dict]
    if missing:
        raise WeightsError(f"not the standard MobileNetV2 of 17 blocks: {missing[0]} is missing")
    return tuple(state_dict[key].shape[0] if state_dict[key].dim() else 0 for key in keys)


def _standard_channels(width: float) -> tuple[int, ...]:
    stages = ((16, 1), (24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1))
    blocks = [_rounded(c * width) for c, repeats in stages for _ in range(repeats)]
    return (_rounded(32 * width), *blocks, _rounded(1280 * max(1.0, width)))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not more than 10 % below `channels`."""
    result = max(8, int(channels + 4) // 8 * 8)
    return result + 8 if result < 0.9 * channels else result
