"""The files of a run, and how they are written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from mnv2_fused.trainer.config import TrainError

CHECKPOINT, MODEL, LABELS, LOG = "checkpoint.pth", "model.safetensors", "labels.txt", "log.jsonl"


_locks: set[int] = set()  # files whose locks this process holds


class Lock:
    """Keeps other runs out of a directory, which must exist, until `release` or the end of the process.

    The lock is on the directory itself, so nothing is left behind. Raises TrainError.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: int | None = None
        try:
            self._file = os.open(directory, os.O_RDONLY)
            _locks.add(self._file)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if isinstance(error, BlockingIOError):
                raise TrainError(f"another run is writing to {directory}") from None
            raise TrainError(f"cannot lock {directory}: {error.strerror}") from None

    def check(self) -> None:
        """Raises TrainError if the directory is not the locked one any more, but another of its name or none."""
        try:
            same = os.path.samestat(os.fstat(self._file), os.stat(self._directory))
        except OSError:
            same = False
        if not same:
            raise TrainError(f"{self._directory} was removed or replaced while the run was writing to it")

    def release(self) -> None:
        """Lets other runs in."""
        if self._file is not None:
            _locks.discard(self._file)
            os.close(self._file)
            self._file = None

    __del__ = release


def _leave_locks() -> None:
    while _locks:
        os.close(_locks.pop())


# A process that decodes images may outlive a killed run for seconds, and must not hold its lock.
os.register_at_fork(after_in_child=_leave_locks)


def make(directory: Path) -> None:
    """Makes the directory of a run if it does not exist. Raises TrainError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from error


def start(directory: Path, labels: list[str], history: list[dict]) -> None:
    """Writes the labels, and a log of `history` alone. Raises TrainError.

    Other entries of an old log belong to steps that a resumed run takes again.
    """
    write_whole(directory / LABELS, lambda path: path.write_text("".join(f"{label}\n" for label in labels), "utf-8"))
    write_whole(directory / LOG, lambda path: path.write_text("".join(map(_line, history)), "utf-8"))


def append_to_log(directory: Path, record: dict) -> None:
    """Adds a line to the log. Raises TrainError."""
    try:
        with (directory / LOG).open("a", encoding="utf-8") as log:
            log.write(_line(record))
    except OSError as error:
        raise _unwritable(directory, error) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all, even if the process is killed meanwhile. Raises TrainError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TrainError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        ) from error


def _unwritable(directory: Path, error: OSError) -> TrainError:
    return TrainError(f"cannot write to {directory}: {error.strerror or error}")


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
