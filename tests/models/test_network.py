"""The network operator: one call gives the same as the units one by one."""

from __future__ import annotations

import pytest
import torch
from oracle import check, operators, randomize
from torch import nn

from mnv2_fused import _C, MobileNetV2
from mnv2_fused.models.fused import NETWORK, FusedUnit
from mnv2_fused.tools import measure

SMALL = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
# First blocks that a stem cannot be fused with, and a block so wide that it takes several chunks.
SETTINGS = {
    "fused stem": ({}, SMALL),
    "fused stem of 96 channels": ({"width_mult": 3.0}, SMALL),
    "first block expands": ({}, [[6, 16, 1, 1], [6, 24, 2, 2]]),
    "first block has a shortcut": ({}, [[1, 32, 2, 1], [6, 24, 1, 2]]),
    "first block has a stride": ({}, [[1, 16, 1, 2], [6, 24, 1, 1]]),
    "TensorFlow's padding": ({"tf_padding": True}, SMALL),
    "dilation": ({"output_stride": 8}, [*SMALL, [6, 40, 2, 2]]),
}
NOT_FUSED = ("first block expands", "first block has a shortcut")


def make(setting: str) -> MobileNetV2:
    options, blocks = SETTINGS[setting]
    return randomize(MobileNetV2(9, inverted_residual_setting=blocks, **options), torch.randn(4, 3, 40, 40))


def one_by_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    handle = model.features[0].register_forward_hook(lambda *_: None)
    y = model(x)
    assert operators(lambda: model(x[:1]))[:1] == ["dense"]
    handle.remove()
    return y


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3, 11])  # 11 runs a few images at a time
@torch.no_grad()
def test_network_is_its_units(setting, batch):
    model, x = make(setting), torch.randn(batch, 3, 41, 46)
    y = check(model, x, ["network"])
    for threads in (1, 2, 5):
        with measure.threads(threads):
            assert torch.equal(model(x), y)
            assert torch.equal(one_by_one(model, x), y)


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_large_maps_a_few_images_at_a_time(threads):
    model, x = randomize(MobileNetV2(9, 0.35), torch.randn(2, 3, 96, 96)), torch.randn(7, 3, 224, 224)
    with measure.threads(threads):
        assert torch.equal(model(x), torch.cat([model(image) for image in x.split(1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", ["fused stem", "fused stem of 96 channels", "first block expands"])
@torch.no_grad()
def test_storage_in_16_bits(setting, dtype):
    model, x = make(setting).to(dtype), torch.randn(6, 3, 40, 40).to(dtype)
    y = check(model, x, ["network"])
    for threads in (1, 3):
        with measure.threads(threads):
            assert torch.equal(model(x), y)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@torch.no_grad()
def test_layouts(layout):
    model, x = make("fused stem"), torch.randn(3, 3, 40, 40)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(3, 6, 40, 80)[:, ::2, :, ::2]
    check(model, x, ["network"])


@torch.no_grad()
@torch.no_grad()
def test_another_dtype_is_seen():
    model, x = make("fused stem"), torch.randn(2, 3, 40, 40)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float32):
        model(x.to(model.classifier[1].weight.dtype))
        check(model.to(dtype), x.to(dtype), [] if dtype == torch.float64 else ["network"])


def test_empty_batch():
    assert make("fused stem")(torch.randn(0, 3, 40, 40)).shape == (0, 9)


def arguments(model: nn.Module, x: torch.Tensor) -> dict:
    spec = NETWORK.read(model, False)
    units, bounds = spec.flat().arguments
    with torch.no_grad():
        model(x)
    return {
        "x": x,
        "packed": model._cache.readings[None].packed.data,
        "units": units,
        "bounds": bounds,
    }


def replaced(unit: str, field: str, value: int):
    """A function that gives a field of a unit of `make("fused stem")` another value."""
    dense, block, head = ((*_C.UNIT_FIELDS, *fields) for fields in (_C.DENSE_FIELDS, _C.BLOCK_FIELDS, _C.HEAD_FIELDS))
    names = ["stem", *(f"block {i}" for i in range(1, 5)), "head 1"]
    fields = dict(zip(names, [dense, *[block] * 4, head], strict=True))
    at = sum(len(fields[name]) for name in names[: names.index(unit)]) + fields[unit].index(field)
    return in_numbers(lambda units: [*units[:at], value, *units[at + 1 :]])


def in_numbers(change):
    """`change`, which takes and gives a list of numbers in text, for the text."""
    return lambda text: " ".join(map(str, change(text.split())))


def test_opcheck():
    with torch.no_grad():
        given = arguments(make("fused stem").requires_grad_(False), torch.randn(2, 3, 20, 20))
        torch.library.opcheck(torch.ops.mnv2_fused.network.default, (), given)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[0], "x must have 4 dimensions"),
        ("x", lambda x: x.double(), "x must be float32, bfloat16 or float16"),
        ("x", lambda x: x[:, :2], "packed must come from the matching pack operator"),
        ("packed", lambda packed: packed[1:], "packed must come from the matching pack operator"),
        ("units", lambda units: "", "unit 0: there must be at least one unit"),
        ("units", in_numbers(lambda units: [9, *units[1:]]), "unit 0: its kind must be 0, 1 or 2, got 9"),
        ("units", in_numbers(lambda units: units[:-1]), "unit 5: it must have 5 integers, got 4"),
        ("units", in_numbers(lambda units: [*units, 1.5]), r"units must be integers .*, got '1\.5'"),
        ("units", lambda units: units + " ", "units must be integers"),
        (
            "units",
            lambda units: units.replace(" ", "  ", 1),
            "units must be integers with a space between them, got ''",
        ),
        ("units", in_numbers(lambda units: [*units, 1 << 63]), f"units must be integers .*, got '{1 << 63}'"),
        ("bounds", in_numbers(lambda bounds: [*bounds, "six"]), "bounds must be numbers .*, got 'six'"),
        ("units", replaced("stem", "kernel", 2), "stem: kernel must be odd"),
        ("units", replaced("stem", "stride", 0), "stem: stride and dilation must be positive"),
        ("units", replaced("block 2", "c_hidden", 0), "block 2: channel counts must be positive"),
        ("units", replaced("block 2", "dilation", 1 << 62), "block 2: stride and dilation"),
        ("units", replaced("block 2", "source", 2), "unit 2: its source must be the images or a unit before it"),
        ("units", replaced("block 2", "source", -2), "unit 2: its source must be the images or a unit before it"),
        ("units", replaced("block 2", "source", -1), "unit 2: only a dense convolution can take the images"),
        ("units", replaced("block 2", "source", 0), "block 1: its output must be taken by a unit or be an output"),
        ("units", replaced("head 1", "classes", 0), "head 1: channel counts must be positive"),
        ("units", replaced("head 1", "tap", 0), "unit 5: a head must be an output"),
        ("bounds", in_numbers(lambda bounds: bounds[:-1]), "unit 5: it must have 2 bounds, got 1"),
        ("bounds", in_numbers(lambda bounds: [*bounds, 6.0]), "bounds must have 20 values for these units, got 21"),
        ("bounds", in_numbers(lambda bounds: [7.0, *bounds[1:]]), "stem: activation bounds must satisfy lo <= hi"),
    ],
)
def test_errors_name_unit_argument_and_rule(name, change, message):
    given = arguments(make("fused stem").requires_grad_(False), torch.randn(2, 3, 20, 20))
    torch.ops.mnv2_fused.network(**given)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"mnv2_fused::network: {message}"):
        torch.ops.mnv2_fused.network(**given)


