"""transformers' MobileNetV2: its networks run fused, whole or block by block, and stay transformers' models."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_close, check, check_training, operators, plain, randomize
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import extras
from mnv2_fused.families import is_converted

NETWORK = ["network"]
TRAINED = ["train_dense", *["train_block"] * 17, "train_dense"]
TRAINED += [f"{name}_backward" for name in TRAINED]
SIZE = 72  # of images; the last maps have several pixels


@pytest.fixture(scope="module")
def hf():
    with contextlib.suppress(extras.MissingExtraError):  # it makes torchvision importable, which transformers imports
        extras.use("transformers", "test")
    return pytest.importorskip("transformers.models.mobilenet_v2.modeling_mobilenet_v2")


class Output(nn.Module):
    """`model` with one tensor as its output, which `pick` takes from what it returns."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor] = lambda outputs: outputs[0], **arguments: Any):
        super().__init__()
        self.model, self.pick, self.arguments = model, pick, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.model(x, **self.arguments))


def make(hf, name: str = "ForImageClassification", x: Tensor | None = None, **options: Any) -> nn.Module:
    """A converted network of narrow layers with random statistics."""
    torch.manual_seed(0)
    arguments = {"add_pooling_layer": options.pop("add_pooling_layer")} if "add_pooling_layer" in options else {}
    options = {"depth_multiplier": 0.25, "num_labels": 101, "classifier_dropout_prob": 0.0, **options}
    model = getattr(hf, f"MobileNetV2{name}")(hf.MobileNetV2Config(**options), **arguments).eval()
    return mnv2_fused.convert(randomize(model, images() if x is None else x))


