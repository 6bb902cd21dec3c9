"""Reads files of weights of any kind, and finds the state dict in them."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mnv2_fused.weights import hdf5, layouts
from mnv2_fused.weights.errors import WeightsError, first_line
from mnv2_fused.weights.published import known_names

HEAD = 256  # bytes of a file that `other_kind` needs


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
        raise WeightsError(f"no such weights file: {path} ({known_names()})") from None
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
            raise WeightsError(f"{path} is not a readable safetensors file: {first_line(error)}") from error
    if hdf5.is_keras(path, head):
        try:
            return hdf5.read(path), {}
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path} is not a readable Keras file: {first_line(error)}") from error
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
        return WeightsError(f"{path} is a damaged PyTorch weights file: {first_line(error)}")
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


def tensors(loaded: object, source: str) -> dict[str, torch.Tensor]:
    """The state dict in `loaded`, which training scripts wrap in a dictionary. Raises WeightsError."""
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{source}: expected a dictionary of tensors, got {type(loaded).__name__}")
    state_dict = layouts.unwrapped(loaded)
    others = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        kind = type(state_dict[others[0]]).__name__
        raise WeightsError(f"{source}: expected a dictionary of tensors, but {others[0]!r} is of type {kind}")
    for key, value in state_dict.items():
        kind = unusable(value)
        if kind is not None:
            raise WeightsError(f"{source}: expected dense tensors, but {key} is {kind}")
    return state_dict


def named(loaded: object, source: str) -> tuple[dict[str, torch.Tensor], str | None]:
    """The state dict in `loaded` under torchvision's names, and the convention that the file's own names tell, if any.

    Raises:
        WeightsError: as `tensors`, and for keys that the library's MobileNetV2 does not have, or lacks.
    """
    layout, state_dict, unknown = layouts.renamed(tensors(loaded, source))
    if unknown:
        raise WeightsError(f"{source}: unknown keys for {layout.library}'s MobileNetV2: {_listed(unknown)}")
    missing = [f"{name}.weight" for name, ours in layout.modules.items() if f"{ours}.weight" not in state_dict]
    if missing:
        raise WeightsError(f"{source}: missing keys of {layout.library}'s MobileNetV2: {_listed(missing)}")
    if layout is layouts.TRANSFORMERS:
        _check_config(Path(source).with_name("config.json"))
    return state_dict, layout.convention


def _check_config(path: Path) -> None:
    """Raises WeightsError if transformers' configuration at `path`, if there is one, changes what the network does."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return
    for name, expected in layouts.TRANSFORMERS_CONFIG.items():
        got = config.get(name, expected) if isinstance(config, dict) else expected
        if got != expected:
            raise WeightsError(
                f"{path}: {name}: expected {expected!r}, got {got!r}. Load it with transformers, and use convert()"
            )


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return ", ".join(keys[:12]) + more


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
