"""torch.compile(fullgraph=True) and torch.export: one graph, fused operators in it, and no stale weights."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from graphs import compiled, operators_in
from oracle import check, operators, plain, randomize
from torch import nn

from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused._core import freshness
from mnv2_fused._core.library import _C
from mnv2_fused.models.fused import NETWORK
from mnv2_fused.models.network import HEAD

SMALL = [[1, 8, 1, 1], [6, 8, 1, 2], [6, 16, 1, 2]]
CACHED = ["cached_network"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def make_model(**options):
    return randomize(MobileNetV2(7, 0.5, SMALL, **options), torch.randn(4, 3, 33, 33))


def targets(graph) -> list[str]:
    return [name for name in operators_in(graph) if name.startswith("cached_")]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_of_fused_operators(guard, dtype):
    model, x, graphs = make_model().to(dtype), torch.randn(4, 3, 33, 33).to(dtype), []
    with guard():
        y = compiled(model, graphs)(x)
        assert targets(graphs[0]) == CACHED and len(graphs) == 1
        assert torch.equal(y, model(x))


@pytest.mark.parametrize("options", [{}, {"tf_padding": True}])
def test_inductor(options):
    model = make_model(**options)
    with torch.no_grad():
        function = torch.compile(model, fullgraph=True)
        for shape in ((4, 3, 33, 33), (2, 3, 33, 33), (2, 3, 40, 48)):
            x = torch.randn(shape)
            assert torch.equal(function(x), model(x))
        x = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(function(x), model(x))
        names = operators(lambda: function(x))
    assert [name for name in names if name.startswith("cached_")] == CACHED


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_changed_between_calls_are_seen(backend):
    model, x = make_model(), torch.randn(4, 3, 33, 33)
    function = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        y = function(x)
        weight = model.features[2].conv[0][0].weight
        for change in (
            lambda: weight.data.mul_(1.5),
            lambda: weight.add_(0.1),
            lambda: setattr(weight, "data", weight.data.clone().mul_(0.5)),
            lambda: model.features[1].conv[0][1].running_var.data.mul_(1.5),
            lambda: model.classifier[1].bias.data.add_(1.0),
            lambda: model.load_state_dict(make_model().state_dict()),
        ):
            change()
            changed = function(x)
            assert not torch.equal(changed, y)
            assert torch.equal(changed, model(x))
            y = changed


def test_unchanged_weights_are_packed_once():
    model, x = make_model(), torch.randn(4, 3, 33, 33)
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        function(x)
        packings = _C.packings()
        function(x)
        assert _C.packings() == packings
        model.features[0][0].weight.mul_(0.5)
        function(x)
        assert _C.packings() == packings + 1


def test_rewritten_child_is_seen():
    block, x = randomize(InvertedResidual(8, 8, 1, 6), torch.randn(2, 8, 9, 9)), torch.randn(2, 8, 9, 9)
    function = compiled(block)
    with torch.no_grad():
        assert torch.equal(function(x), block(x))
        block.conv[1][0].dilation, block.conv[1][0].padding = (2, 2), (2, 2)
        assert torch.equal(function(x), block(x))
        block.conv[0][2] = nn.SiLU()
        assert torch.equal(function(x), plain(block)(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_of_a_compiled_block(channels_last):
    block, x = randomize(InvertedResidual(8, 16, 2, 6), torch.randn(2, 8, 9, 9)), torch.randn(2, 8, 9, 9)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert compiled(block)(x).stride() == torch.compile(block)(x).stride() == block(x).stride()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("double", lambda f, x: f(x.double())),
        ("vmap", lambda f, x: torch.compile(torch.vmap(lambda y: f(y)), fullgraph=True, backend="eager")(x[None])[0]),
    ],
)
def test_plain_in_the_graph_where_it_must_be(name, call):
    model, x, graphs = make_model(dropout=0.0), torch.randn(4, 3, 33, 33), []
    model = model.double() if name == "double" else model
    reference = plain(model)
    with torch.no_grad():
        y = call(model if name == "vmap" else compiled(model, graphs), x)
        expected = call(reference, x)
    assert all(targets(graph) == [] for graph in graphs)
    torch.testing.assert_close(y, expected)


def test_hooks_on_children_run():
    model, x = make_model(), torch.randn(4, 3, 33, 33)
    model.features[2].conv[0].register_forward_hook(lambda module, arguments, y: y * 0)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", ["most", "least"])
def test_training_step(recompute, backend):
    if (recompute, backend) == ("least", "inductor"):
        pytest.skip("one that is compiled is enough")
    model, x = make_model(dropout=0.0, recompute=recompute).train(), torch.randn(4, 3, 33, 33)
    reference = copy.deepcopy(model)
    function = torch.compile(model, fullgraph=True, backend=backend)
    for compiling in (True, False):
        names = operators(lambda: function(x).square().mean().backward())
        if not compiling:
            assert names.count("train_block_backward") == 3 and names.count("train_dense_backward") == 2
        reference(x).square().mean().backward()
    exact = backend == "aot_eager"  # in plain units inductor adds in another order
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) if exact else (p.grad - q.grad).norm() < 1e-4 * q.grad.norm() + 1e-6, name
    for (name, p), q in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(p, q) if exact else torch.allclose(p, q), name


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: torch.enable_grad()(f)(x),
        lambda f, x: torch.autocast("cpu", torch.bfloat16)(f)(x),
        lambda f, x: torch.enable_grad()(torch.autocast("cpu", torch.bfloat16)(f))(x),
    ],
    ids=["gradients", "autocast", "both"],
)
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_training_operators_in_the_graph(training, call):
    model, x, graphs = make_model(dropout=0.0).train(training), torch.randn(4, 3, 33, 33), []
    y = call(compiled(copy.deepcopy(model), graphs), x)
    (graph,) = graphs
    assert [str(node.target) for node in graph.nodes].count("mnv2_fused.train_block.default") == 3
    assert torch.equal(y, call(model, x))


# ------------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, x = make_model(tf_padding=True), torch.randn(4, 3, 33, 33)
    dynamic = {0: torch.export.Dim("n"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,), strict=strict)
        assert targets(program.graph) == CACHED
        for shape in ((4, 3, 33, 33), (7, 3, 40, 51)):
            x = torch.randn(shape)
            assert torch.equal(program.module()(x), model(x))
        plain_program = torch.export.export(plain(model), (x,), strict=strict)
        assert targets(plain_program.graph) == []
        assert torch.equal(plain_program.module()(x), plain(model)(x))
    assert targets(torch.export.export(model, (x,), strict=strict).graph) == ["cached_network_grad"]


def test_exported_program_in_another_process(tmp_path):
    model, x = make_model(), torch.randn(4, 3, 33, 33)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
        torch.save((x, model(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, mnv2_fused\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "x, y = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(program(x), y)\n"
        "    program.state_dict()['classifier.1.bias'].data.add_(1.0)\n"
        "    assert not torch.equal(program(x), y)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "program.pt2", tmp_path / "expected.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_exported_program_beside_a_changed_model():
    model, x = make_model(), torch.randn(4, 3, 33, 33)
    with torch.no_grad():
        y = model(x)
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, (x,)), file)
        file.seek(0)
        program = torch.export.load(file).module()
        function = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.classifier[1].bias.add_(1.0)
        model.features[2].conv[0][0].weight.mul_(2.0)
        for _ in range(2):  # both use the caches of the same names
            assert torch.equal(program(x), y)
            assert torch.equal(function(x), model(x))
        del model, function
        assert torch.equal(program(x), y)


def test_cache_of_an_unknown_name_is_kept_and_bounded(monkeypatch):
    monkeypatch.setattr(freshness, "_MAX_FOREIGN", 3)
    monkeypatch.setattr(freshness, "_foreign", copy.copy(freshness._foreign))
    freshness._foreign.clear()
    first = freshness.by_name("a")
    assert freshness.by_name("a") is first
    for name in "bcd":
        freshness.by_name(name)
    assert list(freshness._foreign) == ["b", "c", "d"]


# ---------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tf_padding", [False, True])
def test_opcheck_of_cached_operators(dtype, tf_padding):
    model = make_model(tf_padding=tf_padding).to(dtype).requires_grad_(False)
    x = torch.randn(2, 3, 16, 18).to(dtype)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(unit, module, x):
        spec, name = unit.read(module, False), unit.operator.name
        arguments = (list(spec.flat().tensors), f"opcheck-{name}", [*spec.flat().eps], *spec.flat().arguments)
        torch.library.opcheck(unit.operator.cached, (x, *arguments), test_utils=tests)

    check(model.features[0]._unit, model.features[0], x)
    block = model.features[2]
    c_in = block.conv[0][0].in_channels
    contiguous, one_pixel = torch.randn(2, c_in, 9, 7).to(dtype), torch.randn(1, c_in, 1, 1).to(dtype)
    for y in (contiguous, contiguous.contiguous(memory_format=torch.channels_last), one_pixel):
        check(block._unit, block, y)
    check(HEAD, model, torch.randn(2, model.features[-1][0].in_channels, 3, 3).to(dtype))
    check(NETWORK, model, x)


def test_compiled_is_right():
    model, x = make_model(), torch.randn(4, 3, 33, 33)
    y = check(model, x)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(x), y)


def test_compiles_where_the_environment_says_ci():
    code = (
        "import torch, mnv2_fused; model = mnv2_fused.MobileNetV2(7, 0.35).eval().requires_grad_(False);"
        "x = torch.randn(1, 3, 32, 32); assert torch.equal(torch.compile(model)(x), model(x))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CI": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
