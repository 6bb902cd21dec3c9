"""Calls on several threads that lose time to other work on the processors are followed by calls on one thread."""

from __future__ import annotations

import time

import pytest
import torch

import mnv2_fused
from mnv2_fused import _C
from mnv2_fused.tools import measure


@pytest.fixture
def watched():
    _C.watch_crowding(True)
    yield
    _C.watch_crowding(False)


def pause() -> float:
    """Seconds until calls use several threads again; 0 if they do."""
    start = time.perf_counter()
    while _C.crowded():
        time.sleep(0.0005)
    return time.perf_counter() - start


@pytest.mark.usefixtures("watched")
class TestPauses:
    def test_loops_in_time(self):
        for _ in range(1000):
            _C.parallel_loop_took(0.006, 0.010)
        assert not _C.crowded()

    def test_a_late_loop_among_many_in_time(self):
        for _ in range(10):
            _C.parallel_loop_took(0.006, 0.010)
            _C.parallel_loop_took(0.012, 0.010)
        assert not _C.crowded()

    def test_pauses_grow(self):
        _C.parallel_loop_took(0.018, 0)
        assert not _C.crowded()
        _C.parallel_loop_took(0.018, 0)
        pauses = [pause()]
        for _ in range(3):
            _C.parallel_loop_took(0.018, 0)
            pauses.append(pause())
        for got, expected in zip(pauses, (0.01, 0.04, 0.16, 0.64), strict=True):
            assert expected - 0.002 < got < expected + 0.5

    def test_a_little_is_lost_after_a_pause(self):
        _C.parallel_loop_took(0.030, 0)
        pause()
        _C.parallel_loop_took(0.0005, 0)  # the workers slept
        assert not _C.crowded()

    def test_loops_in_time_make_the_next_pause_short(self):
        for _ in range(4):
            _C.parallel_loop_took(0.100, 0)
            last = pause()
        for _ in range(10):
            _C.parallel_loop_took(0.003, 0.006)
        _C.parallel_loop_took(0.100, 0)
        assert pause() < last

    def test_unwatched(self):
        _C.parallel_loop_took(0.100, 0)
        assert _C.crowded()
        _C.watch_crowding(False)
        assert not _C.crowded()
        _C.parallel_loop_took(1, 0)
        assert not _C.crowded()


@pytest.mark.usefixtures("watched")
def test_same_bits_in_a_pause():
    model = mnv2_fused.MobileNetV2(10, 0.35, fused=True).eval()
    x = torch.randn(1, 3, 96, 96)
    with measure.threads(4), torch.no_grad():
        several = model(x)
        for _ in range(5):
            _C.parallel_loop_took(0.100, 0)  # the last pause takes seconds
        alone = model(x)
        assert _C.crowded()
    assert torch.equal(several, alone)
