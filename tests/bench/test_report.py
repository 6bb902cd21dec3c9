"""The figures that bench/report.py makes of stored results. Needs the extra `bench`."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
import charts
import measure_cuda
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
LIVE, FROZEN = "fused (live)", "fused (frozen)"
PLAIN, CHECKPOINTED = "eager channels_last", "checkpointed channels_last"
STEP = {"milliseconds": {"fused least": 400.0, PLAIN: 600.0, CHECKPOINTED: 1000.0}, "limit_milliseconds": 100.0}
NOT_COMPILED = {"torch.compile, training": "only with --compile-training"}
BLOCK = {"shape": [1, 32, 112, 112], "limit_milliseconds": 2.0}


def block(number: int, milliseconds: float) -> dict:
    plain = "eager channels_last"
    rates = {"gmacs_per_second": 10 / milliseconds, "share_of_peak": 2 / milliseconds}
    times = {"milliseconds": {"fused": milliseconds, plain: 8.0}, "times_as_long": {plain: 8 / milliseconds}}
    return {"block": number, **BLOCK, **rates, **times}


def written(tmp_path, rows: list[tuple[str, dict]], *others) -> tuple[str, str]:
    """The figures page and the README that report.py writes, with each run of spaces and newlines as one space."""
    results = {
        "machine_info": {"mnv2_fused": MACHINE},
        "benchmarks": [{"group": group, "extra_info": info} for group, info in rows],
    }
    (tmp_path / "out.json").write_text(json.dumps(results), encoding="utf-8")
    readme, figures = tmp_path / "README.md", tmp_path / "docs" / "figures.md"
    figures.parent.mkdir(exist_ok=True)
    readme.write_text(f"before {report.BEGIN} old {report.END} after", encoding="utf-8")
    figures.write_text("old", encoding="utf-8")
    files = [*map(str, (tmp_path / "out.json", *others))]
    report.main([*files, "--readme", str(readme), "--figures", str(figures)])
    page, front = (" ".join(path.read_text(encoding="utf-8").split()) for path in (figures, readme))
    assert page.startswith("# Figures") and " old " not in page
    assert front.startswith("before") and front.endswith("after")
    return page, front


def test_tables_and_chart(tmp_path):
    page, front = written(tmp_path, [("network", NETWORK), ("blocks", block(1, 2.5)), ("blocks", block(2, 5.0))])
    assert "| 1 | 1 | 5.00 | 12.5 (2.50x) | 4.00 | 80% |" in page
    assert "| all | | 2.7 | 53% | 2.1x |" in page  # 20 million multiply-adds take 4 ms at the peak, 7.5 ms measured
    assert "Not measured: ONNX Runtime: ModuleNotFoundError: no." in page
    assert "2030-01-02, Abacus, 2 cores, avx2, torch 2.13, openvino 2026.4: `" in page
    assert (tmp_path / "out.png").stat().st_size > 0 and "](../out.png)" in page and "](out.png)" in front


def test_grid(tmp_path):
    """The fastest peer is compared with both of ours."""
    times = {LIVE: 5.0, FROZEN: 4.0, "OpenVINO": 8.0, "LiteRT": 6.0}
    row = {**NETWORK, "milliseconds": times, "times_as_long": {name: ms / 5 for name, ms in times.items()}}
    page, _ = written(tmp_path, [("grid", {**row, "width": 0.5, "resolution": 96, "batch": 8})])
    assert f"| fastest peer / {LIVE} | fastest peer / {FROZEN} |" in page
    assert "| 1 | 8 | 0.5 | 96 | 5.00 | 4.00 (0.80x) | 8.00 (1.60x) | 6.00 (1.20x) | 1.20x | 1.50x | 80% |" in page


def test_serving(tmp_path):
    case = {"width": 1.0, "resolution": 224, "threads": 2, "missing": {"LiteRT": "ImportError: no"}}
    rates = {"1": {LIVE: 100.0, "OpenVINO": 90.0}, "16": {LIVE: 200.0, "OpenVINO": 150.0}}
    times = {**case, "busy": 1, "milliseconds": {LIVE: 3.5, "OpenVINO": 14.0}, "p99": {LIVE: 5.25, "OpenVINO": 20.0}}
    rows = [("serving", {**case, "images_per_second": rates}), ("latency", times), ("latency", {**times, "busy": 0})]
    page, _ = written(tmp_path, rows)
    assert "| 1.0, 224x224 | 1 | 2 | 100 (1.00x) | 90 (0.90x) |" in page
    assert "| 1.0, 224x224 | 16 | 1 | 200 (1.00x) | 150 (0.75x) |" in page
    assert page.index("| 1.0, 224x224 | 0 |") < page.index("| 1.0, 224x224 | 1 | 3.50 / 5.25 | 14.0 / 20.0 |")
    assert "Not measured: LiteRT: ImportError: no." in page


def test_what_was_not_measured_is_left_out(tmp_path):
    memory = {"batch": 32, "bytes": {"fused": 13e6, "eager channels_last": 334e6}, "share": {"fused": 0.039}}
    page, front = written(tmp_path, [("memory", memory)])
    assert "| allocator | 32 | 13.0 | 334.0 | 0.04 |" in page
    assert "Block by block" not in page and "Not measured:" not in page and ".png" not in page
    assert " old " in front, "nothing that the README shows was measured"


def test_detection_and_segmentation(tmp_path):
    task = {"network": "SSDLite 320", **NETWORK, "missing": {}}
    memory = {"network": "DeepLabv3 513", "bytes": {"fused": 30e6, PLAIN: 60e6}, "share": {"fused": 0.5, PLAIN: 1.0}}
    memory["bytes"]["fused, predict_mask"], memory["share"]["fused, predict_mask"] = 12e6, 0.2
    other = {**memory, "network": "SSDLite 320", "bytes": {"fused": 4e6, PLAIN: 8e6}}
    step = {**task, "batch": 8, "saved": {"fused": 80e6, PLAIN: 640e6}}
    rows = [("tasks", task), ("tasks memory", other), ("tasks memory", memory), ("tasks training", step)]
    page, front = written(tmp_path, rows)
    assert "| SSDLite 320 | 1 | 5.00 | 12.5 (2.50x) | 4.00 | 80% |" in page
    assert "| SSDLite 320 | 4.0 (0.50) | 8.0 (1.00) | |" in page
    assert "| DeepLabv3 513 | 30.0 (0.50) | 60.0 (1.00) | 12.0 (0.20) |" in page
    assert "| SSDLite 320 | 8 | 1 | 5.00 | 12.5 (2.50x) | 10.0 | 80.0 | 0.12 |" in page
    assert " old " in front


def test_seven_rows_for_the_readme(tmp_path):
    """The README shows seven rows, whatever batch sizes and thread counts there are, with ratios to ours."""
    times = {LIVE: 5.0, FROZEN: 4.5, PLAIN: 20.0, "OpenVINO": 4.0}
    times["torch.compile frozen"] = 10.0
    case = {**NETWORK, "milliseconds": times, "times_as_long": {name: ms / 5 for name, ms in times.items()}}
    rows = [("network", {**case, "batch": batch, "threads": n}) for n in (1, 2) for batch in (1, 8, 16, 32)]
    steps = {"fused most": 90.0, "fused balanced": 80.0, PLAIN: 100.0, CHECKPOINTED: 1600.0, "torch.compile": 160.0}
    for group in ("training step", "training step alone"):
        rows += [(group, {**STEP, "threads": 2, "batch": b, "milliseconds": steps}) for b in (32, 2, 16)]
    sizes = {"fused balanced": 5e8, PLAIN: 2e9}
    peak = {"level": "peak", "batch": 32, "threads": 2, "bytes": sizes, "share": {PLAIN: 1.0}}
    rows += [("training memory", peak), ("training memory", {**peak, "level": "saved"})]
    for width, ratio in ((0.5, 0.79), (1.0, 1.24)):
        ratios = {LIVE: 1.0, FROZEN: 0.8, "OpenVINO": ratio}
        rows.append(("grid", {**NETWORK, "width": width, "resolution": int(96 * width), "times_as_long": ratios}))
    front = written(tmp_path, rows)[1]
    assert [front.count(name) for name in ("| inference, ", "| training step, ", "| peak memory ")] == [3, 3, 1]
    assert "| MobileNetV2 1.0, 224x224, fp32, 2 threads | mnv2_fused | mnv2_fused, frozen |" in front
    inference = "| inference, batch 8, ms | 5.00 | 4.50 (0.90x) | 20.0 (4.00x) | 10.0 (2.00x) | | | 4.00 (0.80x) | |"
    assert inference in front
    for batch, how in ((2, "freed memory kept"), (32, "freed memory kept"), (32, "C library's defaults")):
        row = f"| training step, batch {batch}, {how}, ms | 80.0 | | 100 (1.25x) | 160 (2.00x) | 1600 (20.00x) | | | |"
        assert row in front
    assert "| peak memory of a training step, batch 32, MB | 500 | | 2000 (4.00x) | | | | | |" in front
    assert "widths 0.5 to 1.0 and resolutions 48 to 96 (batch 1, 1 thread) the time relative to mnv2_fused" in front
    assert "is 0.79 to 1.24 for OpenVINO, and relative to mnv2_fused (frozen) is 0.99 to 1.55 for OpenVINO." in front
    assert "2030-01-02, Abacus, 2 cores, avx2" in front and "](docs/figures.md)" in front


def test_a_file_without_markers_stays_as_it_is(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"{report.END} then {report.BEGIN}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README\.md must hold the markers"):
        report.insert(file, "new")
    assert file.read_text(encoding="utf-8") == f"{report.END} then {report.BEGIN}"


def test_a_gpu(tmp_path, monkeypatch):
    """A JSON file as bench/measure_cuda.py writes it, for a made-up GPU with made-up times."""
    assert "| network | 256 | images a second | at least 200 thousand | not yet measured |" in written(tmp_path, [])[0]

    def measured(what, batch, dtype, names, seconds):
        times = {"fused, graph": 1.0, "eager, graph": 6.0}
        ratios = {"missing": {}, "times_as_long": times}
        return {"what": what, "batch": batch, "milliseconds": times, "limit_milliseconds": 0.5, **ratios}

    gpu = {"name": "Abacus 9", "driver, clock, power": "1.2, 3 MHz", "cuda": "13.0"}
    monkeypatch.setattr(measure_cuda.Apart, "__call__", lambda self, function, *arguments: function(*arguments))
    monkeypatch.setattr(measure_cuda, "measured", measured)
    monkeypatch.setattr(measure_cuda, "gpu", lambda: gpu)
    measure_cuda.main(["network", "blocks", "--json", str(tmp_path / "gpu.json")])
    text = written(tmp_path, [("network", NETWORK)], tmp_path / "gpu.json")[0]
    assert "| 1 | 1 | 5.00 | 12.5 (2.50x) | 4.00 | 80% |" in text
    assert "| network | 256 | images a second | at least 200 thousand | 256 thousand |" in text
    assert "| each block | 256 | of its own limit | at least 25% | 50% |" in text
    assert "| network | float16 | 256 | 1000.0 | | | 6000.0 (6.00x) | | 500 | 50% | 256000 |" in text
    assert (
        "## GPU Abacus 9. Times are" in text
        and "Not measured yet" not in text
        and ", Abacus 9, driver 1.2, 3 MHz, torch " in text
    )
    assert "out.json" in text and "gpu.json`;" in text
    assert report.of_commit({}) == "" and report.of_commit({"commit": "0a1b"}) == ", kernels of commit 0a1b"


def test_training(tmp_path):
    rows = [
        ("training step", {"batch": 32, **STEP}),
        ("training step", {"batch": 16, **STEP, "missing": NOT_COMPILED}),
        ("training frozen", {"batch": 16, **STEP, "milliseconds": {"fused least": 300.0, PLAIN: 600.0}}),
        ("training memory", {"level": "peak", "batch": 32, "bytes": {PLAIN: 3e9}, "share": {PLAIN: 1.0}}),
        (
            "training memory",
            {
                "level": "saved",
                "batch": 16,
                "bytes": {"fused least": 17e6, PLAIN: 78e6},
                "share": {"fused least": 0.218, PLAIN: 1.0},
            },
        ),
    ]
    text = written(tmp_path, rows)[0]
    step, frozen = text.split("Fine-tuning")
    heading = f"| batch | engine | ms | images/s | against {PLAIN} | against {CHECKPOINTED} | FMA limit, ms |"
    assert heading in step and heading not in frozen
    # 16 images in 0.4 s; the smaller batch comes first.
    first = "| 16 | fused least | 400.0 | 40.0 | 1.50x | 2.50x | 100.0 | 25% |"
    assert step.index(first) < step.index("| 32 | fused least | 400.0 | 80.0 | 1.50x | 2.50x | 100.0 | 25% |")
    assert f"| 16 | {CHECKPOINTED} | 1000.0 | 16.0 | 0.60x | 1.00x | 100.0 | 10% |" in step
    assert "| 16 | fused least | 300.0 | 53.3 | 2.00x | 100.0 | 33% |" in frozen
    assert "saved for the backward (batch 16), MB an image | saved, share | peak of a step (batch 32), MB" in frozen
    assert "| fused least | 17.0 | 0.22 | missing | missing |" in frozen
    assert f"| {PLAIN} | 78.0 | 1.00 | 3000.0 | 1.00 |" in frozen
    assert "Not measured: torch.compile, training: only with --compile-training." in text
    assert text.count("](../training.png)") == 1 and (tmp_path / "training.png").stat().st_size > 0
    assert "out.png" not in text


def test_the_training_chart_takes_the_largest_batch(tmp_path, monkeypatch):
    drawn = []

    def savefig(figure, path, **_):
        drawn.extend(
            (axes.get_xlabel(), [bar.get_width() for bar in axes.patches], len(axes.lines)) for axes in figure.axes
        )

    monkeypatch.setattr(charts.plt.Figure, "savefig", savefig)
    peak = {"level": "peak", "batch": 32, "bytes": {"fused most": 4e8, PLAIN: 2e9}}
    larger = {"batch": 32, "milliseconds": {"fused most": 7.0, PLAIN: 9.0}, "limit_milliseconds": 3.0}
    charts.draw_training([larger, {"batch": 16, **STEP}], [peak], tmp_path / "training.png")
    assert drawn == [
        ("a step of 32 images, freed memory kept, ms", [7.0, 9.0], 1),
        ("peak memory of 32 images, MB", [400.0, 2000.0], 0),
    ]
