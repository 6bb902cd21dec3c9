"""Training runs: a run that is ready to start, its steps and epochs, and how signals stop it."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader

from mnv2_fused import extras, weights
from mnv2_fused.data import datasets, images
from mnv2_fused.tools import measure
from mnv2_fused.trainer import checkpoint, files, signals
from mnv2_fused.trainer.config import Config, TrainError, check, complete, merged, option
from mnv2_fused.trainer.tasks import TASKS, Task
from mnv2_fused.trainer.tasks.classification import Classification


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the checkpoint holds everything up to the last finished step."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    `loss` and `accuracy` (0 to 1; None for tasks that count none) are means over the epoch so far; the memory is the
    process's peak. `record` is the log's new entry if an epoch, or the run, has just ended; else None.
    """

    epoch: int
    step: int
    loss: float
    accuracy: float | None
    images_per_s: float
    peak_memory_bytes: int
    record: dict | None = None


def train(
    config: Config, report: Callable[[Progress], None] = lambda progress: None, data: datasets.Data | None = None
) -> list[dict]:
    """Trains as `config` says, calls `report` after every step, and returns the log's entries.

    Raises the errors of `Trainer` and `Trainer.run`.
    """
    return Trainer(config, data).run(report)


class Trainer:
    """A run that is ready to start: everything is read and checked, nothing is written yet.

    Args:
        config: what to do.
        data: images to use in place of what `config.data` stands for.

    Attributes:
        config: `config` with every default filled in.
        task: what is trained.
        steps: optimizer steps of the whole run.
        new_classifier: whether the layer for the classes is new, because the weights have other classes or none.

    Raises:
        TrainError: options that are out of range or contradict each other or the checkpoint, a checkpoint that does
            not fit, labels outside the range of the classes, an output directory that cannot be used.
        datasets.DataError: as the `load` of the task's data.
        weights.WeightsError: weights to start from that cannot be read or do not fit.
        extras.MissingExtraError: the task needs a package that is missing.
    """

    def __init__(self, config: Config, data: datasets.Data | None = None) -> None:
        given, config = config.data, _with_texts(config)
        self.directory = Path(config.output)
        self.checkpoint = self.directory / files.CHECKPOINT
        check(config)
        saved = start = None
        if config.resume:
            saved = checkpoint.read(self.checkpoint)
            config = merged(config, saved["arguments"])
        elif self.checkpoint.exists():
            raise TrainError(f"{self.checkpoint} exists: --resume goes on from it, another --output starts a new run")
        self.task = task = TASKS[config.task or Classification.name]
        _check_task(config, task)
        for package in task.packages:  # missed only after an epoch, it would cost that epoch
            extras.use(package, task.name)
        if saved is None and config.weights is not None:
            start, config = task.read_start(config)
        if config.freeze_bn and config.weights is None:
            raise TrainError("--freeze-bn needs --weights: a new network has no batch-norm statistics to keep")
        self.config = config = complete(config, task.defaults(config))
        self.convention = task.convention(config)
        self.data = task.load(given, config, self.convention) if data is None else data
        self._check_data(given, saved)
        # At least one batch, which may then be incomplete.
        self.steps_per_epoch = max(1, len(self.data.train) // config.batch)
        self.steps = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = task.build(config, len(self.data.labels), saved["model"] if saved else start)
            self._rng = torch.get_rng_state()  # the state that dropout starts from
        self._frozen: dict[str, nn.Module] = {}  # the batch norms that stay as they are, by name
        self.new_classifier = False
        if start is not None:
            self._fill(start)
        if saved is not None:
            self._frozen = checkpoint.frozen(self.checkpoint, saved, self._norms())
        for norm in self._frozen.values():
            norm.requires_grad_(False)
        self._optimizer = _optimizer(self.model, config)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: self._lr_factor(step),  # a bound method would be asked for its state
        )

        self.step = 0  # all steps taken so far
        self.epoch = 1  # the one that is running
        self._in_epoch = dict(checkpoint.NOTHING_YET)
        self.history: list[dict] = []
        if saved is not None:
            checkpoint.restore(self.checkpoint, saved, self.model, self._optimizer, self._scheduler)
            self._rng = saved["rng"]
            self.step, self.epoch = saved["step"], saved["epoch"]
            self._in_epoch, self.history = saved["in_epoch"], saved["history"]

    def _check_data(self, given: str, saved: dict | None) -> None:
        labels = self.data.labels
        self.task.check(self.data, given, self.config)
        if saved is not None and saved["labels"] != labels:
            raise TrainError(
                f"{given} does not have the classes that {self.checkpoint} was trained on: expected "
                f"{len(saved['labels'])} ({', '.join(saved['labels'][:5])}...), "
                f"got {len(labels)} ({', '.join(labels[:5])}...)"
            )

    def _fill(self, start: dict[str, torch.Tensor]) -> None:
        """Loads the weights to start from, with new layers for what they do not have."""
        start, new = self.task.merge(start, self.model.state_dict())
        self.new_classifier = bool(new)
        weights.fill(self.model, start, self.config.weights)
        # A trained network has other means than 0. One that was never trained has biases of 0.
        trained = {name: norm for name, norm in self._norms().items() if f"{name}.weight" not in new}
        folded = all(not norm.running_mean.any() and norm.bias.any() for norm in trained.values())
        if folded and not self.config.freeze_bn:
            raise TrainError(
                f"{self.config.weights} has no batch-norm statistics (they were folded into the convolutions): "
                "training them needs --freeze-bn"
            )
        if self.config.freeze_bn:
            self._frozen = trained

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> list[dict]:
        """Trains to the end, calls `report` after every step, and returns the log's entries.

        Raises:
            Interrupted: SIGINT or SIGTERM came. The step was finished and the checkpoint written before.
            TrainError: a loss or a weight became NaN or infinite, or a file cannot be written.
            images.ImageError: an image cannot be read. The checkpoint was written before.
        """
        files.start(self.directory, self.data.labels, self.history)
        with (
            measure.threads(self.config.threads),
            torch.random.fork_rng(devices=[]),
            signals.stop_requested() as stopping,
        ):
            torch.set_rng_state(self._rng)
            try:
                while self.epoch <= self.config.epochs and (self.step < self.steps or self._epoch_is_trained()):
                    self._run_epoch(report, stopping)
            except (_Stop, images.ImageError) as reason:
                self._save()
                kept = f"{self.checkpoint} is written, --resume goes on from it"
                if isinstance(reason, images.ImageError):
                    raise images.ImageError(f"{reason}; {kept}") from None
                raise Interrupted(f"interrupted in epoch {self.epoch} after step {self.step}; {kept}") from None
        files.write_whole(self.directory / files.MODEL, self._write_model)
        return self.history

    def _run_epoch(self, report: Callable[[Progress], None], stopping: Callable[[], bool]) -> None:
        config, sums = self.config, self._in_epoch
        self.model.train()
        for norm in self._frozen.values():
            norm.eval()
        begin, seen_before = time.perf_counter(), sums["images"]
        rate = 0.0
        for x, target in self._batches(self.data.train, self._order(), stopping):
            sums["lr"] = self._lr()
            self._optimizer.zero_grad(set_to_none=True)
            loss, correct = self.task.loss(self.model, x, target, config)
            self._check(loss.item(), "loss")
            loss.backward()
            self._optimizer.step()
            self._scheduler.step()
            self.step += 1
            sums["steps"] += 1
            sums["images"] += len(target)
            sums["loss"] += loss.item() * len(target)
            sums["correct"] += correct
            rate = (sums["images"] - seen_before) / (time.perf_counter() - begin)
            report(self._progress(rate))
            if stopping():
                raise _Stop
            if self.step >= self.steps:
                break
        figures = self._validate(stopping) if self._validation_is_due() else {}
        self._check(figures.get("validation_loss") or 0.0, "validation loss")
        now = self._progress(rate)
        record = {"epoch": self.epoch, "step": self.step, "lr": sums["lr"], "train_loss": now.loss}
        if now.accuracy is not None:
            record["train_accuracy"] = now.accuracy
        record |= {name: value for name, value in figures.items() if value is not None}
        record |= {"images_per_s": rate, "peak_memory_bytes": now.peak_memory_bytes}
        self.history.append(record)
        if self._epoch_is_trained():
            self.epoch += 1
            self._in_epoch = dict(checkpoint.NOTHING_YET)
        self._save()
        files.append_to_log(self.directory, record)
        report(dataclasses.replace(now, record=record))

    def _validation_is_due(self) -> bool:
        ends = self.step >= self.steps
        return ends or self.epoch % self.config.evaluate_every == 0

    def _epoch_is_trained(self) -> bool:
        return self._in_epoch["steps"] >= self.steps_per_epoch

    def _order(self) -> list[list[tuple[int, int]]]:
        """The batches of this epoch that are still to come, as keys of the training set."""
        count, batch = len(self.data.train), self.config.batch
        order = random.Random(f"{self.config.seed}/{self.epoch}").sample(range(count), count)
        steps = range(self._in_epoch["steps"], self.steps_per_epoch)
        return [[(index, self.epoch) for index in order[step * batch : (step + 1) * batch]] for step in steps]

    def _batches(
        self, dataset: datasets.Pictures, keys: list, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Any, Any]]:
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=self.config.workers,
            collate_fn=functools.partial(_collate, self.task.collate),
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
                    raise _Stop from None
                raise
            if batch is None:
                return
            if isinstance(batch, images.ImageError):
                raise images.ImageError(str(batch))  # `batch` itself would keep this frame, and the workers, alive
            yield batch

    @torch.no_grad()
    def _validate(self, stopping: Callable[[], bool]) -> dict[str, float | None]:
        """The task's figures on the held-out images."""
        self.model.eval()
        count, batch = len(self.data.held_out), self.config.batch
        keys = [list(range(start, min(start + batch, count))) for start in range(0, count, batch)]

        def batches() -> Iterator[tuple[Any, Any]]:
            for each in self._batches(self.data.held_out, keys, stopping):
                yield each
                if stopping():
                    raise _Stop

        return self.task.validate(self.model, self.data.held_out, batches())

    def _progress(self, images_per_s: float) -> Progress:
        sums = self._in_epoch
        seen = max(1, sums["images"])
        accuracy = sums["correct"] / seen if self.task.accuracy else None
        return Progress(self.epoch, self.step, sums["loss"] / seen, accuracy, images_per_s, _peak_memory())

    def _norms(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, nn.BatchNorm2d)}

    def _lr_factor(self, step: int) -> float:
        """The learning rate of `step`, as a share of the highest."""
        if self.config.optimizer == "rmsprop":
            return 0.98 ** (step // self.steps_per_epoch)
        warmup = self.config.warmup * self.steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        decay = max(1, self.config.epochs * self.steps_per_epoch - warmup)
        return self.task.decay((step - warmup) / decay)

    def _lr(self) -> float:
        return self._scheduler.get_last_lr()[0]

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            kept = f"the last good checkpoint is {self.checkpoint}"
            raise TrainError(
                f"the {what} became {value} in epoch {self.epoch} after step {self.step}, at a learning rate of "
                f"{self._lr():g}; {kept if self.checkpoint.exists() else 'no checkpoint was written yet'}"
            )

    def _save(self) -> None:
        for key, value in self.model.state_dict().items():
            # The step after a finite loss can still overflow.
            self._check(value.sum().item(), f"sum of {key}")
        content = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "epoch": self.epoch,
            "in_epoch": self._in_epoch,
            "history": self.history,
            "labels": self.data.labels,
            "frozen": list(self._frozen),
            "arguments": dataclasses.asdict(self.config),
            **self._facts(),
        }
        files.write_whole(self.checkpoint, lambda path: torch.save(content, path))

    def _write_model(self, path: Path) -> None:
        # `safetensors.torch.save_file` makes files that only their owner may read.
        path.write_bytes(save(self.model.state_dict(), {key: str(value) for key, value in self._facts().items()}))

    def _facts(self) -> dict[str, object]:
        """What the functions that read weights find beside them."""
        return self.task.facts(self.config, len(self.data.labels))


