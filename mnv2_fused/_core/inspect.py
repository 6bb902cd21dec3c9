"""Reads a unit (stem, block or head) from its child modules: what to run fused, or the reason why it must run plain.

Everything that decides is read from the modules at the time of the call, because users rewrite them in place.
``read_*`` does it in full; `freshness.Guard` tells in microseconds whether a reading still holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext

from mnv2_fused._core import library as _library
from mnv2_fused._core.layout import is_channels_last
from mnv2_fused.models.layers import Conv2dSame
from mnv2_fused.reference import same_padding

_C = _library._C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_INFINITY = float("inf")
_MAX_KERNEL = 63
_GLOBAL_HOOKS = (
    _module._global_forward_pre_hooks,
    _module._global_forward_hooks,
    _module._global_backward_pre_hooks,
    _module._global_backward_hooks,
)
# Attributes in an instance's __dict__ that change what calling the module does.
_OVERRIDES = ("forward", "_conv_forward", "_call_impl", "_slow_forward", "_check_input_dim", "weight", "bias")


class BlockSpec(NamedTuple):
    """An inverted-residual block. `tensors` are six a convolution: weight, bias, BN's weight, bias, mean, var; those
    of the expansion are None where there is none. `eps` are the three norms'.
    """

    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    dtype: torch.dtype
    c_in: int
    c_hidden: int
    c_out: int
    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, ...]  # top, left, bottom, right; empty: TensorFlow's "SAME", from the input's size
    has_expand: bool
    residual: bool
    lo: float
    hi: float
    channels_last: bool  # the plain output is that whatever the input is, because of the weights
    norms: tuple[nn.Module, ...]  # those that there are, in order

    @property
    def device(self) -> torch.device:
        return self.tensors[12].device


class StemSpec(NamedTuple):
    """A dense convolution with batch norm and activation; `tensors` as in `BlockSpec`."""

    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    dtype: torch.dtype
    c_in: int
    c_out: int
    kernel: int
    stride: int
    padding: tuple[int, ...]
    lo: float
    hi: float
    channels_last: bool
    norms: tuple[nn.Module, ...]
    dilation: int = 1

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class HeadSpec(NamedTuple):
    """1x1 convolution with batch norm and activation, mean, classifier; `tensors` ends with the classifier's two."""

    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    dtype: torch.dtype
    c_in: int
    c_last: int
    num_classes: int
    lo: float
    hi: float
    padding: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class NetworkSpec(NamedTuple):
    """Stem, blocks and head one after the other; sizes and bounds are arguments of the operator `network`."""

    stem: StemSpec
    tensors: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    stem_sizes: list[int]
    block_sizes: list[int]
    head_sizes: list[int]
    bounds: list[float]
    unfit: dict[tuple, str | None]  # what `network_reason` has found, by the input

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.dtype


# --------------------------------------------------------------------------------------------- the call, the input


def call_reason(x: Tensor) -> str | None:
    """Why a call with `x`, here and now, must run plain whatever the modules are; None where it need not."""
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}, not a plain torch.Tensor"
    if not x.is_cpu:
        reason = device_reason(x.device)
        if reason is not None:
            return reason
    if x.layout is not torch.strided:
        return "the input is not strided"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._len_torch_function_stack() and not _only_device_modes():
        return "a TorchFunctionMode is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    return None


def training_call(x: Tensor) -> bool:
    """Whether a call with `x` takes the training operators whatever the modules are."""
    return (x.is_cpu and torch.is_autocast_enabled("cpu")) or (x.requires_grad and torch.is_grad_enabled())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast has inference on `x` compute in; None where it is off, and on the CPU, where training operators
    compute under autocast.
    """
    if x.is_cpu or x.dtype not in DTYPES or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


def device_reason(device: torch.device) -> str | None:
    """Why what is on `device` must run plain; None where there are kernels for it."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the input is on {device}, not on the CPU or a CUDA GPU"
    if _library.cuda_missing is not None:
        return f"the input is on {device}, and mnv2_fused's CUDA kernels are not there: {_library.cuda_missing}"
    reason = _gpu_reason(device.index)
    return None if reason is None else f"the input is on {device}: {reason}"


