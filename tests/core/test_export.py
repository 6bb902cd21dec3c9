"""Exported programs of eval models: their gradients, weights that change, other tools that read them."""

from __future__ import annotations

import gc
import subprocess
import sys
import types

import pytest
import torch
from oracle import assert_close, plain, randomize

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused._core import when_imported
from mnv2_fused._core.library import _C

SMALL = [[1, 8, 1, 1], [6, 8, 1, 2], [6, 16, 1, 2]]
SHAPE = (4, 3, 33, 33)


def make_model(**options):
    return randomize(MobileNetV2(7, 0.5, SMALL, **options), torch.randn(SHAPE))


def fused(graph) -> list[str]:
    names = [str(node.target).removeprefix("mnv2_fused.").removesuffix(".default") for node in graph.nodes]
    return [name for name in names if name.startswith(("cached_", "train_"))]


def exported(model, x, **options):
    """The module of the program of `model`, exported in grad mode."""
    module = torch.export.export(model.eval(), (x,), **options).module()
    assert fused(module.graph) == ["cached_network_grad"]
    return module


def test_module_in_training_mode_keeps_training_operators():
    graph = torch.export.export(make_model().train(), (torch.randn(SHAPE),)).graph
    assert "train_block" in fused(graph) and not any(name.startswith("cached_") for name in fused(graph))


@pytest.mark.parametrize("tf_padding", [False, True])
def test_gradients_of_an_exported_program(tf_padding):
    model = make_model(tf_padding=tf_padding)
    x = torch.randn(SHAPE, requires_grad=True)
    module, reference = exported(model, x), plain(model)
    exact = plain(model).double()

    def gradients(function, parameters, x):
        leaves = [x, *parameters]
        return torch.autograd.grad(function(x).square().sum(), leaves)

    got = gradients(module, module.parameters(), x)
    names = [name for name, _ in module.named_parameters()]
    order = [dict(reference.named_parameters())[name] for name in names]
    expected = gradients(reference, order, x)
    order = [dict(exact.named_parameters())[name] for name in names]
    wanted = gradients(exact, order, x.detach().double().requires_grad_())
    for a, b, c in zip(got, expected, wanted, strict=True):
        assert_close(a, b, c)


def test_only_wanted_gradients_and_second_derivatives():
    model = make_model().requires_grad_(False)
    model.classifier[1].bias.requires_grad_()
    x = torch.randn(SHAPE)
    module = exported(model, x)
    module(x).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert [name for name, grad in grads.items() if grad is not None] == ["classifier.1.bias"]
    assert torch.allclose(grads["classifier.1.bias"], torch.full((7,), 4.0))

    x = torch.randn(2, 8, 9, 9, dtype=torch.float32, requires_grad=True)
    block = randomize(InvertedResidual(8, 8, 1, 6), x.detach())
    once = torch.autograd.grad(torch.export.export(block, (x,)).module()(x).square().sum(), x, create_graph=True)[0]
    twice = torch.autograd.grad(once.square().sum(), x)[0]
    y = plain(block)(x).square().sum()
    once = torch.autograd.grad(y, x, create_graph=True)[0]
    torch.testing.assert_close(twice, torch.autograd.grad(once.square().sum(), x)[0], rtol=1e-3, atol=1e-3)


def test_transforms_of_an_exported_program():
    model, x = make_model(), torch.randn(3, *SHAPE)
    module = exported(model, x[0])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(module)(x), torch.stack([module(y) for y in x]), rtol=1e-3, atol=1e-3)
    gradient = torch.func.grad(lambda y: module(y).square().sum())
    y = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(y).square().sum(), y)
    torch.testing.assert_close(gradient(x[0]), expected)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(module, x[0], vectorize=True), jacobian(module, x[0]))


@pytest.mark.parametrize("project_activation", [None, torch.nn.ReLU, torch.nn.ReLU6])
def test_decomposed_program(project_activation):
    model, x = make_model(tf_padding=True, project_activation=project_activation), torch.randn(SHAPE)
    module = torch.export.export(model, (x,))
    before = set(module.state_dict)
    program = mnv2_fused.export.decompose(module)
    inside = mnv2_fused.export.decompose(module.module())
    assert fused(program.graph) == fused(inside.graph) == [] and set(program.state_dict) == before
    exact = plain(model).double()(x.double())
    for function in (program.module(), inside):
        assert_close(function(x), plain(model)(x), exact)


def test_decomposed_taps_and_memory_formats():
    backbone = mnv2_fused.deeplabv3_mobilenet_v2(width_mult=0.35, num_classes=7).eval().backbone
    x = torch.randn(1, 3, 33, 33)
    randomize(backbone, x)
    program = torch.export.export(backbone, (x,))
    module = mnv2_fused.export.decompose(program.module())
    assert fused(module.graph) == [] and len(fused(program.graph)) > 0
    exact = plain(backbone).double()(x.double())
    for name, wanted in plain(backbone)(x).items():
        got = module(x)[name]
        assert got.stride() == program.module()(x)[name].stride()
        assert_close(got, wanted, exact[name])


def test_decompose_names_what_it_got():
    with pytest.raises(TypeError, match=r"decompose: program must be an ExportedProgram .*; got MobileNetV2"):
        mnv2_fused.export.decompose(make_model())


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(tmp_path, dynamic):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = make_model(), torch.randn(SHAPE)
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    torch.onnx.export(program, (x,), tmp_path / "model.onnx", external_data=False, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), plain(model)(x), plain(model).double()(x.double()), factor=4)


