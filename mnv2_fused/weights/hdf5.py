"""Reads Keras' files: .h5, .weights.h5 and .keras, with Keras' layer names and torch's tensor layouts."""

from __future__ import annotations

import io
import os
import re
import zipfile
from typing import Any

import torch
from torch import Tensor

from mnv2_fused import extras
from mnv2_fused.weights.layouts import KERAS

__all__ = ["is_keras", "read"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_MEMBER = "model.weights.h5"  # of a .keras file, which is a ZIP archive

_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Keras 3 numbers a layer's variables, and calls the layer by its class and a count. The name stands beside them, but
# not in its early files: there the order of the network tells.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}
# What training leaves beside the weights.
_OTHERS = re.compile(r"(^|/)(optimizer|optimizer_weights|metrics|compile_metrics|seed_generator\w*)(/|$)")


def is_keras(path: str | os.PathLike[str], head: bytes) -> bool:
    """Whether the file, which begins with `head`, is one of Keras'."""
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _MEMBER in archive.namelist()
    return head.startswith(_MAGIC)


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a Keras file by layer and leaf, such as ``Conv1.weight``.

    The only dense layer is called ``predictions``, whatever its name is: it is the classifier.

    Raises:
        mnv2_fused.extras.MissingExtraError: h5py is not installed.
        OSError, ValueError, TypeError, KeyError: the file is damaged, or holds something else.
    """
    h5py = extras.use("h5py", "keras")
    source: Any = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            source = io.BytesIO(archive.read(_MEMBER))
    found: dict[str, Tensor] = {}
    with h5py.File(source, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            dataset = file[name]
            if _OTHERS.search(name) or dataset.shape is None:
                continue
            if dataset.external or dataset.is_virtual:
                raise ValueError(f"{name} is stored in another file")
            layer, leaf = _layer_and_leaf(dataset)
            key = f"{layer}.{_LEAVES.get(leaf, leaf)}"
            if key in found:
                raise ValueError(f"two layers are named {layer}")
            found[key] = _in_torch_layout(torch.from_numpy(dataset[()]), layer)
    dense = [key for key, value in found.items() if key.endswith(".weight") and value.dim() == 2]
    if len(dense) == 1:
        layer = dense[0].removesuffix("weight")
        found = {f"predictions.{k.removeprefix(layer)}" if k.startswith(layer) else k: v for k, v in found.items()}
    return found


def _layer_and_leaf(dataset: Any) -> tuple[str, str]:
    *_, holder, group, leaf = ["", "", *dataset.name.split("/")]
    if group != "vars":  # Keras 2, and Keras 3 as an old .h5 file
        return group, leaf.partition(":")[0]
    kind, _, count = re.fullmatch(r"(.*?)(_(\d+))?", holder).groups()
    layer = dataset.parent.attrs.get("name") or _by_order(kind, int(count or 0)) or holder
    variables = _VARIABLES.get(kind, ())
    return str(layer), variables[int(leaf)] if leaf.isdigit() and int(leaf) < len(variables) else leaf


def _by_order(kind: str, count: int) -> str | None:
    """The name of the layer of that class which has so many before it, or None."""

    def kind_of(layer: str) -> str:
        if layer.endswith("_BN") or layer in ("bn_Conv1", "Conv_1_bn"):
            return "batch_normalization"
        return "depthwise_conv2d" if layer.endswith("_depthwise") else "conv2d"

    layers = [layer for layer in KERAS.modules if layer != "predictions" and kind_of(layer) == kind]
    return layers[count] if count < len(layers) else None


def _in_torch_layout(value: Tensor, layer: str) -> Tensor:
    """Keras' kernels are (h, w, in, out), depthwise ones (h, w, channels, 1), dense ones (in, out)."""
    if value.dim() == 4:
        return value.permute(2, 3, 0, 1) if layer.endswith("depthwise") else value.permute(3, 2, 0, 1)
    return value.t() if value.dim() == 2 else value
