"""Training of blocks, stem and last convolution: output, gradients and statistics right, in every mode there is."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from oracle import assert_close, check_training, decided, operators, plain, randomize, step
from test_kernels import network_blocks
from torch import nn

from mnv2_fused import InvertedResidual
from mnv2_fused.models.layers import Conv2dSame
from mnv2_fused.models.units import FusedConv2dNormActivation
from mnv2_fused.training import RECOMPUTE

pytestmark = pytest.mark.usefixtures("both_ways")

BLOCK = ["train_block", "train_block_backward"]
DENSE = ["train_dense", "train_dense_backward"]


def make_block(
    inp=8, oup=8, hidden=24, *, kernel=3, stride=1, dilation=1, padding=None, same=False, activation=nn.ReLU6,
    norm=nn.BatchNorm2d, x=None,
):  # fmt: skip
    """A block in training mode; without expansion if `hidden` is None."""
    block = InvertedResidual(inp, oup, 1, 1 if hidden is None else hidden / inp + 1e-9, norm)
    depthwise = block.conv[-3]
    channels = depthwise[0].in_channels
    assert hidden in (None, channels)
    padding = (kernel - 1) // 2 * dilation if padding is None else padding
    make_conv = Conv2dSame if same else nn.Conv2d
    depthwise[0] = make_conv(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
    block.stride, block.use_res_connect = stride, stride == 1 and inp == oup and padding == (kernel - 1) // 2 * dilation
    for sequence in block.conv[:-2]:
        sequence[2] = activation(inplace=True)
    return randomize(block, torch.randn(2, inp, 17, 15) if x is None else x).train()


def make_stem(c_in=3, c_out=16, **options):
    options = {"stride": 2, "activation_layer": nn.ReLU6, **options}
    x = torch.randn(2, c_in, 15, 17)
    return randomize(FusedConv2dNormActivation(c_in, c_out, **options), x).train()


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


# ------------------------------------------------------------------------------------------------------------ shapes


def small_blocks():
    """Every distinct block of the network, at sizes that leave few activations."""
    found = {(5 if shape[2] > 200 else 9, *shape[1:]) for shape in network_blocks()}
    return list(zip(sorted(found), itertools.cycle(RECOMPUTE)))


@pytest.mark.parametrize(("shape", "recompute"), small_blocks(), ids=str)
def test_blocks_of_the_network(shape, recompute):
    size, c_in, c_hidden, c_out, stride, has_expand = shape
    x = torch.randn(8, c_in, size, size)
    block = make_block(c_in, c_out, c_hidden if has_expand else None, stride=stride, x=x)
    block.recompute = recompute
    check_training(block, x)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("c_hidden", [1, 15, 16, 17, 47, 48, 49, 95, 97, 385, None])
def test_hidden_channels_around_a_chunk(c_hidden, recompute):
    block = make_block(8, 12, c_hidden)
    if c_hidden == 1:
        block.conv[3].eval()  # else the gradient of what it scales by one number is 0
    block.recompute = recompute
    check_training(block, torch.randn(2, 8, 5, 6))


@pytest.mark.parametrize("channels", [1, 2, 5, 7, 15, 16, 17, 31, 33, 47, 49, 63, 65])
def test_channels_around_a_vector(channels):
    check_training(make_block(channels, 12, 20), torch.randn(2, channels, 5, 6))
    check_training(make_block(6, channels, 20), torch.randn(2, 6, 6, 5))
    check_training(make_block(channels, channels, 12 if channels < 16 else 9), torch.randn(2, channels, 6, 5))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [*range(1, 21), 56, 113])
def test_widths_and_heights_around_a_tile_and_a_strip(width, stride):
    check_training(make_block(4, 6, 20, stride=stride), torch.randn(2, 4, 5, width))
    check_training(make_block(4, 4, 20, stride=stride), torch.randn(2, 4, width, 4))


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(itertools.product([1, 3, 5, 7], [1, 2, 3], [1, 2, 4])))
def test_kernel_stride_dilation(kernel, stride, dilation):
    block = make_block(5, 5, 20, kernel=kernel, stride=stride, dilation=dilation)
    block.recompute = RECOMPUTE[(kernel // 2 + stride + dilation) % 3]
    check_training(block, torch.randn(2, 5, 13, 11))


@pytest.mark.parametrize("hidden", [20, None])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), (3, 1), 5])
def test_padding(padding, stride, hidden):
    check_training(make_block(6, 6, hidden, stride=stride, padding=padding), torch.randn(2, 6, 8, 9))


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (1, 2), (5, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_of_tensorflow(kernel, size):
    block = make_block(6, 10, 20, kernel=kernel, stride=2, padding=0, same=True)
    check_training(block, torch.randn(3, 6, *size))
    stem = make_stem(kernel_size=kernel, conv_layer=Conv2dSame)
    check_training(stem, torch.randn(3, 3, *size), DENSE)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU6, partial(nn.Hardtanh, -1.0, 1.5), partial(nn.Hardtanh, 0.5, 2.0)]
)
def test_activation_bounds(activation, recompute):
    for hidden in (20, None):
        block = make_block(6, 6, hidden, activation=activation)
        block.recompute = recompute
        check_training(block, torch.randn(2, 6, 7, 7))


@pytest.mark.parametrize("hidden", [4, 6, 11])
def test_no_more_hidden_channels_than_input_channels(hidden):
    check_training(make_block(12, 12, hidden), torch.randn(2, 12, 7, 7))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("size", [(40, 3, 4), (17, 7, 1), (9, 2, 2), (300, 1, 1)])
def test_many_images(size, recompute):
    batch, h, w = size
    block = make_block(8, 8, 20)
    block.recompute = recompute
    check_training(block, torch.randn(batch, 8, h, w))


@pytest.mark.parametrize("stride", [1, 2])
def test_inputs_far_from_zero(stride):
    x = 50 + 0.3 * torch.randn(3, 8, 9, 9)
    check_training(make_block(8, 8, 20, stride=stride, x=x), x, margin=1e-4)
    image = 50 + 0.1 * torch.randn(3, 3, 9, 9)
    stem = randomize(FusedConv2dNormActivation(3, 8, stride=stride, activation_layer=nn.ReLU6), image).train()
    check_training(stem, image, DENSE, margin=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "c_in", "c_out"), [
    (3, 2, 3, 16), (3, 2, 3, 32), (3, 2, 3, 48), (3, 1, 4, 5), (1, 1, 20, 40), (1, 2, 5, 9), (5, 2, 2, 17),
    (7, 3, 3, 8),
])  # fmt: skip
def test_dense_convolutions(kernel, stride, c_in, c_out):
    for activation in (nn.ReLU6, nn.ReLU):
        stem = make_stem(c_in, c_out, kernel_size=kernel, stride=stride, activation_layer=activation)
        for size in ((9, 8), (7, 16)):
            check_training(stem, torch.randn(2, c_in, *size), DENSE)
            check_training(stem, torch.randn(2, c_in, *size), DENSE, wants_input=False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("oup", [8, 12])
def test_memory_formats(oup, channels_last):
    format = torch.channels_last if channels_last else torch.contiguous_format
    check_training(make_block(8, oup), torch.randn(2, 8, 6, 7).contiguous(memory_format=format))
    check_training(make_stem(), torch.randn(2, 3, 8, 9).contiguous(memory_format=format), DENSE)
    block = make_block(8, oup).to(memory_format=torch.channels_last)
    check_training(block, torch.randn(2, 8, 6, 7).contiguous(memory_format=format))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 16, 7, 7)[:, ::2],
        lambda: torch.randn(2, 8, 14, 14)[:, :, ::2, 3:9],
        lambda: torch.randn(7, 6, 8, 2).permute(3, 2, 0, 1),
        lambda: torch.randn(1 + 2 * 8 * 42)[1:].view(2, 8, 7, 6),
        lambda: torch.randn(12, 8, 1, 1).expand(12, 8, 3, 3),
    ],
)
def test_strides(make):
    # The memory format of a gradient with respect to such an input is nobody's business.
    check_training(make_block(), make(), formats=False)
    check_training(make_stem(), make()[:, :3], DENSE, formats=False)


def test_gradient_of_any_strides():
    block, x = make_block(8, 12), decided(make_block(8, 12), torch.randn(2, 8, 6, 6))
    dy = torch.randn(2, 12, 6, 6)
    results = []
    for given in (
        dy,
        dy.contiguous(memory_format=torch.channels_last),
        dy.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        torch.cat([dy, dy], 1).contiguous(memory_format=torch.channels_last)[:, :12],
    ):
        block.zero_grad()
        block(x).backward(given)
        results.append([p.grad.clone() for p in block.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    outputs = [plain(block), plain(block).double()]
    for module in outputs:
        y = module(x.to(module.conv[-1].weight.dtype))
        y.sum().backward()  # its gradient is one number, expanded
    block.zero_grad()
    block(x).sum().backward()
    for (name, p), a, b in zip(block.named_parameters(), *(m.parameters() for m in outputs), strict=True):
        if "conv.3" in name:
            assert_close(p.grad, a.grad, b.grad, 3.0)


# ------------------------------------------------------------------------------------------- states of the batch norms


def cumulative(block):
    for norm in norms(block):
        norm.momentum = None


def without_affine(block):
    for i, norm in enumerate(norms(block)):
        if i != 1:
            norm.affine, norm.weight, norm.bias = False, None, None


def without_bias(block):
    for norm in norms(block):
        norm.bias = None


def without_statistics(block):
    for norm in norms(block):
        norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = (
            False,
            None,
            None,
            None,
        )


STATES = {
    "momentum 0.3": lambda block: [setattr(norm, "momentum", 0.3) for norm in norms(block)],
    "momentum 0": lambda block: [setattr(norm, "momentum", 0.0) for norm in norms(block)],
    "cumulative": cumulative,
    "eps": lambda block: [setattr(norm, "eps", 0.1 * i) for i, norm in enumerate(norms(block), 1)],
    "no statistics": without_statistics,
    "no statistics, eval": lambda block: (without_statistics(block), block.eval()),
    "statistics not tracked": lambda block: [setattr(norm, "track_running_stats", False) for norm in norms(block)],
    "no affine": without_affine,
    "no bias": without_bias,
    "eval": lambda block: block.eval(),
    "eval batch norms": lambda block: [norm.eval() for norm in norms(block)],
}  # fmt: skip


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("hidden", [20, None])
@pytest.mark.parametrize("state", STATES)
def test_states(state, hidden, recompute):
    block = make_block(6, 6, hidden)
    block.recompute = recompute
    STATES[state](block)
    for _ in range(2):
        check_training(block, torch.randn(2, 6, 7, 6))


@pytest.mark.parametrize("state", STATES)
def test_states_of_a_dense_convolution(state):
    stem = make_stem()
    STATES[state](stem)
    for _ in range(2):
        check_training(stem, torch.randn(2, 3, 9, 10), DENSE)


@pytest.mark.parametrize("recompute", ["most", "least"])
@pytest.mark.parametrize("modes", list(itertools.product([False, True], repeat=3)))
def test_every_mixture_of_modes(modes, recompute):
    block = make_block(6, 6, 20)
    block.recompute = recompute
    for norm, mode in zip(norms(block), modes, strict=True):
        norm.train(mode)
    before = [norm.num_batches_tracked.item() for norm in norms(block)]
    check_training(block, torch.randn(2, 6, 7, 6))
    # The step, and no other call.
    assert [n.num_batches_tracked.item() for n in norms(block)] == [b + m for b, m in zip(before, modes, strict=True)]
    if not modes[0]:
        block = make_block(6, 6, None)
        for norm, mode in zip(norms(block), modes[1:], strict=True):
            norm.train(mode)
        check_training(block, torch.randn(2, 6, 7, 6))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants_input", [True, False])
@pytest.mark.parametrize("trained", [[0], [1], [2], [3], [4], [5], [6], [7], [8], [0, 8], [3, 4, 6], []])
def test_frozen_parameters(trained, wants_input, training):
    if not trained and not wants_input:
        pytest.skip("nothing to train")
    block = make_block(6, 6, 20).train(training)
    for i, p in enumerate(block.parameters()):
        p.requires_grad_(i in trained)
    found = check_training(block, torch.randn(2, 6, 7, 6), wants_input=wants_input)
    assert sum(name.startswith("gradient") for name in found) == len(trained) + wants_input


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 2], []])
def test_frozen_parameters_of_a_dense_convolution(trained, training):
    for wants_input in (True, False) if trained else (True,):
        stem = make_stem().train(training)
        for i, p in enumerate(stem.parameters()):
            p.requires_grad_(i in trained)
        check_training(stem, torch.randn(2, 3, 9, 10), DENSE, wants_input=wants_input)


@torch.no_grad()
def test_statistics_without_gradients():
    for unit, shape, fused in ((make_block(), (3, 8, 7, 7), BLOCK), (make_stem(), (3, 3, 7, 7), DENSE)):
        x, reference = torch.randn(shape), plain(unit)
        exact, found = copy.deepcopy(reference).double(), []
        tracked = norms(unit)[0].num_batches_tracked.item()
        assert operators(lambda unit=unit, x=x, found=found: found.append(unit(x))) == fused[:1]
        assert norms(unit)[0].num_batches_tracked == tracked + 1
        assert_close(found[0], reference(x), exact(x.double()), 3.0)
        for (name, got), a, b in zip(unit.named_buffers(), reference.buffers(), exact.buffers(), strict=True):
            if "num" not in name:
                assert_close(got, a, b, 3.0)


def outcome(unit, x):
    try:
        y = unit(x)
        return tuple(y.shape), [b.tolist() for b in unit.buffers()]
    except Exception as error:
        return type(error), str(error), [b.tolist() for b in unit.buffers()]


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (0, 8, 5, 5), (1, 8, 2, 2), (2, 7, 5, 5), (2, 8, 0, 5), (8, 5, 5)])
def test_errors_are_those_of_plain(shape):
    # One value a channel: the first norm has four of them in (1, 8, 2, 2), the others behind a stride have one.
    for block in (make_block(stride=2), make_block(8, 8, None)):
        if shape == (1, 8, 2, 2) and block.stride == 1:
            continue
        reference, x = plain(block), torch.randn(shape)
        assert outcome(block, x) == outcome(reference, x)
    stem, x = make_stem(8, 4), torch.randn(shape)
    reference = plain(stem)
    assert outcome(stem, x) == outcome(reference, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden", [20, None])
def test_nan_where_plain_gives_nan(hidden, training, value):
    block = make_block(6, 6, hidden).train(training)
    x = torch.randn(2, 6, 9, 9)
    x[1, 2, 4, 4] = value
    theirs, ours = step(plain(block), x), step(block, x)
    for name, expected in theirs.items():
        # Whether a gradient goes through a clamp of NaN depends in PyTorch on where in a vector it lies.
        if "gradient" not in name or name == f"gradient of conv.{len(block.conv) - 2}.weight":
            assert torch.equal(ours[name].isfinite(), expected.isfinite()), name


def test_nan_in_the_gradient_stays():
    block, x = make_block(), torch.randn(2, 8, 6, 6, requires_grad=True)
    dy = torch.randn(2, 8, 6, 6)
    dy[0, 0, 0, 0] = float("nan")
    block(x).backward(dy)
    assert x.grad.isnan().any() and block.conv[3].bias.grad[0].isnan() and block.conv[3].bias.grad[1:].isfinite().all()


# ------------------------------------------------------------------------------------------------------ lower precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("oup", "hidden"), [(8, 48), (12, 48), (8, None)])
def test_autocast(oup, hidden, training, dtype):
    context = partial(torch.autocast, "cpu", dtype)
    block, x = make_block(8, oup, hidden).train(training), torch.randn(4, 8, 12, 12)
    check_training(block, x, context=context, margin=0)
    check_training(make_stem().train(training), torch.randn(4, 3, 24, 24), DENSE, context=context, margin=0)
    with torch.no_grad(), context():
        assert operators(lambda: block(x)) == BLOCK[:1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norms_in_float32", [True, False])
def test_16_bits(norms_in_float32, dtype):
    for unit, shape, fused in ((make_block(8, 8, 48), (4, 8, 12, 12), BLOCK), (make_stem(), (4, 3, 24, 24), DENSE)):
        unit = unit.to(dtype)
        if norms_in_float32:
            for norm in norms(unit):
                norm.float()
        check_training(unit, torch.randn(shape).to(dtype), fused, margin=0)
