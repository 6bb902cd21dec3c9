"""Training for detection and segmentation: what is computed, what is written, how runs resume and fail."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pictures import make_objects
from PIL import Image
from runs import assert_same, checkpoint, run
from safetensors import safe_open

from mnv2_fused import MobileNetV2, builders, cli, extras, weights
from mnv2_fused import trainer as train
from mnv2_fused.data import detection

for _name in ("pycocotools.coco", "torchmetrics.classification", "torchvision"):
    try:
        extras.use(_name, "detection")
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)

TASKS = ("detection", "segmentation")
SMALL = {"width": 0.1, "resolution": 33, "batch": 3, "epochs": 2, "threads": 1, "workers": 0}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return make_objects(tmp_path_factory.mktemp("objects") / "data")


@pytest.fixture
def config(objects, tmp_path):
    """`config(task, ...)` is a run of two epochs of two steps."""

    def make(task, **change):
        return train.Config(**{"data": objects, "output": str(tmp_path / "out"), "task": task, **SMALL, **change})

    return make


@pytest.fixture(scope="module")
def trained(objects, tmp_path_factory):
    """The directory of an uninterrupted run of each task."""
    root = tmp_path_factory.mktemp("trained")
    for task in TASKS:
        train.train(train.Config(data=objects, output=str(root / task), task=task, **SMALL))
    return root


# --------------------------------------------------------------------------------------------------- runs, and resuming


@pytest.mark.parametrize("task", TASKS)
def test_a_run_writes_what_the_commands_read(task, trained, objects, capsys):
    directory = trained / task
    assert (directory / "labels.txt").read_text(encoding="utf-8") == "background\nblue thing\nred thing\n"
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["epoch"], record["step"]) for record in log] == [(1, 2), (2, 4)]
    for record in log:
        assert 0 < record["train_loss"] < 50 and "train_accuracy" not in record
        assert 0 <= record["AP50" if task == "detection" else "mIOU"] <= 1
    with safe_open(directory / train.MODEL, "pt") as file:
        facts = file.metadata()
    assert facts["task"] == task and facts["num_classes"] == "3" and facts["width_mult"] == "0.1"
    assert facts["convention"] == "torchvision" and facts["resolution"] == "33"
    build = builders.ssdlite320_mobilenet_v2 if task == "detection" else builders.deeplabv3_mobilenet_v2
    for name in (train.MODEL, train.CHECKPOINT):
        model = build(directory / name)
        assert_same(dict(model.state_dict()), dict(checkpoint(directory)["model"]))
        command = ["evaluate", "--task", task, "--data", objects, "--weights", str(directory / name)]
        assert cli.main([*command, "--threads", "1", "--json", "-"]) == 0
        figures = json.loads(capsys.readouterr().out)["figures"]
        for key, value in figures.items():
            assert log[-1].get(key) == (None if value is None else pytest.approx(value, abs=1e-6))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(task, stop, config, trained, tmp_path):
    def interrupt(now):
        if now.step == stop and now.record is None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(train.Interrupted, match=f"after step {stop}; .*checkpoint.pth is written"):
        train.train(config(task), interrupt)
    resumed = train.Config(data=config(task).data, output=str(tmp_path / "out"), threads=1, workers=0, resume=True)
    assert_same(train.train(resumed), checkpoint(trained / task)["history"])
    assert_same(checkpoint(tmp_path / "out"), checkpoint(trained / task))


def test_workers_change_nothing(config, trained, tmp_path):
    train.train(config("detection", workers=2, max_steps=2))
    train.train(dataclasses.replace(config("detection"), resume=True))
    assert_same(checkpoint(tmp_path / "out")["model"], checkpoint(trained / "detection")["model"])


@pytest.mark.parametrize("task", TASKS)
def test_fused_and_plain_train_the_same(task, config, tmp_path):
    trainers = [
        train.Trainer(config(task, batch=6, fused=fused, max_steps=1, output=str(tmp_path / str(fused))))
        for fused in (True, False)
    ]
    assert [trainer.model.fused for trainer in trainers] == [True, False]
    assert_same(*(dict(trainer.model.state_dict()) for trainer in trainers))
    fused, plain = (trainer.run()[0]["train_loss"] for trainer in trainers)
    # Batch norm of the pooled branch divides by the deviation of six nearly equal values.
    assert fused == pytest.approx(plain, rel=1e-3 if task == "detection" else 1e-2)


@pytest.mark.parametrize(("task", "resolution"), [("detection", 64), ("segmentation", 33)])
def test_training_learns(task, resolution, config):
    more = {"batch": 6, "width": 0.25, "lr": 0.02, "augment": False}
    history = train.train(config(task, epochs=20, resolution=resolution, evaluate_every=20, **more))
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]


@pytest.mark.parametrize("task", TASKS)
def test_validation_may_be_rare(task, config):
    history = train.train(config(task, epochs=3, evaluate_every=2))
    figure = "AP50" if task == "detection" else "mIOU"
    assert [figure in record for record in history] == [False, True, True]


def test_the_command_line(objects, tmp_path, capsys):
    options = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    options += ["--task", "segmentation", "--data", objects, "--output", str(tmp_path / "out"), "--no-augment"]
    assert run(*options, "--output-stride", "8", "--aspp", "--tf", "--evaluate-every", "2") == 0
    out = capsys.readouterr().out
    assert "DeepLabv3 MobileNetV2 0.1, 33x33, 3 classes; 6 images to train on, the same to validate on" in out
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert "held out" not in epochs[0] and "held out: mIOU 0." in epochs[1] and "accuracy" not in epochs[0]
    assert "python -m mnv2_fused segment IMAGE --weights " in out
    with safe_open(tmp_path / "out" / train.MODEL, "pt") as file:
        facts = file.metadata()
    assert (facts["convention"], facts["output_stride"], facts["aspp"]) == ("tensorflow", "8", "True")
    model = builders.deeplabv3_mobilenet_v2(tmp_path / "out" / train.MODEL)
    assert model.preprocessing.mean == (0.5, 0.5, 0.5) and model.preprocessing.crop == 33
    assert run("--resume", "--data", objects, "--output", str(tmp_path / "out"), "--task", "detection") == 2
    assert "--task detection contradicts the checkpoint to resume, which has segmentation" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the recipes


def test_detection_follows_torchvision_s_recipe(objects):
    trainer = train.Trainer(train.Config(data=objects, task="detection", threads=1, workers=0, output="none"))
    config, group = trainer.config, trainer._updates.optimizer.param_groups[0]
    assert (config.epochs, config.batch, config.resolution, config.freeze_bn) == (660, 24, 320, False)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 4e-5) and config.lr == pytest.approx(0.15 / 8)
    assert trainer._updates.lr_factor(1 + 659 // 2) == pytest.approx(0.5, abs=0.01)
    assert not trainer.directory.exists()


def test_segmentation_follows_deeplab_s_recipe(objects):
    trainer = train.Trainer(
        train.Config(data=objects, task="segmentation", batch=4, epochs=10, width=0.1, threads=1, workers=0)
    )
    config, group = trainer.config, trainer._updates.optimizer.param_groups[0]
    assert (config.resolution, config.output_stride, config.aspp, config.freeze_bn) == (513, 16, False, False)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 4e-5) and config.lr == pytest.approx(0.007 / 4)
    assert [trainer._updates.lr_factor(step) for step in range(10)] == pytest.approx(
        [(1 - i / 10) ** 0.9 for i in range(10)]
    )


def test_the_loss_ignores_255(config):
    trainer = train.Trainer(config("segmentation"))
    ((x, target),) = next(trainer._shares(bool))
    trainer.model.classifier.dropout.p = 0.0
    loss, weight, correct = trainer.task.loss(trainer.model, x, target, trainer.config)
    logits = trainer.model(x)["out"].double()
    mask = torch.stack(target)
    kept = mask != 255
    expected = -logits.log_softmax(1).permute(0, 2, 3, 1)[kept].gather(1, mask[kept][:, None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and correct == 0
    assert weight == pytest.approx(kept.sum().item() / 33**2)
    nothing, *_ = trainer.task.loss(trainer.model, x, [torch.full_like(each, 255) for each in target], trainer.config)
    assert nothing.item() == 0


def test_images_without_boxes_are_trained_on(objects, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(objects, data)
    content = json.loads((data / "instances.json").read_text(encoding="utf-8"))
    content["annotations"] = content["annotations"][:1]
    (data / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    config = train.Config(data=str(data), task="detection", output=str(tmp_path / "out"), **SMALL)
    history = train.train(config)
    assert len(train.Trainer(dataclasses.replace(config, output=str(tmp_path / "new"))).data.train) == 6
    assert math.isfinite(history[-1]["train_loss"])


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_takes_the_network_of_the_weights(task, config, trained):
    start = {"weights": str(trained / task / train.MODEL), "width": None, "resolution": None}
    trainer = train.Trainer(config(task, **start))
    assert not trainer.new_classifier
    assert (trainer.config.width, trainer.config.resolution) == (0.1, 33)
    assert_same(dict(trainer.model.state_dict()), dict(checkpoint(trained / task)["model"]))
    with pytest.raises(
        train.TrainError, match=r"--width 0\.5 contradicts|no standard MobileNetV2 with width_mult=0\.5"
    ):
        try:
            train.Trainer(config(task, **{**start, "width": 0.5}))
        except weights.WeightsError as error:
            raise train.TrainError(str(error)) from None


@pytest.mark.parametrize("task", TASKS)
def test_other_classes_get_a_new_layer(task, config, trained, tmp_path):
    data = Path(make_objects(tmp_path / "data"))
    (data / "labels.txt").write_text("background\na\nb\nc\n", encoding="utf-8")
    content = json.loads((data / "instances.json").read_text(encoding="utf-8"))
    content["categories"].append({"id": 9, "name": "another"})
    (data / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    trainer = train.Trainer(config(task, data=str(data), weights=str(trained / task / train.MODEL), width=None))
    assert trainer.new_classifier
    before, new = checkpoint(trained / task)["model"], set()
    for key, value in trainer.model.state_dict().items():
        if value.shape != before[key].shape:
            new.add(key)
        else:
            assert torch.equal(value, before[key]), key
    prefix = "head.classification_head." if task == "detection" else "classifier.logits."
    assert new and all(key.startswith(prefix) for key in new)
    trainer.run()


@pytest.mark.parametrize(("task", "classes"), [("detection", 7), ("segmentation", 7), ("segmentation", 1001)])
def test_a_classification_network_is_a_backbone(task, classes, config, tmp_path):
    torch.manual_seed(5)
    network = MobileNetV2(classes, 0.1)
    weights.randomize_batch_norm(network)
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    trainer = train.Trainer(config(task, weights=str(tmp_path / "backbone.pth"), width=None, freeze_bn=True))
    assert trainer.new_classifier and trainer.config.width == 0.1
    assert trainer.config.convention == ("tensorflow" if classes == 1001 else "torchvision")
    state, expected = trainer.model.state_dict(), network.state_dict()
    units = 19 if task == "detection" else 18
    for i in range(units):
        for key in (key for key in expected if key.startswith(f"features.{i}.")):
            assert torch.equal(state[f"backbone.{key}"], expected[key]), key
    trainer.run()
    after = trainer.model.state_dict()
    assert torch.equal(after["backbone.features.3.conv.0.1.running_mean"], expected["features.3.conv.0.1.running_mean"])
    new = "head.regression_head.module_list.0.0.1" if task == "detection" else "classifier.aspp0.1"
    assert not torch.equal(after[f"{new}.running_mean"], torch.zeros_like(after[f"{new}.running_mean"]))


@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_a_frozen_backbone_and_a_new_head_resumes(task, config, tmp_path):
    network = MobileNetV2(7, 0.1)
    weights.randomize_batch_norm(network)
    torch.save(network.state_dict(), tmp_path / "backbone.pth")

    def settings(name):
        start = {"weights": str(tmp_path / "backbone.pth"), "width": None, "freeze_bn": True}
        return config(task, **start, output=str(tmp_path / name))

    def interrupt(now):
        if now.step == 3 and now.record is None:
            signal.raise_signal(signal.SIGINT)

    whole = train.train(settings("whole"))
    with pytest.raises(train.Interrupted):
        train.train(settings("parts"), interrupt)
    data, output = settings("parts").data, settings("parts").output
    assert_same(train.train(train.Config(data=data, output=output, threads=1, workers=0, resume=True)), whole)
    assert_same(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))


def test_a_resumed_run_keeps_the_eps_of_a_folded_backbone(config, tmp_path):
    """A new head has batch norms of its own, which are trained."""
    network = MobileNetV2(7, 0.1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.running_var, 1 - 1e-3)
    torch.save(network.state_dict(), tmp_path / "folded.pth")
    settings = config(
        "segmentation", weights=str(tmp_path / "folded.pth"), width=None, freeze_bn=True, output=str(tmp_path / "run")
    )
    first = train.Trainer(settings)
    eps = [module.eps for module in first.model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert set(eps) == {1e-3}
    first.run()
    second = train.Trainer(train.Config(data=settings.data, output=settings.output, threads=1, workers=0, resume=True))
    assert eps == [m.eps for m in second.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_batch_norm_is_frozen_at_small_batches_of_segmentation(config, trained):
    start = str(trained / "segmentation" / train.MODEL)
    assert train.Trainer(config("segmentation", weights=start, width=None)).config.freeze_bn
    assert not train.Trainer(config("segmentation", weights=start, width=None, batch=16)).config.freeze_bn
    assert not train.Trainer(config("segmentation", weights=start, width=None, freeze_bn=False)).config.freeze_bn


# ------------------------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(task, workers, tmp_path, capsys):
    data = Path(make_objects(tmp_path / "data"))
    bad = data / "images" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    options = [text for key, value in {**SMALL, "workers": workers}.items() for text in (f"--{key}", str(value))]
    options += ["--task", task, "--data", str(data), "--output", str(tmp_path / "out")]
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert str(bad) in error and "checkpoint.pth is written, --resume goes on from it" in error
    assert "Traceback" not in error
    bad.write_bytes(good)
    assert run(*options, "--resume") == 0


def test_bad_masks_and_boxes_stop_a_run(objects, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(objects, data)
    Image.new("P", (5, 5)).save(data / "SegmentationClass" / "2.png")
    content = json.loads((data / "instances.json").read_text(encoding="utf-8"))
    content["annotations"][3]["bbox"][2] = 500
    (data / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    options = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    for task, message in {
        "segmentation": "SegmentationClass/2.png has 5x5 pixels, expected 48x40",
        "detection": "instances.json: annotation 3: bbox: expected a box inside 3.png",
    }.items():
        assert run(*options, "--task", task, "--data", str(data), "--output", str(tmp_path / task)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_loss_that_is_no_number_stops_the_run(config):
    trainer = train.Trainer(config("detection"))
    torch.nn.init.constant_(trainer.model.backbone.features[3].conv[0][0].weight, float("nan"))
    with pytest.raises(train.TrainError, match=r"the loss became nan in epoch 1 after step 0"):
        trainer.run()


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("detection", {"aspp": True}, "--aspp is no option of --task detection"),
        ("detection", {"label_smoothing": 0.1}, "--label-smoothing is no option of --task detection"),
        ("classification", {"augment": False}, "--augment is no option of --task classification"),
        ("segmentation", {"sync_bn": True}, "--sync-bn is no option of --task segmentation"),
        (
            "detection",
            {"sync_bn": True, "fused": False},
            "--sync-bn needs fused units: PyTorch's own synchronised batch norm does not run on a CPU",
        ),
        (
            "classification",
            {"sync_bn": True, "shortcut": "expansion"},
            "--sync-bn needs fused units: PyTorch's own synchronised batch norm does not run on a CPU",
        ),
        ("segmentation", {"output_stride": 4}, "--output-stride: expected 8 or 16, got 4"),
        ("segmentation", {"evaluate_every": 0}, "--evaluate-every: expected a whole number from 1 to 100000, got 0"),
        ("pose", {}, "--task: expected classification or detection or segmentation, got 'pose'"),
    ],
)
def test_options_that_do_not_fit(task, change, message, config):
    with pytest.raises(train.TrainError) as caught:
        train.Trainer(config(task, **change))
    assert str(caught.value) == message


def test_a_single_photograph_is_refused(tmp_path):
    data = make_objects(tmp_path / "one", 1)
    for task in TASKS:
        with pytest.raises(train.TrainError, match="expected at least two photographs to train on"):
            train.Trainer(train.Config(data=data, task=task, output=str(tmp_path / "out"), **SMALL))


@pytest.mark.parametrize(("task", "package"), [("detection", "pycocotools"), ("segmentation", "torchmetrics")])
def test_a_missing_package_is_named_before_the_first_epoch(task, package, config, monkeypatch):
    real = extras.importlib.import_module

    def missing(name, *arguments):
        if name.startswith(package):
            raise ImportError(f"No module named {package!r}")
        return real(name, *arguments)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(extras.MissingExtraError, match=rf'{package} cannot .* pip install "mnv2_fused\[{task}\]"'):
        train.Trainer(config(task, augment=False))


def test_data_may_be_given(config):
    data = detection.load(config("detection").data, (33, 33), augment=False)
    trainer = train.Trainer(config("detection", max_steps=1), data)
    assert trainer.data is data and trainer.run()[0]["step"] == 1
