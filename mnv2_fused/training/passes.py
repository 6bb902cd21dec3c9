"""The passes over pixels that training is made of, as C++ kernels in float32.

`closed_form`, `block` and `dense` put them together; `reference_passes` specifies them. Maps are (n, c, h, w),
channels_last and dense. Vectors over channels and sums over pixels are float64. A norm is a tensor of `BatchNorm` rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnv2_fused._core import library as _library
from mnv2_fused._core.geometry import NO_BOUNDS, BlockShape, Bounds, DenseShape
from mnv2_fused.training.batch_norm import BatchNorm

_C = _library._C
_ops = torch.ops.mnv2_fused

_VECTORS = (torch.float32, torch.float64)  # dtypes in which kernels read vectors over channels


class Slot:
    """Parts of a thread's workspace. What lies in one holds until its next use."""

    HIDDEN = WINDOWS = 0
    D_HIDDEN = 1
    D_PROJECT = 2
    CENTRED = 3


class Projection(NamedTuple):
    """Sums over pixels in the backward of a projection and of the activation and batch norm before it.

    dy, the gradient of that norm's output, is d_hidden.
    """

    d_weight: Tensor | None  # (c_out, c_hidden): d_project' (activated hidden); None if not asked for
    sum_dy: Tensor  # (c_hidden)
    sum_dy_centred: Tensor  # (c_hidden): of dy * (hidden - mean)


class HiddenGradients(NamedTuple):
    """The backward of a block's depthwise convolution and expansion.

    d_expand is the gradient of the expansion's norm's output.
    """

    d_x: Tensor | None  # through the folded weights alone; None if not asked for
    d_depthwise_weight: Tensor  # (c_hidden, kernel * kernel)
    d_expand_weight: Tensor | None  # (c_hidden, c_in), of the folded weights: sum of d_expand x'; None if not asked for
    sum_d_expand: Tensor  # (c_hidden)
    sum_d_expand_linear: Tensor  # (c_hidden): of d_expand * (folded weights x); 0 without an expansion
    projection: Projection | None  # if computed in the same pass


