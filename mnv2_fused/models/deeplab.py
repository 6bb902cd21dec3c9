"""DeepLabv3 on MobileNetV2, and what turns its logits into masks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnv2_fused._core.checks import check_module, check_tensor, what
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.layout import is_channels_last
from mnv2_fused._core.packing import fold_conv_norm
from mnv2_fused._core.read import ConvParts, child_reason, conv_parts, read_dense
from mnv2_fused._core.run import run
from mnv2_fused._core.specs import DenseSpec, unflatten
from mnv2_fused.models.backbone import LAST_BLOCK, Backbone, initialise_head
from mnv2_fused.models.fused import DENSE, Asked, FusedModel, FusedUnit
from mnv2_fused.models.layers import Conv2dNormActivation
from mnv2_fused.models.units import FusedConv2dNormActivation

__all__ = ["RATES", "DeepLabHead", "DeepLabV3", "multiscale"]

RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # dilations of ASPP's 3x3 branches, by output stride
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
AUX_BLOCK = 13  # the last block before the stride, or the dilation, of the last stage
HEAD_EPS = 1e-5
# TensorFlow's batch norm: eps of the backbone, and momentum everywhere.
TF_EPS, TF_MOMENTUM = 1e-3, 3e-4


def _pack_map_part(tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Packs the input channels of a `PooledProjection` that come from maps, without a bias."""
    (conv,) = unflatten(tensors, eps)
    weight, _ = fold_conv_norm(conv)
    weight = weight[:, weight.shape[0] :].contiguous()
    return torch.ops.mnv2_fused.pack_dense.default(weight, weight.new_zeros(len(weight)), dtype)


class PooledProjection(FusedUnit, Conv2dNormActivation):
    """1x1, BN, ReLU of a concatenation whose first part is the same at every pixel, and as wide as the output.

    Shapes: (n, c_out + c, h, w) to (n, c_out, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__(in_channels, out_channels, 1, norm_layer=norm_layer)

    def forward(self, pooled: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Takes ``pooled`` (n, c_out, 1, 1) and ``maps`` (n, c_i, h, w), whose channels add up to c."""
        if not self.fused or self._reason() is not None:
            spread = pooled.expand(-1, -1, *maps[0].shape[-2:])
            return nn.Sequential.forward(self, torch.cat([spread, *maps], 1))
        x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        conv, norm, activation = self
        at_pooled, at_maps = conv.weight.split([pooled.shape[1], x.shape[1]], dim=1)
        share = F.conv2d(pooled, at_pooled, conv.bias)
        if not norm.training and not torch.compiler.is_compiling():
            y = run(PROJECTION, self, x, inside=True, more=(norm(share)[:, :, 0, 0].float().contiguous(),))
            if y is not None:
                return y
        return activation(norm(F.conv2d(x, at_maps) + share))

    def _reason(self) -> str | None:
        """Why the concatenation has to exist; None if the convolution may be computed in two parts."""
        if len(self) != 3:
            return f"it has {len(self)} children, not convolution, norm and activation"
        conv = self[0]
        if (
            type(conv) is not nn.Conv2d
            or conv.groups != 1
            or any(size != (1, 1) for size in (conv.kernel_size, conv.stride))
        ):
            return "0 is not a dense 1x1 convolution"
        if conv.padding != (0, 0):
            return "0 is padded"
        return child_reason(conv, "0") or child_reason(self[1], "1")  # forward calls the norm for the pooled part alone

    def _read(self, train: bool) -> DenseSpec | str:
        parts = self._reason() or conv_parts(list(self), ("0", "1", "2"), "it")
        spec = parts if isinstance(parts, str) else read_dense(parts, train)
        if isinstance(spec, str):
            return spec
        return spec._replace(shape=spec.shape._replace(c_in=spec.shape.c_in - spec.shape.c_out))

    def _asked(self) -> list[Asked]:
        return [Asked("", PROJECTION, self)]


PROJECTION = Unit(
    DENSE.operator._replace(pack=_pack_map_part), PooledProjection._read, lambda module: tuple(module._modules.values())
)
LOGITS = Unit(
    DENSE.operator,
    lambda head, train: read_dense(ConvParts(head.logits, None, None, ("logits", "", "")), train),
    lambda head: (head.logits,),
)


