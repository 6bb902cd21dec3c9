"""The passes of csrc/train/passes.h with the methods of `reference_passes`: the CPU's, and their C++ specification."""

from __future__ import annotations

import torch
from reference_passes import HiddenGradients, Projection
from torch import Tensor

from mnv2_fused import _C


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _doubles(*sizes: int) -> Tensor:
    return torch.full(sizes, float("nan"), dtype=torch.float64)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


class CpuPasses:
    """In float32."""

    dtype, reference = torch.float32, False

    def __init__(self, shape=None, bounds=(0.0, 6.0), expand=None, expand_norm=None, depthwise=None, project=None):
        self.passes, self.shape, self.bounds = _C.TrainPasses(self.reference), shape, bounds
        self.weights = (
            None if shape is None else (self._dense(expand), expand_norm, self._dense(depthwise), self._dense(project))
        )

    def _dense(self, t):
        return None if t is None else t.to(self.dtype).contiguous()

    def _empty(self, *sizes):
        return torch.full(sizes, float("nan"), dtype=self.dtype)

    def _map(self, x):
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _empty_map(self, *sizes):
        return self._map(self._empty(*sizes))

    def moments(self, x, exact=False):
        x, c = self._map(x), x.shape[1]
        mean, products = _doubles(c), _doubles(c, c)
        self.passes.moments(_at(x), _pixels(x), c, exact, _at(mean), _at(products))
        return mean, products

    def linear_moments(self, weight, mean, products, least=0.0):
        weight, (rows, c) = self._dense(weight), weight.shape
        out = _doubles(rows), _doubles(rows)
        cancels = self.passes.linear_moments(_at(weight), rows, c, _at(mean), _at(products), least, *map(_at, out))
        return *out, cancels

    def norm(self, gamma, beta, mean, squares, count, eps):
        vectors = [None if t is None else t.double().contiguous() for t in (gamma, beta, mean, squares)]
        out = _doubles(6, len(mean))
        self.passes.norm(len(mean), *map(_at, vectors), count, eps, _at(out))
        return out

    def norm_backward(self, norm, sum_dy=None, sum_dy_centred=None, count=1.0):
        out = _doubles(3, norm.shape[1])
        self.passes.norm_backward(norm.shape[1], _at(norm), _at(sum_dy), _at(sum_dy_centred), count, _at(out))
        return torch.cat([norm[:3], out])

    def linear_gradients(self, norm, weight, d_folded, sum_dy, sum_dy_linear, batch):
        weight, d_folded = self._dense(weight), self._dense(d_folded)
        rows, c = weight.shape
        apart, d_gamma = self._empty(rows, c), _doubles(rows)
        in_place, again = d_folded.clone(), _doubles(rows)
        for folded, d_weight, gamma in ((d_folded, apart, d_gamma), (in_place, in_place, again)):
            found = [0, *map(_at, (folded, sum_dy, sum_dy_linear))]
            self.passes.linear_gradients(_at(weight), rows, c, _at(norm), found, batch, _at(d_weight), _at(gamma))
        assert torch.equal(apart, in_place) and torch.equal(d_gamma, again)
        return apart, d_gamma

    def linear_correction(self, d_weight, d_x, norm, weight, d_gamma, d_beta, products, count, share, x, residual):
        d_weight, weight = self._dense(d_weight), self._dense(weight)
        d_x, x, residual = (None if t is None else self._map(t) for t in (d_x, x, residual))
        self.passes.linear_correction(
            _at(weight), *weight.shape, *map(_at, (norm, d_gamma, d_beta, products)), count, share, _at(d_weight),
            _at(x), _pixels(x), _at(residual), _at(d_x),
        )  # fmt: skip
        return d_weight, d_x

    def map_moments(self, x):
        x, c = self._map(x), x.shape[1]
        mean, squares = _doubles(c), _doubles(c)
        self.passes.map_moments(_at(x), _pixels(x), c, _at(mean), _at(squares))
        return mean, squares

    def map_products(self, dy, x, mean):
        dy, x, c = self._map(dy), self._map(x), x.shape[1]
        sums = _doubles(c), _doubles(c)
        self.passes.map_products(_at(dy), _pixels(dy), c, _at(x), _at(mean), *map(_at, sums))
        return sums

    def map_combine(self, a, scale, shift, b=None, b_scale=None, c=None):
        a, b, c = (None if t is None else self._map(t) for t in (a, b, c))
        out = torch.full_like(a, float("nan"))
        arguments = _pixels(a), a.shape[1], *map(_at, (scale, shift, b, b_scale, c))
        self.passes.map_combine(_at(a), *arguments, _at(out))
        self.passes.map_combine(_at(a), *arguments, _at(a))  # in place
        assert torch.equal(a, out)
        return out

    def windows(self, x, shape):
        x, h, w = x.to(self.dtype), *shape.size_out(x.shape[2], x.shape[3])
        out = self._empty_map(x.shape[0], shape.kernel**2 * shape.c_in, h, w)
        self.passes.windows(x.shape, shape.fields(), _at(x), x.stride(), _at(out))
        return out

    def add_windows(self, windows, size, shape):
        windows, out = self._map(windows), self._empty_map(*size)
        self.passes.add_windows(size, shape.fields(), _at(windows), _at(out))
        return out

    def dense(self, x, weight, norm, shape, bounds):
        x, weight = x.to(self.dtype), self._dense(weight)
        y = self._empty_map(x.shape[0], shape.c_out, *shape.size_out(x.shape[2], x.shape[3]))
        self.passes.dense(
            x.shape, shape.fields(), bounds, _at(x), x.stride(), _at(weight), _at(norm[0]), _at(norm[1]), _at(y)
        )
        return y

    def linear_backward(self, x, dy, weight, norm, lo, hi, wants_x):
        x, dy, weight = self._map(x), self._map(dy), self._dense(weight)
        rows = weight.shape[0]
        found = (
            torch.full_like(x, float("nan")) if wants_x else None,
            self._empty(*weight.shape),
            _doubles(rows),
            _doubles(rows),
        )
        self.passes.linear_backward(
            x.shape, _at(x), _at(dy), _at(weight), rows, (lo, hi), _at(norm[0]), _at(norm[1]), list(map(_at, found))
        )
        return found

    # Blocks.

    def _set_block(self, x):
        expand, expand_norm, depthwise, project = self.weights
        scale, shift = (None, None) if expand_norm is None else (expand_norm[0], expand_norm[1])
        size = self.passes.set_block(
            x.shape, self.shape.fields(), self.bounds, *map(_at, (expand, scale, shift, depthwise, project))
        )
        return self._map(x), size

    def hidden(self, x, store):
        x, size = self._set_block(x)
        hidden, found = (
            self._empty(size) if store else None,
            (_doubles(self.shape.c_hidden), _doubles(self.shape.c_hidden)),
        )
        self.passes.hidden(_at(x), _at(hidden), *map(_at, found))
        return hidden, *found

    def project(self, x, hidden, depthwise_norm):
        x, _ = self._set_block(x)
        out = self._empty_map(x.shape[0], self.shape.c_out, *self.shape.size_out(x.shape[2], x.shape[3]))
        self.passes.project(_at(x), _at(hidden), _at(depthwise_norm), self.shape.c_hidden, _at(out))
        return out

    def pack_backward(self, project_norm):
        self.project_scale = None if project_norm is None else project_norm[0].contiguous()

    def _projection(self, wants):
        s = self.shape
        d_weight = self._empty(s.c_out, s.c_hidden) if wants else None
        return Projection(d_weight, _doubles(s.c_hidden), _doubles(s.c_hidden))

    def project_backward(self, x, hidden, d_project, depthwise_norm, store, wants_project):
        x, size = self._set_block(x)
        self.passes.set_backward(_at(self.project_scale))
        saved, found, d_project = hidden is not None, self._projection(wants_project), self._map(d_project)
        if not saved and store:
            hidden = self._empty(size)
        d_hidden = self._empty(size) if store else None
        self.passes.project_backward(
            _at(x), _at(hidden), saved, _at(d_hidden), _at(d_project), _at(depthwise_norm), self.shape.c_hidden,
            list(map(_at, found)),
        )  # fmt: skip
        return hidden if store else None, d_hidden, found

    def hidden_backward(
        self, x, hidden, d_hidden, d_project, rows, wants_x, wants_expand, with_projection=False, wants_project=False
    ):
        x, _ = self._set_block(x)
        self.passes.set_backward(_at(self.project_scale))
        s, d_project = self.shape, self._map(d_project)
        d_x = torch.full_like(x, float("nan")) if wants_x else None
        d_depthwise = self._empty(s.c_hidden, s.kernel**2)
        d_expand = self._empty(s.c_hidden, s.c_in) if wants_expand else None
        sums = _doubles(s.c_hidden), _doubles(s.c_hidden)
        projection = self._projection(wants_project)
        self.passes.hidden_backward(
            *map(_at, (x, hidden, d_hidden, d_project, rows, rows[3:])), s.c_hidden, _at(d_depthwise),
            list(map(_at, (d_x, d_expand, *sums))), with_projection, list(map(_at, projection)),
        )  # fmt: skip
        return HiddenGradients(d_x, d_depthwise, d_expand, *sums, projection if with_projection else None)


class SpecifiedPasses(CpuPasses):
    """Their specification in C++, in float64."""

    dtype, reference = torch.float64, True