def network_plan(setting: str | None = None, n: int = 1, size: int = 224, threads: int = 2, **changes) -> dict:
    model = MobileNetV2().eval() if setting is None else make(setting)
    with torch.no_grad():
        spec = NETWORK.read(model, False)
    texts = dict(zip(("units", "bounds"), spec.flat().arguments, strict=True))
    return _C.cpu_network_plan((n, size, size, 3), **{**texts, **changes}, threads=threads)


def test_plan():
    assert network_plan()["arena_bytes"] < 2e6 and network_plan()["steps_for_a_few_images"] == 0
    many = network_plan(n=32)
    assert many["images_at_a_time"] == 4 and 0 < many["steps_for_a_few_images"] < many["steps"]
    assert many["arena_bytes"] < 32 * network_plan()["arena_bytes"] / 4
    fused = {setting: network_plan(setting, size=40)["fused_stem"] for setting in SETTINGS}
    assert fused == {setting: setting not in NOT_FUSED for setting in SETTINGS}
    with pytest.raises(ValueError, match="plan: unit 0: there must be at least one unit"):
        network_plan(units="")


def test_switching_a_unit_off_and_on():
    model, x = make("fused stem"), torch.randn(2, 3, 40, 40)
    check(model, x, ["network"])
    model.features[2].fused = False
    check(model, x, ["dense", *["inverted_residual"] * 3, "head"])
    del model.features[2].fused
    check(model, x, ["network"])
    assert all(unit.fused for unit in model.modules() if isinstance(unit, FusedUnit))


@pytest.mark.parametrize("count", [0, 1])
@torch.no_grad()
def test_features_cut_short(count):
    model = make("fused stem")
    model.features = model.features[:count]
    model.classifier = nn.Identity()
    check(model, torch.randn(2, 3, 40, 40))