def _when_traced(function: Callable) -> Callable:
    """While a graph is traced `function` is called, and what it returns is a constant: what
    torch.compiler.assume_constant_result does, which takes seconds to import.
    """
    function._dynamo_marked_constant = True
    return function


@_when_traced
def _gpu_reason(index: int | None) -> str | None:
    return _library.gpu_reason(torch.cuda.current_device() if index is None else index)


def tf32(x: Tensor) -> bool:
    """Whether PyTorch would compute convolutions of `x` in tf32."""
    return x.is_cuda and x.dtype == torch.float32 and _tf32_convolutions()


@_when_traced
def _tf32_convolutions() -> bool:
    """PyTorch's setting, in a graph of operators that of its tracing. Without cuDNN it has cuBLAS multiply matrices."""
    backends = torch.backends
    return (backends.cudnn.conv if backends.cudnn.enabled else backends.cuda.matmul).fp32_precision == "tf32"


GRADIENTS = "gradients are needed"


def _only_device_modes() -> bool:
    # torch.set_default_device installs such a mode; it changes factory functions only.
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(mode) is DeviceContext for mode in modes)


def traced_call_reason(x: Tensor) -> str | None:
    """`call_reason` while torch.compile or torch.export traces: only what they can decide statically."""
    if torch.compiler.is_dynamo_compiling() and type(x) is not Tensor:
        return "the input is not a plain torch.Tensor"
    reason = device_reason(x.device)
    if reason is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if torch.onnx.is_in_onnx_export():
        return "an ONNX export records"
    return None


