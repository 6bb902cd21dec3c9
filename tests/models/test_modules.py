"""InvertedResidual and FusedConv2dNormActivation: right if they run fused, and plain if they must be."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import check, operators, plain, randomize
from torch import nn

from mnv2_fused import InvertedResidual
from mnv2_fused._core.layout import is_channels_last
from mnv2_fused.models.layers import Conv2dNormActivation, Conv2dSame
from mnv2_fused.models.units import FusedConv2dNormActivation

BLOCK, STEM = ["inverted_residual"], ["dense"]


def make_block(inp=8, oup=8, stride=1, expand_ratio=6, x=None, **options):
    block = InvertedResidual(inp, oup, stride, expand_ratio, **options)
    return randomize(block, torch.randn(2, inp, 15, 17) if x is None else x)


def make_stem(**options):
    options = {"stride": 2, "activation_layer": nn.ReLU6, **options}
    return randomize(FusedConv2dNormActivation(3, 16, **options), torch.randn(2, 3, 15, 17))


# ------------------------------------------------------------------------------------------------------ fused, right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expand_ratio", [1, 6, 0.5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("oup", [8, 20])
def test_block(oup, stride, expand_ratio, dtype):
    block = make_block(8, oup, stride, expand_ratio).to(dtype)
    check(block, torch.randn(2, 8, 15, 17).to(dtype), BLOCK)


@pytest.mark.parametrize("make", [make_block, make_stem])
def test_synchronised_batch_norms(make):
    """In inference they are batch norms."""
    unit = nn.SyncBatchNorm.convert_sync_batchnorm(make()).eval()
    assert any(type(module) is nn.SyncBatchNorm for module in unit.modules())
    check(unit, torch.randn(2, 8 if make is make_block else 3, 15, 17), BLOCK if make is make_block else STEM)


@pytest.mark.parametrize("dilation", [2, 4])
def test_dilated_block(dilation):
    check(make_block(dilation=dilation), torch.randn(1, 8, 13, 11), BLOCK)


@pytest.mark.parametrize("size", [(12, 12), (13, 13), (12, 13), (1, 1), (2, 1)])
def test_tensorflow_padding(size):
    block = make_block(oup=16, stride=2, tf_padding=True)
    y = check(block, torch.randn(2, 8, *size), BLOCK)
    assert y.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"conv_layer": Conv2dSame}, {"stride": 1}, {"kernel_size": 5}, {"bias": True}])
def test_stem(options, dtype):
    check(make_stem(**options).to(dtype), torch.randn(2, 3, 16, 19).to(dtype), STEM)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 5), (7, 7), (31, 33)])
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_sizes(size, stride):
    check(make_block(stride=stride), torch.randn(2, 8, *size), BLOCK)
    check(make_stem(), torch.randn(2, 3, *size), STEM)


def test_batch_of_none():
    block, stem = make_block(), make_stem()
    with torch.no_grad():
        for unit, x in ((block, torch.randn(0, 8, 9, 9)), (stem, torch.randn(0, 3, 9, 9))):
            y, expected = unit(x), plain(unit)(x)
            assert y.shape == expected.shape and y.stride() == expected.stride() and y.dtype == expected.dtype
        assert operators(lambda: block(torch.randn(0, 8, 9, 9))) == BLOCK


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, lambda inplace: nn.Hardtanh(-1.5, 2.5)])
def test_activation_bounds(activation):
    block = make_block()
    for sequence in (block.conv[0], block.conv[1]):
        sequence[2] = activation(inplace=True)
    check(block, torch.randn(1, 8, 9, 9), BLOCK)


def test_convolution_biases_and_batch_norm_without_affine():
    block = InvertedResidual(8, 8, 1, 6, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False))
    for sequence, i in ((block.conv[0], 0), (block.conv[1], 0), (block.conv, 2)):
        sequence[i].bias = nn.Parameter(torch.randn(sequence[i].out_channels))
    check(randomize(block, torch.randn(2, 8, 9, 9)), torch.randn(1, 8, 9, 9), BLOCK)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_eps_is_read_at_every_call(eps):
    block, x = make_block(), torch.randn(4, 8, 33, 33)
    check(block, x, BLOCK)
    block.conv[1][1].eps = eps
    block.conv[0][1].running_var.fill_(1e-2)
    check(block, x, BLOCK)


def test_fp32_batch_norm_in_a_16_bit_block():
    block = make_block().to(torch.bfloat16)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    check(block, torch.randn(1, 8, 9, 9).bfloat16(), BLOCK)


def _rewrite_stride(block):
    block.conv[1][0].stride = (2, 2)


def _rewrite_dilation(block):
    conv = block.conv[1][0]
    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)


def _rewrite_padding(block):
    block.conv[1][0].padding = (2, 0)


def _drop_shortcut(block):
    block.use_res_connect = False


@pytest.mark.parametrize("rewrite", [_rewrite_stride, _rewrite_dilation, _rewrite_padding, _drop_shortcut])
@pytest.mark.parametrize("tf_padding", [False, True])
def test_rewritten_child_is_seen(rewrite, tf_padding):
    # Segmentation libraries rewrite convolutions in place, here between two calls.
    block, x = make_block(8, 16, stride=2, tf_padding=tf_padding), torch.randn(1, 8, 12, 13)
    before = check(block, x, BLOCK)
    rewrite(block)
    if rewrite is _drop_shortcut:
        block.use_res_connect = False
        assert torch.equal(before, check(block, x, BLOCK))
    else:
        check(block, x, BLOCK)


def test_replaced_child_of_the_same_kind_is_seen():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    check(block, x, BLOCK)
    conv = nn.Conv2d(48, 8, 1, bias=True)
    block.conv[2] = conv
    check(block, x, BLOCK)
    block.conv[1] = make_block().conv[1]
    check(block, x, BLOCK)
    block.conv = make_block().conv
    check(block, x, BLOCK)


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("weights_channels_last", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("oup", [8, 16])
def test_memory_format_is_that_of_plain(oup, channels_last, weights_channels_last):
    for unit, x in ((make_block(8, oup), torch.randn(2, 8, 9, 9)), (make_stem(), torch.randn(2, 3, 9, 9))):
        if weights_channels_last:
            unit = unit.to(memory_format=torch.channels_last)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert unit(x).stride() == plain(unit)(x).stride()
        check(unit, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 16, 21, 21)[:, ::2],
        lambda: torch.randn(2, 8, 42, 42)[:, :, ::2, 3:24],
        lambda: torch.randn(1, 8, 21, 21).expand(3, 8, 21, 21),
        lambda: torch.randn(64, 8, 1, 1).expand(64, 8, 9, 9),
        lambda: torch.randn(2, 21, 21, 8).permute(0, 3, 1, 2)[:, :, 1:20],
        lambda: torch.randn(21, 21, 8, 2).permute(3, 2, 0, 1),
        lambda: torch.randn(1 + 2 * 8 * 441)[1:].view(2, 8, 21, 21),
    ],
)
def test_strides(make):
    x = make()
    check(make_block(), x, BLOCK)
    check(make_stem(), x[:, :3], STEM)


def test_is_channels_last_is_pytorchs_rule():
    from torch._prims_common import suggest_memory_format

    for n, c, h, w in itertools.product((1, 2), (1, 3), (1, 2), (1, 2)):
        x = torch.randn(n, c, 2 * h, 2 * w)
        for y in (x, x.contiguous(memory_format=torch.channels_last)):
            for z in (
                y,
                y[:, :, :h, :w],
                y[:, :, ::2],
                y.permute(0, 1, 3, 2),
                y[:1].expand(n, c, 2 * h, 2 * w),
            ):
                assert is_channels_last(z) == (suggest_memory_format(z) == torch.channels_last), z.stride()


def test_input_is_left_alone():
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 8, 9, 9).contiguous(memory_format=format)
        before = x.clone()
        with torch.no_grad():
            make_block(oup=8)(x)
        assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("expand_ratio", [1, 6])
def test_nan_and_inf_go_through_as_in_plain(value, expand_ratio):
    block = make_block(expand_ratio=expand_ratio)
    x = torch.randn(2, 8, 12, 12)
    x[0, 3, 5, 6] = value
    with torch.no_grad():
        y, expected = block(x), plain(block)(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    check(block, x)
    assert y.isfinite().any()


def test_nan_in_a_weight_goes_through():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block.conv[2].weight.data[3, 5] = float("nan")
    with torch.no_grad():
        assert torch.equal(block(x).isnan(), plain(block)(x).isnan())


def test_same_bits_for_any_number_of_threads_and_in_every_run():
    block, x = make_block(32, 32, x=torch.randn(1, 32, 9, 9)), torch.randn(1, 32, 28, 28)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            expected = block(x)
            for n in (1, 2, 3, 1):
                torch.set_num_threads(n)
                assert torch.equal(block(x), expected)
    finally:
        torch.set_num_threads(threads)


def test_calls_from_eight_threads_at_once():
    block = make_block()
    inputs = [torch.randn(1, 8, 9 + i, 9) for i in range(8)]

    def run(x):
        with torch.no_grad():
            return block(x)

    expected = [run(x) for x in inputs]
    block = pickle.loads(pickle.dumps(block))  # the copy has no packed weights yet
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for y, e in zip(pool.map(run, inputs), expected, strict=True):
                assert torch.equal(y, e)


# ---------------------------------------------------------------------------------------------- copies and scripts


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda b: pickle.loads(pickle.dumps(b)), lambda b: _saved(b)],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_independent_and_right(copied):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    y = check(block, x, BLOCK)
    other = copied(block)
    assert torch.equal(check(other, x, BLOCK), y)
    assert other._cache is not block._cache and other._cache.name != block._cache.name
    if copied is not copy.copy:
        other.conv[2].weight.data.mul_(2)
        assert torch.equal(check(block, x, BLOCK), y)
        assert not torch.equal(check(other, x, BLOCK), y)


def _saved(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_pickle_holds_no_packed_weights():
    block = make_block(32, 32, x=torch.randn(1, 32, 9, 9))
    before = len(pickle.dumps(block))
    check(block, torch.randn(1, 32, 9, 9))
    assert len(pickle.dumps(block)) == before


def test_compiled_state_is_not_copied():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block.compile(backend="eager")
    with torch.no_grad():
        block(x)
    assert copy.deepcopy(block)._compiled_call_impl is None
    pickle.dumps(block)


def test_script():
    stem = make_stem(conv_layer=Conv2dSame)
    for unit, x in ((make_block(), torch.randn(2, 8, 9, 9)), (stem, torch.randn(2, 3, 8, 9))):
        with torch.no_grad():
            assert torch.equal(torch.jit.script(unit)(x), plain(unit)(x))


def test_fx_trace_holds_plain_modules():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    traced = torch.fx.symbolic_trace(block)
    assert any(node.op == "call_module" for node in traced.graph.nodes)
    with torch.no_grad():
        assert torch.equal(traced(x), plain(block)(x))


def test_cache_dies_with_its_module():
    block = make_block()
    check(block, torch.randn(1, 8, 9, 9))
    cache = weakref.ref(block._cache)
    gc.disable()
    try:
        del block
        assert cache() is None
    finally:
        gc.enable()


def test_conv_norm_activation_takes_torchvisions_arguments():
    layer = Conv2dNormActivation(4, 8, (3, 5), dilation=2, norm_layer=None, activation_layer=None, inplace=None)
    assert layer[0].padding == (2, 4) and layer[0].bias is not None and len(layer) == 1 and layer.out_channels == 8
    assert Conv2dNormActivation(4, 8)[0].bias is None


def test_conv2d_same_agrees_with_explicit_padding():
    conv, x = Conv2dSame(3, 4, 3, stride=2), torch.randn(1, 3, 8, 9)
    expected = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 0, 1)), conv.weight, conv.bias, stride=2)
    assert torch.equal(conv(x), expected)
    assert list(conv.state_dict()) == list(nn.Conv2d(3, 4, 3).state_dict())
