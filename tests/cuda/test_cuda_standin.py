"""Behaviour of modules on a GPU, with the CPU in its place: captured graphs, autocast, compilers."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch
from oracle import assert_close, operators, plain, randomize
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import mnv2_fused
from mnv2_fused import _C, InvertedResidual, MobileNetV2
from mnv2_fused._core import call, fit, freshness, registrations
from mnv2_fused._core import library as _library
from mnv2_fused._core.geometry import FLOATS
from mnv2_fused._core.packing import pack_block
from mnv2_fused.models import fused, network
from mnv2_fused.models.fused import BLOCK, NETWORK, FusedUnit
from mnv2_fused.models.units import FusedConv2dNormActivation

SMALL = [[1, 8, 1, 1], [6, 8, 1, 1], [6, 16, 1, 2]]


def make_block(*channels: int, stride: int = 1) -> InvertedResidual:
    channels = channels or (8, 8)
    return randomize(InvertedResidual(*channels, stride, 6), torch.randn(2, channels[0], 9, 9))


def make_model() -> MobileNetV2:
    return randomize(MobileNetV2(7, 0.5, SMALL), torch.randn(4, 3, 33, 33))


# ------------------------------------------------------------------------------------------------- captured graphs


@pytest.fixture
def capture(monkeypatch):
    """`capture(module, x)` calls `module(x)` as if a graph were captured, and returns what the graph would read."""
    capturing = False
    monkeypatch.setattr(freshness, "_capturing", lambda device: capturing)
    monkeypatch.setattr(freshness, "_synchronize", lambda device: None)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        nonlocal capturing
        used = []
        with monkeypatch.context() as patch, torch.no_grad():
            use = freshness.Cache.use
            patch.setattr(freshness.Cache, "use", lambda *a, **options: used.append(use(*a, **options)) or used[-1])
            capturing = True
            try:
                module(x)
            finally:
                capturing = False
        return used[-1]

    # On the CPU stand the kernels of CUDA, which alone know captured graphs.
    with torch.library._scoped_library("mnv2_fused", "IMPL") as library:
        for operator, kernel in registrations.CUDA_KERNELS.items():
            library.impl(operator.name(), kernel, "CPU", allow_override=True)
        yield call


@torch.no_grad()
def test_a_captured_graph_gets_changed_weights_from_the_next_call(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    graph = capture(block, x)
    for change in (
        lambda: block.conv[0][0].weight.mul_(1.5),
        lambda: setattr(block.conv[2].weight, "data", block.conv[2].weight * 0.5),
        lambda: block.load_state_dict(make_block().state_dict()),
    ):
        before = graph.clone()
        change()
        y = block(x)
        fresh = copy.deepcopy(block)
        assert torch.equal(y, fresh(x)) and not torch.equal(graph, before)
        assert torch.equal(graph, fresh._cache.readings[None].packed.data)
        assert capture(block, x) is graph and len(block._cache.captured) == 1


@torch.no_grad()
def test_a_captured_graph_keeps_what_it_cannot_get_anew(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    graph = capture(block, x)
    before, alive = graph.clone(), weakref.ref(graph)
    block.conv[0][0].weight = nn.Parameter(block.conv[0][0].weight * 1.5)  # a plain graph, too, reads the old weight
    block(x)
    block.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert torch.equal(graph, before)
    del graph
    assert alive() is not None
    del block
    assert alive() is None


@torch.no_grad()
def test_what_is_not_packed_yet_is_packed_in_the_graph(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    graph = capture(block, x)
    assert block._cache.readings == {} and block._cache.captured == []
    before = graph.clone()
    block.conv[0][0].weight.mul_(1.5)
    block(x)
    assert torch.equal(graph, before)  # no graph has run
    block.conv[0][0].weight.mul_(1.5)
    assert capture(block, x) is not block._cache.readings[None].packed.data


def test_nothing_is_compared_in_full_while_a_graph_is_captured(capture, monkeypatch):
    monkeypatch.setattr(freshness, "_watch", lambda t: _C.Watch.PLACE)
    with torch.inference_mode():
        block, x = make_block(), torch.randn(1, 8, 9, 9)
        y = block(x)
        packed = block._cache.readings[None].packed
        assert torch.equal(block(x), y) and block._cache.readings[None].packed is packed
        with monkeypatch.context() as patch:
            patch.setattr(torch, "equal", lambda *_: pytest.fail("a comparison waits for the GPU"))
            graph = capture(block, x)
        assert graph is not packed.data and block._cache.readings[None].packed is packed


@torch.no_grad()
def test_memory_that_another_has_written_is_packed_again(capture):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    weight, cache = block.conv[0][0].weight, block._cache
    first, second = weight.data, weight.data * 1.5
    spec = BLOCK.read(block, False)

    def traced() -> Tensor:
        return cache.packed(spec.flat().tensors, spec.flat().eps, torch.float32, pack_block)

    y = block(x)
    graph = capture(block, x)
    weight.data = second
    assert traced() is graph
    weight.data = first  # the module has seen this one, but its packed weights are gone
    assert torch.equal(block(x), y)
    weight.data = second
    assert torch.equal(block(x), copy.deepcopy(block)(x))


@pytest.fixture
def replay(monkeypatch):
    """`replay(module)` changes all tensors of `module` as a replayed CUDA graph does: without a trace on the host."""
    monkeypatch.setattr(freshness, "_watch", lambda t: _C.Watch.VERSION)
    monkeypatch.setattr(freshness, "_writes_unseen", lambda device: True)

    def write(module: nn.Module) -> None:
        for t in module.state_dict(keep_vars=True).values():
            if t.is_floating_point():
                t.data.mul_(1.1)

    return write


@pytest.mark.parametrize("what", ["block", "model", "compiled"])
@torch.no_grad()
def test_weights_trained_by_replays_are_seen_when_the_mode_changes(what, capture, replay):
    torch._dynamo.reset()
    module, x = (
        (make_block(), torch.randn(1, 8, 9, 9)) if what == "block" else (make_model(), torch.randn(2, 3, 33, 33))
    )
    captured = module if what == "block" else torch.compile(module, fullgraph=True, backend="aot_eager")
    call = captured if what == "compiled" else module
    before = captured(x)
    graph = capture(captured, x)
    call(x)
    replay(module)
    assert torch.equal(call(x), before)
    for _ in range(2):
        call.train()
        replay(module)
        call.eval()
        y, expected = call(x), copy.deepcopy(module)
        assert torch.equal(y, expected(x)) and not torch.equal(y, before)
        assert torch.equal(graph, expected._cache.readings[None].packed.data)
        before = y
    assert capture(captured, x) is graph
    packed = dict(module._cache.readings), dict(module._cache.traced)
    call.eval()
    call(x)
    assert (module._cache.readings, module._cache.traced) == packed


@torch.no_grad()
def test_only_what_a_gpu_has_is_forgotten_when_the_mode_changes():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    packed = block._cache.readings[None].packed
    block.train().eval()(x)
    assert block._cache.readings[None].packed is packed


@torch.no_grad()
def test_a_captured_graph_of_an_exported_program_outlives_the_model(capture):
    model, x = make_model(), torch.randn(2, 3, 33, 33)
    program = torch.export.export(model, (x,)).module()
    program(x)
    graph = capture(program, x)
    name, before, alive = model._cache.name, graph.clone(), weakref.ref(graph)
    del model, graph
    gc.collect()
    assert name not in freshness._owned
    for _ in range(2):
        for i in range(freshness._MAX_FOREIGN):
            freshness.by_name(f"another {i}")
        assert name not in freshness._foreign and torch.equal(alive(), before)
        program(x)
        assert torch.equal(alive(), before) and capture(program, x) is alive()
        next(program.parameters()).mul_(1.5)
        program(x)
        assert not torch.equal(alive(), before) and capture(program, x) is alive()
        before = alive().clone()


@pytest.mark.usefixtures("autocast_infers")
@torch.no_grad()
def test_those_who_share_the_memory_of_a_graph_pack_once(capture, monkeypatch):
    block, x = make_block().bfloat16(), torch.randn(1, 8, 9, 9).bfloat16()
    spec, waits = BLOCK.read(block, False), []

    def calls() -> None:
        for _ in range(3):
            block(x)
            block._cache.packed(spec.flat().tensors, spec.flat().eps, x.dtype, pack_block)
            with autocast():
                block(x)

    calls()
    graph = capture(block, x)
    with autocast():
        other = capture(block, x)
    monkeypatch.setattr(freshness, "_synchronize", waits.append)
    for _ in range(2):
        block.conv[0][0].weight.mul_(1.5)
        waits.clear()
        calls()
        assert len(waits) == 2  # before and after the copy
        expected = copy.deepcopy(block)
        assert torch.equal(block(x), expected(x))
        packed = expected._cache.readings[None].packed.data
        assert torch.equal(graph, packed) and torch.equal(other, packed)


@torch.no_grad()
def test_readings_are_replaced_and_never_written():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    readings = block._cache.readings
    block.conv[2].register_forward_hook(lambda *_: None)
    block(x)
    assert list(readings) == [None] and block._cache.readings == {}


# ---------------------------------------------------------------------------------------------------------- frozen


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Calls take the branches of a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    monkeypatch.setattr(fit, "gpu_reason", lambda *_: None)


def make_frozen(whole: bool, release: bool) -> tuple[FusedUnit, Tensor, Tensor]:
    """A frozen block, or a whole frozen model; an input; and what the live one computed."""
    module, x = (make_model(), torch.randn(2, 3, 33, 33)) if whole else (make_block(), torch.randn(2, 8, 9, 9))
    y = module(x)
    return mnv2_fused.freeze(module, release=release), x, y


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_captured_graph_of_a_frozen_module(whole, release, capture):
    module, x, y = make_frozen(whole, release)
    assert torch.equal(module(x), y)
    packed = module._cache.readings[None].packed
    graph = capture(module, x)
    assert graph is packed.data and module._cache.captured == [packed]
    assert capture(module, x) is graph and torch.equal(module(x), y)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_captured_graph_gets_weights_that_are_frozen_again(whole, capture):
    module, x, y = make_frozen(whole, False)
    graph = capture(module, x)
    before = graph.clone()
    for parameter in module.parameters():
        parameter.mul_(1.5)
    assert torch.equal(module(x), y) and torch.equal(graph, before)  # writes in place are not seen
    changed = mnv2_fused.freeze(module)(x)
    assert not torch.equal(changed, y) and torch.equal(changed, mnv2_fused.thaw(copy.deepcopy(module))(x))
    assert torch.equal(graph, module._cache.readings[None].packed.data) and not torch.equal(graph, before)


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_nothing_is_checked_in_a_frozen_call(monkeypatch):
    module, x, y = make_frozen(True, False)
    monkeypatch.setattr(freshness.Packed, "holds", lambda _: pytest.fail("it looks at the weights"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it waits for the GPU"))
    assert torch.equal(module(x), y)


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_frozen_module_under_autocast(whole, dtype):
    module, x, y = make_frozen(whole, False)
    live = mnv2_fused.thaw(copy.deepcopy(module))
    for _ in range(2):
        with autocast(dtype):
            assert torch.equal(module(x), live(x))
        assert torch.equal(module(x), y) and module._frozen


# -------------------------------------------------------------------------------------------------------- autocast


@pytest.fixture
def autocast_infers(monkeypatch):
    """Makes the CPU's autocast act as a GPU's does in inference."""

    def autocast_dtype(x: Tensor) -> torch.dtype | None:
        casts = torch.is_autocast_enabled("cpu") and x.dtype in FLOATS
        return torch.get_autocast_dtype("cpu") if casts else None

    monkeypatch.setattr(call, "autocast_dtype", autocast_dtype)
    monkeypatch.setattr(call, "training_call", lambda x: x.requires_grad and torch.is_grad_enabled())


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def check_autocast(module: FusedUnit, x: Tensor, fused: list[str], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    reference = plain(module)
    with torch.no_grad():
        with autocast(dtype):
            got, expected = module(x), reference(x)
            assert operators(lambda: module(x)) == fused
        assert_close(got, expected, reference.double()(x.double()))
    assert got.stride() == expected.stride()
    return got


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, given, memory_format):
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(given).contiguous(memory_format=memory_format)

    block = ["inverted_residual"]
    y = check_autocast(make_block(), randn(2, 8, 9, 9), block, dtype)
    assert y.dtype == (dtype if given == dtype else torch.float32)  # the dtype of the sum
    assert check_autocast(make_block(8, 16), randn(2, 8, 9, 9), block, dtype).dtype == dtype
    assert check_autocast(make_block(8, 8, stride=2), randn(2, 8, 9, 9), block, dtype).dtype == dtype
    stem = randomize(FusedConv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6), torch.randn(2, 3, 9, 9))
    assert check_autocast(stem, randn(2, 3, 9, 9), ["dense"], dtype).dtype == dtype


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_network(dtype):
    model, x = make_model(), torch.randn(16, 3, 33, 33)
    assert check_autocast(model, x, ["network"], dtype).dtype == dtype
    model.features[2].register_forward_hook(lambda *_: None)
    fused = ["dense", *["inverted_residual"] * 3, "head"]
    assert check_autocast(model, x, fused, dtype).dtype == dtype
    with torch.no_grad(), autocast(dtype):
        assert mnv2_fused.explain(model, x) == dict.fromkeys([*(f"features.{i}" for i in range(5)), "head"])


@pytest.mark.usefixtures("autocast_infers")
@torch.no_grad()
def test_weights_are_packed_once_for_each_dtype():
    block, x = make_block(), torch.randn(2, 8, 9, 9)

    def call(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return block(x)

    dtypes = [None, torch.bfloat16, torch.float16]
    outputs = [call(dtype) for dtype in dtypes]
    packed = {dtype: block._cache.readings[dtype].packed for dtype in dtypes}
    assert all(torch.equal(call(dtype), y) for dtype, y in zip(dtypes, outputs, strict=True))
    assert {dtype: reading.packed for dtype, reading in block._cache.readings.items()} == packed
    block.conv[0][0].weight.mul_(1.5)
    for dtype, y in zip(dtypes, outputs, strict=True):
        changed = call(dtype)
        assert not torch.equal(changed, y) and block._cache.readings[dtype].packed is not packed[dtype]
    block.conv[0][0].weight.mul_(1.5)
    call(None)
    assert list(block._cache.readings) == [None]  # the other dtypes' packed weights are dropped


@pytest.mark.usefixtures("autocast_infers")
@pytest.mark.parametrize("where", ["inside", "outside"])
@torch.no_grad()
def test_compiled_under_autocast(where):
    torch._dynamo.reset()
    for module, x in ((make_model(), torch.randn(4, 3, 33, 33)), (make_block(), torch.randn(2, 8, 9, 9))):
        if where == "inside":
            function = torch.compile(autocast()(module), fullgraph=True, backend="aot_eager")
        else:
            function = autocast()(torch.compile(module, fullgraph=True, backend="aot_eager"))
        with autocast():
            expected = module(x)
        y = function(x)
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        assert any(name.startswith("cached_") for name in operators(lambda f=function, x=x: f(x)))


def on_gpu(module: nn.Module) -> nn.Module:
    """`module` as if it were on a GPU."""
    for m in module.modules():
        for name, t in m.named_parameters(recurse=False):
            setattr(m, name, nn.Parameter(image(*t.shape, dtype=t.dtype)))
        for name, t in m.named_buffers(recurse=False):
            setattr(m, name, image(*t.shape, dtype=t.dtype))
    return module


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_exported_under_autocast_of_a_gpu(monkeypatch, enabled, strict):
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_library, "gpu_reason", lambda index: None)
    monkeypatch.setattr(call, "shared_memory", lambda index: 227 << 10)
    dtype = torch.float16 if enabled else torch.float32
    torch.set_autocast_enabled("cuda", enabled)
    try:
        for module, x, operator, output in (
            (MobileNetV2(7, 0.5, SMALL), image(2, 3, 33, 33), "cached_network", dtype),
            (InvertedResidual(8, 8, 1, 6), image(2, 8, 9, 9), "cached_inverted_residual", torch.float32),
            (InvertedResidual(8, 16, 2, 6), image(2, 8, 9, 9), "cached_inverted_residual", dtype),
        ):
            with torch.no_grad():
                graph = torch.export.export(on_gpu(module.eval()), (x,), strict=strict).graph
            (node,) = [n for n in graph.nodes if str(n.target).startswith("mnv2_fused.")]
            assert str(node.target) == f"mnv2_fused.{operator}.default"
            (computed,) = node.meta["val"] if operator == "cached_network" else [node.meta["val"]]
            assert node.args[0].meta["val"].dtype == computed.dtype == dtype
            assert next(iter(graph.output_node().args[0])).meta["val"].dtype == output
    finally:
        torch.set_autocast_enabled("cuda", False)


# ------------------------------------------------------------------------------------------------------- compilers


def test_compilers_leave_what_looks_at_weights_out_of_cuda_graphs():
    names = [name for name in dir(torch.ops.mnv2_fused) if name.startswith("cached_")]
    for name in (*names, "cached_inverted_residual", "cached_dense", "cached_head", "cached_network"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.mnv2_fused, name).default.tags


def test_what_a_device_can_is_no_part_of_a_graph(monkeypatch):
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_library, "gpu_reason", lambda index: torch.zeros(index).sum().item() or None)
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module.graph)
        return graph_module.forward

    def function(x: Tensor) -> Tensor:
        return x + 1 if call.device_reason(torch.device("cuda", 0)) is None else x

    torch._dynamo.reset()
    assert torch.compile(function, fullgraph=True, backend=backend)(torch.zeros(1)) == 1
    assert [node.op for node in graphs[0].nodes] == ["placeholder", "call_function", "output"]


# --------------------------------------------------------------------------------------------------------- reasons


def test_explain_counts_the_device_of_the_weights(monkeypatch):
    with torch.device("meta"):
        model = MobileNetV2(7, 0.5, SMALL).eval()
    with torch.no_grad():
        assert all("on meta" in why for why in mnv2_fused.explain(model).values())
    monkeypatch.setattr(call, "device_reason", lambda device: None)
    with torch.no_grad():
        assert mnv2_fused.explain(model) == dict.fromkeys(mnv2_fused.explain(model))
        model.features[1].conv[0][1].train()
        expected = "conv.0.1 is in training mode, and training has kernels for the CPU alone"
        assert mnv2_fused.explain(model)["features.1"] == expected
    for name, why in mnv2_fused.explain(model).items():
        assert name == "features.1" or why == "gradients are needed, and training has kernels for the CPU alone"


def test_training_on_a_gpu_reads_no_unit_in_vain(monkeypatch):
    with torch.device("meta"):
        model, x = MobileNetV2(7, 0.5, SMALL), torch.empty(4, 3, 33, 33)
    monkeypatch.setattr(call, "device_reason", lambda device: None)
    read_dense, reads = fused.read_dense, []
    monkeypatch.setattr(fused, "read_dense", lambda *arguments: reads.append(arguments[1]) or read_dense(*arguments))
    for module, name in ((fused, "read_block"), (network, "read_head"), (network, "read_dense")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("there is nothing to read"))
    assert model(x).requires_grad
    assert reads == [False]  # only the stem is read: its input needs no gradient
    model.features[1](torch.empty(2, 16, 9, 9, device="meta", requires_grad=True))


def test_a_network_asks_once_whether_it_fits(monkeypatch):
    with torch.device("meta"):
        model = MobileNetV2(7, 0.5, SMALL).eval()
    with torch.no_grad():
        spec = NETWORK.read(model, False)
    asked = []

    def gpu_reason(operator: str, fields: list[int], x: Tensor) -> str | None:
        asked.append((x.shape[0], *x.shape[2:]))
        return "it is too wide" if x.shape[3] == 65 else None

    def reason(x: Tensor) -> str | None:
        return fit.shape_reason("network", spec, x)

    monkeypatch.setattr(fit, "gpu_reason", gpu_reason)
    for width, why in ((33, None), (65, "it is too wide"), (33, None), (65, "it is too wide")):
        assert reason(torch.empty(2, 3, 33, width, device="meta")) == why
    assert asked == [(2, 33, 33), (2, 33, 65)]
    for n in range(1, 101):
        reason(torch.empty(n, 3, 9, 9, device="meta"))
    assert len(asked) == 102 and len(spec.fits) == 64


@pytest.mark.parametrize("conv", ["tf32", "ieee"])
@pytest.mark.parametrize("matmul", ["tf32", "ieee"])
def test_tf32_is_what_convolutions_would_use(conv, matmul, monkeypatch):
    def setting(precision: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(fp32_precision=precision)

    backends = types.SimpleNamespace(
        cudnn=types.SimpleNamespace(enabled=True, conv=setting(conv)),
        cuda=types.SimpleNamespace(matmul=setting(matmul)),
    )
    assert {torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision} <= {
        "none",
        "ieee",
        "tf32",
    }
    monkeypatch.setattr(torch, "backends", backends)
    x = image(2, 3, 9, 9)
    assert call.tf32(x) == (conv == "tf32") and not call.tf32(x.half())
    backends.cudnn.enabled = False
    assert call.tf32(x) == (matmul == "tf32") and not call.tf32(x.half())
