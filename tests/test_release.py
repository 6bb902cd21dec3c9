"""freeze(release=True) gives weights back, and whatever needs them afterwards says so."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys

import pytest
import torch
from test_freezing import X, hook, make
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import MobileNetV2


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that Python still knows and that share no memory, without those that `X` and others hold."""
    del model
    gc.collect()
    found = {}
    for candidate in gc.get_objects():
        strided = type(candidate) in (Tensor, nn.Parameter) and candidate.layout is torch.strided
        if strided and not candidate.is_meta:
            storage = candidate.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_release_gives_memory_back():
    model = MobileNetV2(1000, 1.0).eval()
    weights = sum(4 * p.numel() for p in model.parameters())
    live = storage_bytes(model)
    mnv2_fused.freeze(model, release=True)
    packed = model._cache.readings[None].packed.data
    assert 0.95 * weights < packed.numel() < 1.3 * weights
    assert storage_bytes(model) - packed.untyped_storage().nbytes() < live - 0.99 * weights


def test_release_gives_memory_back_to_the_system():
    """In a process of its own, whose memory no other test has used."""
    code = (
        "import mnv2_fused\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "mnv2_fused.freeze(mnv2_fused.MobileNetV2().eval(), release=True)\n"
        "before = resident()\n"
        "held = [mnv2_fused.MobileNetV2().eval() for _ in range(8)]\n"
        "live = resident() - before\n"
        "for model in held: mnv2_fused.freeze(model, release=True)\n"
        "print(live, resident() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    live, released = map(int, done.stdout.split())
    assert live > 8 * 13e6 and released < 1.4 * live, (live, released)


RAISES = {
    "state_dict": lambda model: model.state_dict(),
    "state_dict around": lambda model: nn.Sequential(model).state_dict(),
    "thaw": mnv2_fused.thaw,
    "copy": copy.deepcopy,
    "pickle": lambda model: torch.save(model, io.BytesIO()),
    "convert": mnv2_fused.convert,
    "revert": mnv2_fused.revert,
    "train": lambda model: model.train(),
    "half": lambda model: model.half(),
    "load_state_dict": lambda model: model.load_state_dict(make().state_dict()),
    "plain": lambda model: setattr(model, "fused", False),
    "a unit alone": lambda model: model.features[2](torch.randn(1, 8, 9, 9)),
    "some units": lambda model: model.features(X),
    "gradients": lambda model: model(X.clone().requires_grad_()),
    "another dtype": lambda model: model(X.double()),
    "a hook": lambda model: (hook(model), model(X)),
    "export": lambda model: torch.export.export(model, (X,)),
}


@pytest.mark.parametrize("name", RAISES)
def test_a_released_model_says_what_it_lacks(name, fresh_dynamo):
    model = mnv2_fused.freeze(make(), release=True)
    y = model(X)
    with pytest.raises(Exception, match="freeze\\(release=True\\) gave"):
        RAISES[name](model)
    if name not in ("a hook", "export"):  # a failed export leaves parameters in another order
        assert torch.equal(model.eval()(X), y)
        assert mnv2_fused.freeze(model) is model


def test_release_keeps_what_others_use():
    model = make()
    head = nn.Linear(1280, 7)
    head.weight = model.classifier[1].weight
    both = nn.ModuleDict({"model": model, "head": head}).eval()
    held = model.features[0][0].weight
    mnv2_fused.freeze(both, release=True)
    assert not head.weight.is_meta and not held.is_meta and model.features[0][0].weight.is_meta
    assert model.features[0][0].weight.shape == held.shape
    head(torch.randn(1, 1280))
