"""The oracle must be able to fail."""

import pytest
import torch
from oracle import assert_close, check, errors, operators, plain, randomize, to_tf32

from mnv2_fused import InvertedResidual
from mnv2_fused.models import fused


def test_errors_are_relative_to_the_scale_of_the_oracle():
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert errors(exact * 1.5, exact) == pytest.approx((0.5, 0.5))
    assert errors(exact, exact) == (0.0, 0.0)


def test_rule_rejects_zeros_noise_and_misplaced_nan():
    exact = torch.randn(1000, dtype=torch.float64)
    plain_result = exact.float()
    assert_close(exact.float(), plain_result, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(torch.zeros(1000), plain_result, exact)
    one_wrong = plain_result.clone()
    one_wrong[7] += 1e-6 * exact.abs().max()
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(one_wrong, plain_result, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_close(plain_result * (1 + 1e-6), plain_result, exact)
    broken = plain_result.clone()
    broken[3] = float("nan")
    with pytest.raises(AssertionError, match="NaN or Inf"):
        assert_close(broken, plain_result, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(exact, plain_result, exact)


def test_randomized_block_uses_both_ends_of_the_clamp():
    x = torch.randn(2, 8, 15, 15)
    block = randomize(InvertedResidual(8, 8, 1, 6), x)
    with torch.no_grad():
        for activation in (block.conv[0], block.conv[1]):
            x = activation(x)
            assert 0.05 < (x == 0).float().mean() < 0.95
            assert 0.001 < (x == 6).float().mean() < 0.5


def test_check_notices_a_wrong_unit(monkeypatch):
    x = torch.randn(1, 8, 9, 9)
    block = randomize(InvertedResidual(8, 8, 1, 6), x)
    check(block, x, ["inverted_residual"])
    with torch.no_grad():
        assert operators(lambda: plain(block)(x)) == []
    with pytest.raises(AssertionError):
        check(block, x, [])
    monkeypatch.setattr(
        fused, "run", lambda unit, module, x: module._forward_plain(x) * 1.001 if module.fused else None
    )
    with pytest.raises(AssertionError, match="error"):
        check(block, x)


def test_rounding_to_tf32():
    bits = {0x3F800FFF: 0x3F800000, 0x3F801000: 0x3F802000, 0xBF801000: 0xBF802000, 0x7F800000: 0x7F800000}
    given, expected = (torch.tensor(list(b), dtype=torch.uint32).view(torch.float32) for b in (bits, bits.values()))
    assert torch.equal(to_tf32(given), expected) and torch.equal(to_tf32(given.double()), expected)
    nans = torch.tensor([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.uint32).view(torch.float32)
    assert to_tf32(nans).isnan().all()


def test_operators_are_those_that_compute():
    names = ("cuda_kernels_refused", "pack_dense", "dense")

    def call():
        for name in names:
            with torch.profiler.record_function(f"mnv2_fused::{name}"):
                pass

    assert operators(call) == ["dense"]
