"""The functions of mnv2_fused.functional: right values, clear errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_close, operators

import mnv2_fused
from mnv2_fused import functional as ops
from mnv2_fused import reference
from mnv2_fused._core.geometry import same_padding


def weights(c_in=8, c_hidden=24, c_out=8, kernel=3, dtype=torch.float32, expand=True):
    shapes = [(c_hidden, 1, kernel, kernel), (c_hidden,), (c_out, c_hidden, 1, 1), (c_out,)]
    tensors = [torch.randn(shape) for shape in [(c_hidden, c_in, 1, 1), (c_hidden,), *shapes]]
    tensors = [t.to(dtype) for t in tensors]
    return tensors if expand else [None, None, *tensors[2:]]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "activation"),
    [
        (3, 1, 1, None, (0.0, 6.0)),
        (3, 2, 1, (0, 0, 1, 1), (0.0, 6.0)),
        (3, 1, 2, (1, 2, 3, 0), (0.0, float("inf"))),
        (5, 2, 1, 2, (-1.0, 2.0)),
        (7, 1, 1, (3, 2), (0.0, 6.0)),
        (1, 1, 1, 0, (0.0, 6.0)),
    ],
)
def test_inverted_residual(kernel, stride, dilation, padding, activation, dtype):
    w, x = weights(kernel=kernel, dtype=dtype), torch.randn(2, 8, 12, 13).to(dtype)
    options = {"stride": stride, "dilation": dilation, "activation": activation}
    y = mnv2_fused.inverted_residual(x, *w, padding=padding, **options)
    pads = (kernel - 1) // 2 * dilation if padding is None else padding
    pads = (pads,) * 4 if isinstance(pads, int) else pads * (4 // len(pads))
    options["residual"] = y.shape == x.shape and stride == 1
    plain = reference.inverted_residual(x, *w, padding=pads, **options)
    assert_close(y, plain, reference.inverted_residual(x.double(), *double(w), padding=pads, **options))
    assert y.is_contiguous()
    y = mnv2_fused.inverted_residual(x.contiguous(memory_format=torch.channels_last), *w, padding=padding, **options)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_without_expansion_and_without_biases():
    w, x = weights(c_in=24, expand=False), torch.randn(1, 24, 9, 9)
    w[3] = w[5] = None
    y = mnv2_fused.inverted_residual(x, *w)
    options = {"padding": (1, 1, 1, 1), "residual": False}
    exact = reference.inverted_residual(x.double(), *double(w), **options)
    assert_close(y, reference.inverted_residual(x, *w, **options), exact)


def test_packed_once():
    w, x = weights(), torch.randn(2, 8, 9, 9)
    packed = ops.pack_block(*w)
    assert torch.equal(ops.run_block(x, packed, residual=True), mnv2_fused.inverted_residual(x, *w))
    assert (packed.c_in, packed.c_hidden, packed.c_out, packed.kernel, packed.has_expand) == (8, 24, 8, 3, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stem_and_head(dtype):
    w, b, x = torch.randn(16, 3, 3, 3).to(dtype), torch.randn(16).to(dtype), torch.randn(2, 3, 13, 14).to(dtype)
    y = ops.run_dense(x, ops.pack_dense(w, b), padding=(0, 0, 1, 1))
    options = {"padding": (0, 0, 1, 1)}
    exact = reference.dense(x.double(), w.double(), b.double(), **options)
    assert_close(y, reference.dense(x, w, b, **options), exact)
    w = [torch.randn(shape).to(dtype) for shape in [(40, 16, 1, 1), (40,), (7, 40), (7,)]]
    z = ops.run_head(y, ops.pack_head(*w))
    assert_close(z, reference.head(y, *w), reference.head(y.double(), *double(w)))


def test_reference_is_the_module():
    block = mnv2_fused.InvertedResidual(8, 8, 1, 3).double().eval()
    folded = []
    for conv, norm in ((block.conv[0][0], block.conv[0][1]), (block.conv[1][0], block.conv[1][1]), block.conv[2:]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded += [conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale]
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    y = reference.inverted_residual(x, *folded, padding=(1, 1, 1, 1), residual=True)
    torch.testing.assert_close(y, block(x), rtol=1e-12, atol=1e-12)


def test_same_padding_is_that_of_tensorflow():
    # (height, stride, dilation): top, bottom
    expected = {(8, 2, 1): (0, 1), (9, 2, 1): (1, 1), (1, 2, 1): (1, 1), (2, 2, 1): (0, 1), (8, 1, 1): (1, 1)}
    expected |= {(8, 1, 4): (4, 4), (224, 2, 1): (0, 1)}
    for (h, stride, dilation), (top, bottom) in expected.items():
        assert same_padding(h, 9, 3, stride, dilation)[::2] == (top, bottom)
        assert same_padding(9, h, 3, stride, dilation)[1::2] == (top, bottom)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_fold_bn(given):
    conv = torch.nn.Conv2d(4, 6, 3, bias=given[0]).double()
    norm = torch.nn.BatchNorm2d(6, eps=1e-3).double().eval()
    for t in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(t)
    norm.running_var.uniform_(0.1, 2)
    gamma, beta = (norm.weight if given[1] else None), (norm.bias if given[2] else None)
    w, b = ops.fold_bn(conv.weight, conv.bias, gamma, beta, norm.running_mean, norm.running_var, 1e-3)
    assert w.dtype == b.dtype == torch.float32 and w.is_contiguous() and not w.requires_grad
    if not given[1]:
        torch.nn.init.ones_(norm.weight)
    if not given[2]:
        torch.nn.init.zeros_(norm.bias)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    got = torch.nn.functional.conv2d(x, w.double(), b.double())
    torch.testing.assert_close(got, norm(conv(x)), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_the_reference():
    w, x = weights(), torch.randn(1, 8, 9, 9, requires_grad=True)
    assert operators(lambda: mnv2_fused.inverted_residual(x, *w)) == []
    mnv2_fused.inverted_residual(x, *w).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert operators(lambda: mnv2_fused.inverted_residual(x, *w)) == ["inverted_residual"]


@pytest.mark.parametrize("call", [lambda f, x: torch.vmap(f)(x[None])[0], lambda f, x: f(x.double()).float()])
def test_elsewhere_it_is_the_reference(call):
    w, x = weights(), torch.randn(1, 8, 9, 9)

    def run(y):
        return mnv2_fused.inverted_residual(y, *(t.to(y.dtype) for t in w))

    assert operators(lambda: call(run, x)) == []
    torch.testing.assert_close(call(run, x), run(x), rtol=1e-3, atol=1e-3)


def _call(**changes):
    names = ["expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias"]
    arguments = {"x": torch.randn(2, 8, 9, 9), **dict(zip(names, weights(), strict=True)), **changes}
    return mnv2_fused.inverted_residual(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1]}, TypeError, "x must be a torch.Tensor; got [1]"),
        ({"x": torch.ones(1, 8, 9, 9, dtype=torch.int64)}, TypeError, "x must be of a floating-point dtype; got"),
        ({"x": torch.randn(8, 9, 9)}, ValueError, "x must have the shape (any, 8, any, any); got a tensor of"),
        ({"x": torch.randn(2, 7, 9, 9)}, ValueError, "x must have the shape (any, 8, any, any); got"),
        ({"x": torch.randn(2, 8, 0, 9)}, ValueError, "x must have at least one pixel"),
        ({"x": torch.randn(2, 8, 9, 9).double()}, TypeError, "expand_weight must have x's dtype and device, torch"),
        ({"expand_weight": torch.randn(20, 8, 1, 1)}, ValueError, "expand_weight must have the shape (24, any, 1, 1)"),
        ({"expand_weight": None}, ValueError, "expand_bias must be None if expand_weight is"),
        ({"expand_bias": torch.randn(8)}, ValueError, "expand_bias must have the shape (24); got a tensor of shape"),
        ({"depthwise_weight": torch.randn(24, 2, 3, 3)}, ValueError, "depthwise_weight must have the shape (any, 1"),
        ({"depthwise_weight": torch.randn(24, 1, 2, 2)}, ValueError, "depthwise_weight must have a square kernel"),
        ({"project_weight": torch.randn(8, 20, 1, 1)}, ValueError, "project_weight must have the shape (any, 24"),
        ({"project_bias": 3}, TypeError, "project_bias must be a torch.Tensor; got 3"),
        ({"stride": 0}, ValueError, "stride must be a positive integer; got 0"),
        ({"dilation": 1.5}, ValueError, "dilation must be a positive integer; got 1.5"),
        ({"padding": (1, 1, 1)}, ValueError, "padding must be 1, 2 or 4 integers (top, left, bottom, right)"),
        ({"padding": -1}, ValueError, "none negative; got -1"),
        ({"padding": 0, "dilation": 8}, ValueError, "x must be at least as large as the kernel's reach of 17"),
        ({"residual": True, "stride": 2}, ValueError, "residual=True needs stride 1"),
        ({"activation": (6, 0)}, ValueError, "activation must satisfy lo <= hi; got (6, 0)"),
        ({"activation": 6}, TypeError, "activation must be a pair of numbers (lo, hi); got 6"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error) as raised:
        _call(**changes)
    assert str(raised.value).startswith("inverted_residual: ")
    assert message in str(raised.value)


def test_wrong_packed_weights():
    packed, x = ops.pack_dense(torch.randn(8, 3, 3, 3), None), torch.randn(1, 3, 9, 9)
    with pytest.raises(TypeError, match="run_block: packed must be a PackedBlock; got a PackedDense"):
        ops.run_block(x, packed)
    with pytest.raises(ValueError, match=r"run_dense: x must have the shape \(any, 3, any, any\)"):
        ops.run_dense(x[:, :2], packed)
    with pytest.raises(TypeError, match=r"run_dense: x must be on the device of packed, cpu; got .* meta"):
        ops.run_dense(x.to("meta"), packed)
    with pytest.raises(ValueError, match="run_dense: x must not require a gradient"):
        ops.run_dense(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match=r"pack_head: classifier_weight must have the shape \(any, 40\)"):
        ops.pack_head(torch.randn(40, 8, 1, 1), None, torch.randn(5, 39), None)
