"""Training MobileNetV2 on image folders or digits: SGD or the paper's RMSProp recipe, with resumable checkpoints.

A run is a function of its `Config`: initial weights, order of the images and augmentation follow from the seed alone,
with fused units and without, and a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader

from mnv2_fused import weights
from mnv2_fused.data import datasets, images
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.tools import measure

CHECKPOINT, MODEL, LABELS, LOG = "checkpoint.pth", "model.safetensors", "labels.txt", "log.jsonl"
OPTIMIZERS = ("sgd", "rmsprop")


class TrainError(ValueError):
    """A run that cannot be started, or that has to stop; the message says what was expected and what was got."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the checkpoint holds everything up to the last finished step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how. None stands for the default, or for the checkpoint's value with `resume`.

    Args:
        data: `digits`, or the path of a folder with a directory of images for each class.
        output: directory for checkpoint, weights, labels and log; `runs/` and the data's name by default.
        epochs: passes over the data; 30 for digits, 90 for folders.
        batch: images a step, at least 2; 64 by default. An incomplete last batch is left out.
        optimizer: `sgd` (momentum 0.9; a warm-up, then a cosine to 0) or `rmsprop` (the paper's: decay and momentum
            0.9, times 0.98 after every epoch).
        lr: the highest learning rate; 0.03 for a batch of 64, in proportion for others, and a tenth of that where
            `weights` are given.
        warmup: epochs until the learning rate of `sgd` is reached; 1 by default.
        weight_decay: 4e-5 by default.
        label_smoothing: 0 to 1; 0 by default. The validation loss goes without.
        width: width multiplier; that of `weights`, or else 0.35 for digits and 1.0 for folders.
        resolution: input size; what `weights` expect, or else 48 for digits and 224 for folders.
        weights: file or published name to start from; the classifier is a new one where the class counts differ.
        convention: padding and preprocessing, as in `weights.load_state_dict`.
        freeze_bn: statistics, scales and biases of batch norm stay those of `weights`.
        seed: of initial weights, order, augmentation and dropout; 0 by default.
        fused, recompute: as for `MobileNetV2`.
        threads: of PyTorch; all processors by default.
        workers: processes that decode images; by default none for digits and up to 4 for folders.
        max_steps: stop after this many steps in all, where the epochs have more.
        resume: go on from the checkpoint in `output`. Only ``output`` and the five arguments before this one may
            differ from it.
    """

    data: str
    output: str | None = None
    epochs: int | None = None
    batch: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    width: float | None = None
    resolution: int | None = None
    weights: str | None = None
    convention: str | None = None
    freeze_bn: bool | None = None
    seed: int | None = None
    fused: bool = True
    recompute: str = "balanced"
    threads: int | None = None
    workers: int | None = None
    max_steps: int | None = None
    resume: bool = False


# What does not decide how the run goes, and so may change when it is resumed.
_FREE = ("output", "fused", "recompute", "threads", "workers", "max_steps", "resume")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: `loss` and `accuracy` (0 to 1) are those of the epoch so far, memory is the process's peak.

    `record` is the log's new entry where an epoch, or the run, has just ended; else None.
    """

    epoch: int
    step: int
    loss: float
    accuracy: float
    images_per_s: float
    peak_memory_bytes: int
    record: dict | None = None


def train(
    config: Config, report: Callable[[Progress], None] = lambda progress: None, data: datasets.Data | None = None
) -> list[dict]:
    """Trains as `config` says, tells `report` after every step, and returns the log's entries. Raises as `Trainer`."""
    return Trainer(config, data).run(report)


