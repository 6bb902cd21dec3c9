"""The commands for detection and segmentation: what they print and write, and how they fail."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import make_objects
from PIL import Image
from safetensors.torch import save_file

from mnv2_fused import builders, cli, extras, weights
from mnv2_fused.cli import pictures as drawing
from mnv2_fused.data import images, segmentation

for _name in ("pycocotools.coco", "torchmetrics.classification", "torchvision"):
    try:
        extras.use(_name, "detection")
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def run(*arguments: str) -> int:
    """The exit code, also if argparse exits by itself."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data, and small networks for its three classes with random statistics."""
    root = tmp_path_factory.mktemp("tasks")
    data = Path(make_objects(root / "data"))
    torch.manual_seed(0)
    for name, model in {
        "ssd": builders.ssdlite320_mobilenet_v2(num_classes=3, width_mult=0.1, size=64),
        "deeplab": builders.deeplabv3_mobilenet_v2(num_classes=3, width_mult=0.1),
    }.items():
        weights.randomize_batch_norm(model)
        if name == "deeplab":  # every class is somewhere
            x = images.prepare(images.read(data / "images" / "1.png"), segmentation_convention(65))[None]
            with torch.no_grad():
                model.classifier.logits.weight *= 30
                model.classifier.logits.bias -= model.eval().low_logits(x).mean((0, 2, 3))
        facts = {"convention": "torchvision", "resolution": "64" if name == "ssd" else "65", "output_stride": "8"}
        save_file(model.state_dict(), root / f"{name}.safetensors", facts)
    return {
        "data": data,
        "ssd": str(root / "ssd.safetensors"),
        "deeplab": str(root / "deeplab.safetensors"),
        "photo": str(data / "images" / "1.png"),
        "labels": str(data / "labels.txt"),
    }


# -------------------------------------------------------------------------------------------------------------- detect


def test_detect(files, tmp_path, capsys):
    options = ["--weights", files["ssd"], "--score", "0.1", "--threads", "1", "--labels", files["labels"]]
    assert run("detect", files["photo"], *options, "--output", tmp_path / "boxed.png", "--json", "-") == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["settings"]["classes"] == 3 and content["settings"]["resolution"] == [64, 64]
    assert content["machine"]["cpu"] and content["versions"]["torch"] == torch.__version__ and content["date"]
    (answer,) = content["answers"]
    assert (answer["width"], answer["height"]) == (48, 40)
    model = builders.ssdlite320_mobilenet_v2(files["ssd"], fused=False).eval()
    image = images.read(files["photo"])
    x = images.pixels(image.resize((64, 64), Image.Resampling.BILINEAR)).float() / 255
    with torch.inference_mode():
        (expected,) = model([x])
    kept = expected["scores"] >= 0.1
    assert 0 < kept.sum() == len(answer["detections"])
    for row, label, score, box in zip(
        answer["detections"],
        expected["labels"][kept].tolist(),
        expected["scores"][kept].tolist(),
        (expected["boxes"][kept] * torch.tensor([48 / 64, 40 / 64] * 2)).tolist(),
        strict=True,
    ):
        assert (row["index"], row["label"]) == (label, ["background", "blue thing", "red thing"][label])
        assert row["score"] == pytest.approx(score, rel=1e-3) and row["box"] == pytest.approx(box, abs=0.05)
    assert "red thing" in captured.err or "blue thing" in captured.err
    drawn = Image.open(tmp_path / "boxed.png")
    assert drawn.size == image.size and np.any(np.asarray(drawn) != np.asarray(image))


def test_a_high_score_leaves_nothing(files, tmp_path, capsys):
    options = ["--weights", files["ssd"], "--score", "1", "--threads", "1", "--json", "-"]
    assert run("detect", files["photo"], *options, "--output", tmp_path / "boxed.png") == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["detections"] == []
    assert np.array_equal(np.asarray(Image.open(tmp_path / "boxed.png")), np.asarray(images.read(files["photo"])))


# ------------------------------------------------------------------------------------------------------------- segment


