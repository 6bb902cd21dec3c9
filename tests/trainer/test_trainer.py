"""Training: what it writes, that it resumes where it stopped, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from mnv2_fused import MobileNetV2, cli, weights
from mnv2_fused import trainer as train
from mnv2_fused.data import datasets, images

TINY = {"width": 0.1, "resolution": 32, "batch": 8, "epochs": 2, "threads": 1, "workers": 0}
OPTIONS = [text for key, value in TINY.items() for text in (f"--{key}", str(value))]
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 50), "red": (220, 40, 30)}


def make_pictures(root, count=10, classes=COLOURS):
    rng = random.Random(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = tuple(min(255, max(0, value + rng.randint(-25, 25))) for value in COLOURS[name])
            Image.new("RGB", (40 + i, 50 - i), colour).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture
def config(pictures, tmp_path):
    """A run of two epochs of three steps."""
    return train.Config(data=pictures, output=str(tmp_path / "out"), **TINY)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The directory of the run that `config` asks for, uninterrupted."""
    output = tmp_path_factory.mktemp("trained") / "out"
    train.train(train.Config(data=pictures, output=str(output), **TINY))
    return output


def run(*arguments: str) -> int:
    """The exit code, also where argparse exits by itself."""
    try:
        return cli.main(["train", *arguments])
    except SystemExit as stop:
        return stop.code


def checkpoint(directory) -> dict:
    return torch.load(directory / train.CHECKPOINT, weights_only=True)