class Trainer:
    """A run that is ready to start: everything is read and checked, nothing is written yet.

    Args:
        config: what to do.
        data: images to use in place of what `config.data` stands for.

    Attributes:
        config: `config` with every default filled in.
        steps: optimizer steps of the whole run.
        new_classifier: whether that of the weights was replaced.

    Raises:
        TrainError: options that contradict each other or the checkpoint, labels outside the range of the classes,
            an output directory that cannot be used.
        datasets.DataError: as `datasets.load`.
        weights.WeightsError: as `weights.load_state_dict`.
    """

    def __init__(self, config: Config, data: datasets.Data | None = None) -> None:
        given = config.data
        name = given if given == "digits" else str(Path(given).absolute())
        config = dataclasses.replace(config, data=name, output=config.output or f"runs/{Path(name).name}")
        self.directory = Path(config.output)
        self.checkpoint = self.directory / CHECKPOINT
        saved = self._read_checkpoint(config)
        if saved is not None:
            config = _merged(config, saved["arguments"])
        start = None
        if config.weights is not None and saved is None:
            start, found = weights.load_state_dict(config.weights, config.convention)
            width = weights.width_mult(start)
            if config.width not in (None, width):
                raise TrainError(f"--width {config.width:g} contradicts --weights, whose width is {width:g}")
            config = dataclasses.replace(
                config, width=width, convention=found.name, resolution=config.resolution or found.crop
            )
        if config.freeze_bn and config.weights is None:
            raise TrainError("--freeze-bn needs --weights: a new network has no batch-norm statistics to keep")
        self.config = config = _complete(config)
        self.convention = weights.at_resolution(weights.CONVENTIONS[config.convention], config.resolution)
        self.data = datasets.load(given, self.convention, config.seed) if data is None else data
        classes = len(self.data.labels)
        for targets in (self.data.train.targets, self.data.held_out.targets):
            if not 0 <= min(targets) <= max(targets) < classes:
                raise TrainError(
                    f"{given}: expected labels from 0 to {classes - 1}, got {min(targets)} to {max(targets)}"
                )
        if saved is not None and saved["labels"] != self.data.labels:
            raise TrainError(
                f"{given} does not have the classes that {self.checkpoint} was trained on: expected "
                f"{len(saved['labels'])} ({', '.join(saved['labels'][:5])}...), "
                f"got {classes} ({', '.join(self.data.labels[:5])}...)"
            )
        # At least one batch, which may then be incomplete.
        self.steps_per_epoch = max(1, len(self.data.train) // config.batch)
        self.steps = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = MobileNetV2(
                classes,
                config.width,
                fused=config.fused,
                recompute=config.recompute,
                tf_padding=self.convention.tf_padding,
            )
            self._rng = torch.get_rng_state()  # what dropout draws from next
        self.new_classifier = start is not None and weights.num_classes(start) != classes
        if start is not None:
            if self.new_classifier:
                own = self.model.state_dict()
                start = {**start, **{key: own[key] for key in ("classifier.1.weight", "classifier.1.bias")}}
            weights.fill(self.model, start, config.weights)
            # A network that was trained has other means; one that never was has no biases yet.
            folded = all(not norm.running_mean.any() and norm.bias.any() for norm in self._norms())
            if folded and not config.freeze_bn:
                raise TrainError(
                    f"{config.weights} has no batch-norm statistics (they were folded into the convolutions): "
                    "training them needs --freeze-bn"
                )
        if config.freeze_bn:
            for norm in self._norms():
                norm.requires_grad_(False)
        self._optimizer = _optimizer(self.model, config)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: self._lr_factor(step),  # a bound method would be asked for its state
        )
        self._criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

        self.step = 0  # taken in all
        self.epoch = 1  # the one that is running
        self._in_epoch = dict(_NOTHING_YET)
        self.history: list[dict] = []
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self._scheduler.load_state_dict(saved["scheduler"])
            self._rng = saved["rng"]
            self.step, self.epoch = saved["step"], saved["epoch"]
            self._in_epoch, self.history = saved["in_epoch"], saved["history"]

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> list[dict]:
        """Trains to the end, tells `report` after every step, and returns the log's entries.

        Raises:
            Interrupted: SIGINT or SIGTERM came. The step was finished and the checkpoint written before.
            TrainError: a loss or a weight became NaN or infinite, or a file cannot be written.
            images.ImageError: an image cannot be read. The checkpoint was written before.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / LABELS).write_text("".join(f"{label}\n" for label in self.data.labels), encoding="utf-8")
            # Entries that the checkpoint does not know belong to steps that are taken again.
            (self.directory / LOG).write_text("".join(map(_line, self.history)), encoding="utf-8")
        except OSError as error:
            raise TrainError(f"cannot write to {self.directory}: {error.strerror or error}") from error
        with (
            measure.threads(self.config.threads),
            torch.random.fork_rng(devices=[]),
            _stop_requested() as stopping,
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
        self._write(MODEL, self._write_model)
        return self.history

    def _run_epoch(self, report: Callable[[Progress], None], stopping: Callable[[], bool]) -> None:
        config, sums = self.config, self._in_epoch
        self.model.train()
        if config.freeze_bn:
            for norm in self._norms():
                norm.eval()
        begin, seen_before = time.perf_counter(), sums["images"]
        rate = 0.0
        for x, target in self._batches(self.data.train, self._order(), stopping):
            sums["lr"] = self._lr()
            self._optimizer.zero_grad(set_to_none=True)
            logits = self.model(x)
            loss = self._criterion(logits, target)
            self._check(loss.item(), "loss")
            loss.backward()
            self._optimizer.step()
            self._scheduler.step()
            self.step += 1
            sums["steps"] += 1
            sums["images"] += len(target)
            sums["loss"] += loss.item() * len(target)
            sums["correct"] += (logits.argmax(1) == target).sum().item()
            rate = (sums["images"] - seen_before) / (time.perf_counter() - begin)
            report(self._progress(rate))
            if stopping():
                raise _Stop
            if self.step >= self.steps:
                break
        loss, accuracy = self._validate(stopping)
        self._check(loss, "validation loss")
        now = self._progress(rate)
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": sums["lr"],
            "train_loss": now.loss,
            "train_accuracy": now.accuracy,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "images_per_s": rate,
            "peak_memory_bytes": now.peak_memory_bytes,
        }
        self.history.append(record)
        if self._epoch_is_trained():
            self.epoch += 1
            self._in_epoch = dict(_NOTHING_YET)
        self._save()
        try:
            with (self.directory / LOG).open("a", encoding="utf-8") as log:
                log.write(_line(record))
        except OSError as error:
            raise TrainError(f"cannot write to {self.directory}: {error.strerror or error}") from error
        report(dataclasses.replace(now, record=record))

    def _epoch_is_trained(self) -> bool:
        return self._in_epoch["steps"] >= self.steps_per_epoch

    def _order(self) -> list[list[tuple[int, int]]]:
        """The batches of this epoch that are still to come, as keys of the training set."""
        count, batch = len(self.data.train), self.config.batch
        order = random.Random(f"{self.config.seed}/{self.epoch}").sample(range(count), count)
        steps = range(self._in_epoch["steps"], self.steps_per_epoch)
        return [[(index, self.epoch) for index in order[step * batch : (step + 1) * batch]] for step in steps]

    def _batches(
        self, dataset: datasets.ImageSet, keys: list, stopping: Callable[[], bool]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=self.config.workers,
            collate_fn=_collate,
            worker_init_fn=_end_without_error,
            generator=torch.Generator(),  # else it takes a number from the generator that dropout uses
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a new worker has them wait for its own handlers
        try:
            iterator = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            try:
                batch = next(iterator, None)
            except Exception:  # whatever fetching from a worker that the signal has ended leads to
                if stopping():
                    raise _Stop from None
                raise
            if batch is None:
                return
            if isinstance(batch, images.ImageError):
                raise images.ImageError(str(batch))  # `batch` itself would keep this frame, and the workers, alive
            yield batch

    @torch.no_grad()
    def _validate(self, stopping: Callable[[], bool]) -> tuple[float, float]:
        """Loss and accuracy on the held-out images."""
        self.model.eval()
        count, batch = len(self.data.held_out), self.config.batch
        loss, correct = 0.0, 0
        keys = [list(range(start, min(start + batch, count))) for start in range(0, count, batch)]
        for x, target in self._batches(self.data.held_out, keys, stopping):
            logits = self.model(x)
            loss += nn.functional.cross_entropy(logits, target, reduction="sum").item()
            correct += (logits.argmax(1) == target).sum().item()
            if stopping():
                raise _Stop
        return loss / count, correct / count

    def _progress(self, images_per_s: float) -> Progress:
        sums = self._in_epoch
        seen = max(1, sums["images"])
        return Progress(
            self.epoch, self.step, sums["loss"] / seen, sums["correct"] / seen, images_per_s, _peak_memory()
        )

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def _lr_factor(self, step: int) -> float:
        """The learning rate of `step`, as a part of the highest."""
        if self.config.optimizer == "rmsprop":
            return 0.98 ** (step // self.steps_per_epoch)
        warmup = self.config.warmup * self.steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        decay = max(1, self.config.epochs * self.steps_per_epoch - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / decay)))

    def _lr(self) -> float:
        return self._scheduler.get_last_lr()[0]

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            kept = f"the last good checkpoint is {self.checkpoint}"
            raise TrainError(
                f"the {what} became {value} in epoch {self.epoch} after step {self.step}, at a learning rate of "
                f"{self._lr():g}; {kept if self.checkpoint.exists() else 'no checkpoint was written yet'}"
            )

    # ---------------------------------------------------------------------------------------------------------- files

    def _read_checkpoint(self, config: Config) -> dict | None:
        if not config.resume:
            if self.checkpoint.exists():
                raise TrainError(
                    f"{self.checkpoint} exists: --resume goes on from it, another --output starts a new run"
                )
            return None
        if not self.checkpoint.exists():
            raise TrainError(f"--resume: there is no {self.checkpoint}")
        saved, _ = weights.read(self.checkpoint)
        if not isinstance(saved, dict) or "arguments" not in saved:
            raise TrainError(f"--resume: {self.checkpoint} holds weights alone; --weights starts a new run from them")
        return saved

    def _save(self) -> None:
        for key, value in self.model.state_dict().items():
            # A loss can still be finite where the step after it was not.
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
            "arguments": dataclasses.asdict(self.config),
            **self._facts(),
        }
        self._write(CHECKPOINT, lambda path: torch.save(content, path))

    def _write_model(self, path: Path) -> None:
        # `safetensors.torch.save_file` makes files that only their owner may read.
        path.write_bytes(save(self.model.state_dict(), {key: str(value) for key, value in self._facts().items()}))

    def _facts(self) -> dict[str, object]:
        """What `weights.load_state_dict` reads beside the weights."""
        return {"convention": self.convention.name, "resolution": self.convention.crop}

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes a file whole or not at all, even where the process is killed meanwhile."""
        path, temporary = self.directory / name, self.directory / f"{name}.tmp"
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch.save raises either for a full disk
            temporary.unlink(missing_ok=True)
            raise TrainError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


