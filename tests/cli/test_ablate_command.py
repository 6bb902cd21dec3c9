"""`ablate` on the command line: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import os
import signal

import pytest
from pictures import make_pictures

from mnv2_fused import cli, extras, trainer
from mnv2_fused.trainer import loop

OPTIONS = ["--width", "0.1", "--resolution", "32", "--batch", "8", "--epochs", "2", "--threads", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(make_pictures(tmp_path_factory.mktemp("data") / "colours"))


def ablate(*arguments: str) -> int:
    """The exit code, also if argparse exits by itself."""
    try:
        return cli.main(["ablate", *arguments])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def there(pictures, tmp_path_factory) -> list[str]:
    """The options of an ablation that is done."""
    options = ["--data", pictures, "--output", str(tmp_path_factory.mktemp("ablation") / "out"), *OPTIONS]
    options += ["--variants", "linear,no-shortcut,relu6", "--seeds", "2"]
    assert ablate(*options) == 0
    return options


def test_table_json_and_plot(there, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    path = tmp_path / "out.json"
    assert ablate(*there, "--json", str(path), "--plot", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.count("; was there already") == 6 and "MobileNetV2 0.1, 32x32, 3 classes" in out
    assert "- linear" in out and "mean over 2 seeds ± its standard error" in out and "By mean accuracy: " in out
    written = json.loads(path.read_text(encoding="utf-8"))
    summary = {each["variant"]: each for each in written["summary"]}
    assert list(summary) == ["linear", "no-shortcut", "relu6"] and written["settings"]["width"] == 0.1
    for name, each in summary.items():
        ends = [run["history"][-1] for run in written["runs"] if run["variant"] == name]
        mean = each["figures"]["validation_accuracy"]["mean"]
        assert mean == pytest.approx(sum(end["validation_accuracy"] for end in ends) / 2)
        assert f"{100 * mean:.2f} ±" in out
        assert bool(each["differences"]) == (name != "linear")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_and_a_single_seed(there, capsys):
    assert ablate(*there[:-1], "1", "--markdown") == 0
    out = capsys.readouterr().out
    title, _, *lines = out.splitlines()
    assert title == "## Ablation on colours"
    assert lines[0].startswith("| variant | seeds | accuracy, % | - linear |") and lines[1].startswith("| --- | ---: |")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| linear", "| no-shortcut", "| relu6"]
    assert "One seed has no standard errors" in out and "width 0.1, 32x32, 2 epochs, batch 8" in " ".join(lines)


def test_an_interruption_ends_with_130_and_the_same_command_goes_on(pictures, tmp_path, capsys, monkeypatch):
    options = ["--data", pictures, "--output", str(tmp_path / "out"), *OPTIONS, "--variants", "relu6", "--seeds", "1"]
    step = loop.Trainer._progress

    def interrupt(self, rate):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_progress", interrupt)
        assert ablate(*options) == 130
    assert "after step 2 of 6; the same command goes on" in capsys.readouterr().err
    assert ablate(*options) == 0
    assert len((tmp_path / "out" / trainer.LOG).read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "linear,wide"], "expected different ones of linear, relu6, no-shortcut, expansion-shortcut"),
        (["--variants", "linear,linear"], "expected different ones of"),
        (["--variants", ""], "expected different ones of"),
        (["--seeds", "0"], "expected a whole number from 1 to 1000, got '0'"),
        (["--epochs", "3"], "--epochs 3 contradicts the checkpoint to resume, which has 2"),
        (["--plot", "/nowhere"], "--plot: expected a directory, got /nowhere"),
        (["--json", "/nowhere/out.json"], "--json: no such directory: /nowhere"),
    ],
)
def test_errors(there, options, message, capsys):
    assert ablate(*there, *options) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_before_the_work(pictures, tmp_path, capsys, monkeypatch):
    def missing(name: str, extra: str):
        raise extras.MissingExtraError(f'{name} is missing: pip install "mnv2_fused[{extra}]"')

    monkeypatch.setattr(extras, "use", missing)
    output = tmp_path / "out"
    assert ablate("--data", pictures, "--output", str(output), *OPTIONS, "--plot", str(tmp_path)) == 2
    assert 'pip install "mnv2_fused[ablate]"' in capsys.readouterr().err and not output.exists()