def test_quantizers_see_convolutions():
    prepare = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    x = torch.randn(SHAPE)

    def count(model) -> int:
        quantizer = quantizers.X86InductorQuantizer()
        quantizer.set_global(quantizers.get_default_x86_inductor_quantization_config())
        prepared = prepare.prepare_pt2e(torch.export.export(model.eval(), (x,)).module(), quantizer)
        prepared(x)
        return sum("quantize" in str(node.target) for node in prepare.convert_pt2e(prepared).graph.nodes)

    model = make_model()
    assert count(model) == count(plain(model)) > 20


def test_quantizers_that_were_imported_before_decompose_or_raise(monkeypatch):
    """A name that was bound before the package was imported is not replaced, but the function that it calls is."""
    quantize = types.SimpleNamespace(prepare=lambda model: "prepared")
    quantize.prepare_pt2e = quantize.prepare_qat_pt2e = lambda model: quantize.prepare(model)
    early = quantize.prepare_pt2e
    mnv2_fused.export._teach(quantize)
    model, x = make_model(), torch.randn(SHAPE)
    with pytest.raises(RuntimeError, match=r"call mnv2_fused\.export\.decompose\(model\) before prepare_pt2e"):
        early(exported(model, x))
    module = exported(model, x)
    assert quantize.prepare_qat_pt2e(module) == "prepared" and fused(module.graph) == []


def test_a_hook_runs_with_the_module_that_is_imported(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen = []
    for _ in range(2):  # before the import, and after it
        when_imported.when_imported("imported_late", lambda module: seen.append(module.value))
        import imported_late  # noqa: F401
    assert seen == [3, 3]
    del sys.modules["imported_late"]


# --------------------------------------------------------------------------------------------- weights of a program


def test_two_programs_of_the_same_names_do_not_evict_each_other():
    model, x = make_model(), torch.randn(SHAPE)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        first = program.module()
        torch._foreach_mul_(list(model.parameters()), 1.5)
        second = torch.export.export(make_model(), (x,)).module()
        second.graph.find_nodes(op="call_function", target=torch.ops.mnv2_fused.cached_network.default)[0].update_arg(
            2, model._cache.name
        )
        second.recompile()
        expected = first(x), second(x)
        packings = _C.packings()
        for _ in range(3):
            assert torch.equal(first(x), expected[0]) and torch.equal(second(x), expected[1])
        assert _C.packings() == packings and not torch.equal(*expected)


def test_tensors_with_gaps_and_tensors_of_inference_mode():
    x = torch.randn(2, 8, 9, 9)
    block = randomize(InvertedResidual(8, 16, 2, 6), x)
    wide = torch.randn(48, 16, 1, 1)
    block.conv[0][0].weight = torch.nn.Parameter(wide[:, ::2])
    module = torch.export.export(block, (x,)).module()
    weight = module.get_parameter("conv.0.0.weight")
    assert not weight.is_contiguous()
    with torch.no_grad():
        y = module(x)
        assert torch.equal(y, block(x))
        weight.data[5, 3] += 1.0
        block.conv[0][0].weight.data.copy_(weight)
        assert torch.equal(module(x), block(x)) and not torch.equal(module(x), y)
    with torch.inference_mode():
        block.conv[2].weight = torch.nn.Parameter(torch.randn(16, 48, 1, 1), requires_grad=False)
        module = torch.export.export(block, (x,)).module()
        y = module(x)
        assert torch.equal(y, block(x))
        module.get_parameter("conv.2.weight").mul_(2)
        assert not torch.equal(module(x), y)


def test_an_error_names_a_freed_storage():
    model, x = make_model(), torch.randn(SHAPE)
    module = exported(model, x)
    module(x)
    module.get_parameter("features.0.0.weight").untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"cached_network: a weight .* its data is not allocated"):
        module(x)


def test_packed_weights_go_with_their_module():
    model, x = make_model(), torch.randn(SHAPE)
    module = exported(model, x)
    with torch.no_grad():
        module(x)
        packings = _C.packings()
        del model
        gc.collect()
        module(x)
        assert _C.packings() == packings + 1


def test_bits_of_folding_are_those_of_python():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 3, 64, 64).to(dtype)
        model = randomize(MobileNetV2(num_classes=17), x.float()).to(dtype)
        module = exported(model, x)
        with torch.no_grad():
            assert torch.equal(module(x), model(x))


def test_arguments_that_do_not_fit_together_are_named():
    op = torch.ops.mnv2_fused.cached_dense.default
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(8, 4, 1, 1)
    fields, bounds = [8, 1, 1, 0, 0, 0, 0, 0], [0.0, 6.0]
    with pytest.raises(ValueError, match="6 tensors and 1 value for each of 1 convolutions, got 1 and 1"):
        op(x, [weight], "wrong", [0.0], fields, bounds)
    with pytest.raises(ValueError, match="a vector of convolution 0 must have shape"):
        op(x, [weight, torch.zeros(9), None, None, None, None], "wrong", [0.0], fields, bounds)
    with pytest.raises(ValueError, match="mean and variance of convolution 0 must be given together"):
        op(x, [weight, None, None, None, torch.zeros(8), None], "wrong", [0.0], fields, bounds)
    with pytest.raises(ValueError, match="a convolution that this unit needs is missing"):
        op(x, [None] * 6, "wrong", [0.0], fields, bounds)


def test_importing_the_package_imports_no_exporter():
    script = "import sys, mnv2_fused; assert not {'torchao', 'onnxscript', 'torch._inductor'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
