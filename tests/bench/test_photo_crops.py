"""bench/photo_crops.py: crops to train on and held-out ones come from different parts of a photograph."""

from __future__ import annotations

import sys

import numpy as np
import photo_crops
from PIL import Image


def test_crops_are_apart(tmp_path, monkeypatch, capsys):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    pixels = np.zeros((60, 240, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(240)  # the column
    for name in ("a", "b"):
        Image.fromarray(pixels).save(photographs / f"{name}.jpg", quality=100)
    Image.fromarray(pixels[:, :60]).save(photographs / "small.jpg")
    options = ["--size", "40", "--train", "7", "--val", "3"]
    monkeypatch.setattr(sys, "argv", ["photo_crops.py", str(photographs), str(tmp_path / "out"), *options])
    photo_crops.main()
    assert "left out, too small: " in capsys.readouterr().out
    columns = {}
    for part, count in (("train", 7), ("val", 3)):
        files = sorted((tmp_path / "out" / part).rglob("*.png"))
        assert len(files) == 2 * count and {file.parent.name for file in files} == {"a", "b"}
        crops = [np.asarray(Image.open(file))[:, :, 0].astype(int) for file in files]
        assert {crop.shape for crop in crops} == {(40, 40)}
        columns[part] = min(crop.min() for crop in crops), max(crop.max() for crop in crops)
    assert columns["val"][0] - columns["train"][1] > 40 / 2 - 5  # a JPEG is not exact