class FusedPasses:
    """The kernels.

    Passes over hidden channels need a block: its shape, the bounds of its activation and the weights of its
    convolutions. expand_norm: rows (.., c_hidden) that begin with scale and shift of the norm behind the expansion.
    """

    dtype = torch.float32

    def __init__(
        self,
        shape: BlockShape | None = None,
        bounds: Bounds = (0.0, 6.0),
        expand: Tensor | None = None,
        expand_norm: Tensor | None = None,
        depthwise: Tensor | None = None,
        project: Tensor | None = None,
    ) -> None:
        self.shape = shape
        if shape is not None:
            self._fields, self._bounds = shape._replace(residual=False).fields(), list(bounds)
            self._expand = None if expand is None else _float(expand)
            self._expand_norm, self._depthwise, self._project = expand_norm, _float(depthwise), _float(project)
            self._packed = self._pack()
            self._packed_backward: Tensor | None = None

    def moments(self, x: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Mean over pixels (c), and the sum of products of the centred channels (c, c), with products in float64 if
        `exact`.
        """
        return _ops.train_moments.default(x, exact)

    def linear_moments(
        self, weight: Tensor, mean: Tensor, products: Tensor, least: float = 0.0
    ) -> tuple[Tensor, Tensor, bool]:
        """Mean and sum of centred squares (c_out) of weight (c_out, c) times an input with these moments; and whether
        so much cancels in some sum that products must be exact. `least` is what is added to the sums later.
        """
        return _ops.train_linear_moments.default(_float(weight), mean, products, least)

    def norm(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, squares: Tensor, count: float, eps: float
    ) -> Tensor:
        """`BatchNorm` rows for an input with this mean and sum of centred squares over `count` pixels."""
        tensors = (t if t is None or t.dtype in _VECTORS else t.float() for t in (gamma, beta, mean, squares))
        return _ops.train_norm.default(*tensors, count, eps)

    def norm_backward(
        self, norm: Tensor, sum_dy: Tensor | None = None, sum_dy_centred: Tensor | None = None, count: float = 1.0
    ) -> Tensor:
        """`BatchNormBackward` rows.

        sum_dy, sum_dy_centred (c): sums over all `count` pixels of the output's gradient dy, and of dy times the
        centred input. None if the statistics are fixed.
        """
        return _ops.train_norm_backward.default(norm, sum_dy, sum_dy_centred, count)

    def linear_gradients(
        self, norm: Tensor, weight: Tensor, d_folded: Tensor, sum_dy: Tensor, sum_dy_linear: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weight (c_out, c) and gamma of a linear map with batch norm.

        d_folded (c_out, c): sum of dy x', where dy is the gradient of the norm's output. x is centred if the statistics
        are the `batch`'s; the gradient of the weight then lacks `linear_correction`. sum_dy_linear (c_out): sum of dy *
        (scale * weight x).
        """
        return _ops.train_linear_gradients.default(norm, _float(weight), d_folded, sum_dy, sum_dy_linear, batch)

    def linear_correction(
        self,
        d_weight: Tensor,
        d_x: Tensor | None,
        norm: Tensor,
        weight: Tensor,
        d_gamma: Tensor,
        d_beta: Tensor,
        products: Tensor,
        count: float,
        share: float,
        x: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Adds to d_weight and d_x, in place, the terms of the batch's statistics. x is the centred input.

        d_gamma, d_beta: over all `count` pixels; this process has `share` of them. products (c, c): sum of products of
        x. residual: added to d_x.
        """
        _ops.train_linear_correction.default(
            d_weight, d_x, norm, _float(weight), d_gamma, d_beta, products, count, share, None if d_x is None else x,
            residual,
        )  # fmt: skip
        return d_weight, d_x

    def map_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over pixels (c), and the sum of squares of the centred channels (c)."""
        return _ops.train_map_moments.default(x)

    def map_products(self, dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """sum_dy and sum_dy_centred (c): sums over pixels of dy, and of dy * (x - mean)."""
        return _ops.train_map_products.default(dy, x, mean)

    def map_combine(
        self,
        a: Tensor,
        scale: Tensor,
        shift: Tensor,
        b: Tensor | None = None,
        b_scale: Tensor | None = None,
        c: Tensor | None = None,
        slot: int | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """scale * a + shift (+ b_scale * b) (+ c), by channel; in `a` if `in_place`, in a `Slot`, or in a new map."""
        out = a if in_place else None if slot is None else _workspace.map(slot, a.shape)
        return _ops.train_map_combine.default(a, scale, shift, b, b_scale, c, out)

    def windows(self, x: Tensor, shape: DenseShape) -> Tensor:
        """The inputs of each output pixel of a dense convolution, channel fastest: (n, kernel * kernel * c, h_out,
        w_out), in `Slot.WINDOWS`.
        """
        h, w = shape.size_out(x.shape[2], x.shape[3])
        windows = _workspace.map(Slot.WINDOWS, (x.shape[0], shape.kernel**2 * shape.c_in, h, w))
        _ops.train_windows.default(x, shape.fields(), windows)
        return windows

    def hidden(self, x: Tensor, store: bool, save: bool = False) -> tuple[Tensor | None, Tensor, Tensor]:
        """Expansion and depthwise convolution: the depthwise outputs as a hidden map, None unless `store`; their mean
        and sum of centred squares (c_hidden). The map lies in `Slot.HIDDEN`, or in memory of its own with `save`.
        """
        size = hidden_size(x, self.shape)
        hidden = None
        if store:
            hidden = _ops.train_buffer.default(size) if save else _workspace.take(Slot.HIDDEN, size)
        return hidden, *_ops.train_hidden.default(x, self._packed, self._fields, self._bounds, hidden)

    def project(self, x: Tensor, hidden: Tensor | None, depthwise_norm: Tensor) -> Tensor:
        """The projection (n, c_out, h_out, w_out) of `hidden` after norm and activation; recomputes hidden if None."""
        if hidden is not None:
            return _ops.train_project.default(x, hidden, self._packed, depthwise_norm, self._fields, self._bounds)
        packed = self._pack(depthwise_norm=depthwise_norm[: BatchNorm.SHIFT + 1])
        return _ops.inverted_residual.default(x, packed, self._fields, [*self._bounds, *NO_BOUNDS])

    def pack_backward(self, project_norm: Tensor | None) -> None:
        """Packs the weights for the two passes below, which need them. They then scale d_project by `project_norm`'s
        scale, unless it is None.
        """
        self._packed_backward = self._pack(project_norm=project_norm, backward=True)

    def project_backward(
        self,
        x: Tensor,
        hidden: Tensor | None,
        d_project: Tensor,
        depthwise_norm: Tensor,
        store: bool,
        wants_project: bool,
    ) -> tuple[Tensor | None, Tensor | None, Projection]:
        """From the gradient of the projection's output: `hidden`, recomputed if it is None, and the gradient of the
        depthwise norm's output, both None unless `store`; and the sums.
        """
        size = hidden_size(x, self.shape)
        saved = hidden is not None
        if not saved and store:
            hidden = _workspace.take(Slot.HIDDEN, size)
        d_hidden = _workspace.take(Slot.D_HIDDEN, size) if store else None
        d_weight, sum_dy, sum_dy_centred = _ops.train_project_backward.default(
            x, hidden, saved, d_hidden, d_project, self._packed, self._packed_backward, depthwise_norm, self._fields,
            self._bounds, wants_project,
        )  # fmt: skip
        projection = Projection(d_weight if wants_project else None, sum_dy, sum_dy_centred)
        return hidden if store else None, d_hidden, projection

    def hidden_backward(
        self,
        x: Tensor,
        hidden: Tensor | None,
        d_hidden: Tensor | None,
        d_project: Tensor,
        norm_backward: Tensor,
        wants_x: bool,
        wants_expand: bool,
        with_projection: bool = False,
        wants_project: bool = False,
    ) -> HiddenGradients:
        """The backward of depthwise norm, depthwise convolution, the activation before it and expansion.

        norm_backward: `BatchNormBackward` rows of the depthwise norm. Maps that are None are recomputed.
        with_projection: computes the sums of `project_backward` in the same pass.
        """
        d_x, d_depthwise, d_expand, *expand_sums, d_weight, sum_dy, centred = _ops.train_hidden_backward.default(
            x, hidden, d_hidden, d_project, self._packed, self._packed_backward, norm_backward, self._fields,
            self._bounds, wants_x, wants_expand, with_projection, wants_project,
        )  # fmt: skip
        projection = Projection(d_weight if wants_project else None, sum_dy, centred) if with_projection else None
        return HiddenGradients(
            d_x if wants_x else None, d_depthwise, d_expand if wants_expand else None, *expand_sums, projection
        )

    def _pack(
        self, depthwise_norm: Tensor | None = None, project_norm: Tensor | None = None, backward: bool = False
    ) -> Tensor:
        return _ops.train_pack.default(
            self._expand, self._expand_norm, self._depthwise, depthwise_norm, self._project, project_norm, backward
        )

    def dense(self, x: Tensor, weight: Tensor, norm: Tensor, shape: DenseShape, bounds: Bounds) -> Tensor:
        """A dense convolution with weight (c_out, c, kernel, kernel), batch norm and clamp."""
        folded = (weight * norm[BatchNorm.SCALE].view(-1, 1, 1, 1)).float().contiguous()
        packed = _ops.pack_dense.default(folded, norm[BatchNorm.SHIFT].float(), torch.float32)
        return _ops.dense.default(x, packed, shape.fields(), list(bounds))

    def linear_backward(
        self, x: Tensor, dy: Tensor, weight: Tensor, norm: Tensor, lo: float, hi: float, wants_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """The backward of clamp(scale * (weight x) + shift), from dy, the gradient of its output.

        norm: rows that begin with scale and shift. Returns the gradient of x, None unless asked for; that of the folded
        weight (c_out, c); and the sums over pixels of the gradient before the clamp, and of it times scale * (weight x)
        (c_out).
        """
        weight = _float(weight)[:, :, None, None].contiguous()
        nothing = weight.new_zeros(weight.shape[0], 1, 1, 1)
        norm = norm[: BatchNorm.SHIFT + 1]
        packed, packed_backward = (
            _ops.train_pack.default(weight, norm, nothing, None, nothing.view(1, -1, 1, 1), None, backward)
            for backward in (False, True)
        )
        d_x, *found = _ops.train_linear_backward.default(x, dy, packed, packed_backward, [lo, hi], wants_x)
        return d_x if wants_x else None, *found


def _float(weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight
    return weight.detach().float().contiguous()


def hidden_size(x: Tensor, shape: BlockShape) -> int:
    """Elements of a hidden map: whole chunks of hidden channels."""
    h, w = shape.size_out(x.shape[2], x.shape[3])
    return -(-shape.c_hidden // _C.CHUNK) * _C.CHUNK * x.shape[0] * h * w


class _Workspace(threading.local):
    """A thread's memory for maps, by `Slot`. All blocks share it, because faulting in fresh pages costs more time than
    the kernels that write them.
    """

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}

    def take(self, slot: int, size: int) -> Tensor:
        memory = self.memory.get(slot)
        if memory is None or memory.numel() < size:
            self.memory.pop(slot, None)
            memory = self.memory[slot] = _ops.train_buffer.default(size)
        return memory[:size]

    def map(self, slot: int, size: Sequence[int]) -> Tensor:
        n, c, h, w = size
        return self.take(slot, n * c * h * w).view(n, h, w, c).permute(0, 3, 1, 2)


_workspace = _Workspace()
