"""`features`, slices of it and loops inside it: the memory format changes at the entrance and at outputs at most."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import check, check_training, operators, plain, randomize
from test_model import LAST_ALONE, TRAINED, make_small
from torch import nn

import mnv2_fused

X = (2, 3, 40, 40)


def copies(call) -> int:
    """Copies of whole tensors that `call` makes; a change of memory format is one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::copy_" for event in profile.events())


@torch.no_grad()
def test_one_change_of_format_at_each_end():
    model, x = make_small(), torch.randn(X)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    y = model.features[:2](x)
    model.features(x), model.features[2:](y)
    assert copies(lambda: model.features(x)) == 1  # the stem reads any format
    assert operators(lambda: model.features(x)) == ["network"]
    assert copies(lambda: model.features[:4](x)) == 1
    assert copies(lambda: model.features[2:](y)) == 2
    assert copies(lambda: model.features(channels_last)) == 0

    def loop(x):
        for unit in model.features:
            x = unit(x)

    assert copies(lambda: loop(x)) > len(model.features)
    assert copies(lambda: loop(channels_last)) == 0
    model.to(memory_format=torch.channels_last)
    loop(x)
    assert copies(lambda: loop(x)) == 0


@pytest.mark.parametrize("weights", ["contiguous", "channels_last", "one channels_last"])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cut", [slice(None), slice(0, 3), slice(2, 5), slice(5, None)])
@torch.no_grad()
def test_output_has_the_plain_format(cut, given, weights):
    model = make_small()
    if weights == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif weights == "one channels_last":
        model.features[3].to(memory_format=torch.channels_last)
    units = model.features[cut]
    channels = {0: 3, 2: 8, 5: 16}[cut.start or 0]
    channels = next(m for m in units.modules() if isinstance(m, nn.Conv2d)).in_channels if cut.start else channels
    for size in ((2, channels, 20, 20), (1, channels, 1, 1), (0, channels, 20, 20)):
        x = torch.randn(size).contiguous(memory_format=given)
        assert units(x).stride() == plain(units)(x).stride()


@torch.no_grad()
def test_plain_code_and_hooks_between_units_see_the_plain_format():
    model = make_small()
    seen = []

    class Note(nn.Module):
        def forward(self, x):
            seen.append(x.stride())
            return x.view(x.shape[0], -1).view(x.shape)  # breaks if x is channels_last

    model.features.insert(3, Note())
    model.features[4].register_forward_hook(lambda module, arguments, y: seen.append(arguments[0].stride()))
    check(model.features, torch.randn(X), LAST_ALONE)
    assert len(set(seen)) <= 2 and all(stride[-1] == 1 for stride in seen)  # also for the batch of `check`


def test_training():
    features = make_small().features.train()
    check_training(features, torch.randn(2, 3, 16, 16), TRAINED, margin=1e-6)
    part = make_small().features[2:5].train()
    channels = part[0].conv[0][0].in_channels
    check_training(part, torch.randn(2, channels, 12, 12), [*["train_block"] * 3, *["train_block_backward"] * 3])


@torch.no_grad()
def test_sequences_of_slices():
    # As SSD's and DeepLab's feature extractors.
    model, x = make_small(), torch.randn(X)
    both = nn.Sequential(model.features[:3], model.features[3:])
    check(both, x, LAST_ALONE)  # a slice may be made at every call
    mnv2_fused.convert(both)
    assert copies(lambda: both(x)) == 1 and isinstance(both, nn.Sequential)
    check(both, x, LAST_ALONE)
    mnv2_fused.revert(both)
    assert type(both) is nn.Sequential


@torch.no_grad()
def test_a_slice_is_a_sequence():
    model = make_small()
    part = copy.deepcopy(model.features[1:4])
    assert len(part) == 3 and list(part.state_dict()) == list(plain(part).state_dict())
    part.fused = False
    assert operators(lambda: part(torch.randn(1, 16, 9, 9))) == []
    assert model.features[1].fused


@torch.no_grad()
def test_what_runs_plain(monkeypatch):
    model, x = make_small(), torch.randn(X)
    features = model.features
    with pytest.raises(RuntimeError) as ours:
        features(torch.randn(40, 40))
    with pytest.raises(RuntimeError) as theirs:
        plain(features)(torch.randn(40, 40))
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(torch.jit.script(features)(x), plain(features)(x))
    assert operators(lambda: features.double()(x.double())) == []


def test_a_converted_sequence(torchvision_mobilenetv2):
    theirs = torchvision_mobilenetv2.MobileNetV2(width_mult=0.35)
    model = mnv2_fused.convert(randomize(theirs, torch.randn(4, 3, 64, 64)))
    x = torch.randn(2, 3, 64, 64)
    check(model.features[:7], x, ["dense", *["inverted_residual"] * 6])
    assert list(mnv2_fused.explain(model.features)) == [str(i) for i in range(19)]
    with torch.no_grad():
        assert set(mnv2_fused.explain(model.features, x).values()) == {None}
        assert copies(lambda: model.features[:7](x)) == 1
