"""Real weights on real photographs. Needs the directory that MNV2_FUSED_TEST_DATA names. Its expected.json holds the
results of plain PyTorch in float64 with TensorFlow's padding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from oracle import assert_close, plain

from mnv2_fused import cli, weights
from mnv2_fused.data import images

PHOTOGRAPHS = ("bird.png", "cat_720p.jpg", "grace_hopper.png", "hot_dog.jpg", "parrot.jpg")
DATA = Path(os.environ.get("MNV2_FUSED_TEST_DATA", ""))
pytestmark = pytest.mark.skipif(
    "MNV2_FUSED_TEST_DATA" not in os.environ,
    reason="MNV2_FUSED_TEST_DATA names no directory with the real weights and photographs",
)
WEIGHTS = "mobilenet_v2_1.0_224_imagenet1001.safetensors"


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((DATA / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return images.load_batch([DATA / "photos" / name for name in PHOTOGRAPHS], weights.TENSORFLOW)


@pytest.fixture(scope="module")
def exact(batch) -> torch.Tensor:
    model, _ = weights.load_model(DATA / WEIGHTS, fused=False)
    with torch.inference_mode():
        return model.double()(batch.double())


def test_every_photograph_is_here(expected):
    assert set(expected) == set(PHOTOGRAPHS)


def test_file_is_known_as_tensorflow_s():
    state_dict, convention = weights.load_state_dict(DATA / WEIGHTS)
    assert convention == weights.TENSORFLOW
    assert weights.width_mult(state_dict) == 1.0


def test_float64_logits(expected, exact):
    """The remaining error is the rounding of the prepared image to fp32 and of the file to eight decimals."""
    for row, name in zip(exact, PHOTOGRAPHS, strict=True):
        got = torch.tensor(expected[name]["float64_logits_first8"], dtype=torch.float64)
        torch.testing.assert_close(row[:8], got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_logits_are_as_exact_as_plain_ones(batch, exact, dtype):
    model = weights.load_model(DATA / WEIGHTS)[0].to(dtype)
    with torch.inference_mode():
        x = batch.to(dtype)
        assert_close(model(x), plain(model)(x), exact)


def test_classify_prints_the_expected_answers(expected, capsys):
    """Labels, order and probabilities, also compared with the published 8-bit network."""
    paths = [str(DATA / "photos" / name) for name in PHOTOGRAPHS]
    labels = str(DATA / "imagenet_labels_1001.txt")
    assert cli.main(["classify", *paths, "--weights", str(DATA / WEIGHTS), "--labels", labels, "--json", "-"]) == 0
    captured = capsys.readouterr()
    for name, answer in zip(PHOTOGRAPHS, json.loads(captured.out)["answers"], strict=True):
        top = [(row["index"], row["label"]) for row in answer["top"]]
        assert top == [(index, label) for index, label, _ in expected[name]["float64_top5"]]
        got = [row["probability"] for row in answer["top"]]
        assert got == pytest.approx([probability for *_, probability in expected[name]["float64_top5"]], abs=1e-5)
        assert top[0][0] == expected[name]["int8_litert_top1"][0]
        assert top[0][1] in captured.err


def test_torchvision_s_padding_gives_other_answers(batch, exact):
    """Shows that the tests above depend on the convention."""
    model, _ = weights.load_model(DATA / WEIGHTS, convention="torchvision")
    with torch.inference_mode():
        got = model(batch)
    assert (got - exact).abs().max() > 1
    labels = (DATA / "imagenet_labels_1001.txt").read_text(encoding="utf-8").splitlines()
    hopper = PHOTOGRAPHS.index("grace_hopper.png")
    assert labels[exact[hopper].argmax()] == "military uniform"
    assert labels[got[hopper].argmax()] == "mortarboard"
