"""Variants of the block: trained, resumed, stated by the files of weights, and built from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from runs import OPTIONS, assert_same, checkpoint, run
from safetensors.torch import load_file, save_file
from torch import nn

import mnv2_fused
from mnv2_fused import MobileNetV2, cli, weights
from mnv2_fused import trainer as train
from mnv2_fused.models.units import PROJECT_ACTIVATIONS, ExpansionFeatures, variant

VARIANTS = [("linear", "bottleneck"), ("relu6", "bottleneck"), ("linear", "none"), ("relu6", "expansion")]


def is_variant(model: nn.Module, project_activation: str, shortcut: str) -> bool:
    block = model.features[6]  # of stride 1, with as many outputs as inputs
    activation = PROJECT_ACTIVATIONS[project_activation]
    return (
        (block.project_activation is None if activation is None else type(block.project_activation) is activation)
        and block.use_res_connect == (shortcut == "bottleneck")
        and isinstance(model.features, ExpansionFeatures) == (shortcut == "expansion")
    )


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The directory of a run of each variant."""
    found = {}
    for names in VARIANTS:
        found[names] = tmp_path_factory.mktemp("variant") / "out"
        options = ["--project-activation", names[0], "--shortcut", names[1]]
        assert run("--data", str(pictures), "--output", str(found[names]), *OPTIONS, *options) == 0
    return found


@pytest.mark.parametrize("names", VARIANTS, ids=str)
def test_files_state_the_variant(runs, names):
    saved = checkpoint(runs[names])
    assert (saved["arguments"]["project_activation"], saved["arguments"]["shortcut"]) == names
    for name in (train.MODEL, train.CHECKPOINT):
        path = str(runs[names] / name)
        model, _ = weights.load_model(path)
        built = mnv2_fused.mobilenet_v2(weights=path)
        assert is_variant(model, *names) and is_variant(built, *names)
        assert_same(dict(built.state_dict()), dict(saved["model"]))
    # Said by the caller, it counts.
    assert is_variant(mnv2_fused.mobilenet_v2(weights=path, **variant("relu6", "none")), "relu6", "none")


def test_variants_train_differently(runs):
    states = [load_file(path / train.MODEL) for path in runs.values()]
    keys = [key for key in states[0] if key.endswith("weight")]
    for i, state in enumerate(states):
        assert all(any(not torch.equal(state[key], other[key]) for key in keys) for other in states[:i])


@pytest.mark.parametrize("names", VARIANTS, ids=str)
def test_classify_and_compare_build_the_variant(runs, names, pictures, tmp_path, capsys):
    path, output = str(runs[names] / train.MODEL), tmp_path / "out.json"
    image = str(next(Path(pictures).rglob("*.png")))
    assert cli.main(["classify", image, "--weights", path, "--json", str(output)]) == 0
    model, convention = weights.load_model(path, fused=False)
    x = mnv2_fused.data.images.prepare(mnv2_fused.data.images.read(image), convention)
    with torch.no_grad():
        right = model(x[None])[0]
    for answer in json.loads(output.read_text())["answers"][0]["top"]:
        assert answer["logit"] == pytest.approx(right[answer["index"]].item(), abs=1e-4)

    options = ["--weights", path, "--batch", "1", "--threads", "1", "--resolution", "32", "--seconds", "0.01"]
    assert cli.main(["compare", *options, "--json", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert result["largest_relative_difference"] < 1e-4
    assert ("not fused: features.3: its shortcut" in capsys.readouterr().out) == (names[1] == "expansion")


def test_a_run_is_resumed_and_starts_from_a_variant(runs, pictures, tmp_path):
    names = ("relu6", "expansion")
    whole = checkpoint(runs[names])
    config = train.Config(**{**whole["arguments"], "data": str(pictures), "output": str(tmp_path / "part")})
    train.train(dataclasses.replace(config, max_steps=3))
    rest = train.Config(data=str(pictures), output=config.output, resume=True, threads=1, workers=0)
    resumed = train.Trainer(rest)
    assert is_variant(resumed.model, *names)
    resumed.run()
    assert_same(dict(checkpoint(tmp_path / "part")["model"]), dict(whole["model"]))

    start = dataclasses.replace(
        config, width=None, weights=str(runs[names] / train.MODEL), output=str(tmp_path / "from"), resolution=None
    )
    start = dataclasses.replace(start, project_activation=None, shortcut=None)
    assert is_variant(train.Trainer(start).model, *names)
    assert is_variant(train.Trainer(dataclasses.replace(start, shortcut="none")).model, "relu6", "none")


def test_contradictions_and_unknown_values(runs, pictures, tmp_path, capsys):
    there = ["--data", str(pictures), "--output", str(runs["relu6", "bottleneck"])]
    assert run(*there, "--resume", "--shortcut", "none") == 2
    assert "--shortcut none contradicts the checkpoint to resume, which has bottleneck" in capsys.readouterr().err
    assert run(*there, "--shortcut", "wide") == 2
    with pytest.raises(train.TrainError, match="--project-activation: expected linear or relu6, got 'relu'"):
        train.Trainer(train.Config(data=str(pictures), output=str(tmp_path / "out"), project_activation="relu"))
    assert run("--task", "segmentation", "--data", str(tmp_path), "--output", str(tmp_path), "--shortcut", "none") == 2
    assert "--shortcut is no option of --task segmentation" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["project_activation", "shortcut"])
def test_unknown_metadata(name, tmp_path):
    path = str(tmp_path / "weights.safetensors")
    save_file(MobileNetV2(3, 0.1).state_dict(), path, {name: "wide"})
    with pytest.raises(weights.WeightsError, match=f"{name} in its metadata: expected one of .*, got 'wide'"):
        weights.load_model(path)


def test_a_variant_is_no_backbone(tmp_path):
    path = str(tmp_path / "weights.safetensors")
    save_file(MobileNetV2(3, 0.25).state_dict(), path, {"shortcut": "none"})
    with pytest.raises(weights.WeightsError, match="shortcut in its metadata: expected the paper's block, got 'none'"):
        weights.load_state_dict(path)
    with pytest.raises(weights.WeightsError, match="expected the paper's block"):
        mnv2_fused.deeplabv3_mobilenet_v2(width_mult=0.25, weights_backbone=path)
    save_file(MobileNetV2(3, 0.25).state_dict(), path, {"shortcut": "bottleneck", "project_activation": "linear"})
    mnv2_fused.deeplabv3_mobilenet_v2(width_mult=0.25, weights_backbone=path)
