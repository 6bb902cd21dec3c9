"""`train_block` on the CPU: an inverted-residual block whose hidden channels exist a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape
from mnv2_fused.training.batch_norm import BatchNorm, BatchNormBackward
from mnv2_fused.training.closed_form import (
    Conv,
    Gradients,
    Moments,
    Needs,
    Passes,
    as_map,
    centre,
    finish,
    fixed_norm,
    linear_backward,
    linear_norm,
    no_moments,
    norm_of,
    passes_for,
)
from mnv2_fused.training.passes import HiddenGradients, Projection, Slot
from mnv2_fused.training.processes import join_moments, sum_over_processes

RECOMPUTE = ("most", "balanced", "least")

# Multiply-adds that recomputing a depthwise output must cost for `balanced` to save it until the backward.
_WORTH_SAVING = 128


class Saved(NamedTuple):
    """What the forward saves for the backward besides input and parameters."""

    projected: Tensor  # (n, c_out, h_out, w_out): the projection's output
    hidden: Tensor  # a hidden map, or empty
    mean: Tensor  # moments of the input, see `Moments`
    products: Tensor
    expand_norm: Tensor  # `BatchNorm` rows, or empty without an expansion
    depthwise_norm: Tensor
    project_norm: Tensor
    counts: Tensor  # pixels of all processes: of the input, of the output; or 0


class _Block(NamedTuple):
    """A block in training, as the operators get it."""

    expand: Conv | None
    depthwise: Conv
    project: Conv
    shape: BlockShape
    bounds: Sequence[float]
    group: str
    recompute: str

    @classmethod
    def of(
        cls,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        eps: Sequence[float],
        batch: Sequence[bool],
        block: list[int],
        bounds: Sequence[float],
        group: str,
        recompute: str,
    ) -> _Block:
        """From the operators' flat arguments; parameters: weight, gamma and beta of each convolution."""
        (
            expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
            project_weight, project_gamma, project_beta,
        ) = parameters  # fmt: skip
        expand_eps, depthwise_eps, project_eps = eps
        expand_batch, depthwise_batch, project_batch = batch
        expand = None
        if expand_weight is not None:
            expand = Conv(expand_weight, expand_gamma, expand_beta, expand_eps, expand_batch)
        depthwise = Conv(depthwise_weight, depthwise_gamma, depthwise_beta, depthwise_eps, depthwise_batch)
        project = Conv(project_weight, project_gamma, project_beta, project_eps, project_batch)
        return cls(expand, depthwise, project, BlockShape.of(x.shape[1], block), bounds, group, recompute)

    def passes(self, kind: type[Passes], expand_norm: Tensor | None) -> Passes:
        """Passes over hidden channels. expand_norm: rows that begin with scale and shift."""
        expand = None if self.expand is None else self.expand.weight
        return kind(self.shape, self.bounds, expand, expand_norm, self.depthwise.weight, self.project.weight)

    @property
    def stores_hidden(self) -> bool:
        """Whether hidden maps are in memory between the passes of the forward, and of the backward. Without an
        expansion, recomputing them is faster.
        """
        return self.recompute == "least" or (self.recompute == "balanced" and self.expand is not None)


