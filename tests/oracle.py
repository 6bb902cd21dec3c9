"""The oracle and the tolerance: the only place that decides whether a fused result is right.

The oracle is the plain path in float64. A fused result may be at most twice as far from it as the plain path in the
same dtype, in the largest difference and in the root mean square. One rounding step of the dtype is added, because the
plain result may be exact. The largest difference is an extreme value, so a test of a deep network needs many outputs.

In training the factor is 3, for the output, every gradient and every running statistic separately. The gradient of a
batch norm is a difference of sums, which plain and fused add in different orders. If an activation is so close to a
bound of its clamp that rounding decides the side, gradients differ by more than any factor allows, in the plain path as
well as in the fused one. `decided` moves inputs away from such points.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnv2_fused.models.fused import FusedUnit


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest and the root-mean-square difference, relative to `exact`. NaN and Inf must be the same in both."""
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
    """Asserts that `got` is at most `factor` times as far from `exact` as `plain`, and has the dtype of `plain`."""
    assert got.dtype == plain.dtype, f"dtype {got.dtype}, expected {plain.dtype}"
    step = torch.finfo(plain.dtype).eps
    for name, ours, theirs in zip(("largest", "rms"), errors(got, exact), errors(plain, exact), strict=True):
        bound = factor * theirs + step
        assert ours <= bound, f"{name} error {ours:.3g}, allowed {bound:.3g} (plain {theirs:.3g})"


