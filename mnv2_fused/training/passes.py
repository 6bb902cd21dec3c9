"""The passes over pixels that training is made of, twice: as fused kernels in float32, and as plain PyTorch in float64.

`training` puts them together with the closed form of the batch norms, which is the same for both. Vectors over channels
and sums over pixels are float64.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnv2_fused._core import library as _library
from mnv2_fused._core.geometry import BlockShape, Bounds, DenseShape

_C = _library._C
_ops = torch.ops.mnv2_fused


# A batch norm with known statistics, z -> scale * z + shift, is a float64 tensor (6, c) of these rows.
NORM = SCALE, SHIFT, MEAN, UNBIASED, S, BETA = tuple(range(6))  # S: 1 / sqrt(var + eps)

_READ = (torch.float32, torch.float64)


class Projection(NamedTuple):
    """Sums over the pixels on the way back through a projection. g: the gradient of the second batch norm's output."""

    weight: Tensor | None  # dz' (activated hidden): (c_out, c_hidden); None unless asked for
    of_gradient: Tensor  # g: (c_hidden)
    of_product: Tensor  # g * (hidden - mean): (c_hidden)


class Fused:
    """The C++ kernels. Maps are float32, (n, c, h, w) and dense in channels_last order.

    A block's: `expand`, `depthwise` and `project` are its convolutions' weights; `first` are rows of (c_hidden) that
    begin with scale and shift of the batch norm behind the expansion, `second` with scale, shift and mean of the second
    one.
    """

    dtype = torch.float32

    def __init__(
        self,
        shape: BlockShape | None = None,
        bounds: Bounds = (0.0, 6.0),
        expand: Tensor | None = None,
        first: Tensor | None = None,
        depthwise: Tensor | None = None,
        project: Tensor | None = None,
    ) -> None:
        self.shape = shape
        if shape is not None:
            self._fields, self._bounds = shape._replace(residual=False).fields(), list(bounds)
            self._expand = None if expand is None else _float(expand)
            self._first, self._depthwise, self._project = first, _float(depthwise), _float(project)
            self._packed = self._pack()
            self._packed_backward: Tensor | None = None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the pixels (c), and the sum of products of what is centred by it (c, c)."""
        return _ops.train_moments.default(x)

    def linear_moments(self, weight: Tensor, mean: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sum of centred squares (c_out) of weight (c_out, c) times what has these moments."""
        return _ops.train_linear_moments.default(_float(weight), mean, products)

    def norm(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, squares: Tensor, count: float, eps: float
    ) -> Tensor:
        """A batch norm of `NORM`'s rows, whose input has this mean and sum of centred squares over `count` pixels."""
        tensors = (t if t is None or t.dtype in _READ else t.float() for t in (gamma, beta, mean, squares))
        return _ops.train_norm.default(*tensors, count, eps)

    def norm_backward(
        self, norm: Tensor, of_gradient: Tensor | None = None, of_product: Tensor | None = None, count: float = 1.0
    ) -> Tensor:
        """(6, c): scale, shift and mean of `norm`, then what makes the gradient of its input: [3] * that of the output
        + [4] * input + [5]. of_gradient, of_product: sums over all `count` pixels of the output's gradient, and of that
        times the centred input; None with fixed statistics.
        """
        return _ops.train_norm_backward.default(norm, of_gradient, of_product, count)

    def linear_gradients(
        self, norm: Tensor, weight: Tensor, products: Tensor, of_beta: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor]:
        """Of a linear map with weight (c_out, c) and batch norm, with `batch` its own statistics: the gradient of the
        weight through the folded one alone, and that of gamma. products (c_out, c): sum of the output's gradient times
        the input, centred with `batch`.
        """
        return _ops.train_linear_gradients.default(norm, _float(weight), products, of_beta, batch)

    def linear_correction(
        self,
        dw: Tensor,
        dx: Tensor | None,
        norm: Tensor,
        weight: Tensor,
        of_gamma: Tensor,
        of_beta: Tensor,
        moments: Tensor,
        count: float,
        share: float,
        x: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What statistics of the batch add to the gradients of the weight and of the centred input x, in their place.

        of_gamma, of_beta: over all `count` pixels, of which this process has `share`; moments (c, c): of the input, the
        sum of centred products. residual: added to dx.
        """
        _ops.train_linear_correction.default(
            dw, dx, norm, _float(weight), of_gamma, of_beta, moments, count, share, None if dx is None else x, residual
        )
        return dw, dx

    def map_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the pixels (c), and the sum of squares of what is centred by it (c)."""
        return _ops.train_map_moments.default(x)

    def map_products(self, a: Tensor, b: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the pixels of a, and of a * (b - mean): (c) each."""
        return _ops.train_map_products.default(a, b, mean)

    def map_combine(
        self,
        a: Tensor,
        scale: Tensor,
        shift: Tensor,
        b: Tensor | None = None,
        b_scale: Tensor | None = None,
        c: Tensor | None = None,
        passing: int | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """scale * a + shift (+ b_scale * b) (+ c), by channel. `in_place` of a; with `passing`, one of 2, 3, ..., a map
        that holds until the next use of this number.
        """
        out = a if in_place else None if passing is None else _workspace.map(passing, a.shape)
        return _ops.train_map_combine.default(a, scale, shift, b, b_scale, c, out)

    def windows(self, x: Tensor, shape: DenseShape) -> Tensor:
        """What a dense convolution sees: (n, kernel * kernel * c, h_out, w_out), channel fastest; holds until the next
        use.
        """
        h, w = shape.size_out(x.shape[2], x.shape[3])
        windows = _workspace.map(0, (x.shape[0], shape.kernel**2 * shape.c_in, h, w))
        _ops.train_windows.default(x, shape.fields(), windows)
        return windows

    def hidden(self, x: Tensor, keep: bool, lasting: bool = False) -> tuple[Tensor | None, Tensor, Tensor]:
        """Expand and depthwise: the depthwise outputs in a layout of their own, None unless kept; their mean and sum of
        centred squares (c_hidden). Unless `lasting` they hold until the next use of what is kept.
        """
        size = wide_size(x, self.shape)
        hidden = None if not keep else _ops.train_buffer.default(size) if lasting else _workspace.take(0, size)
        return hidden, *_ops.train_hidden.default(x, self._packed, self._fields, self._bounds, hidden)

    def project(self, x: Tensor, hidden: Tensor | None, second: Tensor) -> Tensor:
        """The projection (n, c_out, h_out, w_out) of the activated second batch norm of `hidden`, of which None is made
        again from x.
        """
        if hidden is not None:
            return _ops.train_project.default(x, hidden, self._packed, second, self._fields, self._bounds)
        packed = self._pack(second=second[:2])
        return _ops.inverted_residual.default(x, packed, self._fields, self._bounds)

    def turn_back(self, project_norm: Tensor | None) -> None:
        """To be called before the two passes that follow. They scale the gradient of the projection's output by
        `project_norm` (rows, c_out), of which it is the first row.
        """
        self._packed_backward = self._pack(third=project_norm, backward=True)

    def project_backward(
        self, x: Tensor, hidden: Tensor | None, dz: Tensor, second: Tensor, keep: bool, wants_project: bool
    ) -> tuple[Tensor | None, Tensor | None, Projection]:
        """From the gradient dz of the projection's output: `hidden` and the gradient of the second batch norm's output,
        None unless kept, and the sums.
        """
        size = wide_size(x, self.shape)
        made = hidden is not None
        if not made and keep:
            hidden = _workspace.take(0, size)
        gradient = _workspace.take(1, size) if keep else None
        dw, of_gradient, of_product = _ops.train_project_backward.default(
            x, hidden, made, gradient, dz, self._packed, self._packed_backward, second, self._fields, self._bounds,
            wants_project,
        )  # fmt: skip
        return hidden if keep else None, gradient, Projection(dw if wants_project else None, of_gradient, of_product)

    def hidden_backward(
        self,
        x: Tensor,
        hidden: Tensor | None,
        gradient: Tensor | None,
        dz: Tensor,
        second: Tensor,
        wants_input: bool,
        wants_expand: bool,
        with_projection: bool = False,
        wants_project: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, Projection | None]:
        """The gradient of the depthwise outputs is second[3] * gradient + second[4] * hidden + second[5], where what is
        None is made again.

        Returns that of the expansion's input through the folded weights alone, None unless asked for; that of the
        depthwise weights (c_hidden, kernel * kernel); the sum over the pixels of g x' (c_hidden, c_in), where g is the
        gradient of the first batch norm's output, None unless asked for; the sum of g; in the same pass, the sums of
        `project_backward`, None unless asked for.
        """
        out, depthwise, expand, of_first, dw, of_gradient, of_product = _ops.train_hidden_backward.default(
            x, hidden, gradient, dz, self._packed, self._packed_backward, second, self._fields, self._bounds,
            wants_input, wants_expand, with_projection, wants_project,
        )  # fmt: skip
        projection = Projection(dw if wants_project else None, of_gradient, of_product) if with_projection else None
        return out if wants_input else None, depthwise, expand if wants_expand else None, of_first, projection

    def _pack(self, second: Tensor | None = None, third: Tensor | None = None, backward: bool = False) -> Tensor:
        return _ops.train_pack.default(
            self._expand, self._first, self._depthwise, second, self._project, third, backward
        )

    def dense(self, x: Tensor, weight: Tensor, norm: Tensor, shape: DenseShape, bounds: Bounds) -> Tensor:
        """A dense convolution with weight (c_out, c, kernel, kernel), its batch norm's scale and shift, clamp."""
        folded = (weight * norm[0].view(-1, 1, 1, 1)).float().contiguous()
        packed = _ops.pack_dense.default(folded, norm[1].float(), torch.float32)
        return _ops.dense.default(x, packed, shape.fields(), list(bounds))

    def linear_backward(
        self, x: Tensor, gradient: Tensor, weight: Tensor, norm: Tensor, lo, hi, wants_input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of clamp(scale * (weight x) + shift) with weight (c_out, c): the gradient of x, None unless asked for; the
        sum of g x' (c_out, c), where g is the gradient of what was clamped; the sum of g.
        """
        weight = _float(weight)[:, :, None, None].contiguous()
        nothing = weight.new_zeros(weight.shape[0], 1, 1, 1)
        packed, packed_backward = (
            _ops.train_pack.default(weight, norm[:2], nothing, None, nothing.view(1, -1, 1, 1), None, backward)
            for backward in (False, True)
        )
        out, expand, of_gradient = _ops.train_linear_backward.default(
            x, gradient, packed, packed_backward, [lo, hi], wants_input
        )
        return out if wants_input else None, expand, of_gradient


def _float(weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight
    return weight.detach().float().contiguous()


def wide_size(x: Tensor, shape: BlockShape) -> int:
    """Elements of a wide map: whole chunks of hidden channels."""
    h, w = shape.size_out(x.shape[2], x.shape[3])
    return -(-shape.c_hidden // _C.CHUNK) * _C.CHUNK * x.shape[0] * h * w


class _Workspace(threading.local):
    """A thread's memory for wide maps, used again by one block after the other: fresh pages would cost more time than
    what is computed into them.
    """

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}

    def take(self, index: int, size: int) -> Tensor:
        memory = self.memory.get(index)
        if memory is None or memory.numel() < size:
            self.memory.pop(index, None)
            memory = self.memory[index] = _ops.train_buffer.default(size)
        return memory[:size]

    def map(self, index: int, size: Sequence[int]) -> Tensor:
        n, c, h, w = size
        return self.take(index, n * c * h * w).view(n, h, w, c).permute(0, 3, 1, 2)


_workspace = _Workspace()


class Plain:
    """The specification of `Fused`: the same methods in a few lines of PyTorch, in float64."""

    dtype = torch.float64

    def __init__(self, shape=None, bounds=(0.0, 6.0), expand=None, first=None, depthwise=None, project=None):
        self.shape = shape
        self.lo, self.hi = bounds
        if shape is not None:
            self.expand, self.bias = (None, None) if expand is None else _fold(expand, first)
            self.depthwise, self.weight = depthwise.detach(), project.detach()

    def moments(self, x):
        rows = _pixels(x)
        mean = rows.mean(0)
        return mean, (rows - mean).t() @ (rows - mean)

    def linear_moments(self, weight, mean, products):
        weight = weight.detach()
        return weight @ mean, ((weight @ products) * weight).sum(1).clamp_min(0)

    def norm(self, gamma, beta, mean, squares, count, eps):
        s = torch.rsqrt(squares / count + eps)
        scale = s if gamma is None else s * gamma.detach()
        beta = torch.zeros_like(scale) if beta is None else beta.detach()
        return torch.stack([scale, beta - mean * scale, mean, squares / (count - 1), s, beta])

    def norm_backward(self, norm, of_gradient=None, of_product=None, count=1.0):
        scale, _, mean, _, s, _ = norm
        if of_gradient is None:
            return torch.stack([*norm[:3], scale, torch.zeros_like(scale), torch.zeros_like(scale)])
        b = scale * s.square() * of_product / -count
        return torch.stack([*norm[:3], scale, b, scale * of_gradient / -count - b * mean])

    def linear_gradients(self, norm, weight, products, of_beta, batch):
        scale, _, mean, _, s, _ = norm
        of_gamma = (products * weight.detach()).sum(1)
        return products * scale.unsqueeze(1), s * (of_gamma if batch else of_gamma - mean * of_beta)

    def linear_correction(self, dw, dx, norm, weight, of_gamma, of_beta, moments, count, share, x, residual):
        scale, _, _, _, s, _ = norm
        weight = weight.detach()
        scaled = weight * (scale * s * of_gamma / count).unsqueeze(1)
        dw = dw - scaled @ (moments * share)
        if dx is None:
            return dw, None
        dx = dx - _map(_pixels(x) @ (weight.t() @ scaled) + (scale * of_beta / count) @ weight, x)
        return dw, dx if residual is None else dx + residual

    def map_moments(self, x):
        rows = _pixels(x)
        mean = rows.mean(0)
        return mean, (rows - mean).square().sum(0)

    def map_products(self, a, b, mean):
        return _pixels(a).sum(0), (_pixels(a) * (_pixels(b) - mean)).sum(0)

    def map_combine(self, a, scale, shift, b=None, b_scale=None, c=None, passing=None, in_place=False):
        out = a * _channels(scale) + _channels(shift)
        out = out if b is None else out + b * _channels(b_scale)
        return out if c is None else out + c

    def windows(self, x, shape):
        n, c, h, w = x.shape
        h, w = shape.size_out(h, w)
        rows = F.unfold(_padded(x, shape.padding), shape.kernel, stride=shape.stride).view(n, c, shape.kernel**2, h, w)
        return rows.transpose(1, 2).reshape(n, -1, h, w).contiguous(memory_format=torch.channels_last)

    def hidden(self, x, keep, lasting=False):
        z = self._filter(self._activated(x)).contiguous(memory_format=torch.channels_last)
        return z if keep else None, *self.map_moments(z)

    def project(self, x, hidden, second):
        z = self._filter(self._activated(x)) if hidden is None else hidden
        a = self.map_combine(z, second[0], second[1]).clamp(self.lo, self.hi)
        return F.conv2d(a, self.weight)

    def turn_back(self, project_norm):
        self.scale = None if project_norm is None else project_norm[0]

    def project_backward(self, x, hidden, dz, second, keep, wants_project):
        z = self._filter(self._activated(x)) if hidden is None else hidden
        u = self.map_combine(z, second[0], second[1])
        scaled = dz if self.scale is None else dz * _channels(self.scale)
        g = torch.where((u > self.lo) & (u < self.hi), _map(_pixels(scaled) @ self.weight.flatten(1), dz), 0.0)
        dw = _pixels(dz).t() @ _pixels(u.clamp(self.lo, self.hi)) if wants_project else None
        return z if keep else None, g if keep else None, Projection(dw, *self.map_products(g, z, second[2]))

    def hidden_backward(
        self, x, hidden, gradient, dz, second, wants_input, wants_expand, with_projection=False, wants_project=False
    ):
        s, projection = self.shape, None
        if gradient is None:
            hidden, gradient, projection = self.project_backward(x, hidden, dz, second, True, wants_project)
        d = self.map_combine(gradient, second[3], second[5], hidden, second[4])
        activated = self._activated(x)
        padded, options = _padded(activated, s.padding), (s.stride, 0, s.dilation, s.c_hidden)
        g = torch.nn.grad.conv2d_input(padded.shape, self.depthwise, d, *options)
        g = g[:, :, s.padding[0] : s.padding[0] + x.shape[2], s.padding[1] : s.padding[1] + x.shape[3]]
        depthwise = torch.nn.grad.conv2d_weight(padded, self.depthwise.shape, d, *options).flatten(1)
        if s.has_expand:
            g = torch.where((activated > self.lo) & (activated < self.hi), g, 0.0)
        out = None
        if wants_input:
            out = _map(_pixels(g) @ self.expand.flatten(1), x) if s.has_expand else g
        expand = _pixels(g).t() @ _pixels(x) if wants_expand else None
        return out, depthwise, expand, _pixels(g).sum(0), projection if with_projection else None

    def _activated(self, x):
        return F.conv2d(x, self.expand, self.bias).clamp(self.lo, self.hi) if self.shape.has_expand else x

    def _filter(self, a):
        s = self.shape
        return F.conv2d(_padded(a, s.padding), self.depthwise, None, s.stride, 0, s.dilation, s.c_hidden)

    def dense(self, x, weight, norm, shape, bounds):
        return F.conv2d(_padded(x, shape.padding), *_fold(weight, norm), shape.stride).clamp(*bounds)

    def linear_backward(self, x, gradient, weight, norm, lo, hi, wants_input):
        folded = weight * norm[0].unsqueeze(1)
        u = _pixels(x) @ folded.t() + norm[1]
        g = torch.where((u > lo) & (u < hi), _pixels(gradient), 0.0)
        return _map(g @ folded, x) if wants_input else None, g.t() @ _pixels(x), g.sum(0)


def _fold(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    return weight.detach() * norm[0].view(-1, 1, 1, 1), norm[1]


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom))


def _channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)
