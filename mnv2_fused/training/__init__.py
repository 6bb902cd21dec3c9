"""Training through fused units: batch-norm statistics and gradients without any expanded tensor kept.

The first convolution of a block is 1x1, so what its batch norm needs follows from moments of the block's input. With
z1 = W x, m = mean of x, S = its covariance over P pixels, s = 1 / sqrt(var + eps), and a hat for what is normalised:

    mean of z1 = W m,  variance of z1 = diag(W S W')

and, with h the gradient of the batch norm's output, A = sum over the pixels of h (x - m)', c = gamma s^2 dgamma / P:

    dbeta = sum h,  dgamma = s rowsum(A * W)
    dW = diag(gamma s) A - diag(c) W (P S)
    dx = h diag(gamma s) W - W' (gamma s dbeta / P) - (x - m) W' diag(c) W

Everything is centred, so no digits are lost where means are large; on a centred input the folded convolution's bias is
beta alone. The second batch norm needs a pass over the depthwise outputs of its own, forward and backward, after which
they are made again or were kept, as `recompute` says:

    most       nothing wide is ever stored; least memory
    balanced   wide tensors of one block at a time, within its forward or its backward; depthwise outputs are kept from
               the forward to the backward where they are few and dear: after a stride, or with many channels
    least      depthwise outputs are kept from the forward to the backward; most speed

With fixed statistics (eval mode) c and the term with dbeta / P vanish, and one pass either way is all there is.

Operators: `train_block`, `train_dense` (a dense convolution, batch norm and clamp: the stem, and the last 1x1) and
their backward. Vectors over channels are float64. With a process group the sums over pixels are those of all its
processes.
"""

from __future__ import annotations

from mnv2_fused.training import registrations as _registrations  # noqa: F401
from mnv2_fused.training.modules import train_block, train_dense, train_reason
from mnv2_fused.training.operators import RECOMPUTE

__all__ = ["RECOMPUTE", "train_block", "train_dense", "train_reason"]
