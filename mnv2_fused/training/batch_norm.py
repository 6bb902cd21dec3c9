"""The rows in which training holds a batch norm."""

from __future__ import annotations

from enum import IntEnum


class BatchNorm(IntEnum):
    """Rows of a batch norm with known statistics, a float64 tensor (6, c): output = scale * input + shift."""

    SCALE = 0  # gamma * rstd
    SHIFT = 1  # beta - mean * scale
    MEAN = 2
    UNBIASED = 3  # variance, for running statistics
    RSTD = 4  # 1 / sqrt(variance + eps)
    BETA = 5


class BatchNormBackward(IntEnum):
    """Rows of a batch norm's backward, a float64 tensor (6, c).

    d_input = D_OUTPUT * d_output + INPUT * input + CONSTANT. The first three rows are those of the norm.
    """

    SCALE = 0
    SHIFT = 1
    MEAN = 2
    D_OUTPUT = 3
    INPUT = 4
    CONSTANT = 5


# Scale and shift of the batch norm behind a linear map whose input is centred.
CENTRED = slice(BatchNorm.SCALE, None, BatchNorm.BETA - BatchNorm.SCALE)