def randomize(module: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Sets random batch-norm parameters, and statistics near those of the data `x`. Returns `module` in eval mode.

    In a new model activations are so small and regular that wrong results look right.
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
        # Statistics from the plain path: the code under test must not choose its own test data.
        reference = plain(module).train()
        reference(x)
        for ours, theirs in zip(module.buffers(), reference.buffers(), strict=True):
            ours.copy_(theirs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.running_var is None:
                continue
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


def to_tf32(t: Tensor) -> Tensor:
    """`t` in float32, rounded to TF32: 10 bits behind the point, ties away from zero."""
    t = t.float()
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isnan(), t, rounded)  # the sum may overflow for the bits of a NaN


def operators(call: Callable[[], object]) -> list[str]:
    """Names of the mnv2_fused operators that `call` runs, in order. Operators that pack weights, the passes inside
    training operators, and the query whether a GPU has kernels, which a process makes once, are left out.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name.partition("::")[2] for event in profile.events() if _is_ours(event) and not _in_training(event)]
    return [name for name in names if not name.startswith("pack_") and name != "cuda_kernels_refused"]


def _is_ours(event) -> bool:
    return event.name.startswith("mnv2_fused::")


def _in_training(event) -> bool:
    while (event := event.cpu_parent) is not None:
        if event.name.startswith("mnv2_fused::train_"):
            return True
    return False


@torch.no_grad()
def check(module: nn.Module, x: Tensor, fused: list[str] | None = None) -> Tensor:
    """Runs `module` on `x` and asserts that it ran the operators `fused` (unless None) and that the result is right.

    Returns the fused result.
    """
    got, reference = module(x), plain(module)  # first, so that a stale cache from an earlier call would show
    if fused is not None:
        assert operators(lambda: module(x[:2])) == fused
    assert_close(got, reference(x), reference.double()(x.double()))
    return got


# -------------------------------------------------------------------------------------------------------- training

FACTOR = 3.0  # the tolerance in training; see above


@torch.no_grad()
def decided(module: nn.Module, x: Tensor, margin: float = 1e-5, attempts: int = 100) -> Tensor:
    """`x`, moved a little until no activation in float64 is closer than `margin` to a bound of its ReLU6."""
    exact, generator = plain(module).double(), torch.Generator().manual_seed(1)
    nearest = []

    def measure(activation: nn.Module, arguments: tuple[Tensor]) -> None:
        bounds = (0.0,) if isinstance(activation, nn.ReLU) else (activation.min_val, activation.max_val)
        nearest.extend((arguments[0] - bound).abs().min().item() for bound in bounds if abs(bound) < float("inf"))

    for activation in exact.modules():
        if isinstance(activation, (nn.ReLU, nn.Hardtanh)):
            activation.register_forward_pre_hook(measure)
    spread, state = 0.05 * x.double().std(), copy.deepcopy(exact.state_dict())
    for _ in range(attempts):
        nearest.clear()
        exact(x.double())
        exact.load_state_dict(state)
        if min(nearest, default=margin) >= margin:
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = torch.empty_like(x).copy_(x.double() + spread * noise)
    raise AssertionError(f"{attempts} inputs have activations within {margin} of a bound: take a smaller one")


Context = Callable[[], contextlib.AbstractContextManager]


def step(
    module: nn.Module, x: Tensor, wants_input: bool = True, context: Context = contextlib.nullcontext
) -> dict[str, Tensor]:
    """Output, gradients and statistics, by name, of one forward (in `context`) and backward of `module`."""
    x = x.detach().requires_grad_(wants_input)
    module.zero_grad()
    with context():
        y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    found = {"output": y.detach()}
    if wants_input:
        found["gradient of the input"] = x.grad
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


Steps = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]  # fused, plain, exact


def _comparable(steps: Steps) -> Steps:
    """Makes gradients comparable that are 0 apart from rounding, for example of a shift before a batch norm: they are
    judged on the scale of the largest gradient.
    """
    got, plain, exact = (dict(step) for step in steps)
    largest = max((t.abs().max().item() for name, t in exact.items() if "gradient" in name), default=0.0)
    for name, right in exact.items():
        if "gradient of" in name and right.abs().max() <= 1e-12 * largest:
            for step in (got, plain, exact):
                step[name] = torch.cat([step[name].flatten(), step[name].new_tensor([largest])])
    return got, plain, exact


def assert_steps_close(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert got.keys() == plain.keys() == exact.keys()
    got, plain, exact = _comparable((got, plain, exact))
    for name in plain:
        try:
            if plain[name].is_floating_point():
                assert_close(got[name], plain[name], exact[name], FACTOR)
            else:
                assert torch.equal(got[name], plain[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def check_training(
    module: nn.Module,
    x: Tensor,
    fused: list[str] | None = None,
    *,
    wants_input: bool = True,
    context: Context = contextlib.nullcontext,
    margin: float = 1e-5,
    formats: bool = True,
) -> dict[str, Tensor]:
    """Trains `module` one step on `x`. Asserts that it ran the operators `fused` forward and backward (by default those
    of one block), and that output, gradients and statistics are right; with `formats`, also their memory formats.

    Returns the result of `step`. `context` surrounds the forward, except in float64. With a `margin` of 0, `x` is not
    moved.
    """
    fused = ["train_block", "train_block_backward"] if fused is None else fused
    initial, reference = copy.deepcopy(module), plain(module)
    exact = copy.deepcopy(reference).double()
    x = decided(module, x, margin) if margin else x.detach()
    found: list[dict[str, Tensor]] = []
    assert operators(lambda: found.append(step(module, x, wants_input, context))) == fused
    theirs = step(reference, x, wants_input, context)
    if formats:
        for name, tensor in theirs.items():
            assert _strides(found[0][name]) == _strides(tensor), f"strides of {name}"
    exactly = step(exact, x.double(), wants_input)
    decide((found[0], theirs, exactly), lambda: _another(initial, x, wants_input, context, margin))
    return found[0]


def decide(first: Steps, another: Callable[[], Steps], more: int = 24) -> None:
    """Asserts that the steps are right. Errors of few numbers, or of sums that cancel, can differ threefold by chance.
    If the `first` step fails, the median over it and `more` other steps decides for each quantity.
    """
    try:
        return assert_steps_close(*first)
    except AssertionError as error:
        if "allowed" not in str(error):
            raise
    excesses: dict[tuple[str, str], list[float]] = {}
    for got, plain, exact in map(_comparable, (first, *(another() for _ in range(more)))):
        for name, theirs in plain.items():
            assert got[name].dtype == theirs.dtype
            if not theirs.is_floating_point():
                assert torch.equal(got[name], theirs), name
                continue
            step = torch.finfo(theirs.dtype).eps
            pairs = zip(errors(got[name], exact[name]), errors(theirs, exact[name]), strict=True)
            for kind, (a, b) in zip(("largest", "rms"), pairs, strict=True):
                excesses.setdefault((name, kind), []).append(a / (FACTOR * b + step))
    for (name, kind), found in excesses.items():
        middle = sorted(found)[len(found) // 2]
        assert middle <= 1, (
            f"{name}: {kind} error {middle:.3g} times what is allowed in the middle of {len(found)} steps"
        )


def _another(module: nn.Module, x: Tensor, wants_input: bool, context: Context, margin: float) -> Steps:
    """A step on another input like `x`."""
    shuffled = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])[torch.randperm(x.numel() // x.shape[1])]
    shuffled = shuffled.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
    x = torch.empty_like(x).copy_(shuffled + 0.5 * x.std() * torch.randn(x.shape).to(x.dtype))
    x = decided(module, x, margin) if margin else x
    reference = plain(module)
    exact = copy.deepcopy(reference).double()
    return (
        step(copy.deepcopy(module), x, wants_input, context),
        step(reference, x, wants_input, context),
        step(exact, x.double(), wants_input),
    )


def _strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def bytes_saved(call: Callable[[], object], module: nn.Module | None = None) -> int:
    """Bytes that `call` saves for its backward, without the parameters of `module`."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # alive, so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()} if module is not None else ()
    del result
    return sum(size for address, size in storages.items() if address not in own)
