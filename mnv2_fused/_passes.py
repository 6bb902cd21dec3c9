"""The passes over pixels that training is made of, twice: as fused kernels in float32, and as plain PyTorch in float64.

`training` puts them together with the closed form of the batch norms, which is the same for both. A block's weights come
as `BlockWeights`; sums over pixels are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import _C as _C  # loads the operators

_ops = torch.ops.mnv2_fused
_CHANNELS_LAST = torch.channels_last


class BlockShape(NamedTuple):
    """What a block computes besides its weights and the size of its input."""

    c_hidden: int
    c_out: int
    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int, int, int]  # top, left, bottom, right
    has_expand: bool
    lo: float
    hi: float

    def size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for an input (n, c, h, w)."""
        top, left, bottom, right = self.padding
        reach = (self.kernel - 1) * self.dilation + 1
        h, w = x.shape[2], x.shape[3]
        return (h + top + bottom - reach) // self.stride + 1, (w + left + right - reach) // self.stride + 1


class BlockWeights(NamedTuple):
    """Weights of a block in training."""

    expand: Tensor | None  # (c_hidden, c_in), the first batch norm folded in
    expand_bias: Tensor | None  # (c_hidden)
    depthwise: Tensor  # (c_hidden, kernel * kernel)
    project: Tensor  # (c_out, c_hidden)


class Affine(NamedTuple):
    """The second batch norm: scale * z + shift, and the mean of z. (c_hidden) each, float64."""

    scale: Tensor
    shift: Tensor
    mean: Tensor


