"""What other libraries' layers compute, by exact class. No library is imported: a class is known by module and name."""

from __future__ import annotations

from torch import nn

_SAME_CONVS = {("timm.layers.conv2d_same", "Conv2dSame")}
_FROZEN = {("torchvision.ops.misc", "FrozenBatchNorm2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d")}
_SYNCHRONISED = {("timm.layers.norm_act", "SyncBatchNormAct")}
_NORM_ACTS = {("timm.layers.norm_act", name) for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")}


def class_name(module: nn.Module) -> tuple[str, str]:
    """Module and qualified name of a class: what identifies it without an import of its library."""
    kind = type(module)
    return kind.__module__, kind.__qualname__


def always_pads_same(conv: nn.Module) -> bool:
    """Whether `conv` pads as TensorFlow's "SAME" does, whatever its attribute `padding` says."""
    return class_name(conv) in _SAME_CONVS


def is_frozen(norm: nn.Module) -> bool:
    """Whether `norm` is a batch norm with fixed statistics and parameters, as in torchvision's detection models."""
    return class_name(norm) in _FROZEN


def is_synchronised(norm: nn.Module) -> bool:
    return type(norm).forward is nn.SyncBatchNorm.forward or class_name(norm) in _SYNCHRONISED


def is_norm_with_activation(norm: nn.Module) -> bool:
    """Whether `norm` calls its children `drop` and then `act` on the normalised map."""
    return class_name(norm) in _NORM_ACTS


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether `norm` computes what `nn.BatchNorm2d` does, apart from an activation of its own."""
    kind = type(norm)
    return (
        kind is nn.BatchNorm2d
        or class_name(norm) == ("timm.layers.norm_act", "BatchNormAct2d")
        or (
            isinstance(norm, nn.BatchNorm2d)
            and kind.forward is nn.BatchNorm2d.forward
            and kind._check_input_dim is nn.BatchNorm2d._check_input_dim
        )
    )
