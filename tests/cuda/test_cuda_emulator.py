"""The host's stand-in for the GPU, which tests of CUDA kernels rely on: its arithmetic, and the faults it must find."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

SCHEDULES = range(12)
SANITIZED = bool(os.environ.get("MNV2_FUSED_SANITIZE"))
DTYPES = [torch.float16, torch.bfloat16]


def as_dtype(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bits.to(torch.int16).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit, but any NaN is as good as another."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def awkward_floats(dtype: torch.dtype) -> torch.Tensor:
    """All values of a 16-bit dtype, the middles between neighbours, what lies next to either; and any bits."""
    values = as_dtype(torch.arange(1 << 16), dtype).float()
    finite = values[values.isfinite()].sort().values
    middles = (finite[:-1].double() + finite[1:].double()).div(2).float()
    exact = torch.cat([values, middles, torch.tensor([65520.0, 3.3961776e38])])
    near = [exact.nextafter(torch.tensor(to)) for to in (float("inf"), -float("inf"))]
    return torch.cat([exact, *near, torch.randint(-(1 << 31), 1 << 31, (100_000,)).int().view(torch.float32)])


# ----------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack(cuda_emulator, dtype):
    x = as_dtype(torch.arange(1 << 16), dtype)
    y = torch.empty(1 << 16)
    cuda_emulator("run_unpack", DTYPES.index(dtype), x, y, len(x) // 2)
    assert same(y, x.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack(cuda_emulator, dtype):
    x = awkward_floats(dtype)
    x = x[: len(x) // 2 * 2]
    y = torch.empty(len(x), dtype=dtype)
    cuda_emulator("run_pack", DTYPES.index(dtype), x, y, len(x) // 2)
    assert same(y, x.to(dtype))


def test_tf32(cuda_emulator):
    x = torch.cat([awkward_floats(torch.bfloat16), torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-23, 1 + 3 * 2**-11])])
    x = torch.cat([x, -x])
    y, whole, rest = (torch.empty_like(x) for _ in range(3))
    cuda_emulator("run_tf32", x, y, whole, rest, len(x))
    last_place = 2.0 ** (torch.frexp(x.double()).exponent.clamp(min=-125) - 11).double()
    expected = ((x.double().abs() / last_place + 0.5).floor() * last_place).float()
    assert same(y, torch.where(x.isfinite(), expected, x).copysign(x))
    assert same(whole, y)
    assert torch.equal(rest[y.isinf()], torch.zeros(int(y.isinf().sum())))
    assert rest[x.isnan()].isnan().all()
    normal = y.isfinite() & (x.abs() > 2.0**-100)
    assert ((x.double() - whole - rest)[normal].abs() <= x[normal].abs() * 2.0**-22).all()
    assert ((rest.view(torch.int32)[normal] & 0x1FFF) == 0).all()


def half_from_units(units: int) -> float:
    """The half nearest to units * 2**-48, ties to even."""
    shift = max(abs(units).bit_length() - 11, 24)
    quotient, rest = divmod(abs(units), 1 << shift)
    quotient += 2 * rest > 1 << shift or (2 * rest == 1 << shift and quotient % 2)
    value = quotient * 2.0 ** (shift - 48)
    return (1 if units >= 0 else -1) * (value if value < 65520 else float("inf"))


def clamp(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
    """torch.clamp, but -0 is less than 0."""
    integer, sign = {2: (torch.int16, 1 << 15), 4: (torch.int32, 1 << 31)}[x.element_size()]
    bits = [v.view(integer).long() for v in (x, lo, hi)]
    x_order, lo_order, hi_order = (torch.where(i >= 0, i, ~(i + sign)) for i in bits)
    y = torch.minimum(torch.maximum(x_order, lo_order), hi_order)
    y = torch.where(y >= 0, y, ~y - sign).to(integer).view(x.dtype)
    return torch.where(x.isnan() | lo.isnan() | hi.isnan(), torch.nan, y)


def test_half2(cuda_emulator):
    count = 20_000
    a, b, c = as_dtype(torch.randint(0, 1 << 16, (3, count)), torch.float16)
    # Sums so near the middle of two halves that a float does not tell them from it.
    near, exponent = slice(count // 2), torch.randint(-2, 15, (count // 2,))
    a[near] = 1 + 2**-10
    b[near] = (1 - 2**-10) * 2.0 ** (exponent - 11)
    c[near] = (1 + torch.randint(1024, (count // 2,)) / 1024) * 2.0**exponent
    total, clamped = torch.empty(2, count, dtype=torch.float16)
    cuda_emulator("run_half2", a, b, c, total, clamped, count // 2)
    special = ~(a.isfinite() & b.isfinite() & c.isfinite())
    expected = a.double() * b.double() + c.double()
    units = [(v.double().nan_to_num() * 2.0**24).long().tolist() for v in (a, b, c)]
    exact = torch.tensor([half_from_units(x * y + (z << 24)) for x, y, z in zip(*units, strict=True)])
    assert same(total, torch.where(special, expected, exact.copysign(expected)).half())
    assert same(clamped, clamp(a, b, c))


def test_float(cuda_emulator):
    special = torch.tensor([0.0, -0.0, 1.5, -1.5, float("inf"), -float("inf"), float("nan"), 1e-45])
    a, b, c = torch.cartesian_prod(special, special, special).T.contiguous()
    total, clamped = torch.empty(2, len(a))
    cuda_emulator("run_float", a, b, c, total, clamped, len(a))
    expected = (a.double() * b.double() + c.double()).float()
    assert same(total, expected)
    assert same(clamped, clamp(a, b, c))


# ------------------------------------------------------------------------------------------------- warp collectives


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_multiply(cuda_emulator, dtype):
    depth = 48
    for schedule in SCHEDULES:
        a, b, c = (torch.randint(-8, 9, shape).float() for shape in ((48, depth), (8, depth), (48, 8)))
        expected = c + a @ b.T  # exact, as all numbers are whole
        if dtype == torch.float32:  # tf32 ignores the last 13 bits
            a, b = (v.view(torch.int32).add(torch.randint(1 << 13, v.shape).int()).view(dtype) for v in (a, b))
        a, b = a.to(dtype), b.to(dtype)
        cuda_emulator("run_multiply", schedule, [*DTYPES, torch.float32].index(dtype), a, b, c, depth)
        assert torch.equal(c, expected)


# Where the elements that a lane holds lie, each a row and a column by the lane's group (lane / 4) and its number within
# (lane % 4), in the order of the PTX ISA: "Matrix Fragments for mma.m16n8k16 with floating point type", and
# "mma.m16n8k8" for .tf32. Of 16-bit elements the first is in the low half of the first register.
SUMS = [
    lambda g, t: (g, 2 * t),
    lambda g, t: (g, 2 * t + 1),
    lambda g, t: (g + 8, 2 * t),
    lambda g, t: (g + 8, 2 * t + 1),
]
FRAGMENTS_16 = {
    "a": [
        *SUMS,
        lambda g, t: (g, 2 * t + 8),
        lambda g, t: (g, 2 * t + 9),
        lambda g, t: (g + 8, 2 * t + 8),
        lambda g, t: (g + 8, 2 * t + 9),
    ],
    "b": [
        lambda g, t: (2 * t, g),
        lambda g, t: (2 * t + 1, g),
        lambda g, t: (2 * t + 8, g),
        lambda g, t: (2 * t + 9, g),
    ],
    "d": SUMS,
}
FRAGMENTS_TF32 = {
    "a": [lambda g, t: (g, t), lambda g, t: (g + 8, t), lambda g, t: (g, t + 4), lambda g, t: (g + 8, t + 4)],
    "b": [lambda g, t: (t, g), lambda g, t: (t + 4, g)],
    "d": SUMS,
}


def lanes(matrix: torch.Tensor, elements: list) -> torch.Tensor:
    """(32, elements): what each lane holds of `matrix`."""
    return torch.stack([torch.stack([matrix[element(i // 4, i % 4)] for element in elements]) for i in range(32)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_fragments_are_those_of_the_ptx_isa(cuda_emulator, dtype):
    fragments, depth = (FRAGMENTS_TF32, 8) if dtype == torch.float32 else (FRAGMENTS_16, 16)
    a, b, c = (torch.randint(-8, 9, shape).to(dtype) for shape in ((16, depth), (depth, 8), (16, 8)))
    d = lanes(c.float(), fragments["d"])
    left, right = lanes(a, fragments["a"]), lanes(b, fragments["b"])
    cuda_emulator("run_registers", [*DTYPES, torch.float32].index(dtype), d, left, right)
    assert torch.equal(d, lanes(c.float() + a.float() @ b.float(), fragments["d"]))
    for name, matrix in (("a", a), ("b", b), ("d", c)):  # every element is in one place
        places = {element(i // 4, i % 4) for i in range(32) for element in fragments[name]}
        assert len(places) == matrix.numel() == 32 * len(fragments[name])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_sums_are_cut_off(cuda_emulator, dtype):
    """Behind the 24th bit behind the largest addend's first, and the total to fp32; half of the products at a time."""
    fragments, depth = (FRAGMENTS_TF32, 8) if dtype == torch.float32 else (FRAGMENTS_16, 16)
    a, b, c = torch.zeros(16, depth), torch.full((depth, 8), 2.0**-12), torch.ones(16, 8)
    expected = torch.ones(16, 8)
    a[1, 0] = 1
    a[2, :2], expected[2] = 1, 1 + 2**-23
    a[3, [0, depth - 1]] = 1
    a[4] = 0.5
    a[5, 0], expected[5] = -1, 1 - 2**-24
    a[6, 0] = -0.5
    a[7], c[7], expected[7] = -depth, 0, -(depth**2) * 2**-24
    a[8:], c[8:], expected[8:] = -a[:8], -c[:8], -expected[:8]
    d, a, b = lanes(c, fragments["d"]), (a * 2**-12).to(dtype), b.to(dtype)
    left, right = lanes(a, fragments["a"]), lanes(b, fragments["b"])
    cuda_emulator("run_registers", [*DTYPES, torch.float32].index(dtype), d, left, right)
    assert torch.equal(d, lanes(expected, fragments["d"]))


