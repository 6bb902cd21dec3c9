"""The order of the images, and the loader that gives each process its share of every batch."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from mnv2_fused.data import datasets, images
from mnv2_fused.trainer import signals


class Stop(Exception):
    """A signal asked the run to stop after this step."""


def order(count: int, batch: int, seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    """The batches of an epoch over `count` images, as keys of the training set. An incomplete last one is left out,
    unless it is the only one.
    """
    indices = random.Random(f"{seed}/{epoch}").sample(range(count), count)
    return [
        [(index, epoch) for index in indices[first : first + batch]]
        for first in range(0, max(1, count // batch) * batch, batch)
    ]


def share(batch: Sequence, part: int, parts: int) -> Sequence:
    """Part `part` of a batch that is cut into `parts`; their sizes differ by at most one."""
    return batch[part * len(batch) // parts : (part + 1) * len(batch) // parts]


def load(
    dataset: datasets.Pictures,
    keys: list[list],
    collate: Callable[[list[tuple]], tuple],
    workers: int,
    stopping: Callable[[], bool],
) -> Iterator[tuple[Any, Any]]:
    """The images of each list of keys, collated.

    Raises:
        Stop: a signal has ended a worker.
        images.ImageError: an image cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=functools.partial(_collate, collate),
        worker_init_fn=signals.set_up_worker,
        generator=torch.Generator(),  # without one, it draws a number from dropout's generator
    )
    with signals.blocked():
        iterator = iter(loader)
    while True:
        try:
            batch = next(iterator, None)
        except Exception:  # a signal that ended a worker leads to several kinds
            if stopping():
                raise Stop from None
            raise
        if batch is None:
            return
        if isinstance(batch, images.ImageError):
            raise images.ImageError(str(batch))  # `batch` itself would keep this frame, and the workers, alive
        yield batch


def dead_worker(error: Exception) -> str | None:
    """What `error` says of a loader's worker that has died, if PyTorch raised it for one; else None."""
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
        return None
    return f"a process that decodes images has died ({str(error).splitlines()[0].strip()})"


def _collate(collate: Callable[[list[tuple]], tuple], items: list[tuple | images.ImageError]) -> Any:
    for item in items:
        if isinstance(item, images.ImageError):
            return item
    return collate(items)