class _Stop(Exception):
    """A signal asked the run to stop after this step."""


def _collate(collate: Callable[[list[tuple]], tuple], items: list[tuple | images.ImageError]) -> Any:
    for item in items:
        if isinstance(item, images.ImageError):
            return item
    return collate(items)


def _check_task(config: Config, task: Task) -> None:
    """Raises TrainError for an option that the task does not have."""
    for name in task.without:
        if getattr(config, name) is not None:
            raise TrainError(f"{option(name)} is no option of --task {task.name}")


def _with_texts(config: Config) -> Config:
    """`config` with texts for all paths, an absolute one for the data, and the default of `output`."""
    digits = config.data == "digits" and config.task in (None, Classification.name)
    name = config.data if digits else str(Path(config.data).absolute())
    output = os.fspath(config.output or f"runs/{Path(name).name}")
    start = config.weights
    if not isinstance(start, (str, type(None))):
        start = weights.published_name(start) or os.fspath(start)
    return dataclasses.replace(config, data=name, output=output, weights=start)


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = {"lr": config.lr, "momentum": 0.9, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **common)
    # The paper names no epsilon; this is the default of the training script that its authors published.
    return torch.optim.RMSprop(parameters, alpha=0.9, eps=1.0, **common)


def _peak_memory() -> int:
    """The most bytes that this process has held in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