# Sums over the steps of an epoch, and the learning rate of the last one.
_NOTHING_YET = {"steps": 0, "images": 0, "loss": 0.0, "correct": 0, "lr": 0.0}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Stop(Exception):
    """A signal asked the run to stop after this step."""


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGINT or SIGTERM came, which do nothing else in the body; a second one raises KeyboardInterrupt.

    Raising at once would leave a step half done. Only the main thread may ask for signals.
    """
    requests: list[int] = []

    def request(number: int, frame: object) -> None:
        requests.append(number)
        if len(requests) > 1:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_without_error(worker: int) -> None:
    """Sets up a loader's worker for signals that go to all processes, as terminals and service managers send them.

    A worker that dies of a signal makes PyTorch raise in the parent wherever that is, in the middle of a step too; one
    that ends well is only missed when the next images are due.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _collate(
    items: list[tuple[torch.Tensor, int] | images.ImageError],
) -> tuple[torch.Tensor, torch.Tensor] | images.ImageError:
    for item in items:
        if isinstance(item, images.ImageError):
            return item
    x = torch.stack([image for image, _ in items])
    return x.contiguous(memory_format=torch.channels_last), torch.tensor([target for _, target in items])


def _merged(config: Config, saved: dict) -> Config:
    """`config` with what it leaves open taken from the checkpoint's arguments. Raises TrainError where both differ."""
    taken = {}
    for field in dataclasses.fields(config):
        given, known = getattr(config, field.name), saved.get(field.name)
        if field.name in _FREE:
            continue
        if given is not None and given != known:
            option = field.name.replace("_", "-")
            raise TrainError(f"--{option} {given} contradicts the checkpoint to resume, which has {known}")
        taken[field.name] = known
    return dataclasses.replace(config, **taken)