class DeepLabHead(FusedModel):
    """DeepLabv3's head: a pooled branch and 1x1 and dilated 3x3 branches, their projection, and the classes' logits.

    The projection's input channels are ``(pool, aspp0, aspp1, ...)``, in this order. If ``fused``, their concatenation
    never exists: the pooled branch is the same at every pixel, so its share of the projection is a bias an image.

    Args:
        in_channels: channels of the input.
        num_classes: channels of the output.
        rates: dilations of the 3x3 branches; none by default.
        channels: channels of each branch and of the projection.
        dropout: probability of the dropout before the last convolution.
        momentum: of the batch norms.

    Shapes: (n, in_channels, h, w) to (n, num_classes, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rates: Sequence[int] = (),
        *,
        channels: int = 256,
        dropout: float = 0.1,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=HEAD_EPS, momentum=momentum)
        self.pool = Conv2dNormActivation(in_channels, channels, 1, norm_layer=norm)
        self.aspp0 = FusedConv2dNormActivation(in_channels, channels, 1, norm_layer=norm)
        for i, rate in enumerate(rates, start=1):
            branch = FusedConv2dNormActivation(in_channels, channels, 3, dilation=rate, norm_layer=norm)
            self.add_module(f"aspp{i}", branch)
        self.branches = 1 + len(rates)
        self.project = PooledProjection((1 + self.branches) * channels, channels, norm_layer=norm)
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        initialise_head(self)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True))
        maps = [self.get_submodule(f"aspp{i}")(x) for i in range(self.branches)]
        y = self.dropout(self.project(pooled, maps))
        logits = run(LOGITS, self, y, inside=True)
        return self.logits(y) if logits is None else logits

    def needs_several_images(self) -> bool:
        """Whether the pooled branch is normalised with the statistics of the batch."""
        norm = self.pool[1]
        return norm.training and isinstance(norm, nn.BatchNorm2d)

    def _asked(self) -> list[Asked]:
        return [Asked("logits", LOGITS, self)]

    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(LOGITS, self)]


class DeepLabV3(FusedModel):
    """DeepLabv3 on MobileNetV2, in torchvision's segmentation convention.

    Args:
        num_classes: channels of the output.
        width_mult, round_nearest: of the backbone; see `MobileNetV2`.
        output_stride: 16 or 8: strides of the backbone beyond it become dilations.
        aspp: add three dilated 3x3 branches to the head: rates 6, 12, 18, or 12, 24, 36 at output stride 8.
        tf: as TensorFlow's networks: its padding in the backbone, eps 1e-3 there, momentum 3e-4 everywhere. False means
            torchvision's padding, eps 1e-5 and momentum 0.1. The head's eps is 1e-5 in both.
        aux_loss: add ``aux_classifier``, an FCN head (3x3 convolution to a quarter of the channels, batch norm, ReLU,
            dropout, 1x1 convolution) on block 13. It runs in training mode only.
        fused: False always runs plain PyTorch. Assigning to ``model.fused`` later switches the whole network.
        eps: of the backbone's batch norms, instead of the value that ``tf`` implies.
        dropout: probability of the dropout before the last convolution.
        recompute: see `MobileNetV2`.

    Shapes: (n, 3, h, w) to ``{"out": (n, num_classes, h, w)}`` in its memory format, and in training mode with
    ``aux_loss`` also ``"aux"`` of the same shape. Logits are resized bilinearly with ``align_corners=True``. Sizes
    16 k + 1 are aligned exactly at every stride.

    Raises:
        ValueError: ``num_classes``, ``output_stride`` or ``recompute`` has another value; an input has another shape or
            no pixels; a batch of one image in training mode, where the pooled branch has one value a channel to
            normalise.
        TypeError: an input is not of a floating-point dtype.
    """

    def __init__(
        self,
        num_classes: int = 21,
        width_mult: float = 1.0,
        round_nearest: int = 8,
        output_stride: int = 16,
        aspp: bool = False,
        tf: bool = False,
        aux_loss: bool = False,
        *,
        fused: bool = True,
        eps: float | None = None,
        dropout: float = 0.1,
        recompute: str = "balanced",
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a whole number from 1, got {num_classes!r}")
        if output_stride not in RATES:
            raise ValueError(f"output_stride should be 8 or 16, got {output_stride}")
        momentum = TF_MOMENTUM if tf else 0.1
        if eps is None:
            eps = TF_EPS if tf else HEAD_EPS
        self.backbone = Backbone(
            {"aux": AUX_BLOCK, "out": LAST_BLOCK} if aux_loss else {"out": LAST_BLOCK},
            width_mult=width_mult,
            round_nearest=round_nearest,
            output_stride=output_stride,
            tf_padding=tf,
            norm_layer=partial(nn.BatchNorm2d, eps=eps, momentum=momentum),
        )
        self.classifier = DeepLabHead(
            self.backbone.channels(LAST_BLOCK),
            num_classes,
            RATES[output_stride] if aspp else (),
            dropout=dropout,
            momentum=momentum,
        )
        self.aux_classifier: nn.Module | None = None
        if aux_loss:
            self.aux_classifier = _fcn_head(self.backbone.channels(AUX_BLOCK), num_classes, momentum)
        if not fused:
            self.fused = False
        if recompute != type(self).recompute:
            self.recompute = recompute

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self._maps(x)
        logits = OrderedDict(out=self.classifier(maps["out"]))
        if self.aux_classifier is not None and self.training:
            logits["aux"] = self.aux_classifier(maps["aux"])
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        for name, each in logits.items():
            logits[name] = _resize(each.contiguous(memory_format=layout), x.shape[-2:])
        return logits

    def low_logits(self, x: Tensor) -> Tensor:
        """The logits before the resize: (n, 3, h, w) to (n, num_classes, about h / 16, about w / 16) at stride 16."""
        return self.classifier(self._maps(x)["out"])

    @torch.no_grad()
    def predict_mask(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The most likely class of every pixel, without the logits at full size in memory.

        Args:
            x: (n, 3, h, w), as for a call.
            size: height and width of the mask; those of ``x`` by default.

        Returns:
            int64 (n, height, width), equal to ``argmax(1)`` of the contiguous logits resized to ``size``.

        Raises:
            ValueError, TypeError: as for a call. ValueError also if ``size`` is no pair of positive whole numbers.
        """
        if size is not None and not _is_size(size):
            raise ValueError(f"predict_mask: size must be a height and a width of at least 1; got {what(size)}")
        logits = self.low_logits(x).contiguous()
        height, width = x.shape[-2:] if size is None else size
        return _resized_argmax(logits, (height, width))

    def _maps(self, x: Tensor) -> OrderedDict[str, Tensor]:
        check_tensor("DeepLabV3", "x", x, (None, self.backbone.features[0][0].in_channels, None, None))
        if x.numel() == 0 and x.shape[0] > 0:
            raise ValueError(f"DeepLabV3: x must have at least one pixel; got {what(x)}")
        if x.shape[0] == 1 and isinstance(self.classifier, DeepLabHead) and self.classifier.needs_several_images():
            raise ValueError(
                "DeepLabV3: x must hold at least 2 images in training mode, because the pooled branch has one value a "
                f"channel and image to normalise; got {what(x)}. model.classifier.pool.eval() keeps its statistics"
            )
        # Between fused units maps are channels_last.
        return self.backbone(x.contiguous(memory_format=torch.channels_last) if self.fused else x)


