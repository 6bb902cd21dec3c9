"""How segmentation networks are trained and compared in tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from oracle import FACTOR, errors, plain
from torch import nn


class Out(nn.Module):
    """A network whose output is one map of a segmentation network."""

    def __init__(self, model: nn.Module, key: str = "out"):
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x):
        return self.model(x)[self.key]


def remove_clamps(model: nn.Module) -> nn.Module:
    """Replaces every ReLU and ReLU6 by a clamp without bounds. Then there is nothing that rounding could decide."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(parent, name, nn.Hardtanh(-float("inf"), float("inf")))
    return model


def loss_step(model: nn.Module, x: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and the gradients of one step as trainers make it."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), masks, ignore_index=255)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trains(make: Callable[[], nn.Module], size: tuple[int, int], seeds: int = 3, classes: int = 5) -> None:
    """Asserts that the gradients of networks (n, 3, h, w) to (n, classes, h, w) are as exact as plain ones.

    Single masks of a ReLU6 differ, in plain as in fused: the middle of several steps decides, on all gradients
    together. `make` returns a network in the mode to test, with random batch norms.
    """
    found: dict[str, list[float]] = {"fused": [], "plain": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        x, masks = torch.randn(8, 3, *size), torch.randint(classes, (8, *size))
        masks[:, :5] = 255
        model = make()
        reference = plain(model)
        exact = loss_step(copy.deepcopy(reference).double(), x.double(), masks)
        largest = max(right.abs().max().item() for right in exact.values())
        for name, m in (("fused", model), ("plain", reference)):
            got = loss_step(m, x, masks)
            assert got.keys() == exact.keys()
            # A shift before a batch norm has a gradient of 0 apart from rounding.
            each = [errors(got[k], right)[1] for k, right in exact.items() if right.abs().max() > 1e-12 * largest]
            found[name].append(sum(each) / len(each))
    ours, theirs = (sorted(each)[seeds // 2] for each in found.values())
    assert ours <= FACTOR * theirs, f"error {ours:.3g}, plain {theirs:.3g}"
