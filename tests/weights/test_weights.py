"""Reading weights: formats, conventions, widths, and wrong files of every kind."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnv2_fused import MobileNetV2, mobilenet_v2, weights
from mnv2_fused.weights import TENSORFLOW, TORCHVISION, WeightsError

WIDTH = 0.1  # the smallest network, to be quick


def state_dict(classes: int = 1000, width: float = WIDTH) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MobileNetV2(classes, width).state_dict()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(state_dict(), path)
    return path


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


# ----------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "no_suffix", "a.safetensors", "safetensors.bin"])
def test_reads_both_formats_whatever_the_suffix(tmp_path, name):
    path, expected = tmp_path / name, state_dict()
    if "safetensors" in name:
        save_file(expected, path)
    else:
        torch.save(expected, path)
    assert_same(weights.load_state_dict(path)[0], expected)
    assert_same(weights.load_state_dict(str(path))[0], expected)


def test_reads_the_legacy_format_of_torch_save(tmp_path):
    torch.save(state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(weights.load_state_dict(tmp_path / "old.pth")[0], state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_unwraps_what_training_scripts_write(tmp_path, key):
    wrapped = {key: {f"module.{k}": v for k, v in state_dict().items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    assert_same(weights.load_state_dict(tmp_path / "checkpoint.pth")[0], state_dict())


# ------------------------------------------------------------------------------------------------ conventions, widths


@pytest.mark.parametrize(("classes", "expected"), [(1000, TORCHVISION), (1001, TENSORFLOW), (10, TORCHVISION)])
def test_class_count_tells_the_convention(tmp_path, classes, expected):
    torch.save(state_dict(classes), tmp_path / "w.pth")
    loaded, convention = weights.load_state_dict(tmp_path / "w.pth")
    assert convention == expected
    assert weights.num_classes(loaded) == classes


@pytest.mark.parametrize("name", ["torchvision", "tensorflow"])
def test_convention_can_be_forced(saved, name):
    model, convention = weights.load_model(saved, convention=name)
    assert convention.name == name
    padded = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    explicit = {m.padding for m in padded}
    assert explicit == ({(0, 0)} if name == "tensorflow" else {(1, 1)})


def test_unknown_convention(saved):
    with pytest.raises(WeightsError, match="unknown convention 'caffe': expected one of torchvision, tensorflow,"):
        weights.load_state_dict(saved, "caffe")


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_width_follows_from_the_shapes(width):
    with torch.device("meta"):
        model = MobileNetV2(width_mult=width)
    assert weights.width_mult(model.state_dict()) == width


@pytest.mark.parametrize("width", [0.15, 0.6, 0.9, 1.1, 1.75, 2.37, 3.0])
def test_uncommon_widths_give_a_network_of_the_same_shapes(width):
    with torch.device("meta"):
        expected = MobileNetV2(width_mult=width).state_dict()
        found = MobileNetV2(width_mult=weights.width_mult(expected)).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_no_width_fits():
    broken = state_dict()
    broken["features.5.conv.2.weight"] = torch.zeros(9, 48, 1, 1)
    with pytest.raises(WeightsError, match=r"no width multiplier .* 8 8 8 8 8 9 8"):
        weights.width_mult(broken)


def test_another_number_of_blocks():
    broken = {k: v for k, v in state_dict().items() if not k.startswith("features.17.")}
    with pytest.raises(WeightsError, match=r"17 blocks: features.17.conv.2.weight is missing"):
        weights.width_mult(broken)


# ------------------------------------------------------------------------------------------------------------- models


def test_load_model_takes_everything_from_the_file(tmp_path):
    expected = state_dict(7, 0.35)
    torch.save(expected, tmp_path / "w.pth")
    model, _ = weights.load_model(tmp_path / "w.pth")
    assert not model.training
    assert_same(model.state_dict(), expected)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_mobilenet_v2_reads_a_file(saved):
    assert_same(mobilenet_v2(weights=saved).state_dict(), state_dict())
    assert_same(mobilenet_v2(weights=str(saved)).state_dict(), state_dict())


def test_half_precision_weights_are_widened(tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state_dict().items()}
    torch.save(half, tmp_path / "w.pth")
    model, _ = weights.load_model(tmp_path / "w.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.features[0][0].weight, half["features.0.0.weight"].float())


def test_checkpoints_without_batch_counters_load(tmp_path):
    old = {k: v for k, v in state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pth")
    model, _ = weights.load_model(tmp_path / "w.pth")
    assert model.features[0][1].num_batches_tracked == 0


def test_the_model_does_not_share_memory_with_what_was_read(tmp_path):
    source = state_dict()
    model = MobileNetV2(width_mult=WIDTH)
    weights.fill(model, source)
    with torch.no_grad():
        source["features.0.0.weight"].zero_()
    assert model.features[0][0].weight.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------- broken files


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"no such weights file: .*nothing\.pth"):
        weights.load_state_dict(tmp_path / "nothing.pth")


def test_unknown_name():
    with pytest.raises(WeightsError, match=r"no published checkpoint of that name: IMAGENET1K_V3 .*IMAGENET1K_V1"):
        weights.load_state_dict("IMAGENET1K_V3")


def test_something_that_is_no_path():
    with pytest.raises(WeightsError, match="must be a path or one of IMAGENET1K_V1, IMAGENET1K_V2, got 3"):
        weights.load_state_dict(3)


def refused(path) -> str:
    """The error message about a file, on one line."""
    with pytest.raises(WeightsError) as caught:
        weights.load_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_directory(tmp_path):
    assert refused(tmp_path).endswith("expected a .pth or .safetensors file, got a directory")


@pytest.mark.parametrize("url", ["https://a.b/c/w.pth?x=1", "https://a.b/" + "c" * 300, "s3://bucket/w.safetensors"])
def test_url(url):
    assert refused(url) == f"expected the path of a weights file, got a URL: {url}. Download the file first"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14\n",
            "a Git LFS pointer; `git lfs pull`",
        ),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page;"),
        (b"\xef\xbb\xbf\n <HTML lang='en'>", "an HTML page;"),
    ],
)
def test_other_kinds_of_files(tmp_path, name, content, got):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(f"expected weights in {tmp_path / name}, got {got}")


def test_torchscript(tmp_path):
    path = tmp_path / "script.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    message = refused(path)
    assert message.startswith(f"expected a state dict in {path}, got a TorchScript archive; torch.save(torch.jit.load(")
    assert "damaged" not in message


def test_exported_program(tmp_path):
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "w.pt2")
    assert "got a torch.export program; torch.save(torch.export.load(" in refused(tmp_path / "w.pt2")


def test_another_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refused(tmp_path / "w.pth").endswith("got a ZIP archive that torch.save did not write")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_whole_pickled_model(tmp_path, options):
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "model.pth", **options)
    message = refused(tmp_path / "model.pth")
    name = "" if "pickle_protocol" in options else " (torch.nn.modules.container.Sequential)"
    assert f"got a whole pickled model{name}, which is not loaded: it could run code." in message
    assert message.endswith("Save the model's state_dict() instead")


def test_a_text_file_is_shown(tmp_path):
    (tmp_path / "labels.txt").write_text("tench\ngoldfish\n" * 9, encoding="utf-8")
    assert refused(tmp_path / "labels.txt").endswith(r"got a file that begins with b'tench\ngoldfish\nt'")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("fact", "value", "rule"),
    [
        ("resolution", "8193", "a whole number from 1 to 8192, got '8193'"),
        ("resolution", "9" * 5000, "a whole number from 1 to 8192, got '999"),
        ("resolution", "0", "a whole number from 1 to 8192, got '0'"),
        ("resolution", "-5", "a whole number from 1 to 8192, got '-5'"),
        ("resolution", "224.5", "a whole number from 1 to 8192, got '224.5'"),
        ("resolution", "\u0662", "a whole number from 1 to 8192, got '"),
        ("convention", "caffe", "one of torchvision, tensorflow, timm, transformers, keras, got 'caffe'"),
        ("convention", "", "one of torchvision, tensorflow, timm, transformers, keras, got ''"),
    ],
)
def test_facts_are_checked(tmp_path, kind, fact, value, rule):
    path = tmp_path / f"w.{kind}"
    if kind == "pth":
        torch.save({"model": state_dict(), fact: value}, path)
    else:
        save_file(state_dict(), path, {fact: value})
    message = refused(path)
    assert message.startswith(f"{path}: {fact} in its metadata: expected {rule}") and len(message) < 300


@pytest.mark.parametrize("value", [True, [224, 224], 224.0, {}])
def test_facts_of_other_types(tmp_path, value):
    torch.save({"model": state_dict(), "resolution": value}, tmp_path / "w.pth")
    assert f"expected a whole number from 1 to 8192, got {value}" in refused(tmp_path / "w.pth")


def test_facts_are_used(tmp_path):
    save_file(state_dict(), tmp_path / "w.safetensors", {"resolution": "8192", "convention": "tensorflow"})
    found = weights.load_state_dict(tmp_path / "w.safetensors")[1]
    assert (found.name, found.crop) == ("tensorflow", 8192)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(16, 8, 1, 1, device="meta"), "without data"),
        (torch.zeros(16, 8).to_sparse(), "sparse"),
        (
            torch.zeros(16, 8, 1, 1, dtype=torch.float8_e4m3fn),
            "of torch.float8_e4m3fn, without the scale that its values need",
        ),
    ],
)
def test_tensors_of_other_kinds(tmp_path, tensor, kind):
    torch.save({**state_dict(), "features.2.conv.0.0.weight": tensor}, tmp_path / "w.pth")
    assert refused(tmp_path / "w.pth").endswith(f"expected dense tensors, but features.2.conv.0.0.weight is {kind}")


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"hello, I am a text file\n" * 9, b"\x80\x02garbage", b"PK\x03\x04rest"]
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_not_weights_at_all(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        weights.load_state_dict(tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated(tmp_path, share, name):
    path = tmp_path / name
    if name == "w.pth":
        torch.save(state_dict(), path)
    else:
        save_file(state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=name):
        weights.load_state_dict(path)


def evil(mark: Path) -> bytes:
    """A checkpoint that creates the file `mark` if it is unpickled without care."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    buffer = io.BytesIO()
    torch.save({"features.0.0.weight": Evil()}, buffer)
    return buffer.getvalue()


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path):
    (tmp_path / "evil.pth").write_bytes(evil(tmp_path / "ran"))
    assert "holds more than weights (getattr), which is not loaded: it could run code" in refused(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected a dictionary of tensors, got list"),
        ({"a": 1}, "'a' is of type int"),
        ({}, r"features.0.0.weight is missing \(got 0 tensors\)"),
        ({"conv1.weight": torch.zeros(1)}, "features.0.0.weight is missing .*such as conv1.weight"),
    ],
)
def test_not_a_mobilenet(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        weights.load_state_dict(tmp_path / "w.pth")


def test_scalars_where_matrices_belong(tmp_path):
    torch.save({**state_dict(), "classifier.1.weight": torch.tensor(1.0)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"classifier.1.weight has shape \(\), expected 2 dimensions"):
        weights.load_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.3.conv.2.weight"), "features.3.conv.2.weight is missing"),
        (lambda s: s.pop("features.3.conv.3.bias"), "missing features.3.conv.3.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda s: s.update({"classifier.1.bias": torch.zeros(9)}),
            r"classifier.1.bias has shape \(9,\), expected \(1000,\)",
        ),
        (lambda s: s["features.0.0.weight"][0, 0, 0].fill_(float("nan")), "features.0.0.weight holds NaN or infinity"),
        (
            lambda s: s.update({"classifier.1.bias": torch.full((1000,), 1e300, dtype=torch.float64)}),
            "classifier.1.bias holds NaN or infinity",
        ),
        (lambda s: s["features.0.1.running_var"][3].fill_(-1), "features.0.1.running_var holds negative values"),
        (
            lambda s: s.update({"classifier.1.weight": torch.zeros(0, 1280)}),
            r"shape \(0, 1280\), expected 2 dimensions",
        ),
        (
            lambda s: s.update({"features.0.0.weight": s["features.0.0.weight"].to(torch.int8)}),
            "has dtype torch.int8, expected a floating-point one",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    broken = state_dict()
    change(broken)
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        weights.load_model(tmp_path / "w.pth")


def test_many_problems_are_counted_not_listed():
    with pytest.raises(WeightsError, match=r"and \d+ more$") as caught:
        weights.fill(MobileNetV2(width_mult=WIDTH), state_dict(width=1.4))
    assert len(str(caught.value)) < 500


# ---------------------------------------------------------------------------------------------- published checkpoints


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Puts a checkpoint on this disk in place of the published one. Returns a function that stores its file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def store(content: bytes, digest: str | None = None) -> None:
        digest = digest or hashlib.sha256(content).hexdigest()[:8]
        file = tmp_path / f"mobilenet_v2-{digest}.pth"
        file.write_bytes(content)
        monkeypatch.setitem(weights.PUBLISHED, "IMAGENET1K_V1", weights.Published(file.as_uri(), TORCHVISION))

    return store


def checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save(state_dict(), buffer)
    return buffer.getvalue()


class Enumeration:
    """Like torchvision's MobileNet_V2_Weights."""

    name = "IMAGENET1K_V1"


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "MobileNet_V2_Weights.IMAGENET1K_V1", Enumeration()])
def test_published_by_name(published, name):
    published(checkpoint())
    loaded, convention = weights.load_state_dict(name)
    assert_same(loaded, state_dict())
    assert convention == TORCHVISION


def test_published_is_cached(published, tmp_path):
    published(checkpoint())
    weights.load_state_dict("IMAGENET1K_V1")
    for file in tmp_path.glob("*.pth"):
        file.unlink()
    assert_same(weights.load_state_dict("IMAGENET1K_V1")[0], state_dict())


def test_published_with_the_wrong_hash(published):
    published(checkpoint(), digest="00000000")
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V1: the downloaded or cached file is damaged .*hash"):
        weights.load_state_dict("IMAGENET1K_V1")


def test_published_that_runs_code_does_not_run_it(published, tmp_path):
    published(evil(tmp_path / "ran"))
    with pytest.raises(WeightsError, match="IMAGENET1K_V1: the downloaded or cached file is damaged"):
        weights.load_state_dict("IMAGENET1K_V1")
    assert not (tmp_path / "ran").exists()


def test_published_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(WeightsError, match=r"could not be downloaded \(Name or service not known\).*give the path"):
        weights.load_state_dict("IMAGENET1K_V2")


def test_published_contradicted(published):
    published(checkpoint())
    with pytest.raises(WeightsError, match="trained with the torchvision convention"):
        weights.load_state_dict("IMAGENET1K_V1", "tensorflow")


def test_published_facts():
    assert weights.published_name("DEFAULT") == "IMAGENET1K_V2"
    assert [p.convention.resize for p in weights.PUBLISHED.values()] == [256, 232]
    assert [p.url.rsplit("-", 1)[1] for p in weights.PUBLISHED.values()] == ["b0353104.pth", "7ebf99e0.pth"]


# ------------------------------------------------------------------------------------------------------ random weights


def test_randomized_batch_norm_gives_outputs_worth_comparing():
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = MobileNetV2(width_mult=0.35, fused=False).eval()
        weights.randomize_batch_norm(model, seed=5)
        with torch.inference_mode():
            outputs.append(model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))))
    assert torch.equal(*outputs)
    assert 0.01 < outputs[0].std() < 100
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-3  # and they depend on the input
