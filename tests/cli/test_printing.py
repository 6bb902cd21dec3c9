"""Texts of users come out as they are: labels, class names, paths and error messages are no markup."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.progress import BarColumn
from safetensors.torch import save_file

from mnv2_fused import MobileNetV2, cli
from mnv2_fused.cli import output
from mnv2_fused.cli.options import InputError

# Markup, the end of markup that was never begun, an emoji's code, and a link.
NASTY = ["[background]", "[/x]", "[bold]red", ":smile:", "[link=a]b", "\\[green]"]
PHOTO, WEIGHTS = "[dim]p[/dim].png", ["--weights", "w[/b].safetensors"]
SMALL = ["--resolution", "32", "--threads", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with files whose paths look like markup, and a network of as many classes as there are labels.

    The path `w[/b].safetensors` names a file `b].safetensors` in a directory `w[`.
    """
    directory = tmp_path / "[red]a"
    for name in ("w[", "l[", "[dim]p[", "out["):
        (directory / name).mkdir(parents=True)
    monkeypatch.chdir(directory)
    save_file(MobileNetV2(len(NASTY), 0.1).state_dict(), "w[/b].safetensors")
    (directory / "l[/i].txt").write_text("".join(f"{label}\n" for label in NASTY), encoding="utf-8")
    Image.new("RGB", (40, 40), (9, 99, 199)).save(PHOTO)
    return directory


def test_labels_and_paths(place, capsys):
    files = [PHOTO, *WEIGHTS, "--labels", "l[/i].txt"]
    assert cli.main(["classify", *files, "--top", str(len(NASTY)), *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == PHOTO
    assert sorted(line.split()[-1] for line in lines[4:] if line.strip()) == sorted(NASTY)


def test_a_long_label_is_not_cut(place, capsys):
    label = "x" * 300
    (place / "long.txt").write_text(f"{label}\n" * len(NASTY), encoding="utf-8")
    files = [PHOTO, *WEIGHTS, "--labels", "long.txt"]
    assert cli.main(["classify", *files, "--top", "1", *SMALL]) == 0
    assert capsys.readouterr().out.count("x") == 300


def test_an_empty_label_is_no_missing_label(place, capsys):
    (place / "empty.txt").write_text("\n" * (len(NASTY) - 1) + "last\n", encoding="utf-8")
    files = [PHOTO, *WEIGHTS, "--labels", "empty.txt"]
    assert cli.main(["classify", *files, *SMALL]) == 0
    assert "no --labels" not in capsys.readouterr().out


def test_compare_prints_paths(place, capsys):
    options = ["--batch", "1", "--seconds", "0.01", *SMALL]
    files = [*WEIGHTS, "--image", PHOTO, "--json", "out[/].json"]
    assert cli.main(["compare", *options, *files]) == 0
    out = capsys.readouterr().out
    assert "weights: w[/b].safetensors (" in out and f"input: {PHOTO}\n" in out
    assert "written: out[/].json\n" in out


def test_training_on_classes_with_such_names(place, capsys):
    labels = sorted(set(NASTY) - {"[/x]"})  # a directory's name has no slash
    for i, label in enumerate(labels):
        (place / "data[/u]" / label).mkdir(parents=True)
        for j in range(3):
            Image.new("RGB", (40, 40), (40 * i, 80 * j, 99)).save(place / "data[/u]" / label / f"{j}[red].png")
    options = ["--width", "0.1", "--batch", "4", "--epochs", "1", "--workers", "0", *SMALL]
    assert cli.main(["train", "--data", "data[/u]", "--output", "o[/s]", *options]) == 0
    captured = capsys.readouterr()
    assert "written: o[/s]/model.safetensors, o[/s]/labels.txt, o[/s]/log.jsonl\n" in captured.out
    assert (place / "o[/s]" / "labels.txt").read_text(encoding="utf-8").splitlines() == labels
    (place / "data[/u]" / "[background]").rename(place / "data[/u]" / "[foreground]")
    assert cli.main(["train", "--data", "data[/u]", "--output", "o[/s]", "--resume"]) == 2
    assert "[background]" in capsys.readouterr().err


def test_error_messages(place, capsys):
    assert cli.main(["classify", "[/n].png", *WEIGHTS]) == 2
    assert capsys.readouterr().err == "error: no such image: [/n].png\n"
    assert cli.main(["classify", "[/n].png", "--weights", "n[/b].pth"]) == 2
    assert "error: no such weights file: n[/b].pth (" in capsys.readouterr().err


def test_everything_that_output_makes_prints_as_it_is(capsys):
    class Arguments:
        json = None

    console = output.console(Arguments)
    for text in NASTY:
        output.say(console, text)
        table = output.table(f"<{text}")
        table.add_row(text)
        console.print(table)
        out = capsys.readouterr().out
        assert out.count(text) == 3, out
        with output.progress(console, "{task.description}", BarColumn()) as bar:
            bar.add_task(text)
            (rendered,) = [column.render(bar.tasks[0]) for column in bar.columns[:1]]
        assert rendered.plain == text


def test_only_output_makes_consoles_tables_and_bars():
    for file in Path(cli.__file__).parent.glob("*.py"):
        made = re.findall(r"\b(?:Console|Table|Progress|Text|TextColumn)\(|\bprint\(", file.read_text(encoding="utf-8"))
        allowed = {"output.py": {"Console(", "Table(", "Progress(", "TextColumn("}}.get(file.name, set())
        assert set(made) <= allowed | {"print("}, file


def test_names_that_the_encoding_does_not_have(place):
    """In a process of its own: pytest's streams accept everything."""
    os.rename(PHOTO, b"\xff\xc3\xa9.png")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-W", "ignore", "-m", "mnv2_fused", "classify", b"\xff\xc3\xa9.png"]
    done = subprocess.run([*command, *WEIGHTS, *SMALL], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\udcff\\xe9.png\n")


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="--json: expected a file, got a directory"):
        output.check_json(str(tmp_path))
    output.check_json(None)
