"""The rows in which training holds a batch norm. Plain integers, because indexing with an enumeration takes longer."""

from __future__ import annotations


class BatchNorm:
    """Rows of a batch norm with known statistics, a float64 tensor (6, c): output = scale * input + shift."""

    SCALE = 0  # gamma * rstd
    SHIFT = 1  # beta - mean * scale
    MEAN = 2
    UNBIASED = 3  # variance, for running statistics
    RSTD = 4  # 1 / sqrt(variance + eps)
    BETA = 5

    ROWS = 6
    CENTRED = slice(SCALE, None, BETA - SCALE)  # scale and shift behind a linear map whose input is centred


class BatchNormBackward:
    """Rows of a batch norm's backward, a float64 tensor (6, c).

    d_input = D_OUTPUT * d_output + INPUT * input + CONSTANT. The first three rows are those of the norm.
    """

    SCALE = BatchNorm.SCALE
    SHIFT = BatchNorm.SHIFT
    MEAN = BatchNorm.MEAN
    D_OUTPUT = 3
    INPUT = 4
    CONSTANT = 5