def test_segment(files, tmp_path, capsys):
    options = ["--weights", files["deeplab"], "--threads", "1", "--labels", files["labels"], "--json", "-"]
    assert run("segment", files["photo"], *options, "--output", tmp_path / "mask.png") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["settings"]["resolution"] == 65 and content["settings"]["classes"] == 3
    model = builders.deeplabv3_mobilenet_v2(files["deeplab"], fused=False).eval()
    x = images.prepare(images.read(files["photo"]), segmentation_convention(65))[None]
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(model.low_logits(x), (40, 48), mode="bilinear", align_corners=True)
    expected = logits.argmax(1)[0].numpy()
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "P" and mask.size == (48, 40)
    assert (np.asarray(mask) == expected).mean() > 0.99
    rows = {row["index"]: row for row in content["answers"][0]["classes"]}
    for index in np.unique(np.asarray(mask)).tolist():
        assert rows[index]["share"] == pytest.approx((np.asarray(mask) == index).mean())
        assert rows[index]["label"] == ["background", "blue thing", "red thing"][index]
    assert segmentation.read_mask(tmp_path / "mask.png", 3).size == (48, 40)  # may be trained on

    assert run("segment", files["photo"], *options[:4], "--output", tmp_path / "over.png", "--overlay") == 0
    over, image = np.asarray(Image.open(tmp_path / "over.png")), np.asarray(images.read(files["photo"]))
    same = (over == image).all(-1)
    assert same[np.asarray(mask) == 0].all() and not same[np.asarray(mask) != 0].all()


def segmentation_convention(size: int) -> weights.Convention:
    return dataclasses.replace(weights.TORCHVISION, crop=size, resize=None)


