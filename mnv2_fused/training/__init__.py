"""Training of fused units.

Operators: `train_block` for an inverted-residual block; `train_dense` for a dense convolution with batch norm and
clamp, as in the stem and the last 1x1 convolution; and their backward. docs/training.md has the mathematics,
csrc/train/ the code.
"""

from __future__ import annotations

from mnv2_fused.training import processes as _processes  # noqa: F401
from mnv2_fused.training import registrations as _registrations  # noqa: F401
from mnv2_fused.training.modules import RECOMPUTE, prepare, train_block, train_dense

__all__ = ["RECOMPUTE", "prepare", "train_block", "train_dense"]
