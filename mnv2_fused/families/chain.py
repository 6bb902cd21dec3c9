"""Networks of other libraries whose units follow one another: each takes the output of the one before it."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import call
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.read import BlockParts, ConvParts, is_sequential, runs_as_module
from mnv2_fused._core.run import run
from mnv2_fused._core.specs import IMAGES
from mnv2_fused.models.fused import DENSE, NETWORK, Asked, Entry, FusedModel, FusedUnit, Walk, unit_of


class Part:
    """A unit that is no module of its own: some children of `owner`, called one after the other.

    It has the owner's switches, and a cache of its own: `name` must be in the owner's `_part_names`. To `read` and
    `explain` it is what a fused layer is.
    """

    def __init__(
        self,
        owner: FusedUnit,
        name: str,
        modules: tuple[nn.Module, ...],
        parts: ConvParts | BlockParts | str,
        unit: Unit = DENSE,
    ) -> None:
        self.owner, self.name, self.modules, self._unit = owner, name, modules, unit
        self._given = parts
        self._cache = owner._cache.parts[name]
        self.fused, self.training, self.recompute = owner.fused, owner.training, owner.recompute
        self._frozen, self._thaw = owner._frozen, owner._thaw

    def _parts(self) -> ConvParts | BlockParts | str:
        return self._given

    def _key(self) -> tuple[Any, ...]:
        return *self.modules, self._given

    def _forward_plain(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x

    def asked(self) -> Asked:
        """Its line in `explain`."""
        return Asked(self.name, self._unit, self, self.modules[0])


class Maps:
    """A chain as a network without a head: its outputs are the maps behind the links `taps`."""

    def __init__(self, owner: "Chain", taps: Sequence[int] | None) -> None:
        self.owner, self.taps = owner, taps
        self._cache, self._unit_by_unit = owner._cache.parts["maps"], owner._unit_by_unit
        self.fused, self.training = owner.fused, owner.training
        self._frozen, self._thaw = owner._frozen, owner._thaw

    def _entries(self) -> list[Entry] | str:
        links = self.owner._links()
        if isinstance(links, str):
            return links
        taps = (len(links) - 1,) if self.taps is None else self.taps
        used, rest = links[: max(taps) + 1], links[max(taps) + 1 :]
        if any(isinstance(link, nn.Module) and runs_as_module(link) for link in rest):
            return "a unit whose output is not used has hooks"
        return entries(used, taps)

    def _network_key(self) -> tuple[Any, ...]:
        return *self.owner._links_key(), self.training, self.taps

    def _weakly(self) -> "Callable[[], Maps | None]":
        """Returns these maps, or None if the chain is gone."""
        found, taps = weakref.ref(self.owner), self.taps
        return lambda: None if (owner := found()) is None else Maps(owner, taps)


def entries(links: Sequence[Any], taps: Iterable[int] = ()) -> list[Entry]:
    """The entries of a network's operator for links that follow one another."""
    found = []
    for i, link in enumerate(links):
        unit = link._unit if isinstance(link, Part) else unit_of(link)
        found.append(Entry(unit, link, i + IMAGES, i in taps))
    return found


def inside(module: nn.Module, depth: int = 1) -> list[nn.Module]:
    """The modules in sequences, `depth` levels deep. A sequence that must be called itself stands for its modules."""
    if depth == 0 or not is_sequential(module) or unit_of(module) is not None or runs_as_module(module):
        return [module]
    return [found for child in module for found in inside(child, depth - 1)]


class Chain(FusedModel):
    """A network whose feature maps come from links that follow one another.

    A link is a module, which may be a unit, or a `Part`. Subclasses have "maps" and the names of their parts in
    `_part_names`.
    """

    _part_names = ("maps",)

    @torch.jit.unused
    def _links(self) -> list[Any] | str:
        """The links in order, or the reason why the plain forward has to call them."""
        raise NotImplementedError

    @torch.jit.unused
    def _links_key(self) -> tuple[Any, ...]:
        """Everything that `_links` depends on."""
        raise NotImplementedError

    @torch.jit.unused
    def _maps(self, x: Tensor, taps: Sequence[int] | None = None) -> list[Tensor] | None:
        """The outputs of the links `taps`, in ascending order, by default of the last; None if the plain forward has
        to run.
        """
        outputs = run(NETWORK, Maps(self, taps), x)
        if outputs is not None:
            return outputs
        if not self.fused or call.call_reason(x) is not None or x.dim() != 4 or self._checkpoints():
            return None
        links = self._links()
        if isinstance(links, str):
            return None
        walk, maps = Walk(x), []
        for i, link in enumerate(links):
            walk.step(link)
            if i in (taps or (len(links) - 1,)):
                maps.append(walk.tap())
        return maps

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(NETWORK, Maps(self, None))]

    @torch.jit.unused
    def _checkpoints(self) -> bool:
        """Whether the plain forward recomputes its maps in the backward."""
        return bool(self.__dict__.get("grad_checkpointing")) and torch.is_grad_enabled()


class ReturnsTensor(Chain):
    """A chain whose forward returns one tensor. Subclasses have `_forward_fused`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(NETWORK, self), *super()._wholes()]


class ReturnsMaps(Chain):
    """A chain whose forward returns maps, those behind the links `_taps()`, as `_outputs` lists them."""

    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> list[Tensor]:
        maps = None if self._called() else self._maps(x, self._taps())
        return self._forward_plain(x) if maps is None else self._outputs(x, maps)

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [] if self._called() else [(NETWORK, Maps(self, self._taps()))]

    @torch.jit.unused
    def _called(self) -> str | None:
        """Why the plain forward has to call the network's links."""
        raise NotImplementedError

    @torch.jit.unused
    def _taps(self) -> tuple[int, ...]:
        """The indices of the links whose outputs are returned."""
        raise NotImplementedError

    @torch.jit.unused
    def _outputs(self, x: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """What the forward returns for the input `x` and the maps at `_taps()`."""
        return maps