class Fused:
    """The C++ kernels. Maps are float32, (n, c, h, w) and dense in channels_last order."""

    dtype = torch.float32

    def __init__(self, shape: BlockShape | None = None, weights: BlockWeights | None = None) -> None:
        self.shape, self.weights = shape, weights
        if shape is not None:
            self._ints = [*shape[:5], *shape.padding, int(shape.has_expand)]
            self._bounds = [shape.lo, shape.hi]
            self._packed = _pack(weights.expand, weights.expand_bias, weights.depthwise, weights.project)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the pixels (c), and the sum of products of what is centred by it (c, c)."""
        return _ops.train_moments.default(x)

    def map_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the pixels (c), and the sum of squares of what is centred by it (c)."""
        return _ops.train_map_moments.default(x)

    def map_products(self, a: Tensor, b: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the pixels of a, and of a * (b - mean): (c) each."""
        return _ops.train_map_products.default(a, b, mean.float())

    def map_combine(
        self, a: Tensor, scale: Tensor, shift: Tensor, b: Tensor | None, b_scale: Tensor | None, c: Tensor | None
    ) -> Tensor:
        """scale * a + shift (+ b_scale * b) (+ c), by channel."""
        b_scale = None if b_scale is None else b_scale.float()
        return _ops.train_map_combine.default(a, scale.float(), shift.float(), b, b_scale, c)

    def input_backward(
        self, a: Tensor, x: Tensor, mean: Tensor, matrix: Tensor, vector: Tensor, residual: Tensor | None
    ) -> Tensor:
        """a - (x - mean) matrix - vector (+ residual), pixel by pixel."""
        return _ops.train_input_backward.default(
            a, x, mean.float(), matrix.float().contiguous(), vector.float(), residual
        )

    def windows(self, x: Tensor, kernel: int, stride: int, padding: tuple[int, int, int, int]) -> Tensor:
        """What a dense convolution sees: (n, kernel * kernel * c, h_out, w_out), channel fastest."""
        return _ops.train_windows.default(x, kernel, stride, padding)

    def hidden(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Expand and depthwise: the depthwise outputs in a layout of their own, or an empty tensor; their mean and sum
        of centred squares (c_hidden).
        """
        return _ops.train_hidden.default(x, self._packed, self._ints, self._bounds, keep)

    def project(self, x: Tensor, hidden: Tensor | None, second: Affine) -> Tensor:
        """The projection (n, c_out, h_out, w_out) of the activated second batch norm of `hidden`, of which None is made
        again from x.
        """
        s, w = self.shape, self.weights
        if hidden is not None:
            return _ops.train_project.default(x, hidden, self._packed, _rows(second), self._ints, self._bounds)
        depthwise = w.depthwise * second.scale.float().unsqueeze(1)
        packed = _pack(w.expand, w.expand_bias, depthwise, w.project, second.shift.float())
        return _ops.inverted_residual.default(x, packed, *s[:5], s.padding, s.has_expand, False, s.lo, s.hi)

    def project_backward(
        self, x: Tensor, hidden: Tensor | None, dz: Tensor, project: Tensor, second: Affine, keep: bool, weight: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
        """From the gradient dz of the projection's output and the `project` weights that it comes back through.

        Returns `hidden` and the gradient of the second batch norm's output, None unless kept; the gradient of the
        projection's weights, None unless asked for; sums over the pixels of that gradient, and of it times
        (hidden - mean).
        """
        back = self._back(project)
        made, gradient, dw, of_gradient, of_product = _ops.train_project_backward.default(
            x, hidden, dz, self._packed, back, _rows(second), self._ints, self._bounds, keep, weight
        )
        made = hidden if hidden is not None else made
        return (
            made if keep else None,
            gradient if keep else None,
            dw if weight else None,
            of_gradient,
            of_product,
        )

    def hidden_backward(
        self,
        x: Tensor,
        x_centred: Tensor | None,
        hidden: Tensor | None,
        gradient: Tensor | None,
        dz: Tensor,
        project: Tensor,
        second: Affine,
        backward: tuple[Tensor, Tensor, Tensor],
        wants_input: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """The gradient of the depthwise outputs is backward[0] * gradient + backward[1] * hidden + backward[2].

        Returns that of the expansion's input through the folded weights alone, None unless asked for; that of the
        depthwise weights (c_hidden, kernel * kernel); the sum over the pixels of g x_centred' (c_hidden, c_in), where g is
        the gradient of the first batch norm's output, None without x_centred; the sum of g.
        """
        keep = hidden is not None and gradient is not None
        out, depthwise, expand, of_gradient = _ops.train_hidden_backward.default(
            x,
            x_centred,
            hidden if keep else None,
            gradient if keep else None,
            dz,
            self._packed,
            self._back(project),
            _rows(second),
            torch.stack(backward).float(),
            self._ints,
            self._bounds,
            wants_input,
        )
        return out if wants_input else None, depthwise, None if x_centred is None else expand, of_gradient

    def _back(self, project: Tensor) -> Tensor:
        w = self.weights
        to_input = w.depthwise.new_zeros(w.depthwise.shape[0], 1) if w.expand is None else w.expand
        # Without an expansion the projection back is never read, but has the input's channels.
        if w.expand is None:
            to_input = to_input.expand(-1, w.depthwise.shape[0])
        return _pack(project.t().contiguous(), None, w.depthwise, to_input.t().contiguous())

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor, kernel, stride, padding, lo, hi) -> Tensor:
        """A dense convolution with weight (c_out, c, kernel, kernel) and clamp."""
        packed = _ops.pack_stem.default(weight.contiguous(), bias)
        return _ops.stem.default(x, packed, weight.shape[0], kernel, stride, padding, lo, hi)

    def linear_backward(
        self, x: Tensor, x_centred: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor, lo, hi, wants_input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of clamp(weight x + bias) with weight (c_out, c): the gradient of x, None unless asked for; the sum of
        g x_centred' (c_out, c), where g is the gradient of what was clamped; the sum of g.
        """
        nothing = weight.new_zeros(weight.shape[0], 1)
        packed = _pack(weight, bias, nothing, nothing.t())
        back = _pack(nothing, None, nothing, weight.t().contiguous())
        out, expand, of_gradient = _ops.train_linear_backward.default(
            x, x_centred, gradient, packed, back, [lo, hi], wants_input
        )
        return out if wants_input else None, expand, of_gradient


def _rows(second: Affine) -> Tensor:
    return torch.stack(second).float()


def _pack(
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    project: Tensor,
    depthwise_bias: Tensor | None = None,
) -> Tensor:
    c_hidden, taps = depthwise.shape
    kernel = round(taps**0.5)
    zeros = depthwise.new_zeros(max(c_hidden, project.shape[0]))
    if expand is not None:
        expand = expand.view(*expand.shape, 1, 1)
        expand_bias = zeros[:c_hidden] if expand_bias is None else expand_bias
    return _ops.pack_block.default(
        expand,
        expand_bias,
        depthwise.view(c_hidden, 1, kernel, kernel),
        zeros[:c_hidden] if depthwise_bias is None else depthwise_bias,
        project.reshape(*project.shape, 1, 1),
        zeros[: project.shape[0]],
    )


class Plain:
    """The specification of `Fused`: the same methods in a few lines of PyTorch, in float64."""

    dtype = torch.float64

    def __init__(self, shape: BlockShape | None = None, weights: BlockWeights | None = None) -> None:
        self.shape, self.weights = shape, weights

    def moments(self, x):
        rows = _pixels(x)
        mean = rows.mean(0)
        return mean, (rows - mean).t() @ (rows - mean)

    def map_moments(self, x):
        rows = _pixels(x)
        mean = rows.mean(0)
        return mean, (rows - mean).square().sum(0)

    def map_products(self, a, b, mean):
        return _pixels(a).sum(0), (_pixels(a) * (_pixels(b) - mean)).sum(0)

    def map_combine(self, a, scale, shift, b, b_scale, c):
        out = a * _channels(scale) + _channels(shift)
        out = out if b is None else out + b * _channels(b_scale)
        return out if c is None else out + c

    def input_backward(self, a, x, mean, matrix, vector, residual):
        out = a - _map((_pixels(x) - mean) @ matrix + vector, x)
        return out if residual is None else out + residual

    def windows(self, x, kernel, stride, padding):
        n, c, _, _ = x.shape
        top, left, bottom, right = padding
        x = F.pad(x, (left, right, top, bottom))
        h, w = (x.shape[2] - kernel) // stride + 1, (x.shape[3] - kernel) // stride + 1
        rows = F.unfold(x, kernel, stride=stride).view(n, c, kernel * kernel, h, w)
        return rows.transpose(1, 2).reshape(n, -1, h, w).contiguous(memory_format=_CHANNELS_LAST)

    def hidden(self, x, keep):
        z = self._filter(self._expand(x))
        return z if keep else z.new_empty(0), *self.map_moments(z)

    def project(self, x, hidden, second):
        z = self._filter(self._expand(x)) if hidden is None else hidden
        a = (z * _channels(second.scale) + _channels(second.shift)).clamp(self.shape.lo, self.shape.hi)
        return F.conv2d(a, self.weights.project[:, :, None, None])

    def project_backward(self, x, hidden, dz, project, second, keep, weight):
        z = self._filter(self._expand(x)) if hidden is None else hidden
        u = z * _channels(second.scale) + _channels(second.shift)
        g = torch.where((u > self.shape.lo) & (u < self.shape.hi), _map(_pixels(dz) @ project, dz), 0.0)
        dw = _pixels(dz).t() @ _pixels(u.clamp(self.shape.lo, self.shape.hi)) if weight else None
        return z if keep else None, g if keep else None, dw, *self.map_products(g, z, second.mean)

    def hidden_backward(self, x, x_centred, hidden, gradient, dz, project, second, backward, wants_input):
        s, w = self.shape, self.weights
        if hidden is None or gradient is None:
            hidden, gradient, *_ = self.project_backward(x, None, dz, project, second, True, False)
        a, b, c = map(_channels, backward)
        d = gradient * a + hidden * b + c
        activated = self._expand(x)
        top, left, bottom, right = s.padding
        padded, filters = F.pad(activated, (left, right, top, bottom)), self._filters()
        options = (s.stride, 0, s.dilation, s.c_hidden)
        g = torch.nn.grad.conv2d_input(padded.shape, filters, d, *options)
        g = g[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        depthwise = torch.nn.grad.conv2d_weight(padded, filters.shape, d, *options).view(s.c_hidden, -1)
        if s.has_expand:
            g = torch.where((activated > s.lo) & (activated < s.hi), g, 0.0)
        out = None
        if wants_input:
            out = _map(_pixels(g) @ w.expand, x) if s.has_expand else g
        expand = None if x_centred is None else _pixels(g).t() @ _pixels(x_centred)
        return out, depthwise, expand, _pixels(g).sum(0)

    def _expand(self, x):
        s, w = self.shape, self.weights
        if not s.has_expand:
            return x
        return F.conv2d(x, w.expand[:, :, None, None], w.expand_bias).clamp(s.lo, s.hi)

    def _filters(self):
        return self.weights.depthwise.view(-1, 1, self.shape.kernel, self.shape.kernel)

    def _filter(self, a):
        s = self.shape
        top, left, bottom, right = s.padding
        return F.conv2d(
            F.pad(a, (left, right, top, bottom)), self._filters(), None, s.stride, 0, s.dilation, s.c_hidden
        )

    def dense(self, x, weight, bias, kernel, stride, padding, lo, hi):
        top, left, bottom, right = padding
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride).clamp(lo, hi)

    def linear_backward(self, x, x_centred, gradient, weight, bias, lo, hi, wants_input):
        u = _pixels(x) @ weight.t() + bias
        g = torch.where((u > lo) & (u < hi), _pixels(gradient), 0.0)
        return _map(g @ weight, x) if wants_input else None, g.t() @ _pixels(x_centred), g.sum(0)


def _channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)
