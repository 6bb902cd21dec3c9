"""MobileNetV2 as torchvision has it, with stem, blocks and head run fused where that gives the same answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnv2_fused._core import inspect as _inspect
from mnv2_fused._core import library as _library
from mnv2_fused._core import packing as _packing
from mnv2_fused._core.layout import is_channels_last, to_contiguous
from mnv2_fused.models.units import Conv2dNormActivation, Conv2dSame, FusedUnit, InvertedResidual, Stem, current
from mnv2_fused.training import operators as training

__all__ = ["MobileNetV2", "mobilenet_v2"]

_C = _library._C
_ops = torch.ops.mnv2_fused

# Expansion, channels, repeats and stride of each stage.
_SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(FusedUnit):
    """MobileNetV2 with torchvision's arguments, state-dict keys, module tree and initialisation.

    Args:
        num_classes: outputs of the classifier.
        width_mult: multiplies the channel counts.
        inverted_residual_setting: (expansion, channels, repeats, stride) of each stage; the paper's by default.
        round_nearest: channel counts become multiples of this.
        block: makes a block, called as ``block(inp, oup, stride, expand_ratio=..., norm_layer=...)``, with
            ``dilation=`` and ``tf_padding=`` added where they are asked for; `InvertedResidual` by default.
        norm_layer: makes a norm from a channel count, ``nn.BatchNorm2d`` by default.
        dropout: probability before the classifier.
        fused: False runs plain PyTorch always. Assigning to ``model.fused`` later switches the whole network.
        output_stride: 32, 16 or 8: strides beyond it become dilations. The first block that loses its stride keeps
            the dilation so far, later ones take the new one.
        tf_padding: pad strided convolutions as TensorFlow's "SAME" does, for weights trained there.
        recompute: what training makes again in order not to keep it: ``"most"`` (least memory), ``"balanced"`` or
            ``"least"`` (most speed). Assigning to ``model.recompute`` later changes the whole network.

    Shapes: (n, 3, h, w) to (n, num_classes).

    Runs fused in float32, bfloat16 and float16: on the CPU in inference and in training, on CUDA GPUs of compute
    capability 8.0 and later in inference. Everything else takes the plain path; `mnv2_fused.explain` tells which unit,
    and why.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        block: Callable[..., nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        dropout: float = 0.2,
        *,
        fused: bool = True,
        output_stride: int = 32,
        tf_padding: bool = False,
        recompute: str = "balanced",
    ) -> None:
        super().__init__()
        if block is None:
            block = InvertedResidual
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if inverted_residual_setting is None:
            inverted_residual_setting = _SETTING
        if len(inverted_residual_setting) == 0 or any(len(row) != 4 for row in inverted_residual_setting):
            raise ValueError(
                "inverted_residual_setting should be non-empty, with 4 elements (expansion, channels, repeats, stride) "
                f"in each row, got {inverted_residual_setting}"
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride should be 8, 16 or 32, got {output_stride}")

        channels = _make_divisible(32 * width_mult, round_nearest)
        self.last_channel = _make_divisible(1280 * max(1.0, width_mult), round_nearest)
        conv_norm_act = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        features: list[nn.Module] = [
            Stem(
                3,
                channels,
                stride=2,
                norm_layer=norm_layer,
                activation_layer=nn.ReLU6,
                conv_layer=Conv2dSame if tf_padding else nn.Conv2d,
            )
        ]
        reached, rate = 2, 1
        for expand_ratio, stage_channels, repeats, stage_stride in inverted_residual_setting:
            out_channels = _make_divisible(stage_channels * width_mult, round_nearest)
            for i in range(repeats):
                stride = stage_stride if i == 0 else 1
                options: dict[str, Any] = {}
                if rate > 1:
                    options["dilation"] = rate
                if stride > 1 and reached >= output_stride:
                    rate *= stride
                    stride = 1
                reached *= stride
                if tf_padding and stride > 1:
                    options["tf_padding"] = True
                features.append(
                    block(channels, out_channels, stride, expand_ratio=expand_ratio, norm_layer=norm_layer, **options)
                )
                channels = out_channels
        features.append(conv_norm_act(channels, self.last_channel, kernel_size=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=dropout), nn.Linear(self.last_channel, num_classes))

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)
        if not fused:
            self.fused = False
        if recompute != type(self).recompute:
            self.recompute = recompute

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "recompute" and value not in training.RECOMPUTE:
            raise ValueError(f"recompute should be one of {', '.join(training.RECOMPUTE)}, got {value!r}")
        super().__setattr__(name, value)
        if name in ("fused", "recompute"):
            for unit in self.modules():
                if unit is not self and isinstance(unit, FusedUnit):
                    setattr(unit, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_network(x)

    def _forward_plain(self, x: Tensor) -> Tensor:
        return self._tail_plain(self.features(x))

    def _tail_plain(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)

    @torch.jit.unused
    def _forward_network(self, x: Tensor) -> Tensor:
        """Stem, blocks and head one after the other, channels_last all the way where they run fused."""
        traced = torch.compiler.is_compiling()
        reason = _inspect.traced_call_reason if traced else _inspect.call_reason
        features = self.features
        if (
            not self.fused
            or reason(x) is not None
            or x.dim() != 4
            or len(features) == 0
            or type(features).forward is not nn.Sequential.forward
            or runs_as_module(features)
        ):
            return self._forward_plain(x)
        if not self.training and not _inspect.training_call(x):
            y = self._network_traced(x) if traced else self._network(x)
            if y is not None:
                return y
        units = list(features)
        keeps_format = is_channels_last(x)
        fusible = True
        for unit in units[:-1]:
            y, run = None, unit
            if fusible and type(unit) in _UNITS and unit.fused and not runs_as_module(unit):
                y, run = unit._fused(x, inside=True), unit._forward_plain
            if y is None:
                # Hooks and plain code see the memory format that they would see in a plain network.
                y = run(x if keeps_format or not fusible else to_contiguous(x))
                fusible = reason(y) is None and y.dim() == 4
            x = y
        if fusible:
            y = None
            if not _inspect.training_call(x):
                y = self._head_traced(x, units[-1]) if traced else self._head(x, units[-1])
            if y is not None:
                return y
            y = self._last_trained(x, units[-1])
            if y is not None:
                return self._tail_plain(y)
            x = x if keeps_format else to_contiguous(x)
        return self._tail_plain(units[-1](x))

    @torch.jit.unused
    def _last_trained(self, x: Tensor, last: nn.Module) -> Tensor | None:
        """The last convolution with gradients; None where it must run plain."""
        if not x.is_cpu or runs_as_module(last):
            return None
        spec = _inspect.read_last(last)
        return None if isinstance(spec, str) else training.train_dense(x, spec)

    @torch.jit.unused
    def _network(self, x: Tensor) -> Tensor | None:
        """All of it in one operator; None where a part of it must run plain, or by itself."""
        key = (self.features, self.classifier)
        reading = self._cache.readings.get(None)
        if (
            x.is_cpu
            and reading is not None
            and reading.key == key
            and not reading.packed.exact
            and not reading.needs_gradients()
            and _inspect.shape_reason(reading.spec.stem, x) is None
        ):
            # Beside other threads' work the check costs no time. Where weights have changed, the result is thrown away.
            _C.check_alongside(reading.guard.same, reading.packed.same)
            try:
                y = _execute_network(x, reading.spec, reading.packed.data)
            finally:
                held = _C.check_held()
            if held:
                return y
        dtype = _inspect.autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        found = current(self._cache, key, key, _read_network, key, _packing.pack_network, dtype)
        if found is None or _inspect.network_reason(found[0], x, dtype) is not None:
            return None
        return _execute_network(x, *found)

    @torch.jit.unused
    def _network_traced(self, x: Tensor) -> Tensor | None:
        """`_network` for graphs."""
        spec, dtype = _read_network(self.features, self.classifier), _inspect.autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        if isinstance(spec, str) or _inspect.network_reason(spec, x, dtype) is not None:
            return None
        return _ops.cached_network.default(
            x,
            list(spec.tensors),
            self._cache.name,
            list(spec.eps),
            spec.stem_sizes,
            spec.block_sizes,
            spec.head_sizes,
            spec.bounds,
        )

    @torch.jit.unused
    def _head(self, x: Tensor, last: nn.Module) -> Tensor | None:
        """Last convolution, pooling and classifier; None where they must run plain."""
        dtype = _inspect.autocast_dtype(x)
        found = self._current_head(last, dtype)
        return None if found is None else self._execute_head(x, *found, dtype)

    @torch.jit.unused
    def _current_head(
        self, last: nn.Module, dtype: torch.dtype | None = None
    ) -> tuple[_inspect.HeadSpec, Tensor] | None:
        key = (last, self.__dict__["_modules"]["classifier"])
        return current(self._cache, key, key, _inspect.read_head, key, _packing.pack_head, dtype)

    @staticmethod
    @torch.jit.unused
    def _execute_head(
        x: Tensor, spec: _inspect.HeadSpec, packed: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        x = x if dtype is None else x.to(dtype)
        if _inspect.shape_reason(spec, x, dtype) is not None:
            return None
        x = x.contiguous(memory_format=torch.channels_last)
        return _ops.head.default(x, packed, spec.c_last, spec.num_classes, spec.lo, spec.hi, _inspect.tf32(x))

    @torch.jit.unused
    def _head_traced(self, x: Tensor, last: nn.Module) -> Tensor | None:
        """`_head` for graphs."""
        spec, dtype = _inspect.read_head(last, self.classifier), _inspect.autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        if isinstance(spec, str) or _inspect.shape_reason(spec, x, dtype) is not None:
            return None
        return _ops.cached_head.default(x, list(spec.tensors), self._cache.name, list(spec.eps), spec.lo, spec.hi)


_UNITS = (Stem, InvertedResidual)


def _execute_network(x: Tensor, spec: _inspect.NetworkSpec, packed: Tensor) -> Tensor:
    return _ops.network.default(
        x, packed, spec.stem_sizes, spec.block_sizes, spec.head_sizes, spec.bounds, _inspect.tf32(x)
    )


def _read_network(features: nn.Module, classifier: nn.Module) -> _inspect.NetworkSpec | str:
    """What the network computes, or the reason why its units have to run one by one."""
    if len(features) < 2:
        return "there is no unit before the head"
    stem, *blocks, last = features
    if type(stem) is not Stem or any(type(block) is not InvertedResidual for block in blocks):
        return "a unit is of another class"
    for unit in (stem, *blocks):
        if not unit.fused or runs_as_module(unit):
            return "a unit is switched off or hooked"
    specs = []
    for read, arguments in (
        (_inspect.read_stem, (stem,)),
        *((_inspect.read_block, (block,)) for block in blocks),
        (_inspect.read_head, (last, classifier)),
    ):
        spec = read(*arguments)
        if isinstance(spec, str):
            return spec
        specs.append(spec)
    return _inspect.join(specs[0], specs[1:-1], specs[-1])


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


def _make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, but at least `divisor` and never below 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def mobilenet_v2(
    *, weights: str | os.PathLike[str] | Any | None = None, progress: bool = True, **kwargs: Any
) -> MobileNetV2:
    """A `MobileNetV2`, with weights if asked for.

    Args:
        weights: a .pth or .safetensors file with torchvision's names, the name of a published checkpoint
            (``"IMAGENET1K_V1"``, ``"IMAGENET1K_V2"``, ``"DEFAULT"``) or torchvision's enumeration member for it.
            The class count, the width and the padding follow from the weights unless given.
        progress: accepted because torchvision takes it.
        **kwargs: arguments of `MobileNetV2`.

    Raises:
        mnv2_fused.weights.WeightsError: the weights cannot be read or do not fit.
        ValueError: ``num_classes`` contradicts the weights.
    """
    if weights is None:
        return MobileNetV2(**kwargs)
    from mnv2_fused import weights as files

    state_dict, convention = files.load_state_dict(weights)
    num_classes = files.num_classes(state_dict)
    if kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ValueError(
            f"mobilenet_v2: num_classes must be that of the weights, {num_classes}; got {kwargs['num_classes']}"
        )
    if not {"width_mult", "inverted_residual_setting", "block"} & kwargs.keys():
        kwargs["width_mult"] = files.width_mult(state_dict)
    kwargs.setdefault("tf_padding", convention.tf_padding)
    model = MobileNetV2(**kwargs)
    files.fill(model, state_dict, str(weights))
    return model
