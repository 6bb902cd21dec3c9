"""Exported programs for tools that do not know the fused operators.

An exported program holds one `mnv2_fused.cached_*` operator for each network or unit. `torch.onnx.export` replaces them
by ordinary convolutions, and so do torchao's `prepare_pt2e` and `prepare_qat_pt2e`. For other tools call `decompose`.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mnv2_fused._core.decompositions import DECOMPOSITIONS
from mnv2_fused._core.when_imported import when_imported

# The kinds of modules that quantizers look for in a graph's `nn_module_stack`, by the operator's name.
_MODULES = {
    "conv2d": nn.Conv2d,
    "batch_norm": nn.BatchNorm2d,
    "hardtanh": nn.ReLU6,
    "relu": nn.ReLU,
    "linear": nn.Linear,
}


def decompose(program: torch.export.ExportedProgram | GraphModule) -> torch.export.ExportedProgram | GraphModule:
    """Replaces the fused operators of inference by PyTorch's own convolutions, batch norms and clamps.

    Args:
        program: an exported program, or the module of one. The module is changed in place.

    Returns:
        An exported program that has the same parameters, or the module.

    Raises:
        TypeError: `program` is neither.
    """
    if isinstance(program, torch.export.ExportedProgram):
        return program.run_decompositions(dict(DECOMPOSITIONS))
    if not isinstance(program, GraphModule):
        raise TypeError(f"decompose: program must be an ExportedProgram or its module(); got {type(program).__name__}")
    graph = program.graph
    for node in _fused_nodes(program):
        _replace(graph, node)
    graph.lint()
    program.recompile()
    return program


def _fused_nodes(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target in DECOMPOSITIONS]


def _replace(graph: Graph, node: Node) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx  # takes long to import

    x, tensors, *others = node.args
    given = [x, *filter(None, tensors)]

    def function(*values: Tensor) -> Tensor | list[Tensor]:
        first, *rest = values
        rest = iter(rest)
        return DECOMPOSITIONS[node.target](first, [None if t is None else next(rest) for t in tensors], *others)

    with torch.no_grad():
        inside = make_fx(function, pre_dispatch=True)(*(t.meta["val"] for t in given)).graph
    copies = dict(zip(inside.find_nodes(op="placeholder"), given, strict=True))
    with graph.inserting_before(node):
        for i, original in enumerate(n for n in inside.nodes if n.op == "call_function"):
            copy = copies[original] = graph.node_copy(original, copies.__getitem__)
            copy.meta = node.meta | {"val": original.meta["val"]} | _origin(original, f"{node.name}_{i}")
    y = inside.output_node().args[0]
    if isinstance(y, list | tuple):
        for user in list(node.users):  # each takes one of the outputs
            user.replace_all_uses_with(copies[y[user.args[1]]])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(copies[y])
    graph.erase_node(node)


def _origin(node: Node, name: str) -> dict[str, object]:
    """The metadata that say which function or module `node` comes from."""
    function = node.target.overloadpacket.__name__
    found: dict[str, object] = {"torch_fn": (name, f"function.{function}")}
    if function in _MODULES:
        kind = _MODULES[function]
        found["nn_module_stack"] = {name: (name, f"{kind.__module__}.{kind.__qualname__}")}
    return found


def _teach(quantize: ModuleType) -> None:
    """Makes torchao's `prepare_pt2e` and `prepare_qat_pt2e` decompose what they are given: they would quantise nothing
    inside a fused operator, without a word. If such a function was imported before, an error names the step.
    """

    def decomposing(prepare):
        @functools.wraps(prepare)
        def prepare_decomposed(model, *arguments, **named):
            return prepare(decompose(model), *arguments, **named)

        return prepare_decomposed

    def checked(prepare):
        @functools.wraps(prepare)
        def prepare_checked(model, *arguments, **named):
            if _fused_nodes(model):
                raise RuntimeError(
                    "mnv2_fused: the graph holds fused operators, inside which nothing can be quantised; call "
                    "mnv2_fused.export.decompose(model) before prepare_pt2e"
                )
            return prepare(model, *arguments, **named)

        return prepare_checked

    quantize.prepare = checked(quantize.prepare)
    for name in ("prepare_pt2e", "prepare_qat_pt2e"):
        setattr(quantize, name, decomposing(getattr(quantize, name)))


when_imported("torchao.quantization.pt2e.quantize_pt2e", _teach)
