"""The specification: every fused operator as a few lines of plain PyTorch, for any floating-point dtype and any device.

Weights have batch norm folded in, and must have the dtype and device of x. Padding is (top, left, bottom, right) in
pixels. An activation is a clamp (lo, hi). The functions are differentiable, are not fast, and raise PyTorch's own
errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, padding: Sequence[int], groups: int
) -> Tensor:
    top, left, bottom, right = padding
    if top == bottom and left == right:
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)


def inverted_residual(
    x: Tensor,  # (n, c_in, h, w)
    expand_weight: Tensor | None,  # (c_hidden, c_in, 1, 1)
    expand_bias: Tensor | None,  # (c_hidden)
    depthwise_weight: Tensor,  # (c_hidden, 1, k, k)
    depthwise_bias: Tensor | None,  # (c_hidden)
    project_weight: Tensor,  # (c_out, c_hidden, 1, 1)
    project_bias: Tensor | None,  # (c_out)
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Sequence[int],  # top, left, bottom, right
    residual: bool = False,
    activation: tuple[float, float] = (0.0, 6.0),
    project_activation: tuple[float, float] | None = None,
) -> Tensor:  # (n, c_out, h_out, w_out)
    """1x1 expand, clamp, depthwise, clamp, linear 1x1 project, clamp if there is a `project_activation`, plus x if
    `residual`.

    Without an expansion (`expand_weight` None) the depthwise convolution reads x.
    """
    lo, hi = activation
    y = x
    if expand_weight is not None:
        y = F.conv2d(y, expand_weight, expand_bias).clamp(lo, hi)
    y = _conv(y, depthwise_weight, depthwise_bias, stride, dilation, padding, depthwise_weight.shape[0]).clamp(lo, hi)
    y = F.conv2d(y, project_weight, project_bias)
    if project_activation is not None:
        y = y.clamp(*project_activation)
    return x + y if residual else y


def dense(
    x: Tensor,  # (n, c_in, h, w)
    weight: Tensor,  # (c_out, c_in, k, k)
    bias: Tensor | None,  # (c_out)
    *,
    stride: int = 2,
    padding: Sequence[int],  # top, left, bottom, right
    activation: tuple[float, float] = (0.0, 6.0),
    image_bias: Tensor | None = None,  # (n, c_out)
) -> Tensor:  # (n, c_out, h_out, w_out)
    """Dense convolution and clamp. `image_bias` has a bias for each image, in place of `bias`."""
    if image_bias is None:
        return _conv(x, weight, bias, stride, 1, padding, 1).clamp(*activation)
    return (_conv(x, weight, None, stride, 1, padding, 1) + image_bias[:, :, None, None]).clamp(*activation)


def head(
    x: Tensor,  # (n, c_in, h, w)
    conv_weight: Tensor,  # (c_last, c_in, 1, 1)
    conv_bias: Tensor | None,  # (c_last)
    classifier_weight: Tensor,  # (classes, c_last)
    classifier_bias: Tensor | None,  # (classes)
    *,
    activation: tuple[float, float] = (0.0, 6.0),
) -> Tensor:  # (n, classes)
    """1x1 convolution, clamp, mean over the pixels, linear classifier."""
    y = F.conv2d(x, conv_weight, conv_bias).clamp(*activation).mean((2, 3))
    return F.linear(y, classifier_weight, classifier_bias)
