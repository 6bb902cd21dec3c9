"""Optional packages: imported where they are used. The error for a missing one names the command that installs it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["MissingExtraError", "use"]

_fragments: list[torch.library.Library] = []  # a schema lives as long as its library


class MissingExtraError(ImportError):
    """An optional package is not installed, or cannot be imported."""


def use(name: str, extra: str) -> ModuleType:
    """The module `name`, which the optional dependency `extra` of this package installs.

    torchvision is also imported if it is a CUDA build beside a CPU-only torch.

    Raises:
        MissingExtraError: it is missing, or its import fails.
    """
    if name.partition(".")[0] in ("torchvision", "torchmetrics", "timm", "transformers"):  # the others import it
        _define_missing_schemas()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingExtraError(
            f'{package} cannot be imported ({error}). Install it with: pip install "mnv2_fused[{extra}]"'
        ) from None


def _define_missing_schemas() -> None:
    """Declares the operators for which torchvision registers Python kernels at import.

    If torchvision's compiled library does not load beside this torch, their schemas are missing and the import fails.
    The compiled library is loaded first, because a schema can be defined only once.
    """
    try:
        importlib.import_module("torchvision")
        return
    except ImportError:
        return  # `use` reports it
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragments.append(library)