def assert_same(got, expected, path="checkpoint"):
    assert type(got) is type(expected), path
    if isinstance(got, dict):
        assert got.keys() == expected.keys(), path
        for key in got:
            if key not in ("images_per_s", "peak_memory_bytes", "arguments"):
                assert_same(got[key], expected[key], f"{path}.{key}")
    elif isinstance(got, list):
        assert len(got) == len(expected), path
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"{path}.{i}")
    else:
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected, path


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
        runs[fused] = initial, list(trainer._batches(trainer.data.train, trainer._order(), bool)), trainer.run()
    assert_same(runs[True][0], runs[False][0])
    assert_same([list(batch) for batch in runs[True][1]], [list(batch) for batch in runs[False][1]])
    for fused, plain in zip(runs[True][2], runs[False][2], strict=True):
        # One step: at this size later ones multiply every rounding.
        assert fused["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
        assert fused["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-3)


def test_another_seed_gives_other_weights_and_another_order(config):
    one, other = (train.Trainer(dataclasses.replace(config, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.model.features[0][0].weight, other.model.features[0][0].weight)
    assert one._order() != other._order()
    first = [[index for index, _ in batch] for batch in one._order()]
    one.epoch = 2
    assert [[index for index, _ in batch] for batch in one._order()] != first


def test_training_leaves_the_process_as_it_was(config):
    before = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    train.train(dataclasses.replace(config, threads=2, max_steps=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == before[1:]


# --------------------------------------------------------------------------------------------------------- the recipes


def rates(trainer):
    return [trainer.config.lr * trainer._lr_factor(step) for step in range(trainer.steps)]


def test_sgd_warms_up_and_ends_at_zero(config):
    trainer = train.Trainer(dataclasses.replace(config, epochs=10, warmup=2, lr=0.5))
    group = trainer._optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 4e-5)
    lr = rates(trainer)
    assert len(lr) == 30 and 0 < lr[0] < lr[3] < lr[5] < lr[6] == max(lr) == 0.5
    assert lr[6:] == sorted(lr[6:], reverse=True) and lr[18] == pytest.approx(0.25) and 0 < lr[-1] < 0.01


def test_rmsprop_is_the_papers(config):
    trainer = train.Trainer(dataclasses.replace(config, optimizer="rmsprop", batch=4, epochs=3))
    group = trainer._optimizer.param_groups[0]
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
    loss, _ = trainer._validate(bool)
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


# ------------------------------------------------------------------------------------------------------------ the data


def test_held_out_images_depend_on_names_alone(tmp_path):
    root = make_pictures(tmp_path / "data")
    before = datasets.folder(root, weights.TORCHVISION)
    assert len(before.train) == 24 and len(before.held_out) == 6
    assert not set(before.train.sources) & set(before.held_out.sources)
    before.train.sources[0].unlink()
    (tmp_path / "data" / "red" / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "data" / ".cache").mkdir()
    after = datasets.folder(root, weights.TORCHVISION)
    assert after.held_out.sources == before.held_out.sources and len(after.train) == 23


def test_a_split_of_the_folders_own(tmp_path):
    make_pictures(tmp_path / "data" / "train", 3)
    make_pictures(tmp_path / "data" / "val", 2, ["red"])
    data = datasets.load(str(tmp_path / "data"), weights.TORCHVISION)
    assert (data.labels, len(data.train), data.held_out.targets) == (["blue", "green", "red"], 9, [2, 2])
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "pink")
    with pytest.raises(datasets.DataError, match=r"has a class that .*train has not: 'pink'"):
        datasets.load(str(tmp_path / "data"), weights.TORCHVISION)


def test_augmentation_follows_from_seed_epoch_and_index(pictures):
    convention = weights.at_resolution(weights.TORCHVISION, 32)
    data = datasets.folder(pictures, convention).train
    Image.linear_gradient("L").save(os.path.join(os.path.dirname(pictures), "gradient.png"))
    data.sources[0] = data.sources[1] = Image.linear_gradient("L").convert("RGB")
    assert torch.equal(data[0, 1][0], data[0, 1][0])
    plain = images.prepare(data.sources[0], convention)
    assert torch.equal(data[0][0], plain)
    different = [data[0, 1][0], data[0, 2][0], data[1, 1][0], plain]
    other = datasets.ImageSet(data.sources, data.targets, convention, datasets.crop_and_flip, seed=1)
    different.append(other[0, 1][0])
    for i, one in enumerate(different):
        assert one.shape == (3, 32, 32)
        assert not any(torch.equal(one, another) for another in different[:i])


@pytest.mark.parametrize("size", [(200, 150), (400, 20), (1, 1)])
def test_crops_lie_inside_the_image(size):
    image = Image.new("RGB", size, (255, 255, 255))
    convention = weights.at_resolution(weights.TORCHVISION, 16)
    for seed in range(20):
        cropped = datasets.crop_and_flip(image, convention, random.Random(seed))
        assert cropped.size == (16, 16) and cropped.getextrema() == ((255, 255),) * 3


def test_shifts_are_small(monkeypatch):
    image = Image.new("RGB", (80, 80))
    image.putpixel((40, 40), (255, 255, 255))
    monkeypatch.setattr(images, "fit", lambda image, convention: image)
    places = set()
    for seed in range(20):
        x, y, *_ = datasets.shift(image, weights.TORCHVISION, random.Random(seed)).getbbox()
        assert abs(x - 40) <= 9 and abs(y - 40) <= 9
        places.add((x, y))
    assert len(places) > 10


# -------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer, stop, config, tmp_path):
    """After an epoch, and in the middle of one: dropout, order, augmentation, learning rate and sums go on."""
    config = dataclasses.replace(config, optimizer=optimizer)

    def interrupt(now):
        if now.step == stop and now.record is None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(train.Interrupted, match=f"after step {stop}; .*out/checkpoint.pth is written, --resume"):
        train.train(config, interrupt)
    assert not (tmp_path / "out" / train.MODEL).exists()
    resumed = train.train(train.Config(data=config.data, output=config.output, threads=1, workers=0, resume=True))
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    assert_same(resumed, train.train(whole))
    assert_same(checkpoint(tmp_path / "out"), checkpoint(tmp_path / "whole"))
    log = (tmp_path / "out" / train.LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in log] == resumed


def test_interrupted_while_validating(config, trained, monkeypatch, tmp_path):
    real = train.Trainer._validate

    def interrupt(self, stopping):
        signal.raise_signal(signal.SIGINT)
        return real(self, stopping)

    monkeypatch.setattr(train.Trainer, "_validate", interrupt)
    with pytest.raises(train.Interrupted, match="in epoch 1 after step 3;"):
        train.train(config)
    monkeypatch.undo()
    resumed = train.train(dataclasses.replace(config, resume=True))
    assert_same(resumed, checkpoint(trained)["history"])


def test_max_steps_ends_early_and_can_be_raised(config, trained, tmp_path):
    first = train.train(dataclasses.replace(config, max_steps=2))
    assert [(record["epoch"], record["step"]) for record in first] == [(1, 2)]
    assert (tmp_path / "out" / train.MODEL).exists()
    train.train(dataclasses.replace(config, resume=True))
    assert_same(checkpoint(tmp_path / "out")["model"], checkpoint(trained)["model"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_all_processes(number, pictures, tmp_path):
    """As a terminal's Ctrl-C and a service manager send them, with workers that decode images."""
    output = tmp_path / "out"
    options = [*OPTIONS[:6], "--threads", "1", "--workers", "2", "--data", pictures, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-m", "mnv2_fused", "train", *options, "--epochs", "2000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    log, patience = output / train.LOG, time.monotonic() + 60
    while (not log.exists() or not log.read_text(encoding="utf-8")) and time.monotonic() < patience:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.startswith("error: interrupted in epoch ") and "--resume goes on from it\n" in error
    saved = checkpoint(output)
    assert f"after step {saved['step']};" in error
    resumed = ["--resume", "--threads", "1", "--workers", "0", "--max-steps", str(saved["step"] + 1)]
    assert run("--data", pictures, "--output", str(output), *resumed) == 0
    assert checkpoint(output)["step"] == saved["step"] + 1


def test_a_signal_ends_a_worker_without_error(config):
    """PyTorch would raise in the parent, wherever that is, for one that died of it."""
    trainer = train.Trainer(dataclasses.replace(config, workers=1))
    batches = trainer._batches(trainer.data.train, trainer._order(), bool)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    worker.join(0.2)
    assert worker.exitcode is None, "the parent finishes its step first"
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(30)
    assert worker.exitcode == 0


def test_a_checkpoint_is_written_whole_or_not_at_all(config, monkeypatch, tmp_path):
    train.train(dataclasses.replace(config, max_steps=1))
    before = (tmp_path / "out" / train.CHECKPOINT).read_bytes()

    def fill_the_disk(content, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(train.TrainError, match=r"cannot write .*checkpoint\.pth: No space left on device"):
        train.train(dataclasses.replace(config, resume=True))
    assert (tmp_path / "out" / train.CHECKPOINT).read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


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
