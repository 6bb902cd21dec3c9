"""The specification of the passes of training: each in a few lines of PyTorch, in the dtype of its arguments.

A batch norm is a tensor (6, c): scale, shift, mean, unbiased variance, rstd, beta. Its backward is one, too: scale,
shift, mean, then a, b and c of d_input = a * d_output + b * input + c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Projection(NamedTuple):
    """Sums in the backward of a projection and of the activation and norm before it."""

    d_weight: Tensor | None
    sum_dy: Tensor
    sum_dy_centred: Tensor


class HiddenGradients(NamedTuple):
    """The backward of a block's depthwise convolution and expansion."""

    d_x: Tensor | None
    d_depthwise_weight: Tensor
    d_expand_weight: Tensor | None
    sum_d_expand: Tensor
    sum_d_expand_linear: Tensor
    projection: Projection | None


_FAR = 8.0  # ratio of beta to gamma above which `linear_gradients` does not use sum_dy_linear


class ReferencePasses:
    """Hidden maps are (n, c_hidden, h_out, w_out)."""

    dtype = torch.float64

    def __init__(self, shape=None, bounds=(0.0, 6.0), expand=None, expand_norm=None, depthwise=None, project=None):
        self.shape = shape
        self.lo, self.hi = bounds
        if shape is not None:
            self.expand, self.bias = (None, None) if expand is None else _fold(expand, expand_norm)
            self.depthwise, self.project_weight = depthwise.detach(), project.detach()

    def moments(self, x, exact=False):
        rows = _pixels(x)
        mean = rows.mean(0)
        return mean, (rows - mean).t() @ (rows - mean)

    def linear_moments(self, weight, mean, products, least=0.0):
        weight = weight.detach()
        return weight @ mean, ((weight @ products) * weight).sum(1).clamp_min(0), False

    def norm(self, gamma, beta, mean, squares, count, eps):
        rstd = torch.rsqrt(squares / count + eps)
        scale = rstd if gamma is None else rstd * gamma.detach()
        beta = torch.zeros_like(scale) if beta is None else beta.detach()
        return torch.stack([scale, beta - mean * scale, mean, squares / (count - 1), rstd, beta])

    def norm_backward(self, norm, sum_dy=None, sum_dy_centred=None, count=1.0):
        scale, shift, mean, _, rstd, _ = norm
        if sum_dy is None:
            zeros = torch.zeros_like(scale)
            return torch.stack([scale, shift, mean, scale, zeros, zeros])
        factor = scale * rstd.square() * sum_dy_centred / -count
        return torch.stack([scale, shift, mean, scale, factor, scale * sum_dy / -count - factor * mean])

    def linear_gradients(self, norm, weight, d_folded, sum_dy, sum_dy_linear, batch):
        scale, _, mean, _, rstd, beta = norm
        product = (d_folded * weight.detach()).sum(1)
        near = beta.abs() * rstd < _FAR * scale.abs()
        product = torch.where(near, sum_dy_linear / scale, product) if batch else product - mean * sum_dy
        return d_folded * scale.unsqueeze(1), rstd * product

    def linear_correction(self, d_weight, d_x, norm, weight, d_gamma, d_beta, products, count, share, x, residual):
        scale, _, _, _, rstd, _ = norm
        weight = weight.detach()
        scaled = weight * (scale * rstd * d_gamma / count).unsqueeze(1)
        d_weight = d_weight - scaled @ (products * share)
        if d_x is None:
            return d_weight, None
        d_x = d_x - _map(_pixels(x) @ (weight.t() @ scaled) + (scale * d_beta / count) @ weight, x)
        return d_weight, d_x if residual is None else d_x + residual

    def map_moments(self, x):
        rows = _pixels(x)
        mean = rows.mean(0)
        return mean, (rows - mean).square().sum(0)

    def map_products(self, dy, x, mean):
        return _pixels(dy).sum(0), (_pixels(dy) * (_pixels(x) - mean)).sum(0)

    def map_combine(self, a, scale, shift, b=None, b_scale=None, c=None):
        out = a * _channels(scale) + _channels(shift)
        out = out if b is None else out + b * _channels(b_scale)
        return out if c is None else out + c

    def windows(self, x, shape):
        n, c, h, w = x.shape
        h, w = shape.size_out(h, w)
        rows = F.unfold(_padded(x, shape.padding), shape.kernel, stride=shape.stride).view(n, c, shape.kernel**2, h, w)
        return rows.transpose(1, 2).reshape(n, -1, h, w).contiguous(memory_format=torch.channels_last)

    def add_windows(self, windows, size, shape):
        n, c, h, w = size
        (top, left, bottom, right), taps = shape.padding, shape.kernel**2
        columns = windows.reshape(n, taps, c, -1).transpose(1, 2).reshape(n, c * taps, -1)
        x = F.fold(columns, (h + top + bottom, w + left + right), shape.kernel, stride=shape.stride)
        return x[:, :, top : top + h, left : left + w]

    def hidden(self, x, store):
        hidden = self._filter(self._activated(x)).contiguous(memory_format=torch.channels_last)
        return hidden if store else None, *self.map_moments(hidden)

    def project(self, x, hidden, depthwise_norm):
        hidden = self._filter(self._activated(x)) if hidden is None else hidden
        return F.conv2d(self._normalised(hidden, depthwise_norm).clamp(self.lo, self.hi), self.project_weight)

    def pack_backward(self, project_norm):
        self.d_project_scale = None if project_norm is None else project_norm[0]

    def project_backward(self, x, hidden, d_project, depthwise_norm, store, wants_project):
        hidden = self._filter(self._activated(x)) if hidden is None else hidden
        u = self._normalised(hidden, depthwise_norm)
        scaled = d_project if self.d_project_scale is None else d_project * _channels(self.d_project_scale)
        d_activated = _map(_pixels(scaled) @ self.project_weight.flatten(1), d_project)
        d_hidden = torch.where((u > self.lo) & (u < self.hi), d_activated, 0.0)
        d_weight = _pixels(d_project).t() @ _pixels(u.clamp(self.lo, self.hi)) if wants_project else None
        projection = Projection(d_weight, *self.map_products(d_hidden, hidden, depthwise_norm[2]))
        return hidden if store else None, d_hidden if store else None, projection

    def hidden_backward(
        self, x, hidden, d_hidden, d_project, norm_backward, wants_x, wants_expand, with_projection=False,
        wants_project=False,
    ):  # fmt: skip
        s, rows, projection = self.shape, norm_backward, None
        if d_hidden is None:
            hidden, d_hidden, projection = self.project_backward(x, hidden, d_project, rows, True, wants_project)
        d_filtered = self.map_combine(d_hidden, rows[3], rows[5], hidden, rows[4])
        activated = self._activated(x)
        padded, options = _padded(activated, s.padding), (s.stride, 0, s.dilation, s.c_hidden)
        d_expand = torch.nn.grad.conv2d_input(padded.shape, self.depthwise, d_filtered, *options)
        top, left, _, _ = s.padding
        d_expand = d_expand[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        d_depthwise = torch.nn.grad.conv2d_weight(padded, self.depthwise.shape, d_filtered, *options).flatten(1)
        if s.has_expand:
            d_expand = torch.where((activated > self.lo) & (activated < self.hi), d_expand, 0.0)
        d_x = None
        if wants_x:
            d_x = _map(_pixels(d_expand) @ self.expand.flatten(1), x) if s.has_expand else d_expand
        d_expand_weight = _pixels(d_expand).t() @ _pixels(x) if wants_expand else None
        sum_d_expand = _pixels(d_expand).sum(0)
        linear = _pixels(activated) - self.bias if s.has_expand else torch.zeros_like(_pixels(d_expand))
        sum_linear, projection = (_pixels(d_expand) * linear).sum(0), projection if with_projection else None
        return HiddenGradients(d_x, d_depthwise, d_expand_weight, sum_d_expand, sum_linear, projection)

    def _activated(self, x):
        return F.conv2d(x, self.expand, self.bias).clamp(self.lo, self.hi) if self.shape.has_expand else x

    def _filter(self, activated):
        s = self.shape
        return F.conv2d(_padded(activated, s.padding), self.depthwise, None, s.stride, 0, s.dilation, s.c_hidden)

    def _normalised(self, hidden, norm):
        return self.map_combine(hidden, norm[0], norm[1])

    def dense(self, x, weight, norm, shape, bounds):
        return F.conv2d(_padded(x, shape.padding), *_fold(weight, norm), shape.stride).clamp(*bounds)

    def linear_backward(self, x, dy, weight, norm, lo, hi, wants_x):
        scale, shift, *_ = norm
        folded = weight * scale.unsqueeze(1)
        u = _pixels(x) @ folded.t() + shift
        d_clamped = torch.where((u > lo) & (u < hi), _pixels(dy), 0.0)
        d_x = _map(d_clamped @ folded, x) if wants_x else None
        return d_x, d_clamped.t() @ _pixels(x), d_clamped.sum(0), (d_clamped * (u - shift)).sum(0)


def _fold(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its norm: rows that begin with scale and shift."""
    scale, shift, *_ = norm
    return weight.detach() * scale.view(-1, 1, 1, 1), shift


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom))


def _channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _pixels(x: Tensor) -> Tensor:
    """A map as rows of channels: (pixels, c)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of channels as a map of the size of `like`."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)
