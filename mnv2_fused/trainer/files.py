"""The files of a run, and how they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from mnv2_fused.trainer.config import TrainError

CHECKPOINT, MODEL, LABELS, LOG = "checkpoint.pth", "model.safetensors", "labels.txt", "log.jsonl"


def start(directory: Path, labels: list[str], history: list[dict]) -> None:
    """Writes the labels, and a log of `history` alone. Raises TrainError.

    Other entries of an old log belong to steps that a resumed run takes again.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        (directory / LOG).write_text("".join(map(_line, history)), encoding="utf-8")
    except OSError as error:
        raise TrainError(f"cannot write to {directory}: {error.strerror or error}") from error


def append_to_log(directory: Path, record: dict) -> None:
    """Adds a line to the log. Raises TrainError."""
    try:
        with (directory / LOG).open("a", encoding="utf-8") as log:
            log.write(_line(record))
    except OSError as error:
        raise TrainError(f"cannot write to {directory}: {error.strerror or error}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all, even if the process is killed meanwhile. Raises TrainError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either for a full disk
        temporary.unlink(missing_ok=True)
        raise TrainError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
