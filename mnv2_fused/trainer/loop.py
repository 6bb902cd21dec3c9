"""Training runs: a run that is ready to start, its steps and epochs, and how signals stop it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mnv2_fused import extras, weights
from mnv2_fused.data import datasets, images
from mnv2_fused.tools import measure
from mnv2_fused.trainer import batches, checkpoint, files, processes, signals, start
from mnv2_fused.trainer.config import Config, TrainError, complete
from mnv2_fused.trainer.curves import Curves
from mnv2_fused.trainer.processes import OtherProcessError, Processes
from mnv2_fused.trainer.start import Start
from mnv2_fused.trainer.tasks import TASKS
from mnv2_fused.trainer.tasks.base import State
from mnv2_fused.trainer.tasks.classification import Classification
from mnv2_fused.trainer.updates import Updates

_BAD_DATA = (images.ImageError, datasets.DataError)
# Errors after which the weights are those of the last finished step, in all processes.
_BETWEEN_STEPS = {kind.__name__ for kind in (batches.Stop, *_BAD_DATA)}


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the checkpoint holds everything up to the last finished step."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    `loss` and `accuracy` (0 to 1; None for tasks that count none) are means over the epoch so far, in all processes;
    the memory is this process's peak. `record` is the log's new entry if an epoch, or the run, has just ended; else
    None.
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

    If PyTorch's default process group exists, all its processes train together, and each must make a `Trainer` and call
    `run` with the same arguments. The first one reads the checkpoint and writes the files.

    Args:
        config: what to do.
        data: images to use in place of what `config.data` stands for.

    Attributes:
        config: `config` with every default filled in.
        task: what is trained.
        processes: the processes that train.
        model: the network.
        steps: optimizer steps of the whole run.
        new_classifier: whether the layer for the classes is new, because the weights have other classes or none.

    Raises:
        TrainError: options that are out of range or contradict each other or the checkpoint, a checkpoint that does
            not fit, labels outside the range of the classes, an output directory that cannot be used or that another
            run writes to, processes with other data.
        datasets.DataError: as the `load` of the task's data.
        weights.WeightsError: weights to start from that cannot be read or do not fit.
        extras.MissingExtraError: the task or the log needs a package that is missing.
        OtherProcessError: another process raised one of these.
    """

    def __init__(self, config: Config, data: datasets.Data | None = None) -> None:
        self.processes = Processes()
        self._lock: files.Lock | None = None
        self._curves: Curves | None = None
        given = config.data
        try:
            read = self.processes.from_lead(lambda: self._read(config))
            self.processes.together(lambda: self._build(read, given, data))
            self.processes.check_same(_described(self.data), f"--data {given}")
            self._parallel = self._joined()
        except BaseException:
            self._unlock()
            raise

    def _joined(self) -> nn.Module:
        """The network that adds up gradients over the processes."""
        if self.processes.size == 1:
            return self.model
        with processes.peers():
            parallel = DistributedDataParallel(self.model)
        if self.config.sync_bn:  # later than DistributedDataParallel, which refuses such norms on a CPU
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self._frozen = {name: norm for name, norm in self._norms().items() if name in self._frozen}
        return parallel

    def _read(self, config: Config) -> Start:
        config = start.checked(config)
        if config.resume and Path(config.output).is_dir():
            self._lock = files.Lock(Path(config.output))
        return start.read(config, self.processes.size)

    def _build(self, read: Start, given: str, data: datasets.Data | None) -> None:
        """Everything of a run that each process makes for itself."""
        config, saved, initial = read
        self.directory = Path(config.output)
        self.checkpoint = self.directory / files.CHECKPOINT
        self.task = task = TASKS[config.task or Classification.name]
        for package in task.packages:  # missed only after an epoch, it would cost that epoch
            extras.use(package, task.name)
        if config.log is not None:
            extras.use(config.log, "train")
        self.config = config = complete(config, task.defaults(config), processes.local_count())
        self.convention = task.convention(config)
        self.data = task.load(given, config, self.convention) if data is None else data
        task.check(self.data, given, config)
        if saved is not None:
            checkpoint.check_data(self.checkpoint, saved, given, self.data.labels, self._counts())
        # At least one batch, which may then be incomplete.
        self.steps_per_epoch = max(1, len(self.data.train) // config.batch)
        self.steps = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = task.build(config, len(self.data.labels), saved["model"] if saved else initial)
            self._rng = torch.get_rng_state()  # the state that dropout starts from
        self._frozen: dict[str, nn.Module] = {}  # the batch norms that stay as they are, by name
        self.new_classifier = False
        if initial is not None:
            self._fill(initial)
        if saved is not None:
            self._frozen = checkpoint.frozen(self.checkpoint, saved, self._norms())
        for norm in self._frozen.values():
            norm.requires_grad_(False)
        self._check_shares()
        self._updates = Updates(self.model, config, task.decay, self.steps_per_epoch)

        self.step = 0  # all steps taken so far
        self.epoch = 1  # the one that is running
        self._in_epoch = dict(checkpoint.NOTHING_YET)
        self.history: list[dict] = []
        if saved is not None:
            checkpoint.check_steps(self.checkpoint, saved, self.steps_per_epoch, len(self.data.train), self.steps)
            checkpoint.restore(self.checkpoint, saved, self.model, self._updates)
            self.step, self.epoch = saved["step"], saved["epoch"]
            self._in_epoch, self.history = saved["in_epoch"], saved["history"]
        rank, states = self.processes.rank, saved["rng"] if saved else [self._rng]
        # Another process's dropout is another one. A process that the checkpoint does not know begins anew.
        self._rng = states[rank] if rank < len(states) else _seeded(f"{config.seed}/{self.step}/{rank}")

    def _counts(self) -> list[int]:
        """The numbers of images to train on and of those held out."""
        return [len(self.data.train), len(self.data.held_out)]

    def _check_shares(self) -> None:
        """Raises TrainError if a part of a batch is too small for the statistics of a batch norm."""
        count, parts = min(self.config.batch, len(self.data.train)), self._parts()
        synchronised = self.config.sync_bn and self.config.accumulate == 1
        frozen = len(self._frozen) == len(self._norms())
        if parts > 1 and count < parts * (1 if synchronised or frozen else 2):
            raise TrainError(
                f"--batch: expected at least two images for each part of a batch, which batch norm needs, got {count} "
                f"images for {parts} parts ({self.processes.size} processes, --accumulate {self.config.accumulate})"
            )

    def _parts(self) -> int:
        """How many parts a batch is cut into."""
        return self.processes.size * self.config.accumulate

    def _fill(self, initial: State) -> None:
        """Loads the weights to start from, with new layers for what they do not have."""
        initial, new = self.task.merge(initial, self.model.state_dict())
        self.new_classifier = bool(new)
        weights.fill(self.model, initial, self.config.weights)
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
            Interrupted: SIGINT or SIGTERM came to a process. The step was finished and the checkpoint written before.
            TrainError: a loss or a weight became NaN or infinite, a file cannot be written, another run writes to the
                directory, or another process has died.
            images.ImageError: an image cannot be read. The checkpoint was written before.
            datasets.DataError: the held-out images cannot be judged by. The checkpoint was written before.
            OtherProcessError: another process raised one of these.
        """
        try:
            with contextlib.ExitStack() as open_files:
                self.processes.from_lead(lambda: self._open(open_files))
                self._run(report)
            self.processes.from_lead(lambda: self._write(files.MODEL, self._write_model))
        except (RuntimeError, processes.LostProcessError) as error:
            reason = batches.dead_worker(error) or processes.lost(error)
            if reason is None:
                raise
            raise TrainError(f"{reason}; {self._kept()}") from error
        finally:
            self._unlock()
        return self.history

    def _open(self, open_files: contextlib.ExitStack) -> None:
        """Opens the files of a run, for the first process alone."""
        files.make(self.directory)
        if self._lock is None:
            self._lock = files.Lock(self.directory)
            if not self.config.resume:
                start.check_new(self.directory)  # another run may have ended meanwhile
        files.start(self.directory, self.data.labels, self.history)
        if self.config.log == "tensorboard":
            self._curves = open_files.enter_context(contextlib.closing(Curves(self.directory, self.step)))

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _run(self, report: Callable[[Progress], None]) -> None:
        with (
            measure.threads(self.config.threads),
            torch.random.fork_rng(devices=[]),
            signals.stop_requested() as stopping,
        ):
            torch.set_rng_state(self._rng)
            try:
                while self.epoch <= self.config.epochs and (self.step < self.steps or self._epoch_is_trained()):
                    self._run_epoch(report, stopping)
            except (batches.Stop, *_BAD_DATA, OtherProcessError) as reason:
                kind = reason.kind if isinstance(reason, OtherProcessError) else type(reason).__name__
                if kind not in _BETWEEN_STEPS:
                    raise
                self._save()
                kept = f"{self.checkpoint} is written, --resume goes on from it"
                if kind == batches.Stop.__name__:
                    where = f"interrupted in epoch {self.epoch} after step {self.step}"
                    raise Interrupted(f"{where}; {kept}") from None
                if isinstance(reason, _BAD_DATA):
                    raise type(reason)(f"{reason}; {kept}") from None
                raise

    def _run_epoch(self, report: Callable[[Progress], None], stopping: Callable[[], bool]) -> None:
        sums = self._in_epoch
        self.model.train()
        for norm in self._frozen.values():
            norm.eval()
        begin, seen_before = time.perf_counter(), sums["images"]
        rate = 0.0
        for parts in self._shares(stopping):
            lr = self._updates.lr(self.step)
            loss, correct, seen = self._step(parts)
            self.step += 1
            sums["lr"] = lr
            sums["steps"] += 1
            sums["images"] += seen
            sums["loss"] += loss * seen
            sums["correct"] += correct
            rate = (sums["images"] - seen_before) / (time.perf_counter() - begin)
            self._draw({"train/loss": loss, "train/lr": lr})
            report(self._progress(rate))
            if self.processes.size == 1 and stopping():
                raise batches.Stop
            if self.step >= self.steps:
                break
        figures = self._validate(stopping) if self._validation_is_due() else {}
        self._check_all(figures.get("validation_loss") or 0.0, "validation loss")
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
        self.processes.from_lead(lambda: files.append_to_log(self.directory, record))
        self._draw({f"epoch/{name}": value for name, value in record.items() if name not in ("epoch", "step")})
        report(dataclasses.replace(now, record=record))

    def _step(self, parts: list[tuple[Any, Any]]) -> tuple[float, int, int]:
        """Takes a step with this process's parts of a batch. Returns the batch's mean loss, correct answers and images.

        Raises:
            TrainError: the loss is NaN or infinite. The weights are those before the step.
        """
        config, size = self.config, self.processes.size
        count = min(config.batch, len(self.data.train))
        total, weight, correct, seen = 0.0, 0.0, 0, 0
        for i, (x, target) in enumerate(parts):
            # Gradients travel with the last part.
            waits = size > 1 and i < len(parts) - 1
            with self._parallel.no_sync() if waits else contextlib.nullcontext():
                with self._updates.autocast():
                    loss, own, right = self.task.loss(self._parallel, x, target, config)
                # The processes' gradients are averaged. What the parts weigh together is known after the last one.
                self._updates.backward(loss if self._parts() == 1 else loss * (size * own / count))
            total += loss.item() * own
            weight += own
            correct += right
            seen += len(target)
        total, weight, correct, seen = self.processes.sum([total, weight, correct, seen])
        self._check_all(total / weight, "loss")
        self._updates.take(self.step, 1.0 if self._parts() == 1 else count / weight)
        return total / weight, int(correct), int(seen)

    def _shares(self, stopping: Callable[[], bool]) -> Iterator[list[tuple[Any, Any]]]:
        """This process's share of each batch of this epoch that is still to come, in parts.

        If a process got a signal or cannot read an image, all processes stop before the same step.
        """
        config = self.config
        each = batches.order(len(self.data.train), config.batch, config.seed, self.epoch)[self._in_epoch["steps"] :]
        first, parts = self.processes.rank * config.accumulate, self._parts()
        keys = [batches.share(batch, first + i, parts) for batch in each for i in range(config.accumulate)]
        loaded = batches.load(self.data.train, keys, self.task.collate, config.workers, stopping)

        def share() -> list[tuple[Any, Any]]:
            if self.processes.size > 1 and stopping():
                raise batches.Stop
            return list(itertools.islice(loaded, config.accumulate))

        for _ in each:
            yield self.processes.together(share)

    def _validation_is_due(self) -> bool:
        ends = self.step >= self.steps
        return ends or self.epoch % self.config.evaluate_every == 0

    def _epoch_is_trained(self) -> bool:
        return self._in_epoch["steps"] >= self.steps_per_epoch

    @torch.no_grad()
    def _validate(self, stopping: Callable[[], bool]) -> dict[str, float | None]:
        """The task's figures on the held-out images, each of which one process sees once."""
        model, data, size = self._result(), self.data.held_out, self.processes.size
        self.processes.share_buffers(model)
        model.eval()
        each = -(-self.config.batch // size)
        keys = [list(range(first, min(first + each, len(data)))) for first in range(0, len(data), each)]

        def share() -> Iterator[tuple[Any, Any]]:
            mine = keys[self.processes.rank :: size]
            for batch in batches.load(data, mine, self.task.collate, self.config.workers, stopping):
                yield batch
                if stopping():
                    raise batches.Stop

        scores = self.processes.together(lambda: self.task.score(model, data, share()))
        everything = self.processes.gather(scores)
        return self.processes.from_lead(lambda: self.task.figures(everything, data))

    def _result(self) -> nn.Module:
        """The network that is validated and written: with averaged weights if they are kept."""
        averaged = self._updates.averaged
        return self.model if averaged is None else averaged.module

    def _progress(self, images_per_s: float) -> Progress:
        sums = self._in_epoch
        seen = max(1, sums["images"])
        accuracy = sums["correct"] / seen if self.task.accuracy else None
        return Progress(self.epoch, self.step, sums["loss"] / seen, accuracy, images_per_s, _peak_memory())

    def _draw(self, values: dict[str, float]) -> None:
        if self._curves is not None:
            self._curves.add(self.step, values)

    def _norms(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)}

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise TrainError(
                f"the {what} became {value} in epoch {self.epoch} after step {self.step}, at a learning rate of "
                f"{self._updates.lr(self.step):g}; {self._kept()}"
            )

    def _check_all(self, value: float, what: str) -> None:
        """`_check` for a value that is the same in all processes."""
        if not math.isfinite(value):
            self.processes.together(lambda: self._check(value, what))

    def _kept(self) -> str:
        if self.processes.leads and not self.checkpoint.exists():
            return "no checkpoint was written yet"
        there = "" if self.processes.leads else ", if there is one,"
        return f"the last good checkpoint{there} is {self.checkpoint}"

    def _save(self) -> None:
        states = self.processes.gather(torch.get_rng_state())
        self.processes.from_lead(lambda: self._write_checkpoint(states))

    def _write_checkpoint(self, rng: list[torch.Tensor]) -> None:
        averaged = self._updates.averaged
        models = {"model": self.model.state_dict(), "averaged": averaged.module.state_dict() if averaged else {}}
        for state in models.values():
            for key, value in state.items():
                # The step after a finite loss can still overflow.
                self._check(value.sum().item(), f"sum of {key}")
        content = {
            **models,
            "optimizer": self._updates.optimizer.state_dict(),
            "scaler": self._updates.scaler.state_dict(),
            "rng": rng,
            "step": self.step,
            "epoch": self.epoch,
            "in_epoch": self._in_epoch,
            "history": self.history,
            "labels": self.data.labels,
            "images": self._counts(),
            "frozen": list(self._frozen),
            "arguments": dataclasses.asdict(self.config),
            **self._facts(),
        }
        self._write(files.CHECKPOINT, lambda path: _save(content, path))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        self._lock.check()
        files.write_whole(self.directory / name, write)

    def _write_model(self, path: Path) -> None:
        # `safetensors.torch.save_file` makes files that only their owner may read.
        path.write_bytes(save(self._result().state_dict(), {key: str(value) for key, value in self._facts().items()}))

    def _facts(self) -> dict[str, object]:
        """What the functions that read weights find beside them."""
        return self.task.facts(self.config, len(self.data.labels))


def _described(data: datasets.Data) -> str:
    """What must be the same in all processes."""
    count, digest = len(data.labels), hashlib.sha256("\n".join(data.labels).encode()).hexdigest()[:8]
    classes = f"{count} classes ({', '.join(data.labels[:3])}{'...' if count > 3 else ''}, names' digest {digest})"
    return f"{len(data.train)} images to train on, {len(data.held_out)} held out, {classes}"


def _save(content: dict, path: Path) -> None:
    with path.open("wb") as file:  # PyTorch's own file does not say why it cannot be written
        torch.save(content, file)


def _seeded(text: str) -> torch.Tensor:
    """The state of a generator whose seed is `text`."""
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63)).get_state()


def _peak_memory() -> int:
    """The most bytes that this process has held in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
