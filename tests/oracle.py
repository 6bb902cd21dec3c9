"""The oracle and the rule of tolerance: the one place that decides whether a fused result is right.

The oracle is the plain path in float64. A fused result may be at most twice as far from it as the plain path in the
same dtype is, in the largest difference and in the root mean square, plus one rounding step of the dtype, without which
an exact plain result could never be matched. The largest difference is an extreme value: a test of a deep network needs
enough outputs for it to be no matter of luck.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnv2_fused.modules import FusedUnit


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference over those of `exact`; numbers only, so that NaN or Inf must be equal."""
    got, exact = got.detach().double(), exact.detach().double()
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), "NaN or Inf in different places"
    assert torch.equal(got[~finite].nan_to_num(1.0, 2.0, 3.0), exact[~finite].nan_to_num(1.0, 2.0, 3.0))
    got, exact = got[finite], exact[finite]
    if got.numel() == 0:
        return 0.0, 0.0
    difference, tiny = got - exact, torch.finfo(torch.float64).tiny
    largest = difference.abs().max() / exact.abs().max().clamp_min(tiny)
    mean = difference.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(tiny)
    return largest.item(), mean.item()


def assert_close(got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """`got` is at most `factor` times as far from `exact` as `plain` is, and has the dtype of `plain`."""
    assert got.dtype == plain.dtype, f"dtype {got.dtype}, expected {plain.dtype}"
    step = torch.finfo(plain.dtype).eps
    for name, ours, theirs in zip(("largest", "rms"), errors(got, exact), errors(plain, exact), strict=True):
        bound = factor * theirs + step
        assert ours <= bound, f"{name} error {ours:.3g}, allowed {bound:.3g} (plain {theirs:.3g})"


def randomize(module: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Random batch-norm parameters, and statistics near those of the data `x`; returns `module` in eval mode.

    At initialisation activations are so small, and so regular, that wrong results look right.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.copy_(1 + torch.rand(norm.weight.shape, generator=generator))
                norm.weight[::5] *= -1
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
        module.train()(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            size = norm.running_var.shape
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(size, generator=generator)
            norm.running_var *= 0.7 + 0.6 * torch.rand(size, generator=generator)
    return module.eval()


def plain(module: nn.Module) -> nn.Module:
    """A copy of `module` that runs plain PyTorch."""
    module = copy.deepcopy(module)
    for unit in module.modules():
        if isinstance(unit, FusedUnit):
            unit.fused = False
    return module


def operators(call: Callable[[], object]) -> list[str]:
    """Names of the mnv2_fused operators that `call` runs, in order, without those that pack weights."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name.partition("::") for event in profile.events()]
    return [name for library, _, name in names if library == "mnv2_fused" and not name.startswith("pack_")]


@torch.no_grad()
def check(module: nn.Module, x: Tensor, fused: list[str] | None = None) -> Tensor:
    """Runs `module` on `x`, sees that it ran the operators `fused` (not asked where None) and that the result is right.

    Returns the fused result.
    """
    got, reference = module(x), plain(module)  # at once: what was remembered of an earlier call must not be used
    if fused is not None:
        assert operators(lambda: module(x[:2])) == fused
    assert_close(got, reference(x), reference.double()(x.double()))
    return got
