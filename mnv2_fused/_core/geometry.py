"""The Python twin of csrc/shapes.h: a unit's sizes, apart from its weights and its input's size.

Padding is (top, left, bottom, right) in pixels. None stands for TensorFlow's "SAME", which follows from the input's
size. An activation is given by the bounds (lo, hi) of a clamp: (0, 6) is ReLU6, (0, inf) is ReLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Storage types of activations, by name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = tuple(DTYPES.values())
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_KERNEL = 63

Pads = tuple[int, int, int, int]
Bounds = tuple[float, float]
NO_BOUNDS = (-float("inf"), float("inf"))  # no activation


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to the nearest multiple of `divisor`; at least `divisor`, and never below 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def reach(kernel: int, dilation: int) -> int:
    """Pixels that a dilated kernel spans, not counting its first."""
    return (kernel - 1) * dilation


def same_padding(h: int, w: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int, int, int]:
    """TensorFlow's "SAME" padding (top, left, bottom, right): the odd pixel goes to the bottom and to the right."""
    # TorchScript compiles this, for Conv2dSame.
    vertical = max((-(-h // stride) - 1) * stride + (kernel - 1) * dilation + 1 - h, 0)
    horizontal = max((-(-w // stride) - 1) * stride + (kernel - 1) * dilation + 1 - w, 0)
    return vertical // 2, horizontal // 2, vertical - vertical // 2, horizontal - horizontal // 2


def size_out(h: int, w: int, kernel: int, stride: int, dilation: int, padding: Pads | None) -> tuple[int, int]:
    """Height and width of a convolution's output for an input of h x w."""
    if padding is None:
        return (h + stride - 1) // stride, (w + stride - 1) // stride
    top, left, bottom, right = padding
    span = reach(kernel, dilation) + 1
    return (h + top + bottom - span) // stride + 1, (w + left + right - span) // stride + 1


def _window_fields(padding: Pads | None) -> tuple[int, ...]:
    return (1, 0, 0, 0, 0) if padding is None else (0, *padding)


def _padding_of(same: int, *padding: int) -> Pads | None:
    return None if same else padding


class BlockShape(NamedTuple):
    """An inverted-residual block. Kernel, stride, dilation and padding belong to its depthwise convolution."""

    c_in: int
    c_hidden: int
    c_out: int
    kernel: int
    stride: int
    dilation: int
    padding: Pads | None
    has_expand: bool
    residual: bool

    def fields(self) -> list[int]:
        """The values of `_C.BLOCK_FIELDS`, in their order, as operators take them."""
        _, c_hidden, c_out, kernel, stride, dilation, padding, has_expand, residual = self
        window = _window_fields(padding)
        return [c_hidden, c_out, kernel, stride, dilation, *window, int(has_expand), int(residual)]

    @classmethod
    def of(cls, c_in: int, fields: list[int]) -> BlockShape:
        """The shape whose `fields` these are."""
        c_hidden, c_out, kernel, stride, dilation, *window, has_expand, residual = fields
        return cls(
            c_in, c_hidden, c_out, kernel, stride, dilation, _padding_of(*window), bool(has_expand), bool(residual)
        )

    def size_out(self, h: int, w: int) -> tuple[int, int]:
        return size_out(h, w, self.kernel, self.stride, self.dilation, self.padding)

    def resolved(self, h: int, w: int) -> BlockShape:
        """The same block for inputs of h x w only, with its padding in pixels."""
        if self.padding is not None:
            return self
        return self._replace(padding=same_padding(h, w, self.kernel, self.stride, self.dilation))


class DenseShape(NamedTuple):
    """A dense convolution: the stem, or a pointwise convolution."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    padding: Pads | None

    # For code that takes a block or a dense convolution.
    dilation = 1

    def fields(self) -> list[int]:
        """The values of `_C.DENSE_FIELDS`, in their order, as operators take them."""
        _, c_out, kernel, stride, padding = self
        return [c_out, kernel, stride, *_window_fields(padding)]

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel is made of the input pixel at its place."""
        return self.kernel == self.stride == 1 and not any(self.padding or ())

    @classmethod
    def of(cls, c_in: int, fields: list[int]) -> DenseShape:
        """The shape whose `fields` these are."""
        c_out, kernel, stride, *window = fields
        return cls(c_in, c_out, kernel, stride, _padding_of(*window))

    def size_out(self, h: int, w: int) -> tuple[int, int]:
        return size_out(h, w, self.kernel, self.stride, 1, self.padding)

    def resolved(self, h: int, w: int) -> DenseShape:
        """The same convolution for inputs of h x w only, with its padding in pixels."""
        if self.padding is not None:
            return self
        return self._replace(padding=same_padding(h, w, self.kernel, self.stride))


class HeadShape(NamedTuple):
    """A 1x1 convolution, the mean over the pixels, and a linear classifier."""

    c_in: int
    c_last: int
    classes: int

    def fields(self) -> list[int]:
        """The values of `_C.HEAD_FIELDS`, in their order, as operators take them."""
        return [self.c_last, self.classes]
