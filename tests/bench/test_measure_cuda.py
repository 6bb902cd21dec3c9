"""The parts of bench/measure_cuda.py that need no GPU: limits, options, rows and their table."""

from __future__ import annotations

import copy
import json
import os
import sys

import cuda_tables
import engines
import measure_cuda
import pytest
import torch
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


def test_what_bars_ask_for_comes_first():
    network = measure_cuda.subjects("network", [1, 32, 256])
    assert measure_cuda.subjects("compiled", [1, 32, 256]) == network
    assert network == [("network", 256), ("17 blocks", 256), ("network", 32), ("network", 1),
                       ("17 blocks", 32), ("17 blocks", 1)]  # fmt: skip
    asked = {(bar.what, bar.batch) for bar in cuda_tables.BARS if bar.what != "each block"}
    assert asked == set(network[:4])
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


def test_json_and_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)  # a machine with a GPU may lack it
    rows = [
        row("network", 256, {"fused, graph": 1.0, "eager": 6.0}, {"torch.compile": "RuntimeError: no"}),
        row("block 3", 256, {"fused, graph": 0.5, "eager, graph": 1.0}),
        row("block 4", 256, {"eager, graph": 1.0}, {"fused, graph": "differs"}),
    ]
    rows[0]["peak_bytes"] = {"fused": 12e6}
    path = tmp_path / "gpu.json"
    measure_cuda.write(path, rows, {"command": "b", "commands": ["a"], "date": "2030-01-02"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["commands"] == ["a", "b"] and content["rows"] == rows
    text = " ".join(path.with_suffix(".md").read_text(encoding="utf-8").split())
    assert "| network | float16 | 256 | 1000.0 | | missing | | 6000.0 (6.00x) | 250 | 25% | 256000 | 12.0 |" in text
    assert "| block 3 | float16 | 256 | 500.0 | | | 1000.0 (2.00x) | | 250 | 50% |" in text
    assert "| block 4 | float16 | 256 | missing |" in text
    assert "Not measured: torch.compile: RuntimeError: no." in text
    assert "| network | 256 | images a second | at least 200 thousand | 256 thousand |" in text


def lines_of_bars(rows: list[dict]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in cuda_tables.bars(rows).splitlines()[2:]]


def test_bars():
    """Bars are reached, missed or not measured, and ignore rows of another batch or dtype."""
    assert {line[-1] for line in lines_of_bars([])} == {"not yet measured"} and len(lines_of_bars([])) == 10
    chain = row("17 blocks", 256, {"fused, graph": 0.9, "torch.compile": 1.8, "eager, graph": 9.0})
    network = row("network", 1, {"fused, graph": 0.125, "torch.compile": 0.25})
    memory = row("network", 256, {"fused": 1.0})
    memory["peak_bytes"] = {"fused": 1e6, "eager": 5e6}
    others = [{**chain, "dtype": "bfloat16"}, row("network", 8, {"fused, graph": 0.01})]
    found = {tuple(line[:3]): line[3:] for line in lines_of_bars([*others, chain, network, memory])}
    compiled, eager = (
        f"times as fast as {name}" for name in ("torch.compile, max-autotune", "eager, folded, in a CUDA graph")
    )
    assert found["17 blocks", "256", compiled] == ["at least 3.00", "2.00, missed"]
    assert found["17 blocks", "256", eager] == ["at least 5.00", "10.00"]
    assert found["17 blocks", "256", "time"] == ["at most 1000 us", "900 us"]
    assert found["network", "1", compiled] == ["at least 2.00", "2.00"]
    assert found["network", "1", "time"] == ["at most 120 us", "125 us, missed"]
    assert found["network", "256", "peak memory of eager's"] == ["at most 25%", "20%"]
    assert found["network", "256", "images a second"][1] == found["network", "32", compiled][1] == "not yet measured"
    blocks = [row(f"block {i}", 256, {"fused, graph": 0.5 if i < 17 else 2.0}) for i in range(1, 18)]
    assert lines_of_bars(blocks[:16])[-1][-1] == "not yet measured"
    assert lines_of_bars(blocks)[-1][-2:] == ["at least 25%", "12%, missed"]


class Here(measure_cuda.Apart):
    """Calls functions in this process."""

    def __call__(self, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:
            raise RuntimeError(measure_cuda.reason(error)) from error


def test_what_is_measured_already_is_left_out(tmp_path, monkeypatch):
    """All of `main` with a made-up GPU: parts, rows on disk after each, and a second run for the rest."""
    measured, path = [], tmp_path / "gpu.json"

    def measure(what, batch, dtype, names, seconds):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((what, batch))
        return row(what, batch, dict.fromkeys(names, 1.0))

    monkeypatch.setattr(measure_cuda, "Apart", Here)
    monkeypatch.setattr(measure_cuda, "measured", measure)
    monkeypatch.setattr(measure_cuda, "gpu", lambda: {"name": "Abacus"})
    arguments = ["compiled", "--json", str(path), "--missing"]
    with pytest.raises(KeyboardInterrupt):
        measure_cuda.main(arguments)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [(r["what"], r["batch"]) for r in content["rows"]] == [("network", 256), ("17 blocks", 256), ("network", 32)]
    measured.clear()
    measure_cuda.main(arguments)
    assert measured == [("network", 1), ("17 blocks", 32), ("17 blocks", 1)]
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 6


def test_one_broken_engine_leaves_the_figures_of_the_others(tmp_path, monkeypatch):
    def measure(what, batch, dtype, names, seconds):
        if {"fused", "fused, graph"} & set(names):
            raise ValueError("an illegal memory access\nwas encountered")
        return row(what, batch, dict.fromkeys(names, 1.0))

    monkeypatch.setattr(measure_cuda, "Apart", Here)
    monkeypatch.setattr(measure_cuda, "measured", measure)
    monkeypatch.setattr(measure_cuda, "gpu", lambda: {"name": "Abacus"})
    path = tmp_path / "gpu.json"
    measure_cuda.main(["network", "--json", str(path), "--batches", "2"])
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [r["what"] for r in rows] == ["network", "17 blocks"]
    for found in rows:
        assert found["milliseconds"] == {"eager": 1.0, "eager, graph": 1.0}
        assert found["missing"] == dict.fromkeys(("fused", "fused, graph"), "ValueError: an illegal memory access")
    assert "Not measured: fused: ValueError: an illegal" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_a_process_that_failed_is_not_used_again():
    apart = measure_cuda.Apart()
    try:
        first = apart(os.getpid)
        assert first == apart(os.getpid) != os.getpid()
        with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
            apart(int, "x")
        second = apart(os.getpid)
        assert second != first
        with pytest.raises(RuntimeError, match="the process ended with 3"):
            apart(os._exit, 3)
        assert apart(os.getpid) not in (first, second)
    finally:
        apart.end()


@torch.no_grad()
def test_what_runs_plain_is_not_published_as_fused(monkeypatch):
    network, names = engines.network, ("eager", "fused")
    monkeypatch.setattr(measure_cuda, "on_gpu", lambda model, dtype: copy.deepcopy(model).to(dtype))
    monkeypatch.setattr(measure_cuda, "inputs_of", lambda what, batch, dtype: [torch.randn(batch, 3, 64, 64)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found, missing, _ = measure_cuda.build("network", 2, torch.float32, names)
    assert list(found) == list(names) and missing == {}

    def with_a_hook(**options):
        model = copy.deepcopy(network(**options))
        model.features[3].conv[1].register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(engines, "network", with_a_hook)
    found, missing, _ = measure_cuda.build("network", 2, torch.float32, names)
    assert list(found) == ["eager"]
    assert missing == {"fused": "RuntimeError: features.3 runs plain: conv.1 has hooks"}
