"""Curves of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from mnv2_fused import extras
from mnv2_fused.trainer.config import TrainError

CURVES = "tensorboard"


class Curves:
    """Writes to the folder `tensorboard` in `directory`.

    Curves that an earlier run drew beyond `step` are hidden: those steps are taken again.

    Raises:
        extras.MissingExtraError: tensorboard is missing.
        TrainError: the folder cannot be written to.
    """

    def __init__(self, directory: Path, step: int) -> None:
        writer = extras.use("torch.utils.tensorboard", "train").SummaryWriter
        self._folder = directory / CURVES
        try:
            self._writer = writer(str(self._folder), purge_step=step + 1)
        except OSError as error:
            raise TrainError(f"cannot write to {self._folder}: {error.strerror or error}") from error

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each curve. Raises TrainError."""
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise TrainError(f"cannot write to {self._folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Writes what is still held back."""
        self._writer.close()
