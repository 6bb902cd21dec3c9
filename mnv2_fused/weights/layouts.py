"""The names that other libraries give MobileNetV2's tensors, and torchvision's for them. A table for each library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mnv2_fused.models.mobilenet_v2 import SETTING

__all__ = ["KERAS", "TRANSFORMERS", "TRANSFORMERS_CONFIG", "Layout", "renamed", "unwrapped"]

# Modules that training scripts put around a network, and AveragedModel's count beside its `module`.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
_COUNT = "n_averaged"

# In a table, "#" is a block: on the right its number in torchvision, 2 to 17, on the left the library's.

# Also the flat sequences of qfgaohao/pytorch-ssd. The last layers have had both places.
_FLAT = {
    "features.0.0": "features.0.0",
    "features.0.1": "features.0.1",
    "features.1.conv.0": "features.1.conv.0.0",
    "features.1.conv.1": "features.1.conv.0.1",
    "features.1.conv.3": "features.1.conv.1",
    "features.1.conv.4": "features.1.conv.2",
    "features.#.conv.0": "features.#.conv.0.0",
    "features.#.conv.1": "features.#.conv.0.1",
    "features.#.conv.3": "features.#.conv.1.0",
    "features.#.conv.4": "features.#.conv.1.1",
    "features.#.conv.6": "features.#.conv.2",
    "features.#.conv.7": "features.#.conv.3",
    "features.18.0": "features.18.0",
    "features.18.1": "features.18.1",
    "classifier.1": "classifier.1",
    "conv.0": "features.18.0",
    "conv.1": "features.18.1",
    "classifier": "classifier.1",
}

_TIMM = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "blocks.0.0.conv_dw": "features.1.conv.0.0",
    "blocks.0.0.bn1": "features.1.conv.0.1",
    "blocks.0.0.conv_pw": "features.1.conv.1",
    "blocks.0.0.bn2": "features.1.conv.2",
    "blocks.#.conv_pw": "features.#.conv.0.0",
    "blocks.#.bn1": "features.#.conv.0.1",
    "blocks.#.conv_dw": "features.#.conv.1.0",
    "blocks.#.bn2": "features.#.conv.1.1",
    "blocks.#.conv_pwl": "features.#.conv.2",
    "blocks.#.bn3": "features.#.conv.3",
    "conv_head": "features.18.0",
    "bn2": "features.18.1",
    "classifier": "classifier.1",
}

_TRANSFORMERS = {
    "mobilenet_v2.conv_stem.first_conv.convolution": "features.0.0",
    "mobilenet_v2.conv_stem.first_conv.normalization": "features.0.1",
    "mobilenet_v2.conv_stem.conv_3x3.convolution": "features.1.conv.0.0",
    "mobilenet_v2.conv_stem.conv_3x3.normalization": "features.1.conv.0.1",
    "mobilenet_v2.conv_stem.reduce_1x1.convolution": "features.1.conv.1",
    "mobilenet_v2.conv_stem.reduce_1x1.normalization": "features.1.conv.2",
    "mobilenet_v2.layer.#.expand_1x1.convolution": "features.#.conv.0.0",
    "mobilenet_v2.layer.#.expand_1x1.normalization": "features.#.conv.0.1",
    "mobilenet_v2.layer.#.conv_3x3.convolution": "features.#.conv.1.0",
    "mobilenet_v2.layer.#.conv_3x3.normalization": "features.#.conv.1.1",
    "mobilenet_v2.layer.#.reduce_1x1.convolution": "features.#.conv.2",
    "mobilenet_v2.layer.#.reduce_1x1.normalization": "features.#.conv.3",
    "mobilenet_v2.conv_1x1.convolution": "features.18.0",
    "mobilenet_v2.conv_1x1.normalization": "features.18.1",
    "classifier": "classifier.1",
}

_KERAS = {
    "Conv1": "features.0.0",
    "bn_Conv1": "features.0.1",
    "expanded_conv_depthwise": "features.1.conv.0.0",
    "expanded_conv_depthwise_BN": "features.1.conv.0.1",
    "expanded_conv_project": "features.1.conv.1",
    "expanded_conv_project_BN": "features.1.conv.2",
    "block_#_expand": "features.#.conv.0.0",
    "block_#_expand_BN": "features.#.conv.0.1",
    "block_#_depthwise": "features.#.conv.1.0",
    "block_#_depthwise_BN": "features.#.conv.1.1",
    "block_#_project": "features.#.conv.2",
    "block_#_project_BN": "features.#.conv.3",
    "Conv_1": "features.18.0",
    "Conv_1_bn": "features.18.1",
    "predictions": "classifier.1",
}


class Layout(NamedTuple):
    """A library's names for the modules of the network: each with torchvision's, in the order of the network.

    `mark` is a key that no other layout has. `convention` is the one that its weights follow, or None if the names do
    not tell.
    """

    library: str
    mark: str
    modules: Mapping[str, str]
    convention: str | None = None


def _modules(table: Mapping[str, str], blocks: Iterable[object]) -> dict[str, str]:
    """`table` without "#". `blocks` is what it stands for on the left: in block 2, in block 3 and so on."""
    numbered = [("#", "#"), *((str(name), str(i)) for i, name in enumerate(blocks, 2))]
    rows = {name.replace("#", n): ours.replace("#", i) for n, i in numbered for name, ours in table.items()}
    rows = {name: ours for name, ours in rows.items() if "#" not in name}
    return dict(sorted(rows.items(), key=lambda row: [int(part) for part in row[1].split(".") if part.isdigit()]))


_STAGES = [f"{stage}.{i}" for stage, row in enumerate(SETTING) for i in range(row[2])][1:]

TORCHVISION = Layout("torchvision", "features.0.0.weight", {})
FLAT = Layout("tonylins/pytorch-mobilenet-v2", "features.1.conv.0.weight", _modules(_FLAT, range(2, 18)))
TIMM = Layout("timm", "conv_stem.weight", _modules(_TIMM, _STAGES), "timm")
TRANSFORMERS = Layout(
    "transformers",
    "mobilenet_v2.conv_stem.first_conv.convolution.weight",
    _modules(_TRANSFORMERS, range(16)),
    "transformers",
)
# What `TRANSFORMERS` and the convention of that name stand for.
TRANSFORMERS_CONFIG = {"tf_padding": True, "layer_norm_eps": 1e-3, "hidden_act": "relu6", "output_stride": 32}
KERAS = Layout("Keras", "Conv1.weight", _modules(_KERAS, range(1, 17)), "keras")


def unwrapped(state_dict: Mapping[object, object]) -> dict[str, Any]:
    """`state_dict` without the prefixes that wrappers of a network leave, and without AveragedModel's count."""
    found: dict[str, Any] = {}
    for key, value in state_dict.items():
        name = str(key)
        while (wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None)) is not None:
            name = name.removeprefix(wrapper)
        if name != _COUNT:
            found[str(key) if name in found else name] = value
    return found


def renamed(state_dict: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor], list[str]]:
    """The layout of an unwrapped state dict, its tensors under torchvision's names, and the keys that have none.

    Without a mark of another library the names are torchvision's. They are not checked, because other networks have
    such names too.
    """
    layout = next((one for one in (FLAT, TIMM, TRANSFORMERS, KERAS) if one.mark in state_dict), TORCHVISION)
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".")
        if layout is TORCHVISION:
            name = f"classifier.1.{leaf}" if module == "classifier" else key
        else:
            name = f"{layout.modules[module]}.{leaf}" if module in layout.modules else None
        if name is None or name in found:
            unknown.append(key)
        else:
            found[name] = value
    return layout, found, unknown