class _BlockNeeds(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    expand: Needs
    depthwise: Needs
    project: Needs

    @classmethod
    def of(cls, needs: Sequence[bool]) -> _BlockNeeds:
        """From the operator's flat list: x, then weight, gamma and beta of each convolution."""
        x, *flat = needs
        return cls(x, Needs(*flat[:3]), Needs(*flat[3:6]), Needs(*flat[6:]))

    @property
    def before_depthwise_norm(self) -> bool:
        """Whether the backward reaches what comes before the depthwise norm."""
        return self.x or any(self.expand) or self.depthwise.weight

    @property
    def before_project_norm(self) -> bool:
        return self.before_depthwise_norm or self.depthwise.gamma or self.depthwise.beta or self.project.weight


def saves_hidden(recompute: str, depthwise_batch: bool, shape: BlockShape, x: Tensor) -> bool:
    """Whether the depthwise outputs are saved from the forward to the backward. With fixed statistics of the depthwise
    norm they never are: forward and backward are then one pass each.
    """
    costs = x.shape[1] * shape.stride**2 if shape.has_expand else 0
    return depthwise_batch and (recompute == "least" or (recompute == "balanced" and costs >= _WORTH_SAVING))


# ------------------------------------------------------------------------------------------------------------ forward


@torch.library.impl("mnv2_fused::train_block", "CPU")
def _train_block(
    x, expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
    project_weight, project_gamma, project_beta, running, eps, batch, block, bounds, group, recompute, save,
):  # fmt: skip
    parameters = (
        expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
        project_weight, project_gamma, project_beta,
    )  # fmt: skip
    unit = _Block.of(x, parameters, eps, batch, block, bounds, group, recompute)
    y, saved = _forward(unit, x, iter(running), save)
    return y, *saved


def _forward(block: _Block, x: Tensor, running: Iterator[Tensor], save: bool) -> tuple[Tensor, Saved]:
    kind = passes_for(x.dtype)
    source = as_map(x, kind.dtype)
    expand_norm, moments, centred = _expand_norm(kind(), block, source, running)
    original, folded_norm = source, expand_norm
    if centred:
        source, folded_norm = centre(kind(), source, expand_norm, moments, Slot.CENTRED)
    passes = block.passes(kind, folded_norm)

    shape, depthwise, project = block.shape, block.depthwise, block.project
    h, w = shape.size_out(x.shape[2], x.shape[3])
    count_out, pixels_out = 0.0, x.shape[0] * h * w
    hidden, save_hidden = None, save and saves_hidden(block.recompute, depthwise.batch, shape, x)
    if depthwise.batch:
        hidden, mean, squares = passes.hidden(source, block.stores_hidden, save_hidden)
        count_out, mean, squares = join_moments(pixels_out, mean, squares, block.group)
        depthwise_norm = norm_of(passes, depthwise, mean, squares, count_out)
    else:
        depthwise_norm = fixed_norm(passes, depthwise, next(running), next(running))
    projected = passes.project(source, hidden, depthwise_norm)

    if project.batch:
        count_out, mean, squares = join_moments(pixels_out, *passes.map_moments(projected), block.group)
        project_norm = norm_of(passes, project, mean, squares, count_out)
    else:
        project_norm = fixed_norm(passes, project, next(running), next(running))
    scale, shift = project_norm[BatchNorm.SCALE], project_norm[BatchNorm.SHIFT]
    y = passes.map_combine(projected, scale, shift, c=original if shape.residual else None, in_place=not save)
    return y.to(x.dtype), Saved(
        projected.to(x.dtype) if save else x.new_empty(0),
        hidden if save_hidden else source.new_empty(0),
        moments.mean,
        moments.products,
        x.new_empty(0, dtype=torch.float64) if expand_norm is None else expand_norm,
        depthwise_norm,
        project_norm,
        torch.tensor([moments.count, count_out], dtype=torch.float64),
    )


def _expand_norm(
    passes: Passes, block: _Block, x: Tensor, running: Iterator[Tensor]
) -> tuple[Tensor | None, Moments, bool]:
    """The norm behind the expansion, None if there is none; the moments of x if it uses the batch's statistics; and
    whether the forward must centre x.
    """
    expand = block.expand
    if expand is None:
        return None, no_moments(x), False
    if not expand.batch:
        return fixed_norm(passes, expand, next(running), next(running)), no_moments(x), False
    return linear_norm(passes, expand, expand.weight.flatten(1), x, block.group)


# ----------------------------------------------------------------------------------------------------------- backward


@torch.library.impl("mnv2_fused::train_block_backward", "CPU")
def _train_block_backward(
    dy, x, projected, hidden, mean, products, expand_norm, depthwise_norm, project_norm, counts,
    expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
    project_weight, project_gamma, project_beta, eps, batch, block, bounds, group, recompute, needs,
):  # fmt: skip
    parameters = (
        expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
        project_weight, project_gamma, project_beta,
    )  # fmt: skip
    unit = _Block.of(x, parameters, eps, batch, block, bounds, group, recompute)
    saved = Saved(projected, hidden, mean, products, expand_norm, depthwise_norm, project_norm, counts)
    gradients = _backward(unit, dy, x, saved, _BlockNeeds.of(needs))
    return finish(gradients, (x, *parameters), needs)


def _backward(block: _Block, dy: Tensor, x: Tensor, saved: Saved, needs: _BlockNeeds) -> tuple[Tensor | None, ...]:
    """Gradients of x, then of weight, gamma and beta of each convolution; None if they were not computed."""
    kind = passes_for(x.dtype)
    source, dy = as_map(x, kind.dtype), as_map(dy, kind.dtype)
    count_in, count_out = saved.counts.tolist()
    moments = Moments(saved.mean, saved.products, count_in)
    expand_norm = None
    if block.expand is not None:
        expand_norm = saved.expand_norm
        if block.expand.batch:
            source, expand_norm = centre(kind(), source, expand_norm, moments, Slot.CENTRED)
    passes = block.passes(kind, expand_norm)

    d_project, project = _project_norm_backward(passes, block, dy, saved, needs.project, count_out)
    d_x, expand, depthwise = None, Gradients(), Gradients()
    if needs.before_project_norm:
        found, projection = _hidden_backward(passes, block, source, d_project, saved, needs, count_out)
        d_depthwise_weight = None if found is None else found.d_depthwise_weight
        d_depthwise_gamma = saved.depthwise_norm[BatchNorm.RSTD] * projection.sum_dy_centred
        depthwise = Gradients(d_depthwise_weight, d_depthwise_gamma, projection.sum_dy)
        if needs.project.weight:
            d_weight = projection.d_weight
            if not block.project.batch:
                d_weight = d_weight * saved.project_norm[BatchNorm.SCALE].unsqueeze(1)
            project = project._replace(d_weight=d_weight)
        if found is not None:
            d_x, expand = _expand_backward(passes, block, source, dy, found, saved, moments)
    return d_x, *expand, *depthwise, *project


def _project_norm_backward(
    passes: Passes, block: _Block, dy: Tensor, saved: Saved, needs: Needs, count: float
) -> tuple[Tensor, Gradients]:
    """The gradient of the projection's output, and those of gamma and beta of its norm. With fixed statistics the first
    lacks the norm's scale, which is packed into the weights (see `pack_backward`).
    """
    if not (needs.gamma or needs.beta or block.project.batch):
        return dy, Gradients()
    norm = saved.project_norm
    # Only statistics of the batch and gamma need the norm's input. For beta alone any map will do.
    projected = as_map(saved.projected, passes.dtype) if needs.gamma or block.project.batch else dy
    sum_dy, sum_dy_centred = passes.map_products(dy, projected, norm[BatchNorm.MEAN])
    gradients = Gradients(None, norm[BatchNorm.RSTD] * sum_dy_centred, sum_dy)
    if not block.project.batch:
        return dy, gradients
    rows = passes.norm_backward(norm, *sum_over_processes([sum_dy, sum_dy_centred], block.group), count)
    d_project = passes.map_combine(
        dy, rows[BatchNormBackward.D_OUTPUT], rows[BatchNormBackward.CONSTANT],
        projected, rows[BatchNormBackward.INPUT], slot=Slot.D_PROJECT,
    )  # fmt: skip
    return d_project, gradients


def _hidden_backward(
    passes: Passes, block: _Block, x: Tensor, d_project: Tensor, saved: Saved, needs: _BlockNeeds, count: float
) -> tuple[HiddenGradients | None, Projection]:
    """The passes over hidden channels: the backward from the depthwise norm to the input, None if not needed, and the
    projection's sums.

    With the batch's statistics the depthwise norm's backward needs these sums over all pixels first, so there are two
    passes. With fixed statistics there is one.
    """
    hidden = saved.hidden if saved.hidden.numel() > 0 else None
    expand = block.expand
    wants_expand = expand is not None and (expand.batch or needs.expand.weight or needs.expand.gamma)
    wants_project, deeper = needs.project.weight, needs.before_depthwise_norm
    passes.pack_backward(None if block.project.batch else saved.project_norm)
    if deeper and not block.depthwise.batch:
        rows = passes.norm_backward(saved.depthwise_norm)
        found = passes.hidden_backward(x, hidden, None, d_project, rows, needs.x, wants_expand, True, wants_project)
        return found, found.projection
    hidden, d_hidden, projection = passes.project_backward(
        x, hidden, d_project, saved.depthwise_norm, deeper and block.stores_hidden, wants_project
    )
    if not deeper:
        return None, projection
    sums = sum_over_processes([projection.sum_dy, projection.sum_dy_centred], block.group)
    rows = passes.norm_backward(saved.depthwise_norm, *sums, count)
    return passes.hidden_backward(x, hidden, d_hidden, d_project, rows, needs.x, wants_expand), projection


def _expand_backward(
    passes: Passes, block: _Block, x: Tensor, dy: Tensor, found: HiddenGradients, saved: Saved, moments: Moments
) -> tuple[Tensor | None, Gradients]:
    """The closed form of the expansion and its norm, and the shortcut. x is centred if the norm uses the batch's
    statistics.
    """
    shortcut = dy if block.shape.residual else None
    if block.expand is not None:
        return linear_backward(
            passes, block.expand, saved.expand_norm, block.expand.weight.flatten(1), found.d_expand_weight,
            found.sum_d_expand, found.sum_d_expand_linear, found.d_x, x, moments, block.group, shortcut,
        )  # fmt: skip
    d_x = found.d_x
    if d_x is not None and shortcut is not None:
        d_x = d_x.add_(shortcut)
    return d_x, Gradients()
