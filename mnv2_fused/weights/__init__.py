"""Reads weights: .pth and .safetensors files, torchvision's published checkpoints, and the conventions they follow.

Weights alone do not say how images are prepared, nor how stride-2 convolutions pad. If either is wrong, the network
gives confident nonsense. A `Convention` says both.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import urllib.error
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mnv2_fused._core.geometry import make_divisible
from mnv2_fused.models.mobilenet_v2 import SETTING, MobileNetV2
from mnv2_fused.models.units import PROJECT_ACTIVATIONS, SHORTCUTS, variant
from mnv2_fused.weights.conventions import CONVENTIONS, TORCHVISION, Convention, at_resolution
from mnv2_fused.weights.conventions import TENSORFLOW as TENSORFLOW
from mnv2_fused.weights.random_statistics import randomize_batch_norm as randomize_batch_norm

MAX_RESOLUTION = 8192  # of an input, in pixels
HEAD = 256  # bytes of a file that `other_kind` needs


class WeightsError(ValueError):
    """Weights that cannot be found, read or used; the message says what was expected and what was got."""


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
        weights: path of a .pth or .safetensors file with torchvision's key names, or the name of a published
            checkpoint (`IMAGENET1K_V1`, `IMAGENET1K_V2`, `DEFAULT`), or torchvision's enumeration member for it.
        convention: `"torchvision"` or `"tensorflow"`. The default is what the file states (files that `train` writes
            do). If it states none, the number of classes decides: 1001, with the background at 0, is TensorFlow's;
            any other is torchvision's.

    Raises:
        WeightsError: nothing readable there, no MobileNetV2 in it, a stated convention, resolution or variant that does
            not exist, or `convention` contradicts a published checkpoint.
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
        return Loaded(check(_download(name, published.url), name), published.convention, {})
    loaded, facts = read(weights)
    state_dict = check(loaded, str(weights))
    stated_name, resolution = stated(facts, str(weights))
    if convention is None:
        convention = stated_name or ("tensorflow" if num_classes(state_dict) == 1001 else "torchvision")
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
        model = MobileNetV2(*sizes, tf_padding=found.tf_padding, fused=fused, **variant(**block)).eval()
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


def read(source: str | os.PathLike) -> tuple[object, Mapping[str, object]]:
    """What the file holds, and what it states beside the weights. Raises WeightsError."""
    name = os.fspath(source)
    if "://" in name and not os.path.exists(name):
        raise WeightsError(f"expected the path of a weights file, got a URL: {name}. Download the file first")
    path = Path(name)
    if path.is_dir():
        raise WeightsError(f"cannot read weights from {path}: expected a .pth or .safetensors file, got a directory")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except FileNotFoundError:
        raise WeightsError(f"no such weights file: {path} ({_known_names()})") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read weights from {path}: {getattr(error, 'strerror', None) or error}") from None
    kind = other_kind(head)
    if kind is not None:
        raise WeightsError(f"expected weights in {path}, got {kind}")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error
    pickled = _check_archive(path) if head.startswith(b"PK") else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        raise _unreadable(path, head, pickled, error) from error
    return loaded, loaded if isinstance(loaded, Mapping) else {}


def other_kind(head: bytes) -> str | None:
    """What a file is instead of weights or an image, from its first `HEAD` bytes; None if they do not tell."""
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer; `git lfs pull` in its repository fetches the file itself"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page; the download got a page of the site and not the file"
    return None


def _check_archive(path: Path) -> zipfile.Path | Path:
    """The pickle in the ZIP archive that torch.save writes. Raises WeightsError for other archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return path  # torch.load says what is damaged
    ends = {name.rsplit("/", 1)[-1]: name for name in names}
    if "constants.pkl" in ends:
        raise WeightsError(
            f"expected a state dict in {path}, got a TorchScript archive; "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth') makes a state dict of it"
        )
    if "archive_format" in ends or "serialized_exported_program.json" in ends:
        raise WeightsError(
            f"expected a state dict in {path}, got a torch.export program; "
            f"torch.save(torch.export.load({str(path)!r}).state_dict, 'weights.pth') makes a state dict of it"
        )
    if "data.pkl" not in ends:
        raise WeightsError(f"expected a state dict in {path}, got a ZIP archive that torch.save did not write")
    return zipfile.Path(path, ends["data.pkl"])


def _unreadable(path: Path, head: bytes, pickled: zipfile.Path | Path, error: Exception) -> WeightsError:
    """Says why torch.load refused the file, whose pickle is in `pickled`."""
    if not isinstance(error, pickle.UnpicklingError) and head.startswith(b"PK"):
        return WeightsError(f"{path} is a damaged PyTorch weights file: {_first_line(error)}")
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))  # not every version of pickle's protocol has it
    name = f" ({refused[1]})" if refused else ""
    if head.startswith((b"PK", b"\x80")):
        with pickled.open("rb") as file:
            if b"torch.nn.modules." in file.read(2**20):
                return WeightsError(
                    f"expected a state dict in {path}, got a whole pickled model{name}, which is not loaded: it could "
                    "run code. Save the model's state_dict() instead"
                )
    expected = "expected a state dict written by torch.save, or a .safetensors file"
    if name:
        return WeightsError(f"{path} holds more than weights{name}, which is not loaded: it could run code; {expected}")
    return WeightsError(f"{path} is not a file of weights: {expected}, got a file that begins with {head[:16]!r}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def tensors(loaded: object, source: str) -> dict[str, torch.Tensor]:
    """The state dict in `loaded`, which training scripts wrap in a dictionary. Raises WeightsError."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{source}: expected a dictionary of tensors, got {type(loaded).__name__}")
    state_dict = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    others = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        kind = type(state_dict[others[0]]).__name__
        raise WeightsError(f"{source}: expected a dictionary of tensors, but {others[0]!r} is of type {kind}")
    for key, value in state_dict.items():
        kind = unusable(value)
        if kind is not None:
            raise WeightsError(f"{source}: expected dense tensors, but {key} is {kind}")
    return state_dict


def unusable(tensor: torch.Tensor) -> str | None:
    """What keeps `tensor` from being used as weights, in a few words; None if nothing does."""
    if tensor.is_meta:
        return "without data"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return f"of {tensor.dtype}, without the scale that its values need"
    return None


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
