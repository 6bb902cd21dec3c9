"""Several Python threads call one network at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from oracle import randomize

from mnv2_fused import MobileNetV2

CALLERS = 8


def test_callers_in_threads_share_a_network():
    """Each gets the results of its own images, and after a change of a weight all get new ones."""
    images = torch.randn(CALLERS, 1, 3, 64, 64)
    model = randomize(MobileNetV2(num_classes=10, width_mult=0.35).eval(), images[0])
    together = threading.Barrier(CALLERS)

    def call(x):
        with torch.no_grad():  # each thread has a mode of its own
            together.wait()
            results = [model(x) for _ in range(10)]
        assert all(torch.equal(results[0], y) for y in results)
        return results[0]

    def expected():
        with torch.no_grad():
            return [model(x) for x in images]

    before = expected()
    with ThreadPoolExecutor(CALLERS) as pool:
        assert all(map(torch.equal, pool.map(call, images), before))
        model.features[0][0].weight.data.neg_()  # changes no version counter
        changed = list(pool.map(call, images))
    assert all(map(torch.equal, changed, expected()))
    assert not any(map(torch.equal, changed, before))
