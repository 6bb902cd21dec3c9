"""Reads modules into specs: what a unit computes, or the reason why it has to run plain.

A unit's class says which of its children play which part (`ConvParts`, `BlockParts`). Everything else is read from
these children at the call, because users rewrite them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core.call import GRADIENTS, wants_gradients
from mnv2_fused._core.geometry import (
    FLOATS,
    MOST_KERNEL,
    NO_BOUNDS,
    BlockShape,
    Bounds,
    DenseShape,
    HeadShape,
    Pads,
    reach,
)
from mnv2_fused._core.kinds import (
    always_pads_same,
    class_name,
    is_batch_norm,
    is_frozen,
    is_norm_with_activation,
    is_synchronised,
)
from mnv2_fused._core.layout import is_channels_last
from mnv2_fused._core.specs import (
    CONV_TENSORS,
    IMAGES,
    NORM_EPS,
    BlockSpec,
    ConvNorm,
    DenseSpec,
    HeadSpec,
    NetworkSpec,
    Step,
)

# Attributes that change what a module's call does if they are in its __dict__.
_OVERRIDES = ("forward", "_conv_forward", "_call_impl", "_slow_forward", "_check_input_dim", "weight", "bias")


class ConvParts(NamedTuple):
    """A convolution, its norm and its activation, and the names that reasons use for the three. Norm and activation may
    be missing. `same`: what calls the convolution pads its input as TensorFlow's "SAME" does.
    """

    conv: nn.Module
    norm: nn.Module | None
    activation: nn.Module | None
    names: tuple[str, str, str]
    same: bool = False


class BlockParts(NamedTuple):
    """The convolutions of an inverted-residual block, and whether it adds its input to its output."""

    expand: ConvParts | None
    depthwise: ConvParts
    project: ConvParts
    shortcut: bool


# ------------------------------------------------------------------------------------------------------- one module


def child_reason(module: nn.Module, name: str) -> str | None:
    """Why the kernels cannot stand in for a call of `module`, called `name`; None if they can."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return f"{name} has hooks"
    for attribute in _OVERRIDES:
        if attribute in module.__dict__:
            return f"{name} overrides {attribute}"
    return None