def shape_reason(spec: BlockSpec | StemSpec | HeadSpec, x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why `x` does not fit the unit (PyTorch's own code then raises its own error); None where it fits. `dtype`: of
    the arithmetic, where it is not that of the weights.
    """
    if x.dtype != (dtype or spec.dtype):
        return f"the input is {x.dtype}, the weights are {spec.dtype}"
    if x.device != spec.device:
        return f"the input is on {x.device}, the weights are on {spec.device}"
    if x.dim() != 4:
        return "the input is not 4-dimensional"
    _, c, h, w = x.shape
    if c != spec.c_in:
        return f"the input has {c} channels, the weights take {spec.c_in}"
    if h < 1 or w < 1:
        return "the input has no pixels"
    if spec.padding:
        top, left, bottom, right = spec.padding
        span = (spec.kernel - 1) * spec.dilation + 1
        if h + top + bottom < span or w + left + right < span:
            return "the input is smaller than the kernel"
    if x.is_cpu:
        return None
    n, h, w = _sizes(x)
    if isinstance(spec, BlockSpec):
        padding = resolve_padding(spec, h, w)
        return block_fit_reason(
            x, spec.c_in, spec.c_hidden, spec.c_out, spec.kernel, spec.stride, spec.dilation, padding, spec.has_expand
        )
    if isinstance(spec, StemSpec):
        sizes = (n, h, w, spec.c_in, spec.c_out, spec.kernel, spec.stride, resolve_padding(spec, h, w))
        return _fit_reason("cuda_stem_unfit", (*sizes, _name(x.dtype)), x.device)
    return _fit_reason("cuda_head_unfit", (n, h, w, spec.c_in, spec.c_last, spec.num_classes), x.device)


def block_fit_reason(
    x: Tensor,
    c_in: int,
    c_hidden: int,
    c_out: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, ...],
    has_expand: bool,
) -> str | None:
    """Why a block's kernels cannot run on the GPU that `x` is on; None where they can."""
    n, h, w = _sizes(x)
    sizes = (n, h, w, c_in, c_hidden, c_out, kernel, stride, dilation, padding, has_expand)
    return _fit_reason("cuda_block_unfit", (*sizes, _name(x.dtype)), x.device, limited=True)


def network_reason(spec: NetworkSpec, x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """`shape_reason` of a whole network."""
    reason = shape_reason(spec.stem, x, dtype)
    if reason is not None or x.is_cpu:
        return reason
    key = (*_sizes(x), x.dtype, x.device)
    reason = spec.unfit.get(key, "")  # hundreds of sizes take time to hash
    if reason == "":
        lists = (spec.stem_sizes, spec.block_sizes, spec.head_sizes, spec.bounds)
        sizes = (*key[:3], spec.stem.c_in, *map(tuple, lists), _name(x.dtype))
        reason = _fit_reason("cuda_network_unfit", sizes, x.device, limited=True)
        if len(spec.unfit) < 64:
            spec.unfit[key] = reason
    return reason


def _sizes(x: Tensor) -> tuple[int, int, int]:
    # A graph serves other sizes as well: maps are then taken to be larger than the kernels' reach.
    return (1, 1 << 14, 1 << 14) if torch.compiler.is_compiling() else (x.shape[0], x.shape[2], x.shape[3])


def _name(dtype: torch.dtype) -> str:
    return "float16" if dtype is torch.float16 else "bfloat16" if dtype is torch.bfloat16 else "float32"


@_when_traced
def _fit_reason(predicate: str, sizes: tuple, device: torch.device, limited: bool = False) -> str | None:
    reason = _unfit(predicate, (*sizes, _shared_memory(device.index)) if limited else sizes)
    return None if reason is None else f"it does not fit {device}: {reason}"


@functools.lru_cache(4096)
def _unfit(predicate: str, arguments: tuple) -> str | None:
    return getattr(_C, predicate)(*arguments)


@functools.cache
def _shared_memory(index: int) -> int:
    """Bytes that a thread block can have."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def resolve_padding(spec: BlockSpec | StemSpec, h: int, w: int) -> tuple[int, ...]:
    """The four paddings (top, left, bottom, right) for an input of h x w."""
    if spec.padding:
        return spec.padding
    return same_padding(h, w, spec.kernel, spec.stride, spec.dilation)


# --------------------------------------------------------------------------------------------------- the modules


def _child_reason(module: nn.Module, name: str) -> str | None:
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return f"{name} has hooks"
    for attribute in _OVERRIDES:
        if attribute in module.__dict__:
            return f"{name} overrides {attribute}"
    return None


def _sequence(module: nn.Module | None, name: str) -> list[nn.Module] | str:
    """The children of a Sequential, or of a subclass that leaves its forward alone."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return f"{name} is a {type(module).__name__}, not an nn.Sequential"
    return _child_reason(module, name) or list(module)


def _two(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _conv_reason(conv: nn.Module, name: str, train: bool) -> str | None:
    kind = type(conv)
    if kind is not nn.Conv2d and kind is not Conv2dSame:
        return f"{name} is a {kind.__name__}, not an nn.Conv2d"
    if conv.padding_mode != "zeros" and _two(conv.padding) != (0, 0):
        return f"{name} pads with {conv.padding_mode}"
    if train and conv.bias is not None:
        return f"{name} has a bias, which training has no use for before a batch norm"
    return _child_reason(conv, name)


def _norm_reason(norm: nn.Module, name: str, train: bool) -> str | None:
    if type(norm) is not nn.BatchNorm2d and not (train and type(norm) is nn.SyncBatchNorm):
        return f"{name} is a {type(norm).__name__}, not an nn.BatchNorm2d"
    if norm.training and not train:
        return f"{name} is in training mode"
    if (norm.running_mean is None or norm.running_var is None) and not train:
        return f"{name} has no running statistics"
    return _child_reason(norm, name)


def _bounds(activation: nn.Module, name: str) -> tuple[float, float] | str:
    kind = type(activation)
    reason = _child_reason(activation, name)
    if reason is not None:
        return reason
    if kind is nn.ReLU6 or kind is nn.Hardtanh:
        return float(activation.min_val), float(activation.max_val)
    if kind is nn.ReLU:
        return 0.0, _INFINITY
    return f"{name} is a {kind.__name__}, not an nn.ReLU6"


def _six(conv: nn.Module, norm: nn.Module) -> tuple[Tensor | None, ...]:
    return conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var


def _pointwise_reason(conv: nn.Module, name: str) -> str | None:
    if conv.weight.dim() != 4 or conv.weight.shape[2] != 1 or conv.weight.shape[3] != 1:
        return f"{name} is not a 1x1 convolution"
    # "same" and "valid" pad nothing here, and neither does Conv2dSame at stride 1.
    if conv.groups != 1 or _two(conv.stride) != (1, 1):
        return f"{name} is grouped or strided"
    if not isinstance(conv.padding, str) and _two(conv.padding) != (0, 0):
        return f"{name} is padded"
    return None


def _spatial(conv: nn.Module, name: str) -> tuple[int, int, int, tuple[int, ...]] | str:
    """Kernel, stride, dilation and padding of a convolution that treats both axes alike."""
    if conv.weight.dim() != 4:
        return f"the weight of {name} is not 4-dimensional"
    kernel, kernel_w = conv.weight.shape[2], conv.weight.shape[3]
    strides, dilations = _two(conv.stride), _two(conv.dilation)
    if kernel != kernel_w or kernel % 2 == 0 or kernel > _MAX_KERNEL:
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
        pads = ((kernel - 1) * dilation // 2,) * 2
    else:
        pads = _two(conv.padding)
    if len(pads) != 2 or pads[0] < 0 or pads[1] < 0:
        return f"the padding of {name} is unusual"
    if type(conv) is Conv2dSame and pads == (0, 0):
        return kernel, stride, dilation, ()
    return kernel, stride, dilation, (pads[0], pads[1], pads[0], pads[1])


def _tensors_reason(tensors: tuple[Tensor | None, ...], dtype: torch.dtype, train: bool = False) -> str | None:
    compiling = torch.compiler.is_compiling()
    grad = torch.is_grad_enabled()
    device = next(t.device for t in tensors if t is not None)
    # Autocast casts all but float64, and leaves batch-norm tensors as they are.
    casts = device.type == "cuda" and not train and dtype in DTYPES and torch.is_autocast_enabled("cuda")
    arithmetic = torch.get_autocast_dtype("cuda") if casts else dtype
    norm_dtype = None
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if not compiling and type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"a weight is a {type(t).__name__}"
        if t.device != device:
            return "the weights are on different devices"
        if t.layout != torch.strided:
            return "a weight is not strided"
        if grad and t.requires_grad and not train:
            return GRADIENTS
        if i % 6 < 2:
            if t.dtype != dtype:
                return "the weights have different dtypes"
        else:
            # PyTorch takes batch-norm tensors of the input's dtype, or all of them in float32.
            norm_dtype = norm_dtype or t.dtype
            if t.dtype != norm_dtype or (t.dtype != arithmetic and t.dtype != torch.float32):
                return "the batch-norm tensors have different dtypes"
    if dtype not in DTYPES:
        return f"the weights are {dtype}, not float32, bfloat16 or float16"
    if arithmetic not in DTYPES:
        return f"autocast computes in {arithmetic}, not float32, bfloat16 or float16"
    return None


def _vectors_reason(tensors: tuple[Tensor | None, ...], size: int, name: str) -> str | None:
    for t in tensors:
        if t is not None and (t.dim() != 1 or t.shape[0] != size):
            return f"a bias or batch-norm tensor of {name} has another size than its output"
    return None


def _read_conv_norm(
    module: nn.Module, name: str, train: bool = False
) -> tuple[nn.Module, nn.Module, tuple[Tensor | None, ...], tuple[float, float]] | str:
    """Convolution, norm, their six tensors and the activation's bounds of a [conv, norm, activation] sequence."""
    children = _sequence(module, name)
    if isinstance(children, str):
        return children
    if len(children) != 3:
        return f"{name} has {len(children)} children, not convolution, norm and activation"
    conv, norm, activation = children
    reason = _conv_reason(conv, f"{name}.0", train) or _norm_reason(norm, f"{name}.1", train)
    if reason is not None:
        return reason
    bounds = _bounds(activation, f"{name}.2")
    if isinstance(bounds, str):
        return bounds
    return conv, norm, _six(conv, norm), bounds


def read_block(block: nn.Module, train: bool = False) -> BlockSpec | str:
    """What an inverted-residual block computes, or the reason why it has to run plain: for inference, or to `train`
    with gradients or statistics of the batch.
    """
    children = _sequence(block.conv, "conv")
    if isinstance(children, str):
        return children
    if len(children) != 3 and len(children) != 4:
        return f"conv has {len(children)} children"
    has_expand = len(children) == 4
    first = 1 if has_expand else 0
    depthwise_name, project_name, norm_name = f"conv.{first}", f"conv.{first + 1}", f"conv.{first + 2}"

    depthwise = _read_conv_norm(children[first], depthwise_name, train)
    if isinstance(depthwise, str):
        return depthwise
    depthwise_conv, depthwise_norm, depthwise_six, bounds = depthwise
    project_conv, project_norm = children[first + 1], children[first + 2]
    reason = _conv_reason(project_conv, project_name, train) or _norm_reason(project_norm, norm_name, train)
    if reason is not None:
        return reason
    project_six = _six(project_conv, project_norm)
    norms: tuple[nn.Module, ...] = (depthwise_norm, project_norm)

    c_hidden = depthwise_conv.weight.shape[0]
    if depthwise_conv.groups != c_hidden or depthwise_conv.weight.shape[1] != 1:
        return f"{depthwise_name}.0 is not a depthwise convolution"
    spatial = _spatial(depthwise_conv, f"{depthwise_name}.0")
    if isinstance(spatial, str):
        return spatial
    kernel, stride, dilation, padding = spatial
    reason = _pointwise_reason(project_conv, project_name)
    if reason is not None:
        return reason
    c_out = project_conv.weight.shape[0]
    if project_conv.weight.shape[1] != c_hidden:
        return f"{project_name} does not take the channels of {depthwise_name}"

    c_in, expand_six = c_hidden, (None,) * 6
    if has_expand:
        expand = _read_conv_norm(children[0], "conv.0", train)
        if isinstance(expand, str):
            return expand
        expand_conv, expand_norm, expand_six, expand_bounds = expand
        norms = (expand_norm, *norms)
        reason = _pointwise_reason(expand_conv, "conv.0.0")
        if reason is not None:
            return reason
        if expand_bounds != bounds:
            return "the two activations differ"
        if expand_conv.weight.shape[0] != c_hidden:
            return f"{depthwise_name} does not take the channels of conv.0"
        c_in = expand_conv.weight.shape[1]
        reason = _vectors_reason(expand_six[1:], c_hidden, "conv.0")
        if reason is not None:
            return reason

    tensors = (*expand_six, *depthwise_six, *project_six)
    eps = tuple(float(norm.eps) for norm in norms)
    eps = eps if has_expand else (0.0, *eps)
    residual = bool(block.use_res_connect)
    if residual:
        reach = (kernel - 1) * dilation
        keeps_size = not padding or (padding[0] + padding[2] == reach and padding[1] + padding[3] == reach)
        if stride != 1 or c_in != c_out or not keeps_size:
            return "the shortcut adds tensors of different shapes"
    dtype = project_conv.weight.dtype
    reason = (
        _vectors_reason(depthwise_six[1:], c_hidden, depthwise_name)
        or _vectors_reason(project_six[1:], c_out, project_name)
        or _tensors_reason(tensors, dtype, train)
    )
    if reason is not None:
        return reason
    # A convolution's output is channels_last where its input or its weight is; a sum takes the format of x.
    channels_last = not residual and any(weight is not None and is_channels_last(weight) for weight in tensors[::6])
    return BlockSpec(
        tensors,
        eps,
        dtype,
        c_in,
        c_hidden,
        c_out,
        kernel,
        stride,
        dilation,
        padding,
        has_expand,
        residual,
        *bounds,
        channels_last,
        norms,
    )


def read_stem(stem: nn.Module, train: bool = False) -> StemSpec | str:
    """What the first convolution computes, or the reason why it has to run plain; as `read_block`."""
    children = list(stem)
    if len(children) != 3:
        return f"it has {len(children)} children, not convolution, norm and activation"
    conv, norm, activation = children
    reason = _conv_reason(conv, "0", train) or _norm_reason(norm, "1", train)
    if reason is not None:
        return reason
    bounds = _bounds(activation, "2")
    if isinstance(bounds, str):
        return bounds
    spatial = _spatial(conv, "0")
    if isinstance(spatial, str):
        return spatial
    kernel, stride, dilation, padding = spatial
    if conv.groups != 1:
        return "0 is a grouped convolution"
    if dilation != 1:
        return "0 is dilated"
    c_out, c_in = conv.weight.shape[0], conv.weight.shape[1]
    tensors, dtype = _six(conv, norm), conv.weight.dtype
    reason = _vectors_reason(tensors[1:], c_out, "0") or _tensors_reason(tensors, dtype, train)
    if reason is not None:
        return reason
    eps, channels_last = (float(norm.eps),), is_channels_last(conv.weight)
    return StemSpec(
        tensors, eps, dtype, c_in, c_out, kernel, stride, padding, *bounds, channels_last=channels_last, norms=(norm,)
    )


def read_last(last: nn.Module) -> StemSpec | str:
    """What the last convolution computes, to train it, or the reason why it has to run plain."""
    children = _sequence(last, "features.-1")
    return children if isinstance(children, str) else read_stem(last, train=True)


def read_head(last: nn.Module, classifier: nn.Module) -> HeadSpec | str:
    """What the last convolution, the pooling and the classifier compute, or the reason why they have to run plain."""
    read = _read_conv_norm(last, "features.-1")
    if isinstance(read, str):
        return read
    conv, norm, tensors, bounds = read
    reason = _pointwise_reason(conv, "features.-1.0")
    if reason is not None:
        return reason
    children = _sequence(classifier, "classifier")
    if isinstance(children, str):
        return children
    if len(children) != 2 or type(children[0]) is not nn.Dropout or type(children[1]) is not nn.Linear:
        return "classifier is not nn.Sequential(nn.Dropout, nn.Linear)"
    dropout, linear = children
    reason = _child_reason(dropout, "classifier.0") or _child_reason(linear, "classifier.1")
    if reason is not None:
        return reason
    if dropout.training and dropout.p > 0:
        return "classifier.0 drops out in training mode"
    c_last, c_in = conv.weight.shape[0], conv.weight.shape[1]
    if linear.weight.dim() != 2 or linear.weight.shape[1] != c_last:
        return "classifier.1 does not take the channels of features.-1"
    num_classes = linear.weight.shape[0]
    if num_classes < 1:
        return "classifier.1 has no outputs"
    tensors, dtype = (*tensors, linear.weight, linear.bias), conv.weight.dtype
    reason = (
        _vectors_reason(tensors[1:6], c_last, "features.-1")
        or _vectors_reason(tensors[7:], num_classes, "classifier.1")
        or _tensors_reason(tensors, dtype)
    )
    if reason is not None:
        return reason
    return HeadSpec(tensors, (float(norm.eps),), dtype, c_in, c_last, num_classes, *bounds)


def join(stem: StemSpec, blocks: list[BlockSpec], head: HeadSpec) -> NetworkSpec | str:
    """The units as one network, or the reason why they have to run one by one."""
    units = (stem, *blocks, head)
    c = stem.c_in
    for unit in units:
        if unit.c_in != c or unit.dtype != stem.dtype or unit.device != stem.device:
            return "a unit does not take what the one before it gives"
        c = 0 if unit is head else unit.c_out
    for unit in (stem, *blocks):
        reach = (unit.kernel - 1) * unit.dilation
        if unit.padding and min(unit.padding[0] + unit.padding[2], unit.padding[1] + unit.padding[3]) < reach:
            return "whether a kernel fits depends on the input's size"
    same = (-1,) * 4
    return NetworkSpec(
        stem,
        tuple(t for unit in units for t in unit.tensors),
        tuple(e for unit in units for e in unit.eps),
        [stem.c_out, stem.kernel, stem.stride, *(stem.padding or same)],
        [
            value
            for b in blocks
            for value in (
                b.c_hidden,
                b.c_out,
                b.kernel,
                b.stride,
                b.dilation,
                *(b.padding or same),
                int(b.has_expand),
                int(b.residual),
            )
        ],
        [head.c_last, head.num_classes],
        [bound for unit in units for bound in (unit.lo, unit.hi)],
        {},
    )
