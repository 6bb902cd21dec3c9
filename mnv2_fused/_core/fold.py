"""Folds batch norm into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor

from mnv2_fused._core.checks import check_tensor


def fold_bn(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Fold a batch norm with running statistics into the convolution before it, in float64.

    Args:
        weight: the convolution's weight, (c_out, ...), of any floating-point dtype.
        bias: the convolution's bias, (c_out), or None for 0.
        bn_weight: scale of the batch norm, (c_out), or None for 1.
        bn_bias: shift of the batch norm, (c_out), or None for 0.
        running_mean, running_var: (c_out).
        eps: added to the variance.

    Returns:
        Weight, of the shape of ``weight``, and bias, (c_out): float32, contiguous, without gradients.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a vector is not of shape (c_out).
    """
    check_tensor("fold_bn", "weight", weight, None)
    c_out = weight.shape[0]
    vectors = {"bias": bias, "bn_weight": bn_weight, "bn_bias": bn_bias}
    for name, t in {**vectors, "running_mean": running_mean, "running_var": running_var}.items():
        if t is not None or name.startswith("running"):
            check_tensor("fold_bn", name, t, (c_out,))
    with torch.no_grad():
        scale = torch.rsqrt(running_var.double() + eps)
        if bn_weight is not None:
            scale = scale * bn_weight.double()
        offset = -running_mean.double() if bias is None else bias.double() - running_mean.double()
        offset = offset * scale
        if bn_bias is not None:
            offset = offset + bn_bias.double()
        folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        return folded.float().contiguous(), offset.float()


def weight_and_bias(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias as contiguous float32 tensors without gradients; a bias of None becomes zeros."""
    weight = weight.detach().float().contiguous()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float().contiguous()
    return weight, bias
