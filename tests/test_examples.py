"""Every example runs as a script and prints its answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TORCHVISION = "from mnv2_fused import extras; extras.use('torchvision', 'detection')"
RUN = """
import runpy, sys
del sys.argv[0]
{before}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def printed(name: str, directory: Path, *arguments: str, before: str = "") -> str:
    """What the example prints. It runs on one thread, because `pytest -n` runs other tests beside it."""
    runner = directory / "run.py"
    runner.write_text(RUN.format(before=before), encoding="utf-8")
    command = [sys.executable, str(runner), str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1])


def test_all_are_short_and_tested():
    found = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert max(found.values()) <= 40
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in found if f'printed("{name}"' not in tests] == []


def test_classify(tmp_path):
    text = printed("classify.py", tmp_path)
    assert len(re.findall(r"^class +\d+: +\d+\.\d%$", text, re.MULTILINE)) == 3
    assert number(r"difference from plain PyTorch: (\S+)", text) < 1e-5


def test_classify_own_image_and_weights(tmp_path):
    from PIL import Image
    from safetensors.torch import save_file

    import mnv2_fused

    model, image, weights = mnv2_fused.MobileNetV2(3, 0.35), tmp_path / "red.png", tmp_path / "own.safetensors"
    save_file(model.state_dict(), weights)
    Image.new("RGB", (30, 20), "red").save(image)
    text = printed("classify.py", tmp_path, str(image), str(weights))
    assert {int(label) for label in re.findall(r"^class +(\d+)", text, re.MULTILINE)} == {0, 1, 2}


def test_convert_torchvision(tmp_path, torchvision_mobilenetv2):
    text = printed("convert_torchvision.py", tmp_path, before=TORCHVISION)
    assert re.search(r"^features\.17 +fused, frozen$", text, re.MULTILINE) and "plain" not in text
    assert re.search(r"torchvision [\d.]+ ms, converted [\d.]+ ms", text)
    assert number(r"difference (\S+) of", text) <= 1e-3 * number(r"values up to (\S+)", text)
    assert "reverted to torchvision.models.mobilenetv2.MobileNetV2" in text


def test_fine_tune(tmp_path):
    text = printed("fine_tune.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
    # Of single batches, which differ by more than fifteen steps of training once it has begun to work: a guess has
    # log(2).
    assert len(losses) == 4 and losses[-1] < 0.5
    assert number(r"accuracy on new images: (\d+)%", text) >= 90


def test_functional_block(tmp_path):
    text = printed("functional_block.py", tmp_path)
    assert "input (1, 24, 56, 56), hidden channels 144, output (1, 24, 56, 56)" in text
    assert number(r"difference from plain PyTorch: (\S+) of", text) < 1e-4


def test_feature_maps(tmp_path):
    text = printed("feature_maps.py", tmp_path)
    assert re.findall(r"stride +(\d+): .*, fused$", text, re.MULTILINE) == ["2", "4", "8", "16"]
    assert "features.17 gives (1, 320, 16, 20), fused" in text


def test_segment(tmp_path):
    text = printed("segment.py", tmp_path)
    shares = [float(share) for share in re.findall(r"^class +\d+: +(\S+)% of the pixels$", text, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert number(r"same as plain PyTorch: (\S+)%", text) > 99.9


def test_segment_own_image_and_weights(tmp_path):
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    import mnv2_fused

    model, weights, mask = (
        mnv2_fused.deeplabv3_mobilenet_v2(num_classes=3, width_mult=0.1),
        *map(tmp_path.joinpath, ("own.safetensors", "mask.png")),
    )
    torch.nn.init.constant_(model.classifier.logits.bias[2:], 9.0)
    save_file(model.state_dict(), weights)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    text = printed("segment.py", tmp_path, str(tmp_path / "red.png"), str(weights), str(mask))
    assert "class   2: 100.0% of the pixels" in text
    written = Image.open(mask)
    assert written.mode == "P" and written.size == (30, 20) and written.getcolors() == [(600, 2)]


def test_convert_deeplab_tflite(tmp_path):
    """The 8-bit network in float: its masks are those of TensorFlow's runtime."""
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    if "MNV2_FUSED_TEST_DATA" not in os.environ:
        pytest.skip("MNV2_FUSED_TEST_DATA names no directory with the network and photographs")
    import numpy as np
    import torch
    from PIL import Image

    import mnv2_fused

    data, weights = Path(os.environ["MNV2_FUSED_TEST_DATA"]), tmp_path / "deeplab.safetensors"
    network = data / "deeplabv3_mnv2_pascal_quant.tflite"
    assert "55 convolutions" in printed("convert_deeplab_tflite.py", tmp_path, str(network), str(weights))
    model, theirs = mnv2_fused.deeplabv3_mobilenet_v2(weights).eval(), litert.Interpreter(str(network))
    theirs.allocate_tensors()
    for name in ("bird.png", "cat_720p.jpg", "grace_hopper.png", "parrot.jpg"):
        image = np.array(Image.open(data / "photos" / name).convert("RGB").resize((513, 513)))
        theirs.set_tensor(theirs.get_input_details()[0]["index"], image[None])
        theirs.invoke()
        expected = torch.from_numpy(theirs.get_tensor(theirs.get_output_details()[0]["index"]))
        mask = model.predict_mask(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
        assert len(mask.unique()) > 1 and (mask == expected).float().mean() > 0.97


def test_detect(tmp_path, torchvision_mobilenetv2):
    from PIL import Image

    output = tmp_path / "boxed.png"
    text = printed("detect.py", tmp_path, "--output", str(output), "--over", "0.01")
    assert len(re.findall(r"^class \d+: \d+\.\d% at -?\d+, -?\d+, \d+, \d+$", text, re.MULTILINE)) > 0
    with Image.open(output) as boxed:
        assert (255, 0, 0) in {colour for _, colour in boxed.getcolors(10**6)}


@pytest.mark.skipif("MNV2_FUSED_TEST_DATA" not in os.environ, reason="needs real weights")
def test_detect_a_person(tmp_path, torchvision_mobilenetv2):
    data = Path(os.environ["MNV2_FUSED_TEST_DATA"])
    weights = data / "tasks" / "ssdlite_person" / "ssdlite_mobilenet_v2_person.safetensors"
    text = printed(
        "detect.py",
        tmp_path,
        str(data / "photos" / "grace_hopper.png"),
        "--weights",
        str(weights),
        "--output",
        str(tmp_path / "boxed.png"),
    )
    assert re.fullmatch(r"class 1: 99\.\d% at .*\n", text)
