"""torchvision's published checkpoints, by name."""

from __future__ import annotations

import dataclasses
import os
import pickle
import urllib.error
from pathlib import Path

import torch

from mnv2_fused.weights.conventions import TORCHVISION, Convention
from mnv2_fused.weights.errors import WeightsError, first_line


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


def known_names() -> str:
    """The names, for an error."""
    return f"known names: {', '.join(PUBLISHED)}"


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
        raise WeightsError(f"no such file, and no published checkpoint of that name: {weights} ({known_names()})")
    return None


def download(name: str, url: str) -> dict[str, torch.Tensor]:
    """What torch.hub has in its cache, or downloads. Raises WeightsError."""
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
            f"{name}: the downloaded or cached file is damaged ({first_line(error)}). "
            f"Remove it from {Path(torch.hub.get_dir(), 'checkpoints')} and try again"
        ) from error