@pytest.mark.parametrize("mask", range(32))
def test_shuffle(cuda_emulator, mask):
    x, y = torch.randn(96), torch.empty(96)
    cuda_emulator("run_shuffle", mask % 12, x, y, mask)
    assert torch.equal(y, x[torch.arange(96) ^ mask])


# ------------------------------------------------------------------------------------------------ between threads


def test_warp_barrier(cuda_emulator):
    """Right with it, and wrong under every schedule without: the threads before or those behind are yet to write."""
    for schedule in SCHEDULES:
        x, y, wrong = torch.randn(5, 96), torch.empty(5, 96), torch.empty(5, 96)
        cuda_emulator("run_rotate", schedule, 1, x, y, 5)
        expected = x.view(5, 3, 32).roll(1, 2).view(5, 96)
        assert torch.equal(y, expected)
        cuda_emulator("run_rotate", schedule, 0, x, wrong, 5)
        assert not torch.equal(wrong, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_cta_starts_anew(cuda_emulator, schedule):
    values, ctas, order = torch.zeros(12, 96), torch.zeros(1, dtype=torch.int32), torch.full((12,), -1).int()
    cuda_emulator("run_first_look", schedule, values, ctas, order)
    assert values.isnan().all() and ctas.item() == 12
    order, ascending = order.tolist(), list(range(12))
    assert sorted(order) == ascending
    assert (order == ascending, order == ascending[::-1]) == (schedule % 3 == 0, schedule % 3 == 1)


def reduce_errors(cuda_emulator, fault: int) -> list[int]:
    """By schedule: how many of the sums are wrong."""
    errors = []
    for schedule in SCHEDULES:
        x, sums = torch.randint(-99, 99, (12 * 5, 96)).float(), torch.full((12 * 5,), torch.nan)
        cuda_emulator("run_reduce", schedule, fault, x, sums, 5)
        errors.append(int((sums != x.sum(1)).sum()))
    return errors


def copy_errors(cuda_emulator, fault: int) -> list[int]:
    """By schedule: how many of the copied numbers are wrong."""
    errors, chunks, valid = [], 5, 800
    for schedule in SCHEDULES:
        x = torch.randint(1 << 31, (2 * chunks, 96, 4)).int()
        y = torch.full_like(x, -7)
        cuda_emulator("run_copy", schedule, fault, x, y, chunks, valid)
        x.view(-1, 4)[valid:] = 0
        errors.append(int((y != x.flip(1)).sum()))
    return errors


def test_reduce(cuda_emulator):
    assert not any(reduce_errors(cuda_emulator, 0))


def test_copy(cuda_emulator):
    assert not any(copy_errors(cuda_emulator, 0))


@pytest.mark.parametrize("fault", [1, 2], ids=["before read", "before write"])
def test_a_missing_barrier_is_seen(cuda_emulator, fault):
    assert any(reduce_errors(cuda_emulator, fault))


@pytest.mark.parametrize(
    "fault",
    range(1, 6),
    ids=["no wait", "wait for too few", "no commit", "no barrier after wait", "no barrier before next"],
)
def test_a_broken_copy_is_seen(cuda_emulator, fault):
    assert any(copy_errors(cuda_emulator, fault))


def cluster_outcomes(cuda_emulator, fault: int, ctas: int) -> list[str]:
    """By schedule: "right", "wrong", or the emulator's message."""
    outcomes = []
    for schedule in SCHEDULES:
        x, sums = torch.randint(-99, 99, (3, 2, 2, ctas, 384)).float(), torch.zeros(3, 2, 2, 384)
        try:
            cuda_emulator("run_cluster", schedule, fault, x, sums, ctas, 3)
            outcomes.append("right" if torch.equal(sums, x.sum(3)) else "wrong")
        except RuntimeError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.mark.parametrize("ctas", [1, 2, 3, 8])
def test_ctas_of_a_cluster_read_each_other(cuda_emulator, ctas):
    assert set(cluster_outcomes(cuda_emulator, 0, ctas)) == {"right"}


@pytest.mark.parametrize("ctas", [2, 3, 8])
@pytest.mark.parametrize("fault", [1, 2], ids=["before read", "before write"])
def test_a_missing_cluster_barrier_is_seen(cuda_emulator, fault, ctas):
    assert "wrong" in cluster_outcomes(cuda_emulator, fault, ctas)


@pytest.mark.parametrize("ctas", [2, 3, 8])
def test_a_cta_that_ends_while_others_read_it_is_seen(cuda_emulator, ctas):
    messages = [o for o in cluster_outcomes(cuda_emulator, 3, ctas) if o != "right"]
    assert messages and all(re.search(r"shared memory of CTA z \d+, which has ended", m) for m in messages)


def test_orders_differ(cuda_emulator):
    """Each of the orders and both ways of copying find something that another one does not."""
    before_read, before_write = reduce_errors(cuda_emulator, 1), reduce_errors(cuda_emulator, 2)
    assert not before_read[0] and before_read[1] and before_read[2]  # ascending, descending, shuffled
    assert before_write[0] and before_write[2] and not before_write[1]
    assert before_write[0] and not before_write[3]  # a warp at a time, or all in turn
    no_wait = copy_errors(cuda_emulator, 1)
    assert all(no_wait[:6]) and not any(no_wait[6:])  # late, at once


MISUSES = [
    r"CTA \([01], 0, 0\): thread \d+ waits at barrier \(selftest.cpp:\d+\) while thread 40 has returned",
    r"thread 0 waits at barrier \(selftest.cpp:\d+\) while thread 32 waits at barrier \(selftest.cpp:\d+\)",
    r"thread 32 waits at mma16<Half> \(.*\) while thread 40 waits at barrier",
    r"thread 32 waits at mma8_tf32 \(.*\) while thread 40 waits at mma16<Half>",
    r"CTA \([01], 0, 0\), thread 63: touched byte 64 of 64 bytes of shared memory",
    r"thread 0: touched byte -1 of 64 bytes of shared memory",
    r"thread 63: touched memory that is not its own",
    r"thread \d+: copy_async to byte 8, unaligned \(selftest.cpp:\d+\)",
    r"thread \d+: copy_async from an unaligned address \(selftest.cpp:\d+\)",
    r"thread \d+: copy_async to byte \d+ of 64 bytes of shared memory",
    r"thread \d+: shuffle_xor with mask 32",
    r"thread \d+: overran its stack",
    r"CTA \(0, 0, 0\), thread \d+: has not waited for the kernel before, and touched what that one may still use",
    r"CTA \([01], 0, 0\), thread \d+: has not waited for the kernel before, and touched what that one may still use",
    r"CTA \([01], 0, 0\): has ended without waiting for the kernel before",
    r"thread \d+ of CTA z [0-3] waits at cluster_barrier \(.*\) while thread 40 of CTA z [13] has returned",
    r"thread \d+ of CTA z [02] waits at cluster_barrier \(.*\) while thread \d+ of CTA z [13] "
    r"(has returned|waits at cluster_barrier)",
    r"CTA z [24] is in another cluster",
    r"byte 64 of another CTA's 64 bytes of shared memory",
    r"load_from_block from an unaligned address",
]
OVERRUN, UNDERRUN, GLOBAL_OVERRUN, STACK_OVERRUN, NO_WAIT, COPY_BEFORE_WAIT = 4, 5, 6, 11, 12, 13
FAULTING = {
    OVERRUN: "use-after-poison",
    UNDERRUN: "use-after-poison",
    GLOBAL_OVERRUN: "use-after-poison",
    STACK_OVERRUN: "stack-overflow",
    NO_WAIT: "SEGV",
    COPY_BEFORE_WAIT: "SEGV",
}  # what the sanitizer calls them


@pytest.mark.parametrize("misuse", range(len(MISUSES)))
def test_misuse_is_reported(cuda_emulator, misuse):
    schedules = SCHEDULES
    if misuse in FAULTING and SANITIZED:
        # A process of its own, as the sanitizer ends it.
        code = f"import ctypes; ctypes.CDLL({cuda_emulator.path!r}).run_misuse(%d, {misuse})"
        for schedule in (0, 1):
            run = subprocess.run([sys.executable, "-c", code % schedule], capture_output=True, text=True)
            assert run.returncode != 0 and f"AddressSanitizer: {FAULTING[misuse]}" in run.stderr
        return
    if misuse in (OVERRUN, UNDERRUN):  # the guard is at one end only
        schedules = SCHEDULES[misuse - OVERRUN :: 2]
    for schedule in schedules:
        with pytest.raises(RuntimeError, match=MISUSES[misuse]):
            cuda_emulator("run_misuse", schedule, misuse)
        x, y = torch.randn(96), torch.empty(96)
        cuda_emulator("run_shuffle", schedule, x, y, 0)  # goes on as if nothing had been
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "launch",
    [
        (0, 1, 1, 1, 32, 0),
        (1, 65536, 1, 1, 32, 0),
        (1, 1, 1, 1, 48, 0),
        (1, 1, 1, 1, 1056, 0),
        (1, 1, 1, 1, 32, 227 * 1024 + 1),
        (1, 1, 3, 2, 32, 0),
        (1, 1, 9, 9, 32, 0),
    ],
)
def test_a_launch_that_no_gpu_takes(cuda_emulator, launch):
    with pytest.raises(RuntimeError, match="launch: no GPU takes"):
        cuda_emulator("run_launch", *launch)


def test_the_largest_launch(cuda_emulator):
    cuda_emulator("run_launch", 2, 1, 8, 8, 1024, 227 * 1024)
