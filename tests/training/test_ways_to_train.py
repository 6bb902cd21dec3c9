"""Training in the ways of PyTorch's users: gradient scaling, checkpoints, hooks; and what a step leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import bytes_saved, decide, decided, operators, plain, step
from test_training import BLOCK, make_block, make_stem
from torch import nn
from torch.utils.checkpoint import checkpoint

from mnv2_fused.tools import measure
from mnv2_fused.training import RECOMPUTE


def _sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1.0)


def _weighted(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def with_a_grad_scaler(module, x):
    optimizer, scaler = _sgd(module), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(_weighted(module(x))).backward()
    scaler.step(optimizer)
    scaler.update()


def with_accumulation(module, x):
    optimizer = _sgd(module)
    for part in x.split(2):
        _weighted(module(part)).backward()
    optimizer.step()


def with_clipping(module, x):
    optimizer = _sgd(module)
    _weighted(module(x)).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    nn.utils.clip_grad_value_(module.parameters(), 0.2)
    optimizer.step()


def with_an_average(module, x):
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    with_accumulation(module, x)
    average.update_parameters(module)
    average.update_parameters(module)
    _weighted(average(x)).backward()
    module.averages = nn.ParameterList(average.parameters())


def with_checkpoint(module, x):
    # To its end the second forward tracks statistics again; where it may stop early is left to each path.
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        _weighted(checkpoint(module, x, use_reentrant=False)).backward()


def with_anomaly_mode(module, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        _weighted(module(x)).backward()


def deterministic(module, x):
    torch.use_deterministic_algorithms(True)
    try:
        _weighted(module(x)).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def with_hooks(module, x):
    module.register_forward_hook(lambda m, arguments, y: y * 2)
    module.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
    for p in module.parameters():
        p.register_hook(lambda grad: grad * 5)
    x.requires_grad_()
    _weighted(module(x)).backward()
    module.dx = nn.Parameter(x.grad)


def with_functional_call(module, x):
    parameters = {name: p * 1.0 for name, p in module.named_parameters()}
    _weighted(torch.func.functional_call(module, parameters, (x,))).backward()


def twice(module, x):
    loss = _weighted(module(x))
    loss.backward(retain_graph=True)
    loss.backward()


def with_two_calls(module, x):
    a, b = x.split(2)
    (_weighted(module(a)) + 2 * _weighted(module(b))).backward()


WAYS = [
    with_a_grad_scaler, with_accumulation, with_clipping, with_an_average, with_checkpoint, with_anomaly_mode,
    deterministic, with_hooks, with_functional_call, twice, with_two_calls,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way, recompute):
    def take():
        block = make_block(6, 6, 20)
        block.recompute = recompute
        x = decided(block, torch.randn(4, 6, 6, 5))
        reference = plain(block)
        exact, states = copy.deepcopy(reference).double(), []
        ran = operators(lambda: way(block, x.clone()))
        assert "train_block_backward" in ran and set(ran) == set(BLOCK)
        way(reference, x.clone())
        way(exact, x.double())
        for module in (block, reference, exact):
            state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
            gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            states.append(state | {f"gradient of {n}": grad for n, grad in gradients.items()})
        return tuple(states)

    decide(take(), take)


def test_second_derivatives_are_refused():
    for unit, shape in ((make_block(), (2, 8, 5, 5)), (make_stem(), (2, 3, 5, 5))):
        x = torch.randn(shape, requires_grad=True)
        (dx,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again .* set model.fused = False"):
            dx.square().sum().backward()
        unit.fused = False
        (dx,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()


def test_an_input_changed_before_the_backward_is_noticed():
    block, x = make_block(), torch.randn(2, 8, 5, 5)
    y = block(x.contiguous(memory_format=torch.channels_last))
    block.conv[2].weight.data.add_(0.0)  # .data leaves no trace, as in plain
    block.conv[1][0].weight.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_caller_may_change_the_output():
    block, x = make_block(8, 12), torch.randn(2, 8, 5, 5)
    y = block(x)
    y += 1
    y.sum().backward()


def test_input_and_gradient_are_left_alone():
    block = make_block()
    for format in (torch.contiguous_format, torch.channels_last):
        x, dy = (torch.randn(2, 8, 6, 6).contiguous(memory_format=format) for _ in range(2))
        before = x.clone(), dy.clone()
        block(x.requires_grad_()).backward(dy)
        assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_same_bits_for_any_number_of_threads_and_in_every_run(recompute):
    units = [
        (make_block(16, 16, 96), (1, 16, 40, 40)),
        (make_block(16, 24, 96, stride=2), (5, 16, 14, 14)),
        (make_block(48, 48, 100), (3, 48, 7, 7)),
        (make_block(32, 16, None), (2, 32, 28, 28)),
        (make_stem(), (3, 3, 65, 65)),
        (make_stem(64, 100, kernel_size=1, stride=1), (3, 64, 7, 7)),
    ]
    for unit, shape in units:
        unit.recompute = recompute
        x, results = torch.randn(shape), []
        for threads in (1, 1, 2, 3, 8):
            with measure.threads(threads):
                results.append(step(copy.deepcopy(unit), x))
        for other in results[1:]:
            for name, expected in results[0].items():
                assert torch.equal(other[name], expected), name


def test_recompute_changes_what_is_saved_and_nothing_else():
    block, x = make_block(16, 16, 96), decided(make_block(16, 16, 96), torch.randn(2, 16, 6, 6))
    saved = {}
    for recompute in RECOMPUTE:
        block.recompute = recompute
        saved[recompute] = bytes_saved(lambda: block(x))
    assert saved["most"] == saved["balanced"] == saved["least"] - 2 * 96 * 6 * 6 * 4
