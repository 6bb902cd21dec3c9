"""The training operators by themselves: gradcheck, opcheck and what they save."""

from __future__ import annotations

import pytest
import torch
from oracle import operators
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from mnv2_fused import _C
from mnv2_fused._core.geometry import BlockShape, DenseShape
from mnv2_fused.models.layers import Conv2dNormActivation
from mnv2_fused.training import RECOMPUTE


def block_arguments(dtype=torch.float64, **changes):
    def random(*sizes):
        return torch.randn(sizes, dtype=dtype).requires_grad_()

    c_in, c_hidden, c_out = (3, 4, 3) if dtype == torch.float64 else (8, 20, 8)
    expand = changes.pop("expand", True)
    c_in = c_in if expand else c_hidden
    arguments = {
        "x": torch.randn(2, c_in, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_(),
        "expand_weight": random(c_hidden, c_in, 1, 1) if expand else None,
        "expand_gamma": random(c_hidden) if expand else None,
        "expand_beta": random(c_hidden) if expand else None,
        "depthwise_weight": random(c_hidden, 1, 3, 3),
        "depthwise_gamma": random(c_hidden),
        "depthwise_beta": random(c_hidden),
        "project_weight": random(c_out, c_hidden, 1, 1),
        "project_gamma": random(c_out),
        "project_beta": random(c_out),
        "running": [],
        "eps": [1e-5, 1e-3, 1e-2] if expand else [0.0, 1e-3, 1e-2],
        "batch": [expand, True, True],
        "block": BlockShape(4, c_hidden, c_out, 3, 1, 1, (1, 1, 1, 1), expand, expand),
        "bounds": [0.0, 6.0], "group": "", "recompute": "balanced", "save": True,
    }  # fmt: skip
    shape = {name: value for name, value in changes.items() if name in BlockShape._fields}
    arguments |= {name: value for name, value in changes.items() if name not in shape}
    arguments["block"] = arguments["block"]._replace(**shape).fields()
    sizes = [c_hidden if expand else None, c_hidden, c_out]
    for size, batch in zip(sizes, arguments["batch"], strict=True):
        if size is not None and not batch:
            arguments["running"] += [torch.randn(size, dtype=dtype), torch.rand(size, dtype=dtype) + 0.5]
    return tuple(arguments.values())


def dense_arguments(dtype=torch.float64, kernel=3, stride=2, padding=(1, 0, 1, 2), batch=True):
    x = torch.randn(2, 2, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(4, 2, kernel, kernel, dtype=dtype, requires_grad=True)
    gamma, beta = (torch.randn(4, dtype=dtype, requires_grad=True) for _ in range(2))
    running = [] if batch else [torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype) + 0.5]
    dense = DenseShape(2, 4, kernel, stride, tuple(padding)).fields()
    return x, weight, gamma, beta, running, 1e-3, batch, dense, [0.0, 6.0], ""


BLOCK_CHANGES = [
    {},
    {"expand": False, "residual": False},
    {"stride": 2, "padding": (0, 1, 2, 0), "residual": False},
    {"dilation": 2, "padding": (2, 2, 2, 2), "bounds": [-1.0, 1.0]},
    {"batch": [False, True, True]},
    {"batch": [True, False, True], "recompute": "most"},
    {"batch": [True, True, False], "recompute": "least"},
    {"batch": [False, False, False], "recompute": "least", "padding": (2, 3, 1, 4), "residual": False},
    {"recompute": "most", "expand": False, "residual": False, "batch": [False, False, True]},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("changes", BLOCK_CHANGES, ids=str)
def test_blocks_without_a_backward_save_nothing(changes, dtype):
    arguments = block_arguments(dtype, **changes)
    with torch.no_grad():
        y, projected, _, *norms = torch.ops.mnv2_fused.train_block(*arguments)
        y_alone, projected_alone, hidden_alone, *norms_alone = torch.ops.mnv2_fused.train_block(*arguments[:-1], False)
    assert projected.numel() > 0 and projected_alone.numel() == hidden_alone.numel() == 0
    for a, b in zip((y, *norms), (y_alone, *norms_alone), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("changes", BLOCK_CHANGES, ids=str)
def test_vectors_of_any_strides(changes):
    arguments = block_arguments(torch.float32, **changes)

    def spread(t):
        """The same numbers, apart in memory."""
        if isinstance(t, list) and t and isinstance(t[0], torch.Tensor):
            return [spread(u) for u in t]
        if not isinstance(t, torch.Tensor) or t.dim() != 1:
            return t
        return torch.stack([torch.full_like(t, 7.0), t], 1)[:, 1]

    with torch.no_grad():
        expected = torch.ops.mnv2_fused.train_block(*arguments)
        got = torch.ops.mnv2_fused.train_block(*map(spread, arguments))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("changes", BLOCK_CHANGES, ids=str)
def test_float64_is_plain_pytorch(changes):
    arguments = block_arguments(**changes)
    with torch.no_grad():
        y = torch.ops.mnv2_fused.train_block(*arguments)[0]
    x, parameters, running, eps, batch, bounds = arguments[0], arguments[1:10], *arguments[10:13], arguments[14]
    shape, fixed, u = BlockShape.of(x.shape[1], arguments[13]), iter(running), x
    for i, (weight, gamma, beta) in enumerate(zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)):
        if weight is None:
            continue
        if i == 1:
            top, left, bottom, right = shape.padding
            u = torch.nn.functional.pad(u, (left, right, top, bottom))
            u = torch.nn.functional.conv2d(u, weight, None, shape.stride, 0, shape.dilation, shape.c_hidden)
        else:
            u = torch.nn.functional.conv2d(u, weight)
        statistics = (None, None) if batch[i] else (next(fixed), next(fixed))
        u = torch.nn.functional.batch_norm(u, *statistics, gamma, beta, batch[i], 0.0, eps[i])
        u = u if i == 2 else u.clamp(*bounds)
    torch.testing.assert_close(y, u + x if shape.residual else u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", BLOCK_CHANGES, ids=str)
def test_gradcheck_of_blocks(changes):
    arguments = block_arguments(**changes)
    tensors = [a for a in arguments[:10] if a is not None]

    def call(*given):
        given = iter(given)
        return torch.ops.mnv2_fused.train_block(
            *(a if a is None else next(given) for a in arguments[:10]), *arguments[10:]
        )[0]

    assert torch.autograd.gradcheck(call, tensors, eps=1e-7, atol=1e-5, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, (1, 0, 1, 2)), (1, 1, (0,) * 4), (1, 2, (0,) * 4), (3, 1, (2,) * 4), (3, 3, (1, 0, 1, 2))],
)
def test_gradcheck_of_dense_convolutions(kernel, stride, padding, batch):
    arguments = dense_arguments(kernel=kernel, stride=stride, padding=padding, batch=batch)
    assert torch.autograd.gradcheck(
        lambda *given: torch.ops.mnv2_fused.train_dense(*given, *arguments[4:])[0],
        arguments[:4],
        eps=1e-7,
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("changes", BLOCK_CHANGES[:2] + BLOCK_CHANGES[-3:], ids=str)
def test_opcheck_of_blocks(changes, dtype):
    torch.library.opcheck(torch.ops.mnv2_fused.train_block.default, block_arguments(dtype, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"batch": False}, {"kernel": 1, "stride": 1, "padding": (0,) * 4}], ids=str)
def test_opcheck_of_dense_convolutions(options, dtype):
    torch.library.opcheck(torch.ops.mnv2_fused.train_dense.default, dense_arguments(dtype, **options))


@pytest.mark.parametrize("size", [(1, 24, 24), (1, 24, 25), (2, 12, 24), (2, 17, 17)], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_fake_kernels_know_which_way_a_block_goes(size, recompute):
    """Just below and above the most pixels that go channel by channel."""
    n, h, w = size
    below = n * h * w <= 8 * _C.CHANNELS_PIXELS_EACH
    assert below == (size in ((1, 24, 24), (2, 12, 24)))
    x = torch.randn(n, 8, h, w).contiguous(memory_format=torch.channels_last)
    shape = {"stride": 2, "residual": False}
    block = (x, *block_arguments(torch.float32, recompute=recompute, **shape)[1:])
    weight, norm = torch.randn(5, 8, 1, 1), torch.rand(5)
    dense = (x, weight, norm, norm, [], 1e-3, True, DenseShape(8, 5, 1, 1, (0,) * 4).fields(), [0.0, 6.0], "")
    for operator, arguments in ((torch.ops.mnv2_fused.train_block, block), (torch.ops.mnv2_fused.train_dense, dense)):
        with torch.no_grad():
            real = operator(*arguments)
            mode = FakeTensorMode()
            made = operator(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for name, (got, want) in enumerate(zip(made, real, strict=True)):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype), name
    state = real[1]  # of the dense convolution: moments are (8 + 1) * 8 numbers
    assert state.numel() == 6 * 5 + 1 + (0 if below else 72)


def test_conv_norm_activation_trains_plain_by_itself():
    # Only the network reads its last convolution.
    layer = Conv2dNormActivation(4, 8, 1, activation_layer=nn.ReLU6)
    assert operators(lambda: layer(torch.randn(2, 4, 5, 5)).sum().backward()) == []
