"""Graphs that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable

import torch


def compiled(function: Callable, graphs: list[torch.fx.Graph] | None = None, **options) -> Callable:
    """`function` compiled to one graph, which runs as it is. The graphs are appended to `graphs`."""

    def backend(graph_module, inputs):
        if graphs is not None:
            graphs.append(graph_module.graph)
        return graph_module.forward

    return torch.compile(function, fullgraph=True, backend=backend, **options)


def operators_in(graph: torch.fx.Graph) -> list[str]:
    """The names of the package's operators in the graph."""
    names = [str(node.target) for node in graph.nodes]
    return [name.split(".")[1] for name in names if name.startswith("mnv2_fused.")]
