"""torchvision's MobileNetV2 and MNASNet: networks, blocks, and the convolutions before and after the blocks."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import operators
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.read import BlockParts, ConvParts, read_head, sequence
from mnv2_fused._core.run import run
from mnv2_fused.families import Kind, find_kinds, kind_of
from mnv2_fused.families.chain import Part, ReturnsTensor, entries, inside
from mnv2_fused.models.fused import BLOCK, NETWORK, Asked, Entry, FusedBlock, FusedDense, FusedUnit
from mnv2_fused.models.network import FusedNetwork

NAME = "torchvision's MobileNetV2 or MNASNet or their blocks or MobileNetV3's (torchvision.models)"


def _in_row(layers: list[nn.Module], first: int, activation: bool = True) -> ConvParts:
    """The convolution at index `first` of a sequence called "layers", and what follows it."""
    names = tuple(f"layers.{first + i}" for i in range(3))
    return ConvParts(*layers[first : first + 2], layers[first + 2] if activation else None, names)


class MobileNetV3Block(FusedBlock):
    """torchvision's InvertedResidual of MobileNetV3: [expand,] depthwise, project. Squeeze-excite runs plain."""

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return d["_modules"]["block"], d["use_res_connect"]

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        layers = sequence(self.block, "block")
        if isinstance(layers, str):
            return layers
        found: list[ConvParts] = []
        for i, layer in enumerate(layers):
            modules = sequence(layer, f"block.{i}")
            if isinstance(modules, str):
                return modules
            if len(modules) != 3 - (layer is layers[-1]):
                return f"block.{i} has {len(modules)} children"
            names = tuple(f"block.{i}.{j}" for j in range(3))
            found.append(ConvParts(modules[0], modules[1], modules[2] if len(modules) == 3 else None, names))
        if len(found) not in (2, 3):
            return f"block has {len(found)} children"
        return BlockParts(found[0] if len(found) == 3 else None, *found[-2:], bool(self.use_res_connect))


class MNASNetBlock(FusedBlock):
    """torchvision's _InvertedResidual of MNASNet: all layers in one sequence."""

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return d["_modules"]["layers"], d["apply_residual"]

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        layers = sequence(self.layers, "layers")
        if isinstance(layers, str) or len(layers) != 8:
            return layers if isinstance(layers, str) else f"layers has {len(layers)} children"
        return BlockParts(
            _in_row(layers, 0), _in_row(layers, 3), _in_row(layers, 6, activation=False), bool(self.apply_residual)
        )


class MNASNet(ReturnsTensor):
    """torchvision's MNASNet: `layers` with stem, a block without expansion, stacks of blocks and the last convolution,
    all in one sequence.
    """

    _part_names = ("maps", "layers.0", "layers.3", "layers.14")
    _LENGTH, _STACKS = 17, slice(8, 14)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        outputs = run(NETWORK, self, x)
        if outputs is not None:
            return outputs[0]
        maps = self._maps(x)
        return self._forward_plain(x) if maps is None else self.classifier(maps[0].mean([2, 3]))

    @torch.jit.unused
    def _ends(self) -> list[Part]:
        """The units that are layers of the sequence: stem, first block, last convolution."""
        layers = sequence(self.layers, "layers")
        if not isinstance(layers, str) and len(layers) != self._LENGTH:
            layers = f"layers has {len(layers)} children"
        if isinstance(layers, str):
            return [Part(self, name, (self.layers,), layers) for name in self._part_names[1:]]
        block = BlockParts(None, _in_row(layers, 3), _in_row(layers, 6, activation=False), False)
        return [
            Part(self, "layers.0", tuple(layers[:3]), _in_row(layers, 0)),
            Part(self, "layers.3", tuple(layers[3:8]), block, BLOCK),
            Part(self, "layers.14", tuple(layers[14:]), _in_row(layers, 14)),
        ]

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        ends = self._ends()
        if isinstance(ends[0]._parts(), str):
            return ends[0]._parts()
        blocks = [block for stack in list(self.layers)[self._STACKS] for block in inside(stack)]
        return [*ends[:2], *blocks, ends[2]]

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        children = self.__dict__["_modules"]
        return children["layers"], children["classifier"]

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        links = self._links()
        return links if isinstance(links, str) else [*entries(links[:-1]), Entry(HEAD, self, len(links) - 2, tap=True)]

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        return *self._links_key(), self.__dict__["training"]

    @torch.jit.unused
    def _asked(self) -> list[Asked]:
        return [end.asked() for end in self._ends()]


HEAD = Unit(
    operators.HEAD,
    lambda network, train: read_head(_in_row(list(network.layers), 14), network.classifier),
    lambda network: network._network_key(),
)

KINDS = {
    ("torchvision.models.mobilenetv2", "MobileNetV2"): Kind(FusedNetwork),
    ("torchvision.models.mobilenetv2", "InvertedResidual"): Kind(FusedBlock),
    ("torchvision.models.mobilenetv3", "InvertedResidual"): Kind(
        MobileNetV3Block, {"forward": frozenset(("block", "use_res_connect"))}
    ),
    ("torchvision.models.mnasnet", "MNASNet"): Kind(MNASNet, {"forward": frozenset(("layers", "mean", "classifier"))}),
    ("torchvision.models.mnasnet", "_InvertedResidual"): Kind(
        MNASNetBlock, {"forward": frozenset(("apply_residual", "layers"))}
    ),
}


def _is_dense(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__module__ == "torchvision.ops.misc"
        and isinstance(module, nn.Sequential)
        and kind.forward is nn.Sequential.forward
    )


def find(model: nn.Module) -> list[tuple[nn.Module, type[FusedUnit]]]:
    """The modules in `model` that can be converted, each with its mixin."""
    found = find_kinds(model, KINDS)

    # A dense convolution is found by its place: the stem stands before a block, the last convolution after one.
    def is_block(module: nn.Module) -> bool:
        kind = kind_of(module, KINDS)
        return isinstance(module, FusedBlock) or (kind is not None and issubclass(kind.mixin, FusedBlock))

    dense: dict[nn.Module, type[FusedUnit]] = {}
    for parent in model.modules():
        for one, following in pairwise(parent.children()):
            for module, neighbour in ((one, following), (following, one)):
                if _is_dense(module) and is_block(neighbour):
                    dense[module] = FusedDense
    return [*found, *dense.items()]
