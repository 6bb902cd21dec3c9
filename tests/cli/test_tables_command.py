"""`tables` on the command line: what it prints, writes, and refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mnv2_fused import cli, extras
from mnv2_fused.cli.output import Sheet
from mnv2_fused.cli.sheets import sheets
from mnv2_fused.paper import printed, tables
from mnv2_fused.tools import measure


def run(*arguments: str) -> int:
    """The exit code, also if argparse exits by itself."""
    try:
        return cli.main(["tables", *arguments])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def small(monkeypatch):
    """Tables of few and small networks, which are measured in seconds."""
    monkeypatch.setattr(tables, "_IMAGE", 32)
    monkeypatch.setattr(tables, "WIDTHS", (0.5, 0.35))
    monkeypatch.setattr(tables, "RESOLUTIONS", (96,))
    monkeypatch.setattr(printed, "TABLE_3", {"MobileNetV2": printed.TABLE_3["MobileNetV2"]})
    monkeypatch.setattr(printed, "TABLE_4", {"MobileNetV2": printed.TABLE_4["MobileNetV2"]})


def test_measures_and_writes_json(small, capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = ("--only", "figure5,4,3", "--seconds", "0.01", "--threads", "1", "--json", str(path))
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert out.index("Table 3") < out.index("Section 5.1") < out.index("Table 4") < out.index("Figure 5")
    assert "Table 6" not in out
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["machine"]["cpu"] and content["versions"]["torch"] and content["date"]
    assert content["settings"]["threads"] == [1]
    assert f"{content['peak_gmacs_per_second']:.0f} G multiply-adds a second" in " ".join(out.split())
    found = content["tables"]
    assert list(found) == ["3", "4", "figure5"]
    (row,) = found["4"]["rows"]
    for times in (row["milliseconds"], *(row["milliseconds"] for row in found["figure5"]["rows"])):
        assert times.keys() == {"1"} and all(times["1"][kind] > 0 for kind in ("plain", "fused"))
    by_convolutions, by_blocks = found["3"]["memory"]
    assert by_blocks["scratch_bytes"] > 0 and by_blocks["peak_bytes"] < by_convolutions["peak_bytes"]
    assert f"{row['milliseconds']['1']['fused']:.2f}" in out


def test_counts_without_measuring(small, capsys):
    assert run("--only", "4", "--no-measure") == 0
    out = capsys.readouterr().out
    assert "3,504,872" in out and "3.4 M" in out and "+3.1 %" in out
    assert "PyTorch ms" not in out


def test_progress_reaches_its_end(small, monkeypatch):
    """Every step is announced, and there are as many as the bar expects."""
    monkeypatch.setattr(
        measure, "interleaved", lambda calls, seconds, progress: progress(1.0) or {name: [1.0] for name in calls}
    )
    names, shares = [], []
    measuring = tables.Measuring([1, 2], 0.01, 0, names.append, shares.append)
    tables.table_3(measuring, 1)
    tables.table_4(measuring)
    tables.figure_5(measuring)
    assert len(names) == len(shares) == tables.steps(["3", "4", "6", "figure5"], [1, 2])
    assert set(shares) == {1.0}


def test_a_column_for_each_number_of_threads(small, monkeypatch):
    def times(calls, seconds, progress):
        return {(name, kind): [torch.get_num_threads() / (2 if kind == "fused" else 1)] for name, kind in calls}

    monkeypatch.setattr(measure, "interleaved", times)
    (sheet,) = sheets({"4": tables.table_4(tables.Measuring([1, 2], 1, 0, lambda name: None, lambda share: None))})
    columns = ("PyTorch ms, 1 thr.", "fused ms, 1 thr.", "PyTorch ms, 2 thr.", "fused ms, 2 thr.")
    found = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    assert [found[column] for column in columns] == ["1000.00", "500.00", "2000.00", "1000.00"]


def test_page_in_markdown(small, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    directory = tmp_path / "pictures"
    arguments = (
        "--only",
        "4,figure5",
        "--no-measure",
        "--markdown",
        "--plot",
        str(directory),
        "--note",
        "[generation]",
    )
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("# ") and "[generation]" in out
    assert "| MobileNetV2 | 72.0 | 3.4 M | 3,504,872 | +3.1 % |" in out
    assert "](pictures/figure5.png)" in out
    assert (directory / "figure5.png").stat().st_size > 10_000
    prose = re.sub(r"```.*?```", "", out, flags=re.DOTALL)
    assert all(len(line) <= 120 for line in prose.splitlines() if not line.startswith("|"))


def test_a_picture_that_cannot_be_written(small, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "figure5.png").mkdir()
    assert run("--only", "figure5", "--no-measure", "--plot", str(tmp_path)) == 2
    assert f"--plot: cannot write {tmp_path / 'figure5.png'}: Is a directory" in capsys.readouterr().err


def test_rows_that_need_a_package_are_no_error(monkeypatch, capsys):
    def use(name: str, extra: str):
        raise extras.MissingExtraError(f"{name} cannot be imported")

    monkeypatch.setattr(extras, "use", use)
    assert run("--only", "4,6", "--no-measure") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert 'needs pip install "mnv2_fused[tables]"' in out and "3,504,872" in out
    assert run("--plot", "anywhere", "--no-measure") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "5"], "expected names from 3, 4, 6, 7, figure5 separated by commas, got '5'"),
        (["--only", ""], "expected names from"),
        (["--threads", "0"], "expected whole numbers from 1"),
        (["--only", "4", "--plot", "x"], "--plot: draws Figure 5, which --only 4 leaves out"),
        (["--plot", "no/such/directory"], "--plot: expected a directory, got no/such/directory"),
        (["--json", "no/such/file"], "--json: no such directory"),
    ],
)
def test_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_cells_are_escaped_in_markdown():
    assert "| a\\|b |" in Sheet("title", ("<x",), [["a|b"]]).markdown()
