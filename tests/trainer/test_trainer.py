"""Training: what it writes, what it computes, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys

import pytest
import torch
from pictures import make_pictures
from runs import OPTIONS, assert_same, checkpoint, run

from mnv2_fused import MobileNetV2, cli, weights
from mnv2_fused import trainer as train
from mnv2_fused.data import datasets
from mnv2_fused.trainer import batches

# ------------------------------------------------------------------------------------------------------ a run, written


def test_a_run_writes_weights_labels_log_and_checkpoint(trained):
    assert (trained / "labels.txt").read_text(encoding="utf-8") == "blue\ngreen\nred\n"
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["epoch"], record["step"]) for record in log] == [(1, 3), (2, 6)]
    for record in log:
        assert 0 <= record["train_accuracy"] <= 1 and 0 <= record["validation_accuracy"] <= 1
        assert 0 < record["train_loss"] < 10 and 0 < record["validation_loss"] < 10
        assert record["lr"] > 0 and record["images_per_s"] > 0
        assert 50e6 < record["peak_memory_bytes"] < 50e9
    saved = checkpoint(trained)
    assert_same(saved["history"], log)
    model, convention = weights.load_model(str(trained / "model.safetensors"))
    assert_same(dict(model.state_dict()), dict(saved["model"]))
    assert (convention.name, convention.crop, convention.resize) == ("torchvision", 32, 37)
    assert sorted(path.name for path in trained.iterdir()) == sorted(
        (train.CHECKPOINT, train.MODEL, train.LABELS, train.LOG)
    )


def test_training_learns(config):
    # All pictures in a step: the last feature maps are of one pixel, and statistics of eight make the loss leap.
    history = train.train(dataclasses.replace(config, epochs=30, lr=0.01, width=0.25, batch=24))
    assert history[-1]["train_accuracy"] > 0.7
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]


def test_digits_then_classify(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="digits come with scikit-learn")
    output = tmp_path / "digits"
    options = ["--data", "digits", "--output", str(output), *OPTIONS[:4], "--epochs", "3", "--threads", "1"]
    assert run(*options, "--json", str(tmp_path / "run.json")) == 0
    out = capsys.readouterr().out
    assert "MobileNetV2 0.1, 32x32, 10 classes; 1438 images to train on, 359 held out" in out and "epoch 3" in out
    written = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert written["epochs"][-1]["validation_accuracy"] > 0.2 and written["settings"]["batch"] == 64

    data = datasets.digits(weights.at_resolution(weights.TORCHVISION, 32))
    assert sorted(set(data.train.targets)) == sorted(set(data.held_out.targets)) == list(range(10))
    data.held_out.sources[100].save(tmp_path / "digit.png")
    for name in (train.MODEL, train.CHECKPOINT):
        model, _ = weights.load_model(str(output / name), fused=False)
        with torch.no_grad():
            expected = model(data.held_out[100][0][None])[0].softmax(0)
        command = ["classify", str(tmp_path / "digit.png"), "--weights", str(output / name)]
        assert cli.main([*command, "--labels", str(output / "labels.txt"), "--json", "-"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["settings"]["resolution"] == 32
        top = content["answers"][0]["top"]
        assert [row["probability"] for row in top] == pytest.approx(expected.topk(5).values.tolist(), rel=1e-3)
        assert top[0]["label"] == str(expected.argmax().item())


def test_classify_prints_all_classes_where_there_are_few(trained, pictures, capsys):
    assert cli.main(["classify", f"{pictures}/red/0.png", "--weights", str(trained / train.MODEL), "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"][0]["top"]) == 3


def test_the_same_seed_trains_the_same_network_fused_and_plain(config, tmp_path):
    runs = {}
    for fused in (True, False):
        torch.manual_seed(100 + fused)  # the caller's generator does not matter
        trainer = train.Trainer(
            dataclasses.replace(config, fused=fused, max_steps=1, output=str(tmp_path / str(fused)))
        )
        assert trainer.model.fused is fused
        initial = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        runs[fused] = initial, [part for share in trainer._shares(bool) for part in share], trainer.run()
    assert_same(runs[True][0], runs[False][0])
    assert_same([list(batch) for batch in runs[True][1]], [list(batch) for batch in runs[False][1]])
    for fused, plain in zip(runs[True][2], runs[False][2], strict=True):
        # One step: at this size later ones multiply every rounding.
        assert fused["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
        assert fused["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-3)


def test_another_seed_gives_other_weights_and_another_order(config):
    one, other = (train.Trainer(dataclasses.replace(config, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.model.features[0][0].weight, other.model.features[0][0].weight)

    def indices(trainer, epoch):
        keys = batches.order(len(trainer.data.train), trainer.config.batch, trainer.config.seed, epoch)
        return [[index for index, _ in batch] for batch in keys]

    assert indices(one, 1) != indices(other, 1)
    assert indices(one, 1) != indices(one, 2)


def test_training_leaves_the_process_as_it_was(config):
    before = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    train.train(dataclasses.replace(config, threads=2, max_steps=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == before[1:]


# --------------------------------------------------------------------------------------------------------- the recipes


def rates(trainer):
    return [trainer.config.lr * trainer._updates.lr_factor(step) for step in range(trainer.steps)]


def test_sgd_warms_up_and_ends_at_zero(config):
    trainer = train.Trainer(dataclasses.replace(config, epochs=10, warmup=2, lr=0.5))
    group = trainer._updates.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 4e-5)
    lr = rates(trainer)
    assert len(lr) == 30 and 0 < lr[0] < lr[3] < lr[5] < lr[6] == max(lr) == 0.5
    assert lr[6:] == sorted(lr[6:], reverse=True) and lr[18] == pytest.approx(0.25) and 0 < lr[-1] < 0.01


def test_rmsprop_is_the_papers(config):
    trainer = train.Trainer(dataclasses.replace(config, optimizer="rmsprop", batch=4, epochs=3))
    group = trainer._updates.optimizer.param_groups[0]
    assert (group["alpha"], group["momentum"], group["weight_decay"], group["eps"]) == (0.9, 0.9, 4e-5, 1.0)
    assert trainer.config.lr == pytest.approx(0.045 * 4 / 96)
    steps = trainer.steps_per_epoch
    expected = [trainer.config.lr * 0.98**epoch for epoch in range(3) for _ in range(steps)]
    assert rates(trainer) == pytest.approx(expected)


def test_label_smoothing_changes_the_training_loss_alone(config, trained, tmp_path):
    smooth = train.train(dataclasses.replace(config, label_smoothing=0.5, max_steps=1))
    plain = train.train(dataclasses.replace(config, max_steps=1, output=str(tmp_path / "plain")))
    assert smooth[0]["train_loss"] != plain[0]["train_loss"]
    trainer = train.Trainer(dataclasses.replace(config, label_smoothing=0.5, output=str(tmp_path / "none")))
    trainer.model.load_state_dict(checkpoint(trained)["model"])
    loss = trainer._validate(bool)["validation_loss"]
    assert loss == pytest.approx(checkpoint(trained)["history"][-1]["validation_loss"])


# --------------------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_takes_the_weights_and_the_width(config, trained, pictures, tmp_path):
    start = {"weights": str(trained / train.MODEL), "width": None, "resolution": None}
    trainer = train.Trainer(dataclasses.replace(config, **start))
    assert not trainer.new_classifier
    assert (trainer.config.width, trainer.config.resolution) == (0.1, 32)
    assert_same(dict(trainer.model.state_dict()), dict(checkpoint(trained)["model"]))

    shutil.copytree(pictures, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "red")
    trainer = train.Trainer(dataclasses.replace(config, data=str(tmp_path / "two"), **start))
    assert trainer.new_classifier
    expected = checkpoint(trained)["model"]
    for key, value in trainer.model.state_dict().items():
        if key.startswith("classifier"):
            assert value.shape[0] == 2
        else:
            assert torch.equal(value, expected[key]), key
    trainer.run()


def test_frozen_batch_norm_stays(config, trained):
    trainer = train.Trainer(dataclasses.replace(config, weights=str(trained / train.MODEL), freeze_bn=True))
    trainer.run()
    norms = {name for name, module in trainer.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    before = checkpoint(trained)["model"]
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[key]) == (key.rpartition(".")[0] in norms), key


def test_folded_batch_norm_has_to_stay_frozen(config, tmp_path):
    model = MobileNetV2(3, 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 0.1)
    torch.save(model.state_dict(), tmp_path / "folded.pth")
    config = dataclasses.replace(config, weights=str(tmp_path / "folded.pth"), max_steps=1)
    with pytest.raises(train.TrainError, match=r"folded\.pth has no batch-norm statistics .* needs --freeze-bn"):
        train.train(config)
    train.train(dataclasses.replace(config, freeze_bn=True))


def test_the_convention_of_the_weights_is_kept(config, tmp_path):
    torch.save(MobileNetV2(1001, 0.1, tf_padding=True).state_dict(), tmp_path / "tf.pth")
    tuned = dataclasses.replace(config, weights=str(tmp_path / "tf.pth"), max_steps=1)
    train.train(tuned)
    train.train(dataclasses.replace(tuned, resume=True, max_steps=2))
    for name in (train.MODEL, train.CHECKPOINT):
        _, convention = weights.load_state_dict(str(tmp_path / "out" / name))
        assert (convention.name, convention.tf_padding, convention.crop) == ("tensorflow", True, 32)
    _, convention = weights.load_state_dict(str(tmp_path / "out" / train.MODEL), "torchvision")
    assert (convention.name, convention.crop) == ("torchvision", 32)


# ------------------------------------------------------------------------------------------------------------- failure


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(config, tmp_path):
    trainer = train.Trainer(config)
    kept = []

    def poison(now):
        if now.record is not None:
            kept.append((tmp_path / "out" / train.CHECKPOINT).read_bytes())
            torch.nn.init.constant_(trainer.model.features[3].conv[0][0].weight, float("nan"))

    message = (
        r"the loss became nan in epoch 2 after step 3, at a learning rate of 0\.003\d+; the last good checkpoint is "
    )
    with pytest.raises(train.TrainError, match=message):
        trainer.run(poison)
    assert [(tmp_path / "out" / train.CHECKPOINT).read_bytes()] == kept


def test_weights_that_are_no_numbers_are_not_kept(config, tmp_path):
    trainer = train.Trainer(config)

    def poison(now):
        torch.nn.init.constant_(trainer.model.features[3].conv[0][0].weight, float("nan"))
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(train.TrainError, match=r"features\.3\.conv\.0\.0\.weight became nan .* no checkpoint was"):
        trainer.run(poison)
    assert not (tmp_path / "out" / train.CHECKPOINT).exists()


def test_a_rate_that_diverges(pictures, tmp_path, capsys):
    options = ["--data", pictures, "--output", str(tmp_path), *OPTIONS, "--epochs", "40", "--warmup", "0"]
    assert run(*options, "--lr", "1000") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the ") and "at a learning rate of " in error


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(workers, tmp_path, capsys):
    data = make_pictures(tmp_path / "data")
    bad = datasets.folder(data, weights.TORCHVISION).train.sources[5]
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    output = tmp_path / "out"
    options = ["--data", data, "--output", str(output), *OPTIONS, "--workers", str(workers)]
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert str(bad) in error and "checkpoint.pth is written, --resume goes on from it" in error
    assert "Traceback" not in error
    bad.write_bytes(good)
    assert run(*options, "--resume") == 0


def test_labels_outside_the_range(config):
    data = datasets.folder(config.data, weights.at_resolution(weights.TORCHVISION, 32))
    data.train.targets[3] = 3
    with pytest.raises(train.TrainError, match=r"expected labels from 0 to 2, got 0 to 3"):
        train.train(config, data=data)


def test_bad_input(pictures, trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    make_pictures(tmp_path / "single", classes=["red"])
    shutil.copytree(tmp_path / "single", tmp_path / "hollow")
    (tmp_path / "hollow" / "none").mkdir()
    make_pictures(tmp_path / "few", 1)
    make_pictures(tmp_path / "two", classes=["red", "blue"])
    (tmp_path / "weights").mkdir()
    torch.save(MobileNetV2(3, 0.1).state_dict(), tmp_path / "weights" / train.CHECKPOINT)
    (tmp_path / "file").write_text("", encoding="utf-8")
    there = ["--data", pictures, "--output", str(trained)]
    new = ["--output", str(tmp_path / "new")]
    cases = {
        "unknown data 'cats': expected digits, or a folder": ["--data", "cats", *new],
        "of at least two classes, got none": ["--data", str(tmp_path / "empty"), *new],
        "of at least two classes, got only 'red'": ["--data", str(tmp_path / "single"), *new],
        "none holds no image of a kind that Pillow reads": ["--data", str(tmp_path / "hollow"), *new],
        "has a single image: expected at least two": ["--data", str(tmp_path / "few"), *new],
        f"cannot list {pictures}/red/0.png: Not a directory": ["--data", f"{pictures}/red/0.png", *new],
        "argument --batch: expected a whole number from 2 to 4096, got '1'": ["--data", "digits", "--batch", "1"],
        "argument --label-smoothing: expected a number from 0 to 1": ["--data", "digits", "--label-smoothing", "2"],
        "argument --optimizer: invalid choice: 'adam'": ["--data", "digits", "--optimizer", "adam"],
        "the following arguments are required: --data": [],
        "checkpoint.pth exists: --resume goes on from it, another --output starts a new run": there,
        "--resume: there is no ": ["--data", pictures, "--resume", *new],
        "--batch 32 contradicts the checkpoint to resume, which has 8": [*there, "--resume", "--batch", "32"],
        "--freeze-bn True contradicts": [*there, "--resume", "--freeze-bn"],
        "--data ": ["--data", str(tmp_path / "two"), "--output", str(trained), "--resume"],
        "holds weights alone": ["--data", pictures, "--resume", "--output", str(tmp_path / "weights")],
        "--freeze-bn needs --weights": ["--data", pictures, "--freeze-bn", *new],
        "contradicts --weights, whose width is 0.1": [
            *["--data", pictures, "--width", "0.5", "--weights", str(trained / train.MODEL), *new]
        ],
        "cannot write to ": ["--data", pictures, *OPTIONS, "--output", str(tmp_path / "file")],
    }
    for message, arguments in cases.items():
        assert run(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err, (message, captured.err)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("--data", "digits", *new) == 2
    assert "pip install scikit-learn" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_resumed_with_other_classes(tmp_path, config):
    data = make_pictures(tmp_path / "data")
    config = dataclasses.replace(config, data=data, max_steps=1)
    train.train(config)
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "pink")
    with pytest.raises(train.TrainError, match=r"does not have the classes .* expected 3 .*red.*, got 3 .*pink"):
        train.train(dataclasses.replace(config, resume=True))
