"""The same network in training: fused, and in plain PyTorch as a user would train it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from engines import CLASSES, Case, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnv2_fused
from mnv2_fused.tools import measure
from mnv2_fused.training import RECOMPUTE

PLAIN = "eager channels_last"
CHECKPOINTED = "checkpointed channels_last"
CONTIGUOUS = "eager contiguous"
COMPILED = "torch.compile"
FUSED = tuple(f"fused {recompute}" for recompute in RECOMPUTE)
ALL = (*FUSED, PLAIN, CHECKPOINTED, CONTIGUOUS)

# glibc's names for what mallopt sets, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Lets no memory that was freed go back to the system. Needs glibc, does nothing without.

    By default glibc returns large tensors when they are freed, and the next step's are made of new pages. Plain PyTorch
    allocates gigabytes a step, so this alone can take several times as long as the arithmetic, most of all in a virtual
    machine, and changes from step to step. Here every engine finds its memory in place, plain PyTorch at its best.
    """
    try:
        mallopt, trim = ctypes.CDLL(None).mallopt, ctypes.CDLL(None).malloc_trim
    except AttributeError:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        # Setting a threshold ends its adjustment for good: these are what the adjustment stops at.
        mallopt(_M_MMAP_MAX, 65536)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        trim(0)


class _Checkpointed(nn.Module):
    """A feature whose inside is computed again for its backward."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


def _fused(recompute: str) -> Callable[[nn.Module], nn.Module]:
    def switch(model: nn.Module) -> nn.Module:
        model.fused, model.recompute = True, recompute
        return model

    return switch


def _checkpointed(model: nn.Module) -> nn.Module:
    model.features = nn.Sequential(*map(_Checkpointed, model.features))
    return model


def _compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=False)


# What each makes of the plain channels_last network.
_BUILD: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{name: _fused(recompute) for name, recompute in zip(FUSED, RECOMPUTE, strict=True)},
    PLAIN: lambda model: model,
    CHECKPOINTED: _checkpointed,
    CONTIGUOUS: lambda model: model.to(memory_format=torch.contiguous_format),
    COMPILED: _compiled,
}


@dataclass
class Trainee:
    """A network in training on one batch, over and over, with cross entropy and SGD with momentum.

    Without dropout, so that every engine computes the same. With `frozen` batch norm uses fixed statistics, and trains
    scale and shift alone, as in fine-tuning. The learning rate is so small that the network stays what it is.
    """

    name: str
    case: Case
    frozen: bool = False
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        model = mnv2_fused.MobileNetV2(CLASSES, self.case.width, fused=False, dropout=0.0).train()
        model.load_state_dict(network(self.case.width).state_dict())
        if self.frozen:
            for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
                norm.eval()
        self.model = _BUILD[self.name](model.to(memory_format=torch.channels_last))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.give(self.case.batch)

    def give(self, batch: int) -> None:
        """Makes the steps that follow take `batch` images."""
        self.case = replace(self.case, batch=batch)
        self.x = self.case.images() if self.name == CONTIGUOUS else self.case.images_channels_last()
        self.target = torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(batch))

    def forward(self) -> Tensor:
        return self.model(self.x)

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.forward(), self.target)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def results(self, gradients: bool) -> list[Tensor]:
        """The outputs, and every parameter's gradient in one vector where asked for."""
        if not gradients:
            return [self.forward()]
        self.optimizer.zero_grad()
        y = self.forward()
        nn.functional.cross_entropy(y, self.target).backward()
        return [y.detach(), torch.cat([p.grad.flatten() for p in self.model.parameters()])]


def build(
    case: Case, names: Iterable[str], *, frozen: bool = False, gradients: bool = True
) -> tuple[dict[str, Trainee], dict[str, str]]:
    """The engines by name, and those that could not be built, each with the reason.

    Raises:
        RuntimeError: an engine computes something else than plain PyTorch.
    """
    # With statistics of the batch the gradients of plain PyTorch's own two layouts differ by 2e-2, without by 1e-6.
    bounds = 1e-3, 1e-3 if frozen else 0.1
    trainees: dict[str, Trainee] = {}
    missing: dict[str, str] = {}
    with measure.threads(case.threads), torch.set_grad_enabled(gradients):
        expected = Trainee(CONTIGUOUS, case, frozen).results(gradients)
        for name in names:
            try:
                trainee = Trainee(name, case, frozen)
                got = trainee.results(gradients)
            except Exception as error:
                if name != COMPILED:
                    raise
                missing[f"{name}, training"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            for what, a, b, bound in zip(("outputs", "gradients"), got, expected, bounds, strict=False):
                relative = ((a.double() - b.double()).norm() / b.double().norm()).item()
                if not relative < bound:
                    raise RuntimeError(f"{name}: {what} differ from plain PyTorch's by {relative:.1g}: {case}")
            trainees[name] = trainee
    return trainees, missing


def saved_bytes(trainee: Trainee) -> int:
    """Bytes that one forward pass keeps for the backward, parameters and buffers left out; shared ones count once."""
    own = {t.untyped_storage().data_ptr() for t in (*trainee.model.parameters(), *trainee.model.buffers())}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = trainee.loss()  # holds what was saved, so that no two storages have one address
    del loss
    return sum(storages.values())