def runs_as_module(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def is_sequential(module: nn.Module | None) -> bool:
    """Whether `module` calls its children in a row: an nn.Sequential, a subclass that keeps its forward, or such a
    class converted.
    """
    kind = getattr(type(module), "_kind", type(module))
    return isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward


def sequence(module: nn.Module | None, name: str) -> list[nn.Module] | str:
    """The children of an nn.Sequential or of a subclass that keeps its forward; else the reason why it is neither."""
    if not is_sequential(module):
        return f"{name} is a {type(module).__name__}, not an nn.Sequential"
    return child_reason(module, name) or list(module)


def _two(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pads_as_tensorflow(conv: nn.Module) -> bool:
    """Whether padding (0, 0) means TensorFlow's "SAME"; see `models.layers.Conv2dSame`."""
    return getattr(type(conv), "pads_same", False) or always_pads_same(conv)


def _conv_reason(conv: nn.Module, name: str, train: bool) -> str | None:
    """`train`: a norm follows the convolution, in training."""
    if type(conv) is not nn.Conv2d and not _pads_as_tensorflow(conv):
        return f"{name} is a {type(conv).__name__}, not an nn.Conv2d"
    if conv.padding_mode != "zeros" and _two(conv.padding) != (0, 0):
        return f"{name} pads with {conv.padding_mode}"
    if train and conv.bias is not None:
        return f"{name} has a bias, which training has no use for before a batch norm"
    return child_reason(conv, name)


def _norm_reason(norm: nn.Module, name: str, train: bool) -> str | None:
    if not is_batch_norm(norm) and not (is_synchronised(norm) and (train or not norm.training)):
        if is_frozen(norm):
            return child_reason(norm, name)
        return f"{name} is a {type(norm).__name__}, not an nn.BatchNorm2d"
    if norm.training and not train:
        return f"{name} is in training mode"
    if (norm.running_mean is None or norm.running_var is None) and not train:
        return f"{name} has no running statistics"
    return child_reason(norm, name)


def _bounds(parts: ConvParts) -> Bounds | str:
    """The bounds of the activation, which may be the norm's own."""
    activation, name = parts.activation, parts.names[2]
    if parts.norm is not None and is_norm_with_activation(parts.norm):
        own = norm_activation(parts.norm, parts.names[1])
        if isinstance(own, str):
            return own
        if own is not None and activation is not None:
            return f"{parts.names[1]} has an activation of its own"
        if own is not None:
            activation, name = own, f"{parts.names[1]}.act"
    return _bounds_of(activation, name)


def identity_reason(module: nn.Module | None, name: str) -> str | None:
    """Why `module`, called `name`, changes its input; None if it does not, or if there is none."""
    if module is None:
        return None
    if type(module) is not nn.Identity:
        return f"{name} is a {type(module).__name__}"
    return child_reason(module, name)


def norm_activation(norm: nn.Module, name: str) -> nn.Module | str | None:
    """The activation of a norm that has one of its own, or the reason why its call does more; None for an identity."""
    reason = identity_reason(getattr(norm, "drop", None), f"{name}.drop")
    if reason is not None:
        return reason
    activation = getattr(norm, "act", None)
    return None if activation is None or identity_reason(activation, name) is None else activation


def _bounds_of(activation: nn.Module | None, name: str) -> Bounds | str:
    if activation is None:
        return NO_BOUNDS
    kind = type(activation)
    reason = child_reason(activation, name)
    if reason is not None:
        return reason
    if kind is nn.ReLU6 or kind is nn.Hardtanh:
        return float(activation.min_val), float(activation.max_val)
    if kind is nn.ReLU:
        return 0.0, float("inf")
    return f"{name} is a {kind.__name__}, not an nn.ReLU6"


# ---------------------------------------------------------------------------------------------------- a convolution


def _conv_norm(conv: nn.Module, norm: nn.Module | None) -> ConvNorm:
    if norm is None:
        return ConvNorm(conv.weight, conv.bias, None, None, None, None, 0.0)
    return ConvNorm(
        conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, float(norm.eps), norm
    )


def conv_parts(children: list[nn.Module], names: tuple[str, str, str], name: str) -> ConvParts | str:
    """The parts of a [convolution, norm, activation] sequence called `name`, or the reason why it is none."""
    if len(children) != 3:
        return f"{name} has {len(children)} children, not convolution, norm and activation"
    return ConvParts(*children, names)


def _parts_reason(parts: ConvParts, train: bool) -> str | None:
    conv, norm, names = parts.conv, parts.norm, parts.names
    if norm is None:
        return _conv_reason(conv, names[0], False)
    return _conv_reason(conv, names[0], train) or _norm_reason(norm, names[1], train)


def _pointwise_reason(conv: nn.Module, name: str) -> str | None:
    if conv.weight.dim() != 4 or conv.weight.shape[2] != 1 or conv.weight.shape[3] != 1:
        return f"{name} is not a 1x1 convolution"
    # "same" and "valid" pad nothing here, and neither does Conv2dSame at stride 1.
    if conv.groups != 1 or _two(conv.stride) != (1, 1):
        return f"{name} is grouped or strided"
    if not isinstance(conv.padding, str) and _two(conv.padding) != (0, 0):
        return f"{name} is padded"
    return None


def _spatial(parts: ConvParts) -> tuple[int, int, int, Pads | None] | str:
    """Kernel, stride, dilation and padding of a convolution, or the reason why the kernels cannot compute it."""
    conv, name = parts.conv, parts.names[0]
    if conv.weight.dim() != 4:
        return f"the weight of {name} is not 4-dimensional"
    kernel, kernel_w = conv.weight.shape[2], conv.weight.shape[3]
    strides, dilations = _two(conv.stride), _two(conv.dilation)
    if kernel != kernel_w or kernel % 2 == 0 or kernel > MOST_KERNEL:
        return f"the kernel of {name} is not square and odd"
    if len(strides) != 2 or len(dilations) != 2 or strides[0] != strides[1] or dilations[0] != dilations[1]:
        return f"the stride or dilation of {name} differs between the axes"
    stride, dilation = strides[0], dilations[0]
    if stride < 1 or dilation < 1:
        return f"the stride or dilation of {name} is not positive"
    if isinstance(conv.padding, str):
        if conv.padding == "valid":
            return kernel, stride, dilation, (0, 0, 0, 0)
        if stride != 1:
            return f'{name} has padding="same" and a stride'
        pads = (reach(kernel, dilation) // 2,) * 2
    else:
        pads = _two(conv.padding)
    if len(pads) != 2 or pads[0] < 0 or pads[1] < 0:
        return f"the padding of {name} is unusual"
    if always_pads_same(conv):
        return kernel, stride, dilation, None
    if parts.same and pads != (0, 0):
        return f"{name} is padded twice"
    if pads == (0, 0) and (parts.same or _pads_as_tensorflow(conv)):
        return kernel, stride, dilation, None
    return kernel, stride, dilation, (pads[0], pads[1], pads[0], pads[1])


def _vectors_reason(conv: ConvNorm, size: int, name: str) -> str | None:
    for t in (conv.bias, conv.gamma, conv.beta, conv.mean, conv.var):
        if t is not None and (t.dim() != 1 or t.shape[0] != size):
            return f"a bias or batch-norm tensor of {name} has another size than its output"
    return None


def _tensors_reason(convs: tuple[ConvNorm | None, ...], like: Tensor, train: bool) -> str | None:
    """Why the tensors of a unit's convolutions do not fit together."""
    compiling, grad = torch.compiler.is_compiling(), wants_gradients() and not train
    device, dtype = like.device, like.dtype
    # Autocast casts everything except float64 and batch-norm tensors.
    casts = like.is_cuda and not train and dtype in FLOATS and torch.is_autocast_enabled("cuda")
    arithmetic = torch.get_autocast_dtype("cuda") if casts else dtype
    norm_dtype = None
    for conv in convs:
        for i, t in enumerate(() if conv is None else conv[:NORM_EPS]):
            if t is None:
                continue
            if not compiling and type(t) is not nn.Parameter and type(t) is not Tensor:
                return f"a weight is a {type(t).__name__}"
            if t.device != device:
                return "the weights are on different devices"
            if t.layout != torch.strided:
                return "a weight is not strided"
            if grad and t.requires_grad:
                return GRADIENTS
            if i < CONV_TENSORS:
                if t.dtype != dtype:
                    return "the weights have different dtypes"
            else:
                # PyTorch takes batch-norm tensors in the input's dtype, or all of them in float32.
                norm_dtype = norm_dtype or t.dtype
                if t.dtype != norm_dtype or (t.dtype != arithmetic and t.dtype != torch.float32):
                    return "the batch-norm tensors have different dtypes"
    if dtype not in FLOATS:
        return f"the weights are {dtype}, not float32, bfloat16 or float16"
    if arithmetic not in FLOATS:
        return f"autocast computes in {arithmetic}, not float32, bfloat16 or float16"
    return None


# ------------------------------------------------------------------------------------------------------------ units


def read_block(parts: BlockParts | str, train: bool = False) -> BlockSpec | str:
    """What an inverted-residual block computes, or the reason why it has to run plain.

    With `train` it is read for training: with gradients, or with statistics of the batch.
    """
    if isinstance(parts, str):
        return parts
    expand_parts, depthwise_parts, project_parts, residual = parts
    bounds = _read_bounds(depthwise_parts, train)
    if isinstance(bounds, str):
        return bounds
    output = _read_bounds(project_parts, train)
    if isinstance(output, str):
        return output
    depthwise_conv, project_conv = depthwise_parts.conv, project_parts.conv
    depthwise_name, project_name = depthwise_parts.names[0], project_parts.names[0]

    c_hidden = depthwise_conv.weight.shape[0]
    if depthwise_conv.groups != c_hidden or depthwise_conv.weight.shape[1] != 1:
        return f"{depthwise_name} is not a depthwise convolution"
    spatial = _spatial(depthwise_parts)
    if isinstance(spatial, str):
        return spatial
    kernel, stride, dilation, padding = spatial
    reason = _pointwise_reason(project_conv, project_name)
    if reason is not None:
        return reason
    c_out = project_conv.weight.shape[0]
    if project_conv.weight.shape[1] != c_hidden:
        return f"{project_name} does not take the channels of {depthwise_name}"

    c_in, expand = c_hidden, None
    if expand_parts is not None:
        expand = _read_expand(expand_parts, bounds, c_hidden, depthwise_name, train)
        if isinstance(expand, str):
            return expand
        c_in = expand.weight.shape[1]

    if residual:
        span = reach(kernel, dilation)
        keeps_size = padding is None or (padding[0] + padding[2] == span and padding[1] + padding[3] == span)
        if stride != 1 or c_in != c_out or not keeps_size:
            return "the shortcut adds tensors of different shapes"
    depthwise = _conv_norm(depthwise_conv, depthwise_parts.norm)
    project = _conv_norm(project_conv, project_parts.norm)
    reason = (
        _vectors_reason(depthwise, c_hidden, depthwise_name)
        or _vectors_reason(project, c_out, project_name)
        or _tensors_reason((expand, depthwise, project), project.weight, train)
    )
    if reason is not None:
        return reason
    # In PyTorch a convolution's output is channels_last if its input or its weight is; a sum takes the format of x.
    channels_last = not residual and any(
        conv is not None and is_channels_last(conv.weight) for conv in (expand, depthwise, project)
    )
    shape = BlockShape(c_in, c_hidden, c_out, kernel, stride, dilation, padding, expand is not None, residual)
    return BlockSpec(expand, depthwise, project, shape, bounds, output, channels_last, {})


def _read_bounds(parts: ConvParts, train: bool) -> Bounds | str:
    """The bounds of the activation behind a convolution and its norm, or why one of the three must run plain."""
    return _parts_reason(parts, train) or _bounds(parts)


def _read_expand(parts: ConvParts, bounds: Bounds, c_hidden: int, depthwise_name: str, train: bool) -> ConvNorm | str:
    """The expansion, or the reason why it does not fit the depthwise convolution behind it."""
    conv, name = parts.conv, parts.names[0]
    own = _read_bounds(parts, train)
    if isinstance(own, str):
        return own
    reason = _pointwise_reason(conv, name)
    if reason is not None:
        return reason
    if own != bounds:
        return "the two activations differ"
    if conv.weight.shape[0] != c_hidden:
        return f"{depthwise_name} does not take the channels of {name}"
    expand = _conv_norm(conv, parts.norm)
    return _vectors_reason(expand, c_hidden, name) or expand


def read_dense(parts: ConvParts | str, train: bool = False) -> DenseSpec | str:
    """What a dense convolution computes, or the reason why it has to run plain. `train` is `read_block`'s."""
    if isinstance(parts, str):
        return parts
    conv, name = parts.conv, parts.names[0]
    bounds = _read_bounds(parts, train)
    if isinstance(bounds, str):
        return bounds
    spatial = _spatial(parts)
    if isinstance(spatial, str):
        return spatial
    kernel, stride, dilation, padding = spatial
    if conv.groups != 1:
        return f"{name} is a grouped convolution"
    if dilation != 1 and kernel > 1:
        return f"{name} is dilated"
    c_out, c_in = conv.weight.shape[0], conv.weight.shape[1]
    both = _conv_norm(conv, parts.norm)
    reason = _vectors_reason(both, c_out, name) or _tensors_reason((both,), conv.weight, train)
    if reason is not None:
        return reason
    shape = DenseShape(c_in, c_out, kernel, stride, padding)
    return DenseSpec(both, shape, bounds, is_channels_last(conv.weight), {})


def read_head(parts: ConvParts | str, classifier: nn.Module) -> HeadSpec | str:
    """What the last convolution, the pooling and the classifier compute, or the reason why they have to run plain."""
    if isinstance(parts, str):
        return parts
    conv, name = parts.conv, parts.names[0]
    bounds = _read_bounds(parts, False)
    if isinstance(bounds, str):
        return bounds
    reason = _pointwise_reason(conv, name)
    if reason is not None:
        return reason
    found = _read_classifier(classifier)
    if isinstance(found, str):
        return found
    linear, called = found
    c_last, c_in = conv.weight.shape[0], conv.weight.shape[1]
    if linear.weight.dim() != 2 or linear.weight.shape[1] != c_last:
        return f"classifier.1 does not take the channels of {name}"
    classes = linear.weight.shape[0]
    if classes < 1:
        return "classifier.1 has no outputs"
    both, last = _conv_norm(conv, parts.norm), _conv_norm(linear, None)
    reason = (
        _vectors_reason(both, c_last, name)
        or _vectors_reason(last, classes, called)
        or _tensors_reason((both, last), conv.weight, False)
    )
    if reason is not None:
        return reason
    return HeadSpec(both, last, HeadShape(c_in, c_last, classes), bounds, {})


def _read_classifier(classifier: nn.Module) -> tuple[nn.Linear, str] | str:
    """The linear layer of a classifier and its name, or the reason why the classifier computes something else."""
    if type(classifier) is nn.Linear or class_name(classifier) == ("timm.layers.linear", "Linear"):
        return child_reason(classifier, "classifier") or (classifier, "classifier")
    children = sequence(classifier, "classifier")
    if isinstance(children, str):
        return children
    if len(children) != 2 or type(children[0]) is not nn.Dropout or type(children[1]) is not nn.Linear:
        return "classifier is not nn.Sequential(nn.Dropout, nn.Linear)"
    dropout, linear = children
    reason = child_reason(dropout, "classifier.0") or child_reason(linear, "classifier.1")
    if reason is None and dropout.training and dropout.p > 0:
        reason = "classifier.0 drops out in training mode"
    return reason or (linear, "classifier.1")


def join(steps: Sequence[Step]) -> NetworkSpec | str:
    """The spec of a network of these steps, or the reason why they have to run one by one."""
    first = steps[0].spec
    for spec, source, _ in steps:
        if source == IMAGES and not isinstance(spec, DenseSpec):
            return "only a dense convolution can take the images"
        shape = spec.shape
        gives = first.shape.c_in if source == IMAGES else steps[source].spec.shape.c_out
        if shape.c_in != gives or spec.dtype != first.dtype or spec.device != first.device:
            return "a unit does not take what the one before it gives"
        if isinstance(shape, HeadShape):
            continue
        span, pads = reach(shape.kernel, shape.dilation), shape.padding
        if pads is not None and min(pads[0] + pads[2], pads[1] + pads[3]) < span:
            return "whether a kernel fits depends on the input's size"
    return NetworkSpec(tuple(steps), {})
