"""The same network in training: fused, and in plain PyTorch in each way that a user would train it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from engines import CLASSES, Case, network, reason_of
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

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Keeps freed memory in the process. Needs glibc; does nothing without it.

    By default glibc returns large tensors to the system when they are freed, and the next step faults in new pages.
    Plain PyTorch allocates gigabytes a step. Page faults can take several times as long as its arithmetic, most of all
    in a virtual machine, and vary from step to step. With freed memory kept, plain PyTorch is at its best.
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
        # Setting a threshold switches glibc's automatic adjustment off for good. These are the values that it ends at.
        mallopt(_M_MMAP_MAX, 65536)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        trim(0)


class _Checkpointed(nn.Module):
    """A feature whose inside is recomputed for its backward."""

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


# Each engine's change to the plain channels_last network.
_BUILD: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{name: _fused(recompute) for name, recompute in zip(FUSED, RECOMPUTE, strict=True)},
    PLAIN: lambda model: model,
    CHECKPOINTED: _checkpointed,
    CONTIGUOUS: lambda model: model.to(memory_format=torch.contiguous_format),
    COMPILED: _compiled,
}


@dataclass
class Trainee:
    """A network that trains on one batch again and again, with cross entropy and SGD with momentum.

    There is no dropout, so that every engine computes the same. With `frozen`, batch norm uses fixed statistics and
    only its scale and shift train, as in fine-tuning. The learning rate is so small that the network hardly changes.
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
        """The outputs and, with `gradients`, every parameter's gradient in one vector."""
        if not gradients:
            return [self.forward()]
        self.optimizer.zero_grad()
        y = self.forward()
        nn.functional.cross_entropy(y, self.target).backward()
        return [y.detach(), torch.cat([p.grad.flatten() for p in self.model.parameters()])]


def build(
    case: Case, names: Iterable[str], *, frozen: bool = False, gradients: bool = True
) -> tuple[dict[str, Trainee], dict[str, str]]:
    """The engines by name, and the reasons why others could not be built, by name.

    Raises:
        RuntimeError: an engine's result differs from plain PyTorch's.
    """
    # Gradients of plain PyTorch's own two layouts differ by 2e-2 with statistics of the batch, by 1e-6 without.
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
                missing[f"{name}, training"] = reason_of(error)
                continue
            for what, a, b, bound in zip(("outputs", "gradients"), got, expected, bounds, strict=False):
                relative = ((a.double() - b.double()).norm() / b.double().norm()).item()
                if not relative < bound:
                    raise RuntimeError(f"{name}: {what} differ from plain PyTorch's by {relative:.1g}: {case}")
            trainees[name] = trainee
    return trainees, missing


def saved_bytes(trainee: Trainee) -> int:
    """Bytes that a forward pass saves for the backward, without parameters and buffers. Shared storages count once."""
    own = {t.untyped_storage().data_ptr() for t in (*trainee.model.parameters(), *trainee.model.buffers())}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = trainee.loss()  # keeps the saved tensors alive, so that no two storages share an address
    del loss
    return sum(storages.values())