def _fcn_head(in_channels: int, num_classes: int, momentum: float) -> nn.Sequential:
    """torchvision's FCN head, with its keys."""
    channels = in_channels // 4
    head = nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels, eps=HEAD_EPS, momentum=momentum),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )
    initialise_head(head)
    return head


def _is_size(size: Any) -> bool:
    return isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def _resized_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``_resize(logits, size).argmax(1)``, one class of one image at a time."""
    masks = torch.zeros(logits.shape[0], *size, dtype=torch.int64, device=logits.device)
    for mask, maps in zip(masks, logits, strict=True):
        best = _resize(maps[None, :1], size)
        for k in range(1, maps.shape[0]):
            plane = _resize(maps[None, k : k + 1], size)
            mask.masked_fill_((plane > best)[0, 0], k)
            torch.maximum(best, plane, out=best)
    return masks


@torch.no_grad()
def multiscale(model: nn.Module, x: Tensor, scales: Sequence[float] = SCALES, flip: bool = True) -> Tensor:
    """Class probabilities, averaged over several sizes of the images and over their mirror images.

    Args:
        model: a `DeepLabV3`, or any network that takes (n, 3, h, w) and returns ``{"out": (n, classes, h, w)}``; in
            eval mode.
        x: (n, 3, h, w), as ``model`` takes it.
        scales: each resizes the images, bilinearly, to 16 round(scale (h - 1) / 16) + 1, and their width likewise.
        flip: run the mirror images, too.

    Returns:
        (n, classes, h, w): the mean of the softmax of the logits, resized to h x w.

    Raises:
        TypeError: ``model`` is not a module, or ``x`` not of a floating-point dtype.
        ValueError: ``x`` is not 4-dimensional, or ``scales`` is empty or not positive.
    """
    check_module("multiscale", model)
    check_tensor("multiscale", "x", x, (None, None, None, None))
    if len(scales) == 0 or min(scales) <= 0:
        raise ValueError(f"multiscale: scales must be positive numbers, at least one; got {what(scales)}")
    size = x.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        scaled = tuple(16 * round(scale * (s - 1) / 16) + 1 for s in size)
        resized = x if scaled == tuple(size) else _resize(x, scaled)
        for mirrored in (False, True) if flip else (False,):
            logits = _any_logits(model, resized.flip(-1) if mirrored else resized)
            found = _resize(logits.flip(-1) if mirrored else logits, size).softmax(1)
            total = found if total is None else total.add_(found)
    return total.div_(len(scales) * (2 if flip else 1))


def _any_logits(model: Any, x: Tensor) -> Tensor:
    return model.low_logits(x) if isinstance(model, DeepLabV3) else model(x)["out"]
