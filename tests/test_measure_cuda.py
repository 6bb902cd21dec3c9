"""What bench/measure_cuda.py does without a GPU: limits, options, rows and their table."""

from __future__ import annotations

import json

import engines
import measure_cuda
import pytest
from measure_cuda import Work, block_work, limit, limit_of

BLOCK = {"h": 14, "c_in": 8, "c_hidden": 48, "c_out": 16, "stride": 2, "kernel": 3, "has_expand": True}
BLOCK["w"] = BLOCK["h"]


def test_work_of_a_block():
    x, y, weights = 196 * 8, 49 * 16, 8 * 48 + 9 * 48 + 48 * 16
    expected = Work(2 * (5 * (x + y) + weights), 5 * (196 * 8 * 48 + 49 * 48 * 16), 5 * 49 * 48 * 9)
    assert block_work(BLOCK, 5) == expected
    assert block_work(BLOCK, 5, element=4).bytes == 2 * expected.bytes
    smaller = block_work({**BLOCK, "c_hidden": 8, "has_expand": False}, 5)
    assert smaller.tensor_macs == 5 * 49 * 8 * 16 and smaller.bytes == 2 * (5 * (x + y) + 9 * 8 + 8 * 16)


def test_the_scarcest_resource_sets_the_limit():
    assert limit(Work(43 * 10**9, 0)) == pytest.approx(0.01)
    assert limit(Work(1, 395 * 10**9)) == pytest.approx(0.001)
    assert limit(Work(1, 1, 335 * 10**8)) == pytest.approx(0.001)


def test_limits_of_the_network():
    model = engines.network()
    for batch, microseconds in ((1, 1.6), (32, 34), (256, 272)):
        assert 1e6 * limit_of("17 blocks", model, batch) == pytest.approx(microseconds, rel=0.02)
    blocks = [limit_of(f"block {i}", model, 256) for i in range(1, 18)]
    assert sum(blocks) == pytest.approx(limit_of("17 blocks", model, 256))
    assert blocks.index(max(blocks)) == 0
    works = measure_cuda.network_works(model, 1)
    macs = sum(work.tensor_macs + work.float32_macs for work in works)
    assert macs == 300_774_272  # the multiply-adds of the published model
    assert len(works) == 19 and limit_of("network", model, 1) == pytest.approx(sum(map(limit, works)))


def test_options():
    options = measure_cuda.parse(["network", "blocks", "--json", "a.json", "--batches", "8,2"])
    assert options.parts == ["network", "blocks"] and options.batches == [8, 2] and options.dtype == "float16"
    for wrong in ([], ["network"], ["all", "--json", "a"], ["network", "--json", "a", "--dtype", "float32"]):
        with pytest.raises(SystemExit):
            measure_cuda.parse(wrong)


def test_the_largest_batch_comes_first():
    assert measure_cuda.subjects("network", [1, 256])[:3] == [("network", 256), ("17 blocks", 256), ("network", 1)]
    assert measure_cuda.subjects("blocks", [1, 256])[16:18] == [("block 17", 256), ("block 1", 1)]


def row(what: str, batch: int, milliseconds: dict, missing: dict | None = None) -> dict:
    base = milliseconds.get("fused, graph", 1)
    ratios = {name: value / base for name, value in milliseconds.items()}
    return {
        **{"what": what, "batch": batch, "dtype": "float16", "missing": missing or {}},
        **{"milliseconds": milliseconds, "times_as_long": ratios, "limit_milliseconds": 0.25},
    }


def test_rows_of_one_subject_are_merged():
    rows = measure_cuda.merged([], row("network", 256, {"fused, graph": 1.0, "eager": 6.0}, {"torch.compile": "no"}))
    rows = measure_cuda.merged(rows, row("network", 1, {"fused, graph": 0.1}))
    rows = measure_cuda.merged(rows, row("network", 256, {"fused, graph": 1.1, "torch.compile": 3.3}))
    assert [r["batch"] for r in rows] == [256, 1]
    assert rows[0]["milliseconds"] == {"fused, graph": 1.1, "eager": 6.0, "torch.compile": 3.3}
    assert rows[0]["times_as_long"]["eager"] == 6.0, "of the run that it was measured in"
    assert rows[0]["missing"] == {}


def test_json_and_table(tmp_path):
    pytest.importorskip("tabulate")
    rows = [
        row("network", 256, {"fused, graph": 1.0, "eager": 6.0}, {"torch.compile": "RuntimeError: no"}),
        row("block 3", 256, {"fused, graph": 0.5, "eager, graph": 1.0}),
        row("block 4", 256, {"eager, graph": 1.0}, {"fused, graph": "differs"}),
    ]
    rows[0]["peak_bytes"] = {"fused": 12e6}
    path = tmp_path / "cuda.json"
    measure_cuda.write(path, rows, {"command": "b", "commands": ["a"], "date": "2030-01-02"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["commands"] == ["a", "b"] and content["rows"] == rows
    text = " ".join(path.with_suffix(".md").read_text(encoding="utf-8").split())
    assert "| network | float16 | 256 | 1000.0 | | missing | | 6000.0 (6.00x) | 250 | 25% | 256000 | 12.0 |" in text
    assert "| block 3 | float16 | 256 | 500.0 | | | 1000.0 (2.00x) | | 250 | 50% |" in text
    assert "| block 4 | float16 | 256 | missing |" in text
    assert "Not measured: torch.compile: RuntimeError: no." in text
