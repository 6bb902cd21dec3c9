"""Curves of a run for TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnv2_fused import extras
from mnv2_fused.trainer.config import TrainError

CURVES = "tensorboard"


class Curves:
    """Writes to the folder `tensorboard` in `directory`. If that fails later, a warning says so and the run goes on.

    Curves that an earlier run drew beyond `step` are hidden: those steps are taken again.

    Raises:
        extras.MissingExtraError: tensorboard is missing.
        TrainError: the folder cannot be written to.
    """

    def __init__(self, directory: Path, step: int) -> None:
        writer = extras.use("torch.utils.tensorboard", "train").SummaryWriter
        self._folder = directory / CURVES
        try:
            self._writer: Any = writer(str(self._folder), purge_step=step + 1)
        except OSError as error:
            raise TrainError(f"cannot write to {self._folder}: {error.strerror or error}") from error

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._try(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))

    def close(self) -> None:
        """Writes what is still held back."""
        self._try(lambda writer: writer.close())

    def _try(self, write: Callable[[Any], object]) -> None:
        try:
            if self._writer is not None:
                write(self._writer)
        except OSError as error:
            self._writer = None
            warnings.warn(f"no more curves: cannot write to {self._folder}: {error.strerror or error}", stacklevel=2)
