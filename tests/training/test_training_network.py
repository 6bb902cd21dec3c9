"""Training of whole networks: gradients, memory, and many steps."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import FACTOR, bytes_saved, check_training, decide, decided, errors, operators, plain, randomize, step
from torch import nn

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused.training import RECOMPUTE

SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]


def trained(blocks: int) -> list[str]:
    names = ["train_dense", *["train_block"] * blocks, "train_dense"]
    return names + [f"{name}_backward" for name in names]


def make_small(**options):
    model = MobileNetV2(7, 0.5, SMALL, dropout=0.0, **options)
    return randomize(model, torch.randn(4, 3, 40, 40)).train()


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("options", [{}, {"tf_padding": True}, {"output_stride": 8}], ids=str)
def test_small_network(options, recompute):
    check_training(make_small(recompute=recompute, **options), torch.randn(2, 3, 16, 14), trained(4), margin=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weights_channels_last", [False, True])
def test_memory_formats(weights_channels_last, channels_last):
    model, x = make_small(), torch.randn(2, 3, 16, 14)
    if weights_channels_last:
        model = model.to(memory_format=torch.channels_last)
    check_training(
        model, x.contiguous(memory_format=torch.channels_last) if channels_last else x, trained(4), margin=1e-6
    )


@pytest.mark.parametrize("bounds", [(-float("inf"), float("inf")), (0.0, 6.0)], ids=str)
def test_whole_network(bounds):
    """Without clamps there is nothing that rounding could decide, through all of the 52 batch norms. With them single
    masks differ, in plain as in fused: the middle of several steps decides on all gradients together.
    """
    errors_of = {"fused": [], "plain": []}
    for seed in range(5):
        torch.manual_seed(seed)
        model, x = MobileNetV2(10, 0.35, dropout=0.0), torch.randn(8, 3, 64, 64)
        randomize(model, x).train()
        for m in model.modules():
            if isinstance(m, nn.ReLU6):
                m.min_val, m.max_val = bounds
        reference, found = plain(model), []
        exact = step(copy.deepcopy(reference).double(), x.double())
        assert operators(lambda model=model, x=x, found=found: found.append(step(model, x))) == trained(17)
        for name, got in (("fused", found[0]), ("plain", step(reference, x))):
            each = [
                errors(got[key], right)[1]
                for key, right in exact.items()
                if "gradient" in key and "conv.3.b" not in key
            ]
            errors_of[name].append(sum(each) / len(each))
    ours, theirs = (sorted(found)[2] for found in errors_of.values())
    assert ours <= FACTOR * theirs


def test_twenty_steps_stay_as_near_to_the_exact_trajectory_as_plain():
    # Without clamps: a single mask that rounding decides moves a trajectory, of plain as of fused.
    for seed in range(3):
        ours, theirs = _distances(seed)
        assert ours <= FACTOR * theirs


def _distances(seed: int) -> list[float]:
    """Of fused and plain parameters to those trained in float64."""
    torch.manual_seed(seed)
    model, x, y = make_small(), torch.randn(20, 4, 3, 24, 24), torch.randint(7, (20, 4))
    for m in model.modules():
        if isinstance(m, nn.ReLU6):
            m.min_val, m.max_val = -float("inf"), float("inf")
    reference = plain(model)
    exact = copy.deepcopy(reference).double()
    for m in (model, reference, exact):
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9)
        for images, labels in zip(x, y, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(images.to(m.classifier[1].weight.dtype)), labels).backward()
            optimizer.step()
    return [
        sum((p.double() - q).square().sum() for p, q in zip(m.parameters(), exact.parameters(), strict=True))
        .sqrt()
        .item()
        for m in (model, reference)
    ]


def test_memory_saved_for_the_backward():
    x, model = torch.randn(2, 3, 224, 224), MobileNetV2(dropout=0.0).train()
    ours, theirs = (bytes_saved(lambda m=m: m(x), m) for m in (model, plain(model)))
    assert ours <= theirs / 8


def test_recompute_reaches_every_unit():
    model = make_small(recompute="most")
    assert {m.recompute for m in model.modules() if isinstance(m, InvertedResidual)} == {"most"}
    x = torch.randn(2, 3, 40, 40)
    sizes = []
    for recompute in ("most", "least"):
        model.recompute = recompute
        assert {m.recompute for m in model.modules() if isinstance(m, InvertedResidual)} == {recompute}
        sizes.append(bytes_saved(lambda: model(x), model))
    assert sizes[0] < sizes[1]
    assert copy.deepcopy(model).features[2].recompute == "least" and MobileNetV2().features[2].recompute == "balanced"


@pytest.mark.parametrize("wrong", ["all", "", None])
def test_wrong_recompute(wrong):
    message = "recompute should be one of most, balanced, least, got"
    with pytest.raises(ValueError, match=message):
        MobileNetV2(recompute=wrong)
    model = MobileNetV2(7, 0.5, SMALL)
    with pytest.raises(ValueError, match=message):
        model.recompute = wrong
    assert model.recompute == model.features[1].recompute == "balanced"


def test_fused_switch():
    model, x = make_small(fused=False), torch.randn(2, 3, 24, 24)
    assert operators(lambda: model(x).sum().backward()) == []
    model.fused = True
    assert operators(lambda: model(x).sum().backward()) == trained(4)


def test_converted_network_trains(torchvision_mobilenetv2):
    theirs = randomize(torchvision_mobilenetv2.MobileNetV2(7, 0.5, SMALL, dropout=0.0), torch.randn(4, 3, 40, 40))
    model = mnv2_fused.convert(copy.deepcopy(theirs)).train()
    x = decided(model, torch.randn(2, 3, 16, 16), 1e-6)

    def take():
        y = x + 1e-3 * torch.randn(x.shape) if taken else x
        taken.append(y)
        y = decided(model, y, 1e-6)
        exact = copy.deepcopy(theirs).double().train()
        return step(copy.deepcopy(model), y), step(copy.deepcopy(theirs).train(), y), step(exact, y.double())

    taken: list[torch.Tensor] = []
    decide(take(), take)
    assert operators(lambda: model(x).sum().backward()) == trained(4)


def test_autocast():
    model, x = make_small(), torch.randn(2, 3, 24, 24)
    reference, outputs = plain(model), []
    exact = copy.deepcopy(reference).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [m(x) for m in (model, reference)]
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    ours, theirs = (errors(y, exact)[1] for y in outputs)
    assert ours <= FACTOR * theirs
    outputs[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