def _complete(config: Config) -> Config:
    """`config` with defaults in place of None, except where None has a meaning of its own. Raises TrainError."""
    digits = config.data == "digits"
    batch = 64 if config.batch is None else config.batch
    optimizer = config.optimizer or "sgd"
    if optimizer not in OPTIMIZERS:
        raise TrainError(f"unknown optimizer {optimizer!r}: expected {' or '.join(OPTIMIZERS)}")
    if batch < 2:
        raise TrainError(f"--batch: expected at least 2 images, which batch norm needs, got {batch}")
    lr = 0.045 / 96 * batch * (1.0 if config.weights is None else 0.1)  # the paper's for RMSProp; SGD does well with it
    cpus = measure.usable_cpus()
    defaults = {
        "epochs": 30 if digits else 90,
        "batch": batch,
        "optimizer": optimizer,
        "lr": lr,
        "warmup": 1.0,
        "weight_decay": 4e-5,
        "label_smoothing": 0.0,
        "width": 0.35 if digits else 1.0,
        "resolution": 48 if digits else 224,
        "convention": "torchvision",
        "freeze_bn": False,
        "seed": 0,
        "threads": cpus,
        "workers": 0 if digits else min(4, cpus),
    }
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing)


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = {"lr": config.lr, "momentum": 0.9, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **common)
    # The paper names no epsilon; this is the default of the training script that its authors published.
    return torch.optim.RMSprop(parameters, alpha=0.9, eps=1.0, **common)


def _peak_memory() -> int:
    """Bytes that this process has held in memory at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
