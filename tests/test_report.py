"""The figures that bench/report.py makes of stored results. Needs the extra `bench`."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
import report

MACHINE = {
    "date": "2030-01-02T03:04:05+00:00",
    "machine": {"cpu": "Abacus", "cpus": 2, "isa": "avx2"},
    "versions": {"torch": "2.13", "openvino": "2026.4"},
    "command": "pytest bench/ --benchmark-only",
}
TIMES = {"milliseconds": {"fused": 5.0, "OpenVINO": 12.5}, "times_as_long": {"fused": 1.0, "OpenVINO": 2.5}}
LIMIT = {"limit_milliseconds": 4.0, "share_of_peak": 0.8, "gmacs_per_second": 60.0}
NETWORK = {"batch": 1, "threads": 1, **TIMES, **LIMIT, "missing": {"ONNX Runtime": "ModuleNotFoundError: no"}}
BLOCK = {"shape": [1, 32, 112, 112], "limit_milliseconds": 2.0}


def block(number: int, milliseconds: float) -> dict:
    plain = "eager channels_last"
    rates = {"gmacs_per_second": 10 / milliseconds, "share_of_peak": 2 / milliseconds}
    times = {"milliseconds": {"fused": milliseconds, plain: 8.0}, "times_as_long": {plain: 8 / milliseconds}}
    return {"block": number, **BLOCK, **rates, **times}


def written(tmp_path, rows: list[tuple[str, dict]]) -> str:
    """What report.py writes between the markers, a space for every run of them."""
    results = {
        "machine_info": {"mnv2_fused": MACHINE},
        "benchmarks": [{"group": group, "extra_info": info} for group, info in rows],
    }
    (tmp_path / "out.json").write_text(json.dumps(results), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(f"before {report.BEGIN} old {report.END} after", encoding="utf-8")
    report.main([str(tmp_path / "out.json"), "--readme", str(readme)])
    text = " ".join(readme.read_text(encoding="utf-8").split())
    assert text.startswith("before") and text.endswith("after") and " old " not in text
    return text


def test_tables_and_chart(tmp_path):
    text = written(tmp_path, [("network", NETWORK), ("blocks", block(1, 2.5)), ("blocks", block(2, 5.0))])
    assert "| 1 | 1 | 5.00 | 12.5 (2.50x) | 4.00 | 80% |" in text
    assert "| all | | 2.7 | 53% | 2.1x |" in text  # 20 million multiply-adds, 7.5 ms, of which 4 at the peak
    assert "Not measured: ONNX Runtime: ModuleNotFoundError: no." in text
    assert "2030-01-02, Abacus, 2 cores, avx2, torch 2.13, openvino 2026.4." in text
    assert (tmp_path / "out.png").stat().st_size > 0 and "](out.png)" in text


def test_what_was_not_measured_is_left_out(tmp_path):
    memory = {"batch": 32, "bytes": {"fused": 13e6, "eager channels_last": 334e6}, "share": {"fused": 0.039}}
    text = written(tmp_path, [("memory", memory)])
    assert "| allocator | 32 | 13.0 | 334.0 | 0.04 |" in text
    assert "Block by block" not in text and "Not measured" not in text and ".png" not in text
