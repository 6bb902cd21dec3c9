"""Layers that hold parameters and never run fused by themselves: the parts of the fused units."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mnv2_fused._core.geometry import same_padding


class Conv2dSame(nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's "SAME" padding: it follows from the input's size, and an odd pixel goes to the
    bottom and right.

    Takes the arguments of ``nn.Conv2d`` except ``padding_mode``, and has its state-dict keys. The argument ``padding``
    is ignored. If the attribute ``padding`` is later set to another value than zero (segmentation libraries do so),
    that padding is used instead.
    """

    pads_same = True  # while `padding` is (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` (n, in_channels, h, w) to (n, out_channels, ceil(h / stride), ceil(w / stride))."""
        if self.padding != (0, 0):
            return self._conv_forward(input, self.weight, self.bias)
        # One call an axis: each axis has a kernel size, stride and dilation of its own.
        h, w = input.shape[-2], input.shape[-1]
        kh, kw = self.weight.shape[-2], self.weight.shape[-1]
        top, _, bottom, _ = same_padding(h, w, kh, self.stride[0], self.dilation[0])
        _, left, _, right = same_padding(h, w, kw, self.stride[1], self.dilation[1])
        padded = F.pad(input, [left, right, top, bottom])
        return self._conv_forward(padded, self.weight, self.bias)


class Conv2dNormActivation(nn.Sequential):
    """Convolution, norm and activation in a row, with the arguments and the state-dict keys of torchvision's class.

    ``padding=None`` means ``(kernel_size - 1) // 2 * dilation``. ``bias=None`` means a bias only if there is no norm.
    ``conv_layer`` makes the convolution, with the arguments of ``nn.Conv2d``.

    Shapes: (n, in_channels, h, w) to (n, out_channels, h_out, w_out).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
        conv_layer: Callable[..., nn.Module] = nn.Conv2d,
    ) -> None:
        if padding is None:
            if isinstance(kernel_size, int) and isinstance(dilation, int):
                padding = (kernel_size - 1) // 2 * dilation
            else:
                padding = tuple((k - 1) // 2 * d for k, d in zip(_pair(kernel_size), _pair(dilation), strict=True))
        if bias is None:
            bias = norm_layer is None
        layers: list[nn.Module] = [
            conv_layer(
                in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=bias
            )
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer() if inplace is None else activation_layer(inplace=inplace))
        super().__init__(*layers)
        self.out_channels = out_channels


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
