"""The paper's tables: counts, memory by the paper's rule, and rows that cannot be counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mnv2_fused import MobileNetV2, extras
from mnv2_fused.paper import memory, networks, printed, tables
from mnv2_fused.tools import counts

COUNTED = {  # parameters, and multiply-adds at 224
    "MobileNetV1": (4_231_976, 568_740_352),
    "ShuffleNet (1.5)": (3_443_212, 299_612_448),
    "ShuffleNet (x2)": (5_450_776, 524_045_184),
    "NasNet-A": (5_289_978, 568_234_858),
    "MobileNetV2": (3_504_872, 300_774_272),
    "MobileNetV2 (1.4)": (6_108_776, 582_195_824),
}


def made(network: networks.Network) -> nn.Module:
    """The network on the meta device, or a skip that names the missing library."""
    try:
        return network.make("meta")
    except extras.MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture
def nothing_installed(monkeypatch):
    def use(name: str, extra: str):
        raise extras.MissingExtraError(f"{name} cannot be imported")

    monkeypatch.setattr(extras, "use", use)


def by_name(content: dict) -> dict[str, dict]:
    return {row["network"]: row for row in content["rows"]}


# -------------------------------------------------------------------------------------------------------------- counts


def test_multiply_adds_of_a_convolution_and_a_linear_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    assert counts.multiply_adds(model, torch.zeros(2, 3, 8, 8)) == 2 * (16 * 9 * 3 * 8 + 128 * 5)
    assert counts.parameters(model) == 3 * 8 * 9 + 8 + 16 + 128 * 5 + 5


@pytest.fixture(scope="module")
def table_4() -> dict[str, dict]:
    return by_name(tables.table_4(None))


@pytest.mark.parametrize("name", COUNTED)
def test_classifiers(name, table_4):
    made(networks.CLASSIFIERS[name])
    assert tuple(table_4[name]["here"].values()) == COUNTED[name]
    assert "missing" not in table_4[name] and "milliseconds" not in table_4[name]


def test_every_counted_network_has_a_line_in_the_paper():
    assert networks.CLASSIFIERS.keys() == printed.TABLE_4.keys() == COUNTED.keys()
    assert networks.DETECTORS.keys() <= printed.TABLE_6.keys()
    assert set(printed.FIGURE_5) <= {(w, r) for w in tables.WIDTHS for r in tables.RESOLUTIONS}


def test_detection():
    made(networks.DETECTORS["MNet V2 + SSDLite"])
    rows = by_name(tables.table_6())
    assert rows["MNet V2 + SSDLite"]["here"] == {"parameters": 4_337_013, "multiply_adds": 788_830_144}
    assert rows["SSD300"]["here"]["parameters"] == 34_305_206
    assert {name for name, row in rows.items() if row.get("missing") == "quoted"} == {
        "SSD512",
        "YOLOv2",
        "MNet V1 + SSDLite",
    }
    assert rows["YOLOv2"]["printed"]["multiply_adds"] == 17.5e9


def test_segmentation(monkeypatch):
    """Six scales, each mirrored, cost twice the sum of their squares, up to sizes of 16 k + 1."""
    ours = {i: line for i, line in printed.TABLE_7.items() if i.backbone == "MNet V2" and not i.aspp}
    quoted = {i: line for i, line in printed.TABLE_7.items() if i.backbone == "MNet V1"}
    monkeypatch.setattr(printed, "TABLE_7", ours | quoted)
    simple, several, *rest = tables.table_7()["rows"]
    assert simple["here"] == {"parameters": 2_113_557, "multiply_adds": 2_740_709_056}
    assert several["here"]["multiply_adds"] / 8_825_853_632 == pytest.approx(17.375, rel=0.01)
    assert [row["missing"] for row in rest] == ["quoted", "quoted"]


def test_figure_5(monkeypatch):
    monkeypatch.setattr(tables, "WIDTHS", (1.3, 0.35))
    monkeypatch.setattr(tables, "RESOLUTIONS", (224, 96))
    rows = {(row["width"], row["resolution"]): row for row in tables.figure_5(None)["rows"]}
    assert {key: round(row["here"]["multiply_adds"] / 1e6, 1) for key, row in rows.items()} == {
        (1.3, 224): 509.4,
        (1.3, 96): 94.9,
        (0.35, 224): 59.3,
        (0.35, 96): 11.9,
    }
    assert rows[1.3, 96]["printed"] is None and rows[0.35, 96]["printed"]["accuracy"] == 45.5


def test_without_optional_packages_rows_say_what_to_install(nothing_installed):
    table = by_name(tables.table_4(None))
    assert table["NasNet-A"]["missing"] == 'needs pip install "mnv2_fused[tables]"'
    assert "here" not in table["MobileNetV1"]
    assert table["MobileNetV2"]["here"]["parameters"] == 3_504_872
    assert by_name(tables.table_6())["SSD300"]["missing"] == 'needs pip install "mnv2_fused[detection]"'
    content = tables.table_3(None, 1)
    assert [row["network"] for row in content["memory"] if "missing" in row] == ["MobileNetV1", "ShuffleNet (x2)"]
    assert all(row["here"] == {} for row in content["rows"] if row["network"] == "MobileNetV1")


# -------------------------------------------------------------------------------------------------------------- memory


def largest(name: str) -> memory.Operation:
    model = made(networks.CLASSIFIERS[name])
    return memory.largest(memory.convolutions(model, torch.empty(1, 3, 224, 224, device="meta")))


def test_largest_convolution_of_mobilenet_v2():
    """The depthwise convolution of block 2: 96 channels in at 112, out at 56."""
    found = largest("MobileNetV2")
    assert found.name == "features.2.conv.1.0"
    assert found.bytes == 2 * 96 * (112**2 + 56**2)


def test_largest_convolution_of_mobilenet_v1():
    assert largest("MobileNetV1").bytes == 2 * (32 + 64) * 112**2


def test_blocks_as_operations():
    """The second largest sum is that of block 2, whose input and output are 16 and 24 channels wide."""
    stem, *rest = memory.blocks(MobileNetV2().eval(), 224, threads=1)
    assert stem.name == "stem and block 1"
    assert stem.bytes == 2 * (3 * 224**2 + 16 * 112**2) and stem.scratch > 0
    assert [operation.name for operation in rest] == [*(f"block {i}" for i in range(2, 18)), "head"]
    assert max(operation.bytes for operation in rest) == 2 * (16 * 112**2 + 24 * 56**2)
    assert memory.channels_by_resolution([stem, *rest], [112, 56, 28, 7, 1]) == {
        112: 16,
        56: 24,
        28: 32,
        7: 320,
        1: 1000,
    }


def test_scratch_of_a_plan_grows_with_threads():
    one, two = (memory.blocks(MobileNetV2().eval(), 224, threads=n)[0].scratch for n in (1, 2))
    assert two > one


def test_the_papers_arithmetic():
    """Channels x height x width x 2 bytes. It explains every printed size within 7 %, but for two."""
    away = {
        (name, r)
        for name, lines in printed.TABLE_3.items()
        for r, (channels, size) in lines.items()
        if r != "max" and abs(memory.kilobytes(channels, r) / size - 1) > 0.07
    }
    assert away == {("MobileNetV1", 7), ("MobileNetV2", 1)}


def test_measured_memory():
    model = MobileNetV2(width_mult=0.35).eval()
    x = torch.randn(1, 3, 96, 96)
    peak, scratch = memory.measured(model, x, 1)
    assert peak >= scratch > 0
    model.fused = False
    plain, none = memory.measured(model, x, 1)
    assert plain > peak and none == 0