def test_voc_s_colours():
    colours = drawing.palette(256).tolist()
    assert colours[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[15] == [192, 128, 128] and colours[255] == [224, 224, 192]


# ---------------------------------------------------------------------------------------------- several images, errors


@pytest.mark.parametrize(("command", "network"), [("detect", "ssd"), ("segment", "deeplab")])
def test_several_images(command, network, files, tmp_path, capsys):
    paths = [files["data"] / "images" / f"{i}.png" for i in range(2)]
    options = ["--weights", files[network], "--threads", "1", "--json", "-"]
    bad = tmp_path / "bad.png"
    bad.write_text("no image", encoding="utf-8")
    assert run(command, paths[0], bad, paths[1], *options, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert [answer["image"] for answer in json.loads(captured.out)["answers"]] == list(map(str, paths))
    assert f"error: not an image, or of a kind that Pillow does not read: {bad}\n" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]

    cases = {
        "--output: expected images of different names, got '0' twice": [paths[0], paths[0], "--output", tmp_path],
        "--output: expected the name of an image such as boxed.png": [paths[0], "--output", tmp_path / "out.abc"],
        "--output: no such directory: ": [paths[0], "--output", tmp_path / "none" / "a.png"],
        "--output: expected a directory for several images, got": [*paths, "--output", bad],
        "--output: expected an image with ": [
            paths[0],
            "--output",
            tmp_path / f"out.{'psd' if network == 'ssd' else 'jpg'}",
        ],
        "--json: no such directory: ": [paths[0], "--json", tmp_path / "none" / "a.json"],
    }
    for message, arguments in cases.items():
        assert run(command, *options[:4], *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(("command", "network"), [("detect", "ssd"), ("segment", "deeplab")])
def test_weights_and_labels_that_do_not_fit(command, network, files, tmp_path, capsys, recwarn):
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    pickled = tmp_path / "pickle.pth"
    pickled.write_bytes(pickle.dumps(print, protocol=4))
    other = files["deeplab" if network == "ssd" else "ssd"]
    cases = {
        "no such weights file: none.pth": ["--weights", "none.pth"],
        "holds no ": ["--weights", other],
        "pickle.pth is not a file of weights": ["--weights", pickled],
        "labels.txt has 4 labels, but the weights have 3 classes": [
            "--weights", files[network], "--labels", tmp_path / "labels.txt",
        ],
    }  # fmt: skip
    for message, options in cases.items():
        assert run(command, files["photo"], *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not [warning for warning in recwarn if "pickle protocol" in str(warning.message)]


def test_masks_have_256_classes(files, tmp_path, capsys):
    for classes, code in {256: 0, 257: 2}.items():
        state = builders.deeplabv3_mobilenet_v2(num_classes=classes, width_mult=0.1).state_dict()
        save_file(state, tmp_path / "many.safetensors")
        options = ["--weights", tmp_path / "many.safetensors", "--resolution", "33", "--threads", "1"]
        assert run("segment", files["photo"], *options, "--output", tmp_path / "mask.png") == code
    message = "error: --output: a mask has at most 256 classes, but the weights have 257\n"
    assert capsys.readouterr().err == message


def test_overlay_needs_output(files, capsys):
    assert run("segment", files["photo"], "--weights", files["deeplab"], "--overlay") == 2
    assert capsys.readouterr().err == "error: --overlay needs --output\n"


def test_labels_without_the_background(files, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("first\nsecond\n", encoding="utf-8")
    options = ["--weights", files["ssd"], "--labels", tmp_path / "labels.txt", "--score", "0.1", "--json", "-"]
    assert run("detect", files["photo"], *options) == 0
    rows = json.loads(capsys.readouterr().out)["answers"][0]["detections"]
    assert rows and all(row["label"] == ["background", "first", "second"][row["index"]] for row in rows)


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_detection(files, tmp_path, capsys):
    options = ["--data", files["data"], "--weights", files["ssd"], "--threads", "1"]
    assert run("evaluate", "--task", "detection", *options, "--json", tmp_path / "out.json") == 0
    out = capsys.readouterr().out
    assert out.count("Average Precision") == 6 and out.count("Average Recall") == 6
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["images"] == 6 and content["settings"]["task"] == "detection"
    assert 0 <= content["figures"]["AP"] <= 1 and content["figures"]["APl"] is None


def test_evaluate_segmentation(files, capsys):
    options = ["--data", files["data"], "--weights", files["deeplab"], "--threads", "1", "--no-fused"]
    assert run("evaluate", "--task", "segmentation", *options, "--json", "-") == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["iou"].keys() == {"background", "blue thing", "red thing"}
    assert content["figures"]["mIOU"] == pytest.approx(sum(content["iou"].values()) / 3)
    assert "mIOU" in captured.err and "over the 3 classes in the masks" in captured.err


def test_labels_may_be_the_ids_of_categories(files, tmp_path, capsys):
    """As in torchvision's networks for COCO, which have 91 classes."""
    for classes, code in {8: 0, 5: 2, 2: 2}.items():
        torch.manual_seed(0)
        model = builders.ssdlite320_mobilenet_v2(num_classes=classes, width_mult=0.1)
        save_file(model.state_dict(), tmp_path / "other.safetensors")
        options = ["--weights", tmp_path / "other.safetensors", "--resolution", "32", "--threads", "1"]
        assert run("evaluate", "--task", "detection", "--data", files["data"], *options) == code
        if code:
            error = capsys.readouterr().err
            assert f"has {classes} classes with the background, but {files['data']} has 2 categories" in error


def test_what_evaluate_refuses(files, tmp_path, capsys):
    ssd, deeplab = ["--weights", files["ssd"]], ["--weights", files["deeplab"]]
    torch.manual_seed(0)
    save_file(builders.deeplabv3_mobilenet_v2(num_classes=2, width_mult=0.1).state_dict(), tmp_path / "two.safetensors")
    cases = {
        "the following arguments are required: --task": ["--data", files["data"], *ssd],
        "argument --task: invalid choice": ["--task", "classification", "--data", files["data"], *ssd],
        "--output-stride is no option of --task detection": [
            "--task", "detection", "--data", files["data"], *ssd, "--output-stride", "8",
        ],
        f"{tmp_path}: expected instances.json": ["--task", "detection", "--data", tmp_path, *ssd],
        f"{tmp_path}: expected train.txt or val.txt": ["--task", "segmentation", "--data", tmp_path, *deeplab],
        "two.safetensors has 2 classes, but": [
            "--task", "segmentation", "--data", files["data"], "--weights", tmp_path / "two.safetensors",
        ],
    }  # fmt: skip
    for message, options in cases.items():
        assert run("evaluate", *options) == 2
        assert message in capsys.readouterr().err


def test_an_image_that_cannot_be_read_ends_the_evaluation(files, tmp_path, capsys):
    data = Path(make_objects(tmp_path / "data"))
    (data / "images" / "3.png").write_bytes(b"")
    for task, network in {"detection": "ssd", "segmentation": "deeplab"}.items():
        options = ["--data", data, "--weights", files[network], "--threads", "1"]
        assert run("evaluate", "--task", task, *options) == 2
        assert capsys.readouterr().err == f"error: expected an image in {data}/images/3.png, got an empty file\n"


def test_a_missing_package_is_named_with_its_command(files, capsys, monkeypatch):
    real = extras.importlib.import_module

    def missing(name, *arguments):
        if name.startswith("pycocotools"):
            raise ImportError("No module named 'pycocotools'")
        return real(name, *arguments)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    assert run("evaluate", "--task", "detection", "--data", files["data"], "--weights", files["ssd"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: pycocotools cannot be imported") and 'pip install "mnv2_fused[detection]"' in error
