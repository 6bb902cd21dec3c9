"""The units that run fused: `Stem` and `InvertedResidual`. Both are their plain selves wherever they must be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused._core import freshness as _freshness
from mnv2_fused._core import inspect as _inspect
from mnv2_fused._core import packing as _packing
from mnv2_fused._core.layout import is_channels_last, to_contiguous
from mnv2_fused.models.layers import Conv2dNormActivation, Conv2dSame
from mnv2_fused.training import operators as training

__all__ = ["Conv2dNormActivation", "Conv2dSame", "InvertedResidual", "Stem"]

_ops = torch.ops.mnv2_fused
_CHANNELS_LAST = torch.channels_last


class FusedUnit(nn.Module):
    """What stem, block and network share: a cache of packed weights, which copies and pickles leave behind.

    ``fused = False`` makes a unit run as plain PyTorch. ``recompute`` says what training makes again in order not to
    keep it: see `training`.
    """

    fused: bool = True
    recompute: str = "balanced"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_cache"] = _freshness.Cache()

    def train(self, mode: bool = True) -> FusedUnit:
        """As of any module. Whoever trains by replays of a CUDA graph is seen by that alone."""
        if any(module.training != mode for module in self.modules()):
            self._cache.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_cache", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_cache"] = _freshness.Cache()


class Reading(NamedTuple):
    """A successful reading of a unit, with what tells that it still holds."""

    key: tuple[Any, ...]
    guard: _freshness.Guard
    spec: Any
    packed: _freshness.Packed

    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.packed.tensors)


def current(
    cache: _freshness.Cache,
    key: tuple[Any, ...],
    modules: tuple[nn.Module, ...],
    read: Callable[..., Any],
    arguments: tuple[nn.Module, ...],
    pack: _freshness.Pack,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Tensor] | None:
    """What the unit ``read(*arguments)`` computes, and its packed weights; None where it must run plain.

    ``key`` is what the reading depends on besides the state of ``modules`` and their children; ``dtype`` that of
    autocast, see `_inspect.autocast_dtype`.
    """
    reading: Reading | None = cache.readings.get(dtype)
    packed = None if reading is None else reading.packed
    if reading is not None and reading.key == key and reading.guard.same.holds():
        if reading.needs_gradients():
            return None
        if packed.holds():
            return reading.spec, cache.use(packed)
        packed = None
    spec = read(*arguments)
    if isinstance(spec, str):
        if reading is not None:
            cache.readings = {d: r for d, r in cache.readings.items() if d != dtype}
        return None
    guard = _freshness.Guard(modules)
    if packed is None or not packed.is_of(spec.tensors, spec.eps) or not packed.holds():
        packed = cache.pack(spec.tensors, spec.eps, dtype or spec.dtype, pack)
    if not packed.in_graph:
        others = {d: r for d, r in cache.readings.items() if d != dtype and r.packed.same.holds()}
        cache.readings = others | {dtype: Reading(key, guard, spec, packed)}
    return spec, cache.use(packed)


class FusedLayer(FusedUnit):
    """What stem and block share: the way from a call to one fused operator, or to plain PyTorch."""

    @torch.jit.unused
    def _forward_unit(self, x: Tensor) -> Tensor:
        y = _run(self, x)
        return self._forward_plain(x) if y is None else y

    @torch.jit.unused
    def _fused(self, x: Tensor, inside: bool = False) -> Tensor | None:
        """The output; None where it must run plain. The caller has seen to `call_reason`.

        ``inside`` a network the memory format is channels_last always, else that of the plain output.
        """
        traced = torch.compiler.is_compiling()
        for infer in (not self.training, self.training):  # what is likelier first
            if not infer:
                found = self._train(x) if x.is_cpu else None  # there are training kernels for the CPU alone
            elif not _inspect.training_call(x):
                found = self._infer_traced(x) if traced else self._infer(x)
            else:
                continue
            if found is not None:
                y, spec = found
                return y if inside else _in_plain_format(x, y, spec)
        return None

    @torch.jit.unused
    def _infer(self, x: Tensor) -> tuple[Tensor, Any] | None:
        """The output, channels_last, and the spec, where neither gradients nor statistics of the batch are needed."""
        dtype = _inspect.autocast_dtype(x)
        found = self._current(dtype)
        y = None if found is None else self._execute(x, *found, dtype)
        return None if y is None else (y, found[0])


class Stem(FusedLayer, Conv2dNormActivation):
    """A `Conv2dNormActivation` that runs as one fused operator: a dense convolution, batch norm and ReLU6.

    Takes (n, c_in, h, w) and returns (n, c_out, h_out, w_out).
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(input)
        else:
            return self._forward_unit(input)

    def _forward_plain(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input

    @torch.jit.unused
    def _current(self, dtype: torch.dtype | None = None) -> tuple[_inspect.StemSpec, Tensor] | None:
        """What the unit computes, and its packed weights; None where it must run plain."""
        children = tuple(self.__dict__["_modules"].values())
        return current(self._cache, children, children, _inspect.read_stem, (self,), _packing.pack_stem, dtype)

    @staticmethod
    @torch.jit.unused
    def _execute(x: Tensor, spec: _inspect.StemSpec, packed: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """The output, channels_last; None where plain PyTorch has an error to report, or a shape of its own."""
        x = x if dtype is None else x.to(dtype)
        if _inspect.shape_reason(spec, x, dtype) is not None:
            return None
        padding = spec.padding or _inspect.resolve_padding(spec, x.shape[2], x.shape[3])
        return _ops.stem.default(
            x, packed, spec.c_out, spec.kernel, spec.stride, padding, spec.lo, spec.hi, _inspect.tf32(x)
        )

    @torch.jit.unused
    def _train(self, x: Tensor) -> tuple[Tensor, _inspect.StemSpec] | None:
        """The output with gradients, channels_last, and the spec; None where it must run plain."""
        spec = _inspect.read_stem(self, train=True)
        y = None if isinstance(spec, str) else training.train_dense(x, spec)
        return None if y is None else (y, spec)

    @torch.jit.unused
    def _infer_traced(self, x: Tensor) -> tuple[Tensor, _inspect.StemSpec] | None:
        """`_infer` for graphs."""
        spec, dtype = _inspect.read_stem(self), _inspect.autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        if isinstance(spec, str) or _inspect.shape_reason(spec, x, dtype) is not None:
            return None
        y = _ops.cached_stem.default(
            x,
            list(spec.tensors),
            self._cache.name,
            list(spec.eps),
            spec.kernel,
            spec.stride,
            list(spec.padding),
            spec.lo,
            spec.hi,
        )
        return y, spec


class InvertedResidual(FusedLayer):
    """1x1 expand, BN, ReLU6, 3x3 depthwise, BN, ReLU6, 1x1 project, BN, and a shortcut where the shapes allow one.

    Takes torchvision's arguments, has its state-dict keys and attributes, and can be given to torchvision's
    ``MobileNetV2`` as ``block=``. Runs as one fused operator in float32, bfloat16 and float16, on the CPU in inference
    and in training, on CUDA GPUs of compute capability 8.0 and later in inference, and as its plain PyTorch self
    everywhere else; `mnv2_fused.explain` tells which, and why.

    Args:
        inp, oup: channels of input and output.
        stride: 1 or 2.
        expand_ratio: hidden channels over input channels; 1 leaves the expansion out.
        norm_layer: makes a norm from a channel count, ``nn.BatchNorm2d`` by default.
        dilation: of the depthwise convolution.
        tf_padding: pad a strided depthwise convolution as TensorFlow's "SAME" does (see `Conv2dSame`).
        fused: False runs plain PyTorch always.

    Shapes: (n, inp, h, w) to (n, oup, ceil(h / stride), ceil(w / stride)).
    """

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dilation: int = 1,
        tf_padding: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        hidden = round(inp * expand_ratio)
        self.stride = stride
        self.use_res_connect = stride == 1 and inp == oup

        conv_norm_act = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(conv_norm_act(inp, hidden, kernel_size=1))
        conv_layer = Conv2dSame if tf_padding and stride > 1 else nn.Conv2d
        layers += [
            conv_norm_act(hidden, hidden, stride=stride, dilation=dilation, groups=hidden, conv_layer=conv_layer),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            norm_layer(oup),
        ]
        self.conv = nn.Sequential(*layers)
        self.out_channels = oup
        self._is_cn = stride > 1
        if not fused:
            self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_unit(x)

    def _forward_plain(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)

    @torch.jit.unused
    def _current(self, dtype: torch.dtype | None = None) -> tuple[_inspect.BlockSpec, Tensor] | None:
        """What the unit computes, and its packed weights; None where it must run plain."""
        d = self.__dict__
        conv = d["_modules"]["conv"]
        key = (conv, d["use_res_connect"])
        return current(self._cache, key, (conv,), _inspect.read_block, (self,), _packing.pack_block, dtype)

    @staticmethod
    @torch.jit.unused
    def _execute(
        x: Tensor, spec: _inspect.BlockSpec, packed: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """The output, channels_last; None where plain PyTorch has an error to report, or a shape of its own."""
        source = x if dtype is None else x.to(dtype)
        if _inspect.shape_reason(spec, source, dtype) is not None:
            return None
        # A shortcut from an input of another dtype is added as PyTorch adds it.
        residual = spec.residual and source.dtype == x.dtype
        y = _ops.inverted_residual.default(
            source.contiguous(memory_format=_CHANNELS_LAST),
            packed,
            spec.c_hidden,
            spec.c_out,
            spec.kernel,
            spec.stride,
            spec.dilation,
            spec.padding or _inspect.resolve_padding(spec, x.shape[2], x.shape[3]),
            spec.has_expand,
            residual,
            spec.lo,
            spec.hi,
            _inspect.tf32(source),
        )
        return x + y if spec.residual and not residual else y

    @torch.jit.unused
    def _train(self, x: Tensor) -> tuple[Tensor, _inspect.BlockSpec] | None:
        """The output with gradients, channels_last, and the spec; None where it must run plain."""
        spec = _inspect.read_block(self, train=True)
        y = None if isinstance(spec, str) else training.train_block(x, spec, self.recompute)
        return None if y is None else (y, spec)

    @torch.jit.unused
    def _infer_traced(self, x: Tensor) -> tuple[Tensor, _inspect.BlockSpec] | None:
        """`_infer` for graphs."""
        spec, dtype = _inspect.read_block(self), _inspect.autocast_dtype(x)
        source = x if dtype is None else x.to(dtype)
        if isinstance(spec, str) or _inspect.shape_reason(spec, source, dtype) is not None:
            return None
        residual = spec.residual and source.dtype == x.dtype  # as in _execute
        y = _ops.cached_inverted_residual.default(
            source,
            list(spec.tensors),
            self._cache.name,
            list(spec.eps),
            spec.kernel,
            spec.stride,
            spec.dilation,
            list(spec.padding),
            spec.has_expand,
            residual,
            spec.lo,
            spec.hi,
        )
        return x + y if spec.residual and not residual else y, spec


def _run(unit: Stem | InvertedResidual, x: Tensor) -> Tensor | None:
    if not unit.fused:
        return None
    reason = _inspect.traced_call_reason if torch.compiler.is_compiling() else _inspect.call_reason
    return None if reason(x) is not None else unit._fused(x)


def _in_plain_format(x: Tensor, y: Tensor, spec: _inspect.StemSpec | _inspect.BlockSpec) -> Tensor:
    """The channels_last `y` in the memory format that PyTorch's convolutions would have given it."""
    if is_channels_last(x):
        return y
    n, _, h, w = y.shape
    return y if spec.channels_last and n > 0 and h * w > 1 else to_contiguous(y)
