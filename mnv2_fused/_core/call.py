"""Facts about a call that no module is needed for: the input's type and device, active modes, gradients, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext

from mnv2_fused._core import library
from mnv2_fused._core.geometry import FLOATS

GRADIENTS = "gradients are needed"

# Bound here, because every call of a module looks them up, and caches are cold then.
_tracing_state = torch._C._get_tracing_state
_functorch_is_active = torch._C._are_functorch_transforms_active
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_is_autocast_enabled = torch.is_autocast_enabled

_PRE_HOOKS, _HOOKS = _module._global_forward_pre_hooks, _module._global_forward_hooks
_BACKWARD_PRE_HOOKS, _BACKWARD_HOOKS = _module._global_backward_pre_hooks, _module._global_backward_hooks


def call_reason(x: Tensor) -> str | None:
    """Why a call with `x` must run plain in any module, given the modes that are active now; None if it need not."""
    return _traced_call_reason(x) if torch.compiler.is_compiling() else eager_call_reason(x)


def eager_call_reason(x: Tensor) -> str | None:
    """`call_reason` if no tracer runs."""
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}, not a plain torch.Tensor"
    if not x.is_cpu:
        reason = device_reason(x.device)
        if reason is not None:
            return reason
    if x.layout is not torch.strided:
        return "the input is not strided"
    if _tracing_state() is not None:
        return "torch.jit.trace records"
    if _functorch_is_active():
        return "a functorch transform is active"
    if _dispatch_modes():
        return "a TorchDispatchMode is active"
    if _function_modes() and not _only_device_modes():
        return "a TorchFunctionMode is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _PRE_HOOKS or _HOOKS or _BACKWARD_PRE_HOOKS or _BACKWARD_HOOKS:
        return "global module hooks are registered"
    return None


def _traced_call_reason(x: Tensor) -> str | None:
    """`call_reason` while torch.compile or torch.export traces: only the checks that a tracer supports."""
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


def _only_device_modes() -> bool:
    # torch.set_default_device installs a DeviceContext, which changes factory functions only.
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(mode) is DeviceContext for mode in modes)


def training_call(x: Tensor) -> bool:
    """Whether a call with `x` takes the training operators in any module: gradients, or autocast on the CPU."""
    return (x.is_cpu and _is_autocast_enabled("cpu")) or (x.requires_grad and wants_gradients())


def asks_gradients(x: Tensor) -> bool:
    """Whether the caller may ask for the gradient of `x`."""
    return x.requires_grad and torch.is_grad_enabled()


def casts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    return _is_autocast_enabled("cpu" if x.is_cpu else "cuda")


def wants_gradients() -> bool:
    """Whether inference operators must not take tensors that require gradients. An exported graph may hold them: there
    they have gradients, and most programs that are exported in grad mode never ask for any.
    """
    return torch.is_grad_enabled() and not is_exporting()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of inference on `x` under autocast; None if autocast is off, and always None on the CPU, because there
    the training operators run under autocast.
    """
    if x.is_cpu or x.dtype not in FLOATS or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


def when_traced(function: Callable) -> Callable:
    """Makes a tracer call `function` and treat its result as a constant. `torch.compiler.assume_constant_result` does
    the same, but takes seconds to import.
    """
    function._dynamo_marked_constant = True
    return function


def device_reason(device: torch.device) -> str | None:
    """Why an input on `device` must run plain; None if there are kernels for that device."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the input is on {device}, not on the CPU or a CUDA GPU"
    if library.cuda_missing is not None:
        return f"the input is on {device}, and mnv2_fused's CUDA kernels are not there: {library.cuda_missing}"
    reason = _gpu_reason(device.index)
    return None if reason is None else f"the input is on {device}: {reason}"


@when_traced
def is_exporting() -> bool:
    """Called while tracing, because torch 2.11's tracer takes the function of torch as always true."""
    return torch.compiler.is_exporting()


@when_traced
def _gpu_reason(index: int | None) -> str | None:
    return library.gpu_reason(torch.cuda.current_device() if index is None else index)


def tf32(x: Tensor) -> bool:
    """Whether PyTorch would compute convolutions of `x` in TF32."""
    return x.is_cuda and x.dtype == torch.float32 and _tf32_convolutions()


@when_traced
def _tf32_convolutions() -> bool:
    """PyTorch's setting; a traced graph keeps the one from its tracing. Without cuDNN, cuBLAS's setting counts."""
    backends = torch.backends
    return (backends.cudnn.conv if backends.cudnn.enabled else backends.cuda.matmul).fp32_precision == "tf32"


@functools.cache
def shared_memory(index: int) -> int:
    """Bytes of shared memory that a thread block on GPU `index` can have."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin
