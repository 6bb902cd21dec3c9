"""Each pass that training is made of, fused, against its specification in float64. And the specification in C++ that
operators on float64 inputs run on, against that in PyTorch.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from compiled_passes import CpuPasses, SpecifiedPasses
from oracle import decide
from reference_passes import ReferencePasses
from torch import Tensor

from mnv2_fused._core.geometry import BlockShape, DenseShape

INFINITY = float("inf")


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, Tensor) else value


def image(*sizes: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(sizes) + mean).contiguous(memory_format=torch.channels_last)


def norm(channels: int) -> Tensor:
    return vector(6, channels)


def vector(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


KINDS = ((CpuPasses, None), (ReferencePasses, torch.float32), (ReferencePasses, torch.float64))


def present(results, kind) -> dict[str, Tensor]:
    """Results that are not None. Those of the kernels are judged in float32, also if they are float64."""
    found = {str(i): r for i, r in enumerate(results) if r is not None}
    return {i: r.float() for i, r in found.items()} if kind is CpuPasses else found


def assert_specified(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max().clamp_min(1.0)
        torch.testing.assert_close(got[name] / scale, want / scale, rtol=0, atol=1e-11, equal_nan=True)


def check(method: str, make, results: int | None = None) -> None:
    """Runs a pass on the arguments that `make` gives, in all three ways. Compares the first `results`, or all."""

    def take():
        arguments, found = make(), []
        for kind, dtype in KINDS:
            given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            given = given if dtype is None else [cast(a, dtype) for a in given]
            found.append(run(kind, given))
        exactly = [cast(a.clone() if isinstance(a, Tensor) else a, torch.float64) for a in arguments]
        assert_specified(run(SpecifiedPasses, exactly), found[-1])
        return tuple(found)

    def run(kind, given):
        result = getattr(kind(), method)(*given)
        return present([result] if isinstance(result, Tensor) else list(result)[:results], kind)

    decide(take(), take)


CHANNELS = [1, 3, 7, 8, 15, 16, 17, 32, 33, 47, 48, 49, 96, 100, 320]
SIZES = [(1, 1, 1), (2, 1, 1), (2, 3, 5), (1, 40, 40), (40, 3, 4), (5, 18, 16)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("c", CHANNELS)
def test_passes_over_maps(c, size):
    n, h, w = size

    def a():
        return image(n, c, h, w)

    # Of a few pixels PyTorch's sums have hardly any error. test_training has them.
    if n * h * w > 50 and (c <= 100 or n * h * w < 400):
        check("moments", lambda: (a(),))
        check("moments", lambda: (a(), True))
        check("map_moments", lambda: (a(),))
    check("map_products", lambda: (a(), a(), 0.1 * vector(c)))
    check("map_combine", lambda: (a(), vector(c), vector(c)))
    check("map_combine", lambda: (a(), vector(c), vector(c), a(), vector(c)))
    check("map_combine", lambda: (a(), vector(c), vector(c), None, None, a()))
    check("map_combine", lambda: (a(), vector(c), vector(c), a(), vector(c), a()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("c", "c_out"), [(1, 1), (3, 7), (7, 3), (16, 96), (17, 33), (49, 20), (100, 48), (320, 40)])
def test_correction_of_a_linear_map(c, c_out, size):
    n, h, w = size

    def make(residual, wants_input=True):
        weight, square = torch.randn(c_out, c), torch.randn(c, c).double()
        dx, x = (image(n, c, h, w) for _ in range(2))
        return (
            torch.randn(c_out, c), dx if wants_input else None, norm(c_out), weight, vector(c_out), vector(c_out),
            square, 10.0, 0.5, x, image(n, c, h, w) if residual else None,
        )  # fmt: skip

    check("linear_correction", lambda: make(False))
    check("linear_correction", lambda: make(True))
    check("linear_correction", lambda: make(False, False))


@pytest.mark.parametrize(("c", "c_out"), [(1, 1), (3, 7), (16, 96), (17, 33)])
def test_norms(c, c_out):
    positive = torch.rand(c_out, dtype=torch.float64)
    given = [torch.randn(c_out), torch.randn(c_out), vector(c_out), positive]
    for gamma, beta in itertools.product((given[0], None), (given[1], None)):
        check("norm", lambda gamma=gamma, beta=beta: (gamma, beta, *given[2:], 7.0, 1e-3))
    check("norm", lambda: (*given[:2], given[0], positive.float(), 1.0, 1e-3))
    check("norm", lambda: (torch.randn(c_out, 2)[:, 1], *given[1:], 7.0, 1e-3))
    check("norm_backward", lambda: (norm(c_out), vector(c_out), vector(c_out), 7.0))
    check("norm_backward", lambda: (norm(c_out),))
    for batch in (True, False):
        check(
            "linear_gradients",
            lambda batch=batch: (
                norm(c_out),
                torch.randn(c_out, c),
                torch.randn(c_out, c),
                vector(c_out),
                vector(c_out),
                batch,
            ),
        )


@pytest.mark.parametrize("mean", [50.0, -1000.0])
@pytest.mark.parametrize("c", [3, 16, 33])
def test_moments_far_from_zero(c, mean):
    check("moments", lambda: (image(3, c, 20, 21, mean=mean),))
    check("moments", lambda: (image(3, c, 20, 21, mean=mean), True))
    check("map_moments", lambda: (image(3, c, 20, 21, mean=mean),))
    check("map_products", lambda: (image(3, c, 9, 9), image(3, c, 9, 9, mean=mean), vector(c) + mean))


def test_moments_of_one_pixel():
    x = image(1, 5, 1, 1)
    for mean, products in (CpuPasses().moments(x), CpuPasses().map_moments(x)):
        assert torch.equal(mean.float(), x.flatten()) and (products == 0).all()


@pytest.mark.parametrize(("c", "c_out"), [(1, 1), (3, 7), (16, 96), (17, 33), (96, 576), (160, 960)])
def test_moments_of_a_linear_map(c, c_out):
    def make():
        x = vector(c, 2 * c)
        return torch.randn(c_out, c), vector(c), x @ x.t()

    check("linear_moments", make, 2)


@pytest.mark.parametrize("padding", [(0,) * 4, (1,) * 4, (0, 1, 2, 0), (2, 3, 1, 4)])
@pytest.mark.parametrize(("kernel", "stride", "c"), [(3, 2, 3), (1, 2, 5), (5, 3, 2), (3, 1, 17)])
def test_windows(kernel, stride, c, padding):
    x = image(2, c, 9, 8)
    shape = DenseShape(c, 1, kernel, stride, padding)
    for images in (x, torch.randn(2, c, 9, 8)):
        expected = ReferencePasses().windows(images.double(), shape)
        for kind in (CpuPasses, SpecifiedPasses):
            assert torch.equal(kind().windows(images, shape).double(), expected)
    check("add_windows", lambda: (image(*expected.shape), tuple(x.shape), shape))


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (0.0, INFINITY), (-1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize(("c", "c_out"), [(1, 1), (3, 7), (27, 32), (20, 49), (320, 100)])
def test_linear_backward(c, c_out, bounds):
    for wants_input in (True, False):

        def make(wants_input=wants_input):
            weight = torch.randn(c_out, c) / c**0.5
            return image(3, c, 5, 7), image(3, c_out, 5, 7), weight, norm(c_out), *bounds, wants_input

        check("linear_backward", make)
    for x, shape in (
        ((3, c, 5, 7), DenseShape(c, c_out, 1, 1, (0,) * 4)),
        ((2, 3, 9, 8), DenseShape(3, c_out, 3, 2, (1, 0, 2, 1))),
    ):
        weight = (c_out, shape.c_in, shape.kernel, shape.kernel)
        check("dense", lambda x=x, w=weight, s=shape: (image(*x), torch.randn(w), norm(c_out), s, bounds))


# ------------------------------------------------------------------------------------------------------------- blocks


def check_block(
    n, h, w, c_in, c_hidden, c_out, kernel=3, stride=1, dilation=1, padding=None, expand=True, bounds=(0.0, 6.0)
):
    """All four passes of a block, with hidden maps stored and recomputed, and the last two in one."""
    c_in = c_in if expand else c_hidden
    padding = ((kernel - 1) // 2 * dilation,) * 4 if padding is None else padding
    shape = BlockShape(c_in, c_hidden, c_out, kernel, stride, dilation, padding, expand, False)

    def take(store, scaled):
        x = image(n, c_in, h, w)
        weights = (
            torch.randn(c_hidden, c_in, 1, 1) * 2 / c_in**0.5 if expand else None,
            vector(2, c_hidden) if expand else None,
            torch.randn(c_hidden, 1, kernel, kernel) / kernel,
            torch.randn(c_out, c_hidden, 1, 1) * 2 / c_hidden**0.5,
        )
        depthwise_norm, rows = vector(3, c_hidden), 0.5 * vector(6, c_hidden)
        rows[:3] = depthwise_norm
        scale = vector(2, c_out) * torch.tensor([[1.0], [0.0]]).double() if scaled else None
        given, results = (x, image(n, c_out, *shape.size_out(h, w)), depthwise_norm, rows, scale), []
        for kind, dtype in KINDS:
            convert = (lambda t: t) if dtype is None else (lambda t, dtype=dtype: cast(t, dtype))
            passes = kind(shape, bounds, *map(convert, weights))
            results.append(present(_run_block(passes, store, expand, *map(convert, given)), kind))
        exact = [cast(t, torch.float64) for t in (*weights, *given)]
        passes = SpecifiedPasses(shape, bounds, *exact[:4])
        assert_specified(present(_run_block(passes, store, expand, *exact[4:]), SpecifiedPasses), results[-1])
        return tuple(results)

    for store in (True, False):
        for scaled in (True, False):
            decide(take(store, scaled), lambda store=store, scaled=scaled: take(store, scaled))


def _run_block(passes, store, expand, x, d_project, depthwise_norm, rows, scale) -> list[Tensor | None]:
    hidden, mean, squares = passes.hidden(x, store)
    assert (hidden is not None) is store
    projected = passes.project(x, hidden, depthwise_norm)
    passes.pack_backward(scale)
    in_one = passes.hidden_backward(x, hidden, None, d_project, rows, True, expand, True, True)
    hidden, d_hidden, projection = passes.project_backward(x, hidden, d_project, depthwise_norm, store, True)
    found = [mean, squares, projected, *projection, *in_one.projection]
    for g in (passes.hidden_backward(x, hidden, d_hidden, d_project, rows, True, expand), in_one):
        found += [g.d_x, g.d_depthwise_weight, g.d_expand_weight]
        # Without an expansion they are no parameter's gradients.
        found += [g.sum_d_expand, g.sum_d_expand_linear] if expand else [None, None]
    return found


@pytest.mark.parametrize("c_hidden", [1, 15, 16, 17, 47, 48, 49, 97, 144, 385])
def test_hidden_channels_around_a_chunk(c_hidden):
    check_block(2, 5, 6, 8, c_hidden, 12)
    check_block(2, 5, 6, 8, c_hidden, 12, expand=False)


@pytest.mark.parametrize("c", [1, 2, 5, 8, 15, 16, 17, 24, 31, 33, 47, 48, 49, 65, 97])
def test_channels_around_a_vector(c):
    check_block(2, 5, 6, c, 20, 8)
    check_block(2, 6, 5, 8, 20, c)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [*range(1, 21), 56, 113])
def test_widths_and_heights(size, stride):
    check_block(2, 4, size, 4, 20, 6, stride=stride)
    check_block(1, size, 5, 4, 20, 6, stride=stride)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(itertools.product([1, 3, 5, 7], [1, 2, 3], [1, 2, 4])))
def test_kernel_stride_dilation(kernel, stride, dilation):
    check_block(1, 13, 11, 5, 50, 6, kernel, stride, dilation)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "padding", [(0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 2, 0), (2, 3, 1, 4), (5, 5, 5, 5)]
)
def test_padding(padding, stride, expand):
    check_block(2, 8, 9, 6, 20, 7, stride=stride, padding=padding, expand=expand)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("bounds", [(0.0, INFINITY), (-1.0, 1.0), (0.5, 2.0), (-INFINITY, INFINITY)])
def test_bounds(bounds, expand):
    check_block(2, 6, 7, 8, 50, 8, bounds=bounds, expand=expand)


@pytest.mark.parametrize("n", [3, 40])
def test_several_images_in_a_part(n):
    check_block(n, 3, 4, 8, 50, 8)
    check_block(n, 7, 7, 24, 20, 16, stride=2)
