"""The processes of a run: one, or as many as `torchrun` starts. They train the same network on shares of each batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mnv2_fused.trainer.config import TrainError

T = TypeVar("T")


class OtherProcessError(Exception):
    """Another process of the run has stopped with an error of the class `kind`, which it prints itself."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class LostProcessError(TrainError):
    """A process of the run has died without a word to the others."""


def launched() -> bool:
    """Whether `torchrun` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _grouped() -> bool:
    """Whether this process is in PyTorch's default group."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that `torchrun` has started, for the body. Does nothing in a process that it did not start.

    Raises:
        TrainError: the processes do not find one another.
    """
    if not launched() or not dist.is_available() or _grouped():
        yield
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainError(f"the processes of the run cannot be joined: {_first_line(error)}") from error
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # the others may be dead
            dist.destroy_process_group()


def local_count() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _grouped() else 1


class Processes:
    """PyTorch's default group of processes, or this process alone if there is none.

    Every method but the properties must be called by all processes of the group, in the same order. A method that
    raises does so in all of them: the error itself where it arose, `OtherProcessError` elsewhere, `LostProcessError` if
    a process has died.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)

    @property
    def leads(self) -> bool:
        """Whether this process reads the checkpoint and writes all files."""
        return self.rank == 0

    def agree(self, error: Exception | None) -> None:
        """Raises if any process has an error."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        failed = torch.tensor([error is not None], dtype=torch.int32)
        with peers():
            dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed:
            errors = self.gather(None if error is None else (str(error), type(error).__name__))
            first = next(rank for rank, text in enumerate(errors) if text is not None)
            if first == self.rank:
                raise error
            text, kind = errors[first]
            raise OtherProcessError(f"process {first}: {text}", kind) from error

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`, which every process does and which talks to no other process."""
        if self.size == 1:
            return work()
        result = error = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        self.agree(error)
        return result

    def from_lead(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process does for all. It must be possible to pickle it."""
        result = self.together(work if self.leads else lambda: None)
        if self.size == 1:
            return result
        content = [result]
        with peers():
            dist.broadcast_object_list(content)
        return content[0]

    def gather(self, value: T) -> list[T]:
        """The value of each process, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with peers():
            dist.all_gather_object(values, value)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with peers():
            dist.all_reduce(sums)
        return sums.tolist()

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the buffers of the first: without synchronised batch norms each has statistics of its
        own.
        """
        if self.size > 1:
            with peers():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def check_same(self, value: object, what: str) -> None:
        """Raises TrainError in all processes if `value` differs. `what` names it in the message."""
        values = self.gather(value)
        other = next((rank for rank, got in enumerate(values) if got != values[0]), None)
        if other is not None:
            message = f"{what}: process {other} has {values[other]}, process 0 has {values[0]}"
            self.agree(TrainError(message) if self.leads else None)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """What an exchange between processes raises in the body becomes LostProcessError if one of them has died."""
    try:
        yield
    except RuntimeError as error:
        reason = lost(error)
        if reason is None:
            raise
        raise LostProcessError(reason) from error


def lost(error: Exception) -> str | None:
    """What `error` says of a process that has died, if an exchange between processes has raised it; else None."""
    if isinstance(error, LostProcessError):
        return str(error)
    if isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error):
        return f"a process of the run has died ({_first_line(error).split('. ')[0]})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
