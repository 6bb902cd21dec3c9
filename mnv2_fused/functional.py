"""Functions over the operators of ``torch.ops.mnv2_fused``, for users who hold weights and not modules.

`inverted_residual` takes weights with batch norm folded in (`fold_bn`) and packs them on every call. To pack once::

    packed = functional.pack_block(expand_weight, expand_bias, depthwise_weight, ...)
    y = functional.run_block(x, packed, stride=1, residual=True)

All of them run on the CPU and on CUDA GPUs, in float32, bfloat16 or float16 (16-bit storage, float32 sums). A wrong
type, dtype or device raises `TypeError`, a wrong shape or value `ValueError`. Errors name the function, the argument,
the rule and what was got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mnv2_fused import reference
from mnv2_fused._core import operators
from mnv2_fused._core.call import call_reason, tf32
from mnv2_fused._core.checks import check_tensor, what
from mnv2_fused._core.fit import gpu_reason
from mnv2_fused._core.fold import fold_bn, weight_and_bias
from mnv2_fused._core.geometry import FLOATS, MOST_KERNEL, NO_BOUNDS, BlockShape, DenseShape, HeadShape, reach
from mnv2_fused._core.layout import as_input

__all__ = [
    "PackedBlock",
    "PackedDense",
    "PackedHead",
    "fold_bn",
    "inverted_residual",
    "pack_block",
    "pack_dense",
    "pack_head",
    "run_block",
    "run_dense",
    "run_head",
]


@dataclass(frozen=True)
class PackedBlock:
    """Weights of an inverted-residual block, from `pack_block`.

    ``data`` holds bytes in a private layout, which depends on the device and the CPU's instruction set.
    """

    data: Tensor
    c_in: int
    c_hidden: int
    c_out: int
    kernel: int
    has_expand: bool
    dtype: torch.dtype  # of inputs on a GPU; on the CPU inputs may have any of the three dtypes


@dataclass(frozen=True)
class PackedDense:
    """Weights of a dense convolution, from `pack_dense`; ``data`` and ``dtype`` are as in `PackedBlock`."""

    data: Tensor
    c_in: int
    c_out: int
    kernel: int
    dtype: torch.dtype


@dataclass(frozen=True)
class PackedHead:
    """Weights of a head, from `pack_head`; ``data`` and ``dtype`` are as in `PackedBlock`."""

    data: Tensor
    c_in: int
    c_last: int
    num_classes: int
    dtype: torch.dtype


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int | Sequence[int] | None = None,
    residual: bool | None = None,
    activation: tuple[float, float] = (0.0, 6.0),
    project_activation: tuple[float, float] | None = None,
) -> Tensor:
    """1x1 expand, clamp, depthwise, clamp, linear 1x1 project, plus ``x``: one block, fused.

    Args:
        x: (n, c_in, h, w), float32, bfloat16 or float16.
        expand_weight: (c_hidden, c_in, 1, 1), or None for a block without expansion (c_hidden == c_in).
        depthwise_weight: (c_hidden, 1, k, k), k odd.
        project_weight: (c_out, c_hidden, 1, 1).
        expand_bias, depthwise_bias, project_bias: (c_hidden), (c_hidden), (c_out), or None.
        stride, dilation: of the depthwise convolution.
        padding: of the depthwise convolution, in pixels: one number, or (vertical, horizontal), or (top, left, bottom,
            right). None is ``(k - 1) // 2 * dilation`` on all sides, which keeps the size at stride 1.
        residual: whether to add ``x``. None adds it if stride is 1, c_in == c_out and the size is kept.
        activation: bounds of the clamp: (0, 6) is ReLU6, (0, inf) is ReLU.
        project_activation: bounds of a clamp behind the projection, before ``x`` is added; None for a linear one.

    Weights must have the dtype and device of ``x``.

    Returns:
        (n, c_out, h_out, w_out) in the dtype and the memory format of ``x``.

    Raises:
        TypeError: an argument has a wrong type, dtype or device.
        ValueError: an argument has a wrong shape or value.

    The weights are packed on every call; `pack_block` and `run_block` pack once. `reference.inverted_residual` computes
    the result if a gradient is needed, under autocast, transforms and tracers, for other devices and dtypes, and for
    shapes that do not fit a GPU.
    """
    name = "inverted_residual"
    tensors = (x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    c_hidden, kernel, c_in, c_out = _check_block_weights(name, *tensors[1:])
    _check_input(name, x, c_in)
    for label, t in zip(("expand_weight", "depthwise_weight", "project_weight"), tensors[1::2], strict=True):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise TypeError(f"{name}: {label} must have x's dtype and device, {x.dtype} on {x.device}; got {what(t)}")
    padding = _check_window(name, x, kernel, stride, dilation, padding)
    keeps = stride == 1 and padding[0] + padding[2] == padding[1] + padding[3] == reach(kernel, dilation)
    if residual is None:
        residual = keeps and c_in == c_out
    elif residual and not (keeps and c_in == c_out):
        raise ValueError(
            f"{name}: residual=True needs stride 1, c_in == c_out and padding that keeps the size; "
            f"got stride {stride}, {c_in} -> {c_out} channels, padding {padding}"
        )
    activation = _check_activation(name, activation)
    options = {
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "residual": residual,
        "activation": activation,
        "project_activation": _check_project_activation(name, project_activation),
    }
    shape = BlockShape(c_in, c_hidden, c_out, kernel, stride, dilation, padding, expand_weight is not None, residual)
    if (
        (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        or x.dtype not in FLOATS
        or torch.compiler.is_compiling()
        or call_reason(x)
        or torch.is_autocast_enabled(x.device.type)
        or (x.is_cuda and gpu_reason(operators.INVERTED_RESIDUAL.name, shape.fields(), x))
    ):
        return reference.inverted_residual(*tensors, **options)
    return run_block(x, pack_block(*tensors[1:], dtype=x.dtype), **options)


def pack_block(
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
) -> PackedBlock:
    """Pack the weights of a block for `run_block`.

    The shapes are as in `inverted_residual`; the weights may have any floating-point dtype. ``dtype`` is the dtype of
    the inputs, by default the weights' own; it counts on a GPU only. The result runs on the weights' device.

    Raises:
        TypeError: an argument is no floating-point tensor, or a GPU's ``dtype`` is not one of the three.
        ValueError: a weight has a wrong shape.
    """
    tensors = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    c_hidden, kernel, c_in, c_out = _check_block_weights("pack_block", *tensors)
    expand = (None, None) if expand_weight is None else weight_and_bias(expand_weight, expand_bias)
    depthwise = weight_and_bias(depthwise_weight, depthwise_bias)
    project = weight_and_bias(project_weight, project_bias)
    dtype = _packed_dtype("pack_block", dtype, project_weight)
    data = torch.ops.mnv2_fused.pack_block.default(*expand, *depthwise, *project, dtype)
    return PackedBlock(data, c_in, c_hidden, c_out, kernel, expand_weight is not None, dtype)


def run_block(
    x: Tensor,
    packed: PackedBlock,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int | Sequence[int] | None = None,
    residual: bool = False,
    activation: tuple[float, float] = (0.0, 6.0),
    project_activation: tuple[float, float] | None = None,
) -> Tensor:
    """`inverted_residual` on weights from `pack_block`, without gradients.

    ``x`` is (n, c_in, h, w), on the weights' device, in float32, bfloat16 or float16; on a GPU it must have the dtype
    that the weights were packed for. Returns (n, c_out, h_out, w_out) in its dtype and memory format. Unlike
    `inverted_residual` it adds ``x`` only if ``residual`` is True. Fastest if ``x`` is channels_last, because other
    formats are copied.

    Raises:
        TypeError: ``packed`` is of another kind, or ``x`` has a wrong dtype or device.
        ValueError: an argument has a wrong shape or value, ``x`` needs a gradient, or ``residual`` is True and the
            output has another shape than ``x``.
    """
    _check_packed("run_block", packed, PackedBlock)
    _check_run_input("run_block", x, packed.c_in, packed)
    padding = _check_window("run_block", x, packed.kernel, stride, dilation, padding)
    bounds = [
        *_check_activation("run_block", activation),
        *_check_project_activation("run_block", project_activation),
    ]
    shape = BlockShape(
        packed.c_in,
        packed.c_hidden,
        packed.c_out,
        packed.kernel,
        stride,
        dilation,
        padding,
        packed.has_expand,
        residual,
    )
    x_last = x.contiguous(memory_format=torch.channels_last)
    y = operators.INVERTED_RESIDUAL.run(x_last, packed.data, shape.fields(), bounds, tf32(x))
    return as_input(y, x)


def pack_dense(weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype | None = None) -> PackedDense:
    """Pack a dense convolution for `run_dense`: weight (c_out, c_in, k, k), k odd, and bias (c_out) or None.

    ``dtype`` and errors are as in `pack_block`.
    """
    check_tensor("pack_dense", "weight", weight, (None, None, None, None))
    c_out, c_in, kernel, width = weight.shape
    _check_kernel("pack_dense", "weight", kernel, width)
    if bias is not None:
        check_tensor("pack_dense", "bias", bias, (c_out,))
    dtype = _packed_dtype("pack_dense", dtype, weight)
    data = torch.ops.mnv2_fused.pack_dense.default(*weight_and_bias(weight, bias), dtype)
    return PackedDense(data, c_in, c_out, kernel, dtype)


def run_dense(
    x: Tensor,
    packed: PackedDense,
    *,
    stride: int = 2,
    padding: int | Sequence[int] | None = None,
    activation: tuple[float, float] = (0.0, 6.0),
    image_bias: Tensor | None = None,
) -> Tensor:
    """Dense convolution and clamp on weights from `pack_dense`, without gradients; computes `reference.dense`.

    Takes (n, c_in, h, w) and returns (n, c_out, h_out, w_out). ``image_bias`` (n, c_out), float32, has a bias for each
    image, in place of the packed one. Padding, activation, dtypes and errors are as in `run_block`.
    """
    _check_packed("run_dense", packed, PackedDense)
    _check_run_input("run_dense", x, packed.c_in, packed)
    padding = _check_window("run_dense", x, packed.kernel, stride, 1, padding)
    lo, hi = _check_activation("run_dense", activation)
    shape = DenseShape(packed.c_in, packed.c_out, packed.kernel, stride, padding)
    if image_bias is not None:
        check_tensor("run_dense", "image_bias", image_bias, (x.shape[0], packed.c_out))
        image_bias = image_bias.detach().to(x.device, torch.float32).contiguous()
    y = operators.DENSE.run(x, packed.data, shape.fields(), [lo, hi], tf32(x), image_bias)
    return as_input(y, x)


def pack_head(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    classifier_weight: Tensor,
    classifier_bias: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
) -> PackedHead:
    """Pack a head for `run_head`: conv_weight (c_last, c_in, 1, 1), conv_bias (c_last) or None, classifier_weight
    (classes, c_last), classifier_bias (classes) or None.

    ``dtype`` and errors are as in `pack_block`.
    """
    check_tensor("pack_head", "conv_weight", conv_weight, (None, None, 1, 1))
    c_last, c_in = conv_weight.shape[:2]
    check_tensor("pack_head", "classifier_weight", classifier_weight, (None, c_last))
    num_classes = classifier_weight.shape[0]
    if conv_bias is not None:
        check_tensor("pack_head", "conv_bias", conv_bias, (c_last,))
    if classifier_bias is not None:
        check_tensor("pack_head", "classifier_bias", classifier_bias, (num_classes,))
    dtype = _packed_dtype("pack_head", dtype, conv_weight)
    data = torch.ops.mnv2_fused.pack_head.default(
        *weight_and_bias(conv_weight, conv_bias), *weight_and_bias(classifier_weight, classifier_bias), dtype
    )
    return PackedHead(data, c_in, c_last, num_classes, dtype)


def run_head(x: Tensor, packed: PackedHead, *, activation: tuple[float, float] = (0.0, 6.0)) -> Tensor:
    """1x1 convolution, clamp, mean over the pixels, classifier, on weights from `pack_head`, without gradients.

    Takes (n, c_in, h, w) and returns (n, classes) in its dtype. Dtypes and errors are as in `run_block`.
    """
    _check_packed("run_head", packed, PackedHead)
    _check_run_input("run_head", x, packed.c_in, packed)
    lo, hi = _check_activation("run_head", activation)
    x = x.contiguous(memory_format=torch.channels_last)
    shape = HeadShape(packed.c_in, packed.c_last, packed.num_classes)
    return operators.HEAD.run(x, packed.data, shape.fields(), [lo, hi], tf32(x))


# ------------------------------------------------------------------------------------------------------- checks


def _check_kernel(function: str, name: str, kernel: int, width: int) -> None:
    if kernel != width or kernel % 2 == 0 or kernel > MOST_KERNEL:
        raise ValueError(
            f"{function}: {name} must have a square kernel of odd size up to {MOST_KERNEL}; got {kernel} x {width}"
        )


def _check_block_weights(
    function: str,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
) -> tuple[int, int, int, int]:
    """Returns c_hidden, kernel, c_in, c_out."""
    check_tensor(function, "depthwise_weight", depthwise_weight, (None, 1, None, None))
    c_hidden, _, kernel, width = depthwise_weight.shape
    _check_kernel(function, "depthwise_weight", kernel, width)
    check_tensor(function, "project_weight", project_weight, (None, c_hidden, 1, 1))
    c_in, c_out = c_hidden, project_weight.shape[0]
    if expand_weight is not None:
        check_tensor(function, "expand_weight", expand_weight, (c_hidden, None, 1, 1))
        c_in = expand_weight.shape[1]
    elif expand_bias is not None:
        raise ValueError(f"{function}: expand_bias must be None if expand_weight is; got {what(expand_bias)}")
    biases = (("expand_bias", expand_bias, c_hidden), ("depthwise_bias", depthwise_bias, c_hidden))
    for name, bias, size in (*biases, ("project_bias", project_bias, c_out)):
        if bias is not None:
            check_tensor(function, name, bias, (size,))
    return c_hidden, kernel, c_in, c_out


def _check_input(function: str, x: Tensor, c_in: int) -> None:
    check_tensor(function, "x", x, (None, c_in, None, None))
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{function}: x must have at least one pixel; got {what(x)}")


def _packed_dtype(function: str, dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    dtype = dtype or weight.dtype
    if dtype not in FLOATS:
        if weight.device.type == "cpu":
            return torch.float32  # on the CPU packed weights do not depend on the dtype
        raise TypeError(f"{function}: dtype must be float32, bfloat16 or float16 on a GPU; got {dtype}")
    return dtype


def _check_run_input(function: str, x: Tensor, c_in: int, packed: PackedBlock | PackedDense | PackedHead) -> None:
    _check_input(function, x, c_in)
    if x.dtype not in FLOATS:
        raise TypeError(f"{function}: x must be float32, bfloat16 or float16; got {what(x)}")
    if x.device != packed.data.device:
        raise TypeError(f"{function}: x must be on the device of packed, {packed.data.device}; got {what(x)}")
    if x.device.type != "cpu" and x.dtype != packed.dtype:
        raise TypeError(f"{function}: x must be {packed.dtype}, for which its weights were packed; got {what(x)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{function}: x must not require a gradient, this function has none; got {what(x)}")


def _check_packed(function: str, packed: object, kind: type) -> None:
    if not isinstance(packed, kind):
        raise TypeError(f"{function}: packed must be a {kind.__name__}; got {what(packed)}")


def _check_window(
    function: str, x: Tensor, kernel: int, stride: int, dilation: int, padding: int | Sequence[int] | None
) -> tuple[int, int, int, int]:
    """Checks stride, dilation and padding; returns top, left, bottom, right."""
    for name, value in (("stride", stride), ("dilation", dilation)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{function}: {name} must be a positive integer; got {what(value)}")
    if padding is None:
        padding = (kernel - 1) // 2 * dilation
    pads = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(pads) == 2:
        pads = pads * 2
    if len(pads) != 4 or any(not isinstance(p, int) or p < 0 for p in pads):
        raise ValueError(
            f"{function}: padding must be 1, 2 or 4 integers (top, left, bottom, right), none negative; "
            f"got {what(padding)}"
        )
    top, left, bottom, right = pads
    span = reach(kernel, dilation) + 1
    if x.shape[2] + top + bottom < span or x.shape[3] + left + right < span:
        raise ValueError(
            f"{function}: x must be at least as large as the kernel's reach of {span} after padding {pads}; "
            f"got {what(x)}"
        )
    return top, left, bottom, right


def _check_project_activation(function: str, activation: tuple[float, float] | None) -> tuple[float, float]:
    return NO_BOUNDS if activation is None else _check_activation(function, activation, "project_activation")


def _check_activation(function: str, activation: tuple[float, float], name: str = "activation") -> tuple[float, float]:
    try:
        lo, hi = (float(v) for v in activation)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} must be a pair of numbers (lo, hi); got {what(activation)}") from None
    if not lo <= hi:
        raise ValueError(f"{function}: {name} must satisfy lo <= hi; got {what(activation)}")
    return lo, hi