def images(count: int = 4, height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def reasons(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    return {name: why for name, why in mnv2_fused.explain(model, x).items() if why is not None}


# ------------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("first_layer_is_expansion", [True, False])
@pytest.mark.parametrize("tf_padding", [True, False])
@pytest.mark.parametrize("size", [(72, 72), (65, 70)])
def test_classification_is_one_operator(hf, tf_padding, first_layer_is_expansion, size):
    model = make(hf, tf_padding=tf_padding, first_layer_is_expansion=first_layer_is_expansion)
    with torch.no_grad():
        assert reasons(model) == {} and len(mnv2_fused.explain(model)) == 19
    check(Output(model), images(8, *size), NETWORK)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("add_pooling_layer", [True, False])
def test_the_model(hf, output_stride, add_pooling_layer):
    model = make(hf, "Model", output_stride=output_stride, add_pooling_layer=add_pooling_layer)
    check(Output(model), images(), NETWORK)
    with torch.no_grad():
        if add_pooling_layer:
            check(Output(model, lambda outputs: outputs.pooler_output), images(), NETWORK)
        else:
            assert model(images()).pooler_output is None


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("tf_padding", [True, False])
def test_segmentation(hf, output_stride, tf_padding):
    model = make(hf, "ForSemanticSegmentation", output_stride=output_stride, tf_padding=tf_padding)
    with torch.no_grad():
        assert reasons(model, images()) == {} and len(mnv2_fused.explain(model)) == 22
    check(Output(model), images(), ["network", "dense", "dense", "dense"])


@pytest.mark.parametrize("name", ["Model", "ForImageClassification", "ForSemanticSegmentation"])
def test_every_hidden_state(hf, name):
    model = make(hf, name)
    for i in range(16):
        got = check(Output(model, lambda outputs, i=i: outputs.hidden_states[i], output_hidden_states=True), images())
    assert got.shape[1] == model.config.depth_multiplier * 320
    # The same from the configuration.
    model.config.output_hidden_states = True
    if name != "Model":
        model.mobilenet_v2.config.output_hidden_states = True
    with torch.no_grad():
        assert torch.equal(model(images()).hidden_states[-1], got)


@pytest.mark.parametrize("name", ["Model", "ForImageClassification", "ForSemanticSegmentation"])
@pytest.mark.parametrize("output_hidden_states", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
@torch.no_grad()
def test_outputs_have_the_form_of_a_plain_model(hf, name, output_hidden_states, with_labels):
    model = make(hf, name)
    reference, x = plain(model), images(2)
    arguments: dict[str, Any] = {"output_hidden_states": output_hidden_states}
    if with_labels and name != "Model":
        shape = (2,) if name == "ForImageClassification" else (2, SIZE, SIZE)
        arguments["labels"] = torch.randint(101, shape, generator=torch.Generator().manual_seed(1))
    got, expected = model(x, **arguments), reference(x, **arguments)
    assert type(got) is type(expected) and list(got) == list(expected)
    for ours, theirs in zip(flat(got.to_tuple()), flat(expected.to_tuple()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.stride() == theirs.stride()
    as_tuple = model(x, return_dict=False, **arguments)
    expected = reference(x, return_dict=False, **arguments)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(expected)
    for ours, theirs in zip(flat(as_tuple), flat(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def flat(outputs: tuple[Any, ...]) -> list[Tensor]:
    return [tensor for entry in outputs for tensor in (entry if isinstance(entry, tuple) else (entry,))]


@pytest.mark.parametrize("num_labels", [0, 1, 1001])
def test_class_counts(hf, num_labels):
    check(Output(make(hf, num_labels=num_labels)), images(8), NETWORK)


@torch.no_grad()
def test_no_images(hf):
    for name in ("Model", "ForImageClassification", "ForSemanticSegmentation"):
        with pytest.raises(ValueError, match="pixel_values"):
            make(hf, name)()


@pytest.mark.parametrize("name", ["Model", "ForImageClassification", "ForSemanticSegmentation"])
def test_arguments_have_the_names_of_a_plain_model(hf, name):
    # transformers' Trainer drops columns of a data set that are no arguments.
    model = make(hf, name)
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (type(model), type(model)._kind))
    assert list(ours)[: len(theirs)] == list(theirs)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("tf_padding", [True, False])
def test_training(hf, tf_padding):
    model = make(hf, tf_padding=tf_padding, first_layer_is_expansion=tf_padding).train()
    assert model.mobilenet_v2.conv_1x1.normalization.momentum == 0.997
    check_training(Output(model), images(8, 64, 64), TRAINED, margin=0)


def test_running_statistics_are_nearly_those_of_the_batch(hf):
    model = make(hf, "Model").train()
    seen = []
    norm = model.conv_stem.first_conv.normalization
    model(images())
    y = nn.functional.pad(images(), (0, 1, 0, 1))
    y = nn.functional.conv2d(y, model.conv_stem.first_conv.convolution.weight, stride=2)
    seen = norm.running_mean - y.mean((0, 2, 3))
    assert seen.abs().max() < 0.01 * y.std()


def test_training_segmentation(hf):
    # The last convolution of the model is not used, but its statistics follow the batch.
    model = make(hf, "ForSemanticSegmentation").train()
    before = model.mobilenet_v2.conv_1x1.normalization.running_mean.clone()
    reference = plain(model)
    for one in (model, reference):
        one(images()).logits.square().mean().backward()
    ours, theirs = (one.mobilenet_v2.conv_1x1.normalization for one in (model, reference))
    assert not torch.equal(ours.running_mean, before)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-3, atol=1e-4)
    assert ours.num_batches_tracked == theirs.num_batches_tracked
    grads = [one.mobilenet_v2.layer[3].reduce_1x1.convolution.weight.grad for one in (model, reference)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * grads[1].abs().max().item())


# ---------------------------------------------------------------------------------------------------------- the object


@torch.no_grad()
def test_convert_and_revert(hf):
    for name in ("Model", "ForImageClassification", "ForSemanticSegmentation"):
        model = mnv2_fused.revert(make(hf, name))
        expected, text = model(images())[0], repr(model)
        classes = {name: type(m) for name, m in model.named_modules()}
        attributes = {name: set(vars(m)) for name, m in model.named_modules()}
        tensors = model.state_dict(keep_vars=True)
        mnv2_fused.convert(model)
        assert all(tensor is tensors[key] for key, tensor in model.state_dict(keep_vars=True).items())
        assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
        assert not torch.equal(model(images())[0], expected)
        assert mnv2_fused.convert(model) is model and mnv2_fused.revert(model) is model
        assert {name: type(m) for name, m in model.named_modules()} == classes
        assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
        assert operators(lambda model=model: model(images())) == []
        assert torch.equal(model(images())[0], expected) and repr(model) == text


@torch.no_grad()
def test_copies(hf):
    model = make(hf)
    y = model(images()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()).logits, y)
        assert type(mnv2_fused.revert(other)) is hf.MobileNetV2ForImageClassification


def test_models_keep_the_name_of_their_class(hf):
    for name in ("Model", "ForImageClassification", "ForSemanticSegmentation"):
        kind = getattr(hf, f"MobileNetV2{name}")
        model = mnv2_fused.convert(kind(hf.MobileNetV2Config(depth_multiplier=0.35, image_size=32)))
        assert is_converted(model) and type(model).__name__ == kind.__name__  # pipelines look it up


@torch.no_grad()
def test_save_pretrained(hf, tmp_path):
    model = make(hf)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MobileNetV2ForImageClassification"]
    assert operators(lambda: model(images(1))) == NETWORK  # it is still converted
    loaded = hf.MobileNetV2ForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(mnv2_fused.convert(loaded)(images()).logits, model(images()).logits)


@pytest.mark.parametrize(
    ("path", "fused"),
    [
        ("mobilenet_v2", ["network"]),
        ("mobilenet_v2.conv_stem", ["network", *["inverted_residual"] * 16, "dense"]),
        ("mobilenet_v2.conv_stem.first_conv", ["dense", *["inverted_residual"] * 17, "dense"]),
        ("mobilenet_v2.conv_stem.conv_3x3", ["dense", *["inverted_residual"] * 16, "dense"]),
        ("mobilenet_v2.layer.4", ["dense", *["inverted_residual"] * 17, "dense"]),
        ("mobilenet_v2.layer.4.reduce_1x1", ["dense", *["inverted_residual"] * 16, "dense"]),
        ("mobilenet_v2.conv_1x1", ["dense", *["inverted_residual"] * 17, "dense"]),
        ("mobilenet_v2.pooler", ["network"]),
        ("dropout", ["network"]),
        ("classifier", ["network"]),
    ],
)
def test_hooks_are_called(hf, path, fused):
    model = make(hf)
    with torch.no_grad():
        model(images())  # what was read without the hook counts no longer
    seen = []
    model.get_submodule(path).register_forward_hook(lambda module, arguments, y: seen.append(len(arguments)))
    with torch.no_grad():
        model(images())
    assert seen == [1]
    check(Output(model), images(8), fused)


@torch.no_grad()
def test_hidden_state_hooks_of_an_unused_convolution(hf):
    model = make(hf, "ForSemanticSegmentation")
    seen = []
    model.mobilenet_v2.conv_1x1.register_forward_hook(lambda module, arguments, y: seen.append(y.shape[1]))
    check(Output(model), images())
    assert seen[0] == 1280


@torch.no_grad()
def test_switches_and_changes_count(hf):
    model, x = make(hf), images(8)
    check(Output(model), x, NETWORK)
    model.mobilenet_v2.layer[2].fused = False
    assert reasons(model) == {"mobilenet_v2.layer.2": "fused is False"}
    check(Output(model), x, ["dense", *["inverted_residual"] * 16, "dense"])
    model.fused = True
    check(Output(model), x, NETWORK)
    model.mobilenet_v2.fused = False
    check(Output(model), x, [])
    model.fused = True
    # All layers share the configuration.
    model.config.tf_padding = False
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
        conv.padding = (1, 1)
    check(Output(model), x, NETWORK)
    check(model.mobilenet_v2.conv_stem, x, NETWORK)
    model.config.tf_padding = True
    assert set(reasons(model).values()) >= {"convolution is padded twice", "conv_3x3.convolution is padded twice"}
    assert operators(lambda: model.mobilenet_v2.conv_stem(x)) == []
    model.config.tf_padding = False
    model.mobilenet_v2.layer[1].conv_3x3.activation = None
    assert "the two activations differ" in reasons(model)["mobilenet_v2.layer.1"]


@torch.no_grad()
def test_a_stride_and_a_dilation(hf):
    # The layer pads for the stride and multiplies by the dilation, which is not TensorFlow's rule.
    model = make(hf, "Model")
    model.layer[2].conv_3x3.convolution.dilation = (2, 2)
    assert reasons(model) == {"layer.2": "conv_3x3.convolution has a stride and a dilation"}
    check(Output(model), images(8, 96, 96))


# ------------------------------------------------------------------------------------------------------- other classes


def test_other_activations_run_plain(hf):
    model = make(hf, hidden_act="gelu")
    assert "activation is a GELUActivation, not an nn.ReLU6" in reasons(model)["mobilenet_v2.conv_stem.first_conv"]
    check(Output(model), images(8), [])
    relu = make(hf, hidden_act="relu")
    check(Output(relu), images(8), NETWORK)
    function = make(hf)
    del function.mobilenet_v2.layer[0].conv_3x3.activation
    function.mobilenet_v2.layer[0].conv_3x3.activation = nn.functional.relu6
    assert reasons(function) == {"mobilenet_v2.layer.0": "conv_3x3.activation is a function, not an nn.ReLU6"}
    check(Output(function), images(8), ["dense", *["inverted_residual"] * 16, "dense"])


@torch.no_grad()
def test_subclasses_and_lookalikes_are_left_alone(hf, monkeypatch):
    class Block(hf.MobileNetV2InvertedResidual):
        def forward(self, features):
            return 2 * super().forward(features)

    model = mnv2_fused.revert(make(hf))
    model.mobilenet_v2.layer[3] = Block(model.config, 8, 8, 1).eval()
    mnv2_fused.convert(randomize(model, images()))
    assert type(model.mobilenet_v2.layer[3]) is Block
    check(Output(model), images(8), ["dense", *["inverted_residual"] * 16, "dense"])

    class Layer(hf.MobileNetV2ConvLayer):
        def forward(self, features):
            return 2 * super().forward(features)

    model = mnv2_fused.revert(make(hf))
    model.mobilenet_v2.layer[3].conv_3x3.__class__ = Layer
    mnv2_fused.convert(model)
    assert reasons(model) == {"mobilenet_v2.layer.3": "conv_3x3 is a Layer, not transformers' MobileNetV2ConvLayer"}
    check(Output(model), images(8), ["dense", *["inverted_residual"] * 16, "dense"])


@pytest.mark.parametrize("name", ["ForImageClassification", "Model", "Stem", "InvertedResidual", "ConvLayer"])
@torch.no_grad()
def test_another_forward_is_another_version(hf, monkeypatch, name):
    kind = getattr(hf, f"MobileNetV2{name}")
    original = kind.forward

    def forward(self, *arguments, **options):
        return original(self, *arguments, **options)

    model = mnv2_fused.revert(make(hf))
    monkeypatch.setattr(kind, "forward", forward)
    if name != "ConvLayer":
        mnv2_fused.convert(model)
        converted = [type(m)._kind.__name__ for m in model.modules() if is_converted(m)]
        assert f"MobileNetV2{name}" not in converted
    else:
        mnv2_fused.convert(model)
        assert all("not transformers' MobileNetV2ConvLayer" in why for why in reasons(model).values())
    check(Output(model), images(8))


def test_parts_alone(hf):
    model = mnv2_fused.revert(make(hf))
    block, stem = model.mobilenet_v2.layer[1], model.mobilenet_v2.conv_stem
    check(mnv2_fused.convert(block), torch.randn(4, 8, 24, 24), ["inverted_residual"])
    check_training(block.train(), torch.randn(4, 8, 24, 24))
    check(mnv2_fused.convert(stem), images(8), NETWORK)
    assert list(mnv2_fused.explain(stem)) == ["first_conv", "conv_3x3"]


def test_the_package_is_not_imported():
    code = "import mnv2_fused, sys; mnv2_fused.convert(mnv2_fused.MobileNetV2()); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@torch.no_grad()
def test_compiled(hf):
    model = make(hf)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images()).logits, model(images()).logits)


@torch.no_grad()
def test_dtypes(hf):
    model = make(hf, depth_multiplier=0.5)
    x = images(8)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(model).to(dtype)
        assert operators(lambda narrow=narrow, dtype=dtype: narrow(x.to(dtype))) == NETWORK
        exact = plain(narrow).double()(x.to(dtype).double()).logits
        assert_close(narrow(x.to(dtype)).logits, plain(narrow)(x.to(dtype)).logits, exact)
