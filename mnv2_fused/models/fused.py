"""Mixins that make a plain module run fused. The plain class's forward stays the plain path.

They are bases of this package's own modules (`units`, `mobilenet_v2`) and of the classes that `convert` makes
(`families`). A subclass has its plain forward as `_forward_plain`.
"""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv2_fused import training
from mnv2_fused._core import call, operators
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.freshness import Cache
from mnv2_fused._core.layout import is_channels_last, to_contiguous
from mnv2_fused._core.profile import region
from mnv2_fused._core.read import (
    BlockParts,
    ConvParts,
    child_reason,
    conv_parts,
    join,
    read_block,
    read_dense,
    runs_as_module,
    sequence,
)
from mnv2_fused._core.run import run, run_inside
from mnv2_fused._core.specs import IMAGES, NetworkSpec, Step

__all__ = [
    "BLOCK",
    "DENSE",
    "NETWORK",
    "Asked",
    "Entry",
    "FusedBlock",
    "FusedDense",
    "FusedLayer",
    "FusedModel",
    "FusedSequential",
    "FusedUnit",
    "Walk",
]


class Asked(NamedTuple):
    """A unit for `explain`: the name of its part of the module, the unit, what holds its switches and its cache, and
    the module whose input is its input, None if there is none.
    """

    name: str
    unit: Unit
    module: Any
    entry: nn.Module | None = None


# What torch.compile and nn.Module.compile assign to a module.
_OF_COMPILERS = frozenset(("_is_torch_compile", "_compiled_call_impl"))


class FusedUnit(nn.Module):
    """A module with a cache of packed weights. Copies and pickles leave the cache behind.

    ``fused = False`` makes it run as plain PyTorch. ``recompute`` trades memory for speed in training: ``"most"``,
    ``"balanced"`` or ``"least"`` (see `training`).
    """

    fused: bool = True
    recompute: str = "balanced"

    # Methods of a converted class that the mixin replaces, and the names under which the mixin calls them.
    _plain_methods: tuple[tuple[str, str], ...] = (("forward", "_forward_plain"),)
    _keeps_name: bool = False  # a converted class keeps its name, because its library looks models up by it
    _part_names: tuple[str, ...] = ()  # units inside that are no modules of their own; each has a cache
    _frozen: bool = False  # weights are taken to be constant; see `freezing`
    _released: bool = False  # frozen, and weights inside are gone

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not torch.compiler.is_compiling():  # a traced graph can make slices of a FusedSequential, which need none
            self.__dict__["_cache"] = self._new_cache()

    @torch.jit.unused
    def _new_cache(self) -> Cache:
        return Cache(parts=self._part_names)

    def train(self, mode: bool = True) -> "FusedUnit":
        """Sets the mode. If it changes, the unit thaws, and packed GPU weights are dropped: a replayed CUDA graph
        changes weights without changing their versions.
        """
        if any(module.training != mode for module in self.modules()):
            self._thaw("train")
            self._cache.forget()
        return super().train(mode)

    @torch.jit.unused
    def _asked(self) -> list["Asked"]:
        """The units that this module runs by itself, for `explain`."""
        return []

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        """The units, and what `run` takes with them, by which a call computes this module. The first that runs fused
        does. None if only the units inside do.
        """
        return []

    # ---- what thaws. Whatever else is replaced inside a frozen unit, its next call sees.

    @torch.jit.unused
    def _thaw(self, by: str = "a change inside it") -> None:
        """Thaws this unit and those inside. Raises RuntimeError if there are no weights left."""
        self._need_weights(by)
        if self._frozen:
            for module in self.modules():
                module.__dict__.pop("_frozen", None)

    @torch.jit.unused
    def _need_weights(self, what: str) -> None:
        if self._released:
            raise RuntimeError(
                f"{type(self).__name__}: {what} needs the weights, but freeze(release=True) gave them back; build the "
                "model and load its weights again"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if self._frozen and name not in _OF_COMPILERS and self.__dict__.get(name) is not value:
            self._thaw(f"assigning {name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._thaw(f"deleting {name}")
        super().__delattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> "FusedUnit":
        self._thaw("a move to another device or dtype")
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._thaw("load_state_dict")
        super()._load_from_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._need_weights("state_dict")
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._need_weights("a copy or a pickle")
        state = super().__getstate__()
        state.pop("_cache", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_cache"] = self._new_cache()


def units_in(model: nn.Module) -> list[FusedUnit]:
    """The modules in `model` that can run fused, itself included."""
    return [module for module in model.modules() if isinstance(module, FusedUnit)]


class FusedLayer(FusedUnit):
    """A stem, a block or another convolution: one operator, or plain PyTorch."""

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy) and self.fused:
            y = _leaf(self, x)
            return self._forward_plain(x) if y is None else y
        with region(self):
            y = run(self._unit, self, x)
            return self._forward_plain(x) if y is None else y

    @torch.jit.unused
    def _asked(self) -> list[Asked]:
        return [Asked("", self._unit, self, self)]

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(self._unit, self)]


def _leaf(unit: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy | None:
    """A call of `unit` as one node of the graph that torch.fx traces, so that the graph runs it fused; None if the
    graph cannot name it.
    """
    tracer = x.tracer
    if not isinstance(tracer, torch.fx.Tracer) or tracer.root is unit:
        return None
    try:
        path = tracer.path_of_module(unit)
    except NameError:
        return None
    return tracer.create_proxy("call_module", path, (x,), {})


def layer_parts(layer: nn.Module, name: str) -> ConvParts | str:
    """The parts of a convolution with norm and activation, called `name`: an nn.Sequential, or a unit of its own."""
    if isinstance(layer, FusedDense) and is_unit(layer):
        if not layer.fused:
            return f"{name} is switched off"
        layers = child_reason(layer, name) or list(layer)
    else:
        layers = sequence(layer, name)
    return layers if isinstance(layers, str) else conv_parts(layers, (f"{name}.0", f"{name}.1", f"{name}.2"), name)


# The names that reasons use for projection and norm, by the number of layers before them.
_PROJECT_NAMES = {1: ("conv.1", "conv.2", ""), 2: ("conv.2", "conv.3", "")}


class FusedBlock(FusedLayer):
    """An inverted-residual block with torchvision's layout: `conv` is [expand,] depthwise, project, norm."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        d = self.__dict__
        return d["_modules"]["conv"], d["use_res_connect"]

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        children = sequence(self.conv, "conv")
        if isinstance(children, str):
            return children
        if len(children) != 3 and len(children) != 4:
            return f"conv has {len(children)} children"
        convs = []
        for layer, name in zip(children[:-2], ("conv.0", "conv.1"), strict=False):
            parts = layer_parts(layer, name)
            if isinstance(parts, str):
                return parts
            convs.append(parts)
        project = ConvParts(children[-2], children[-1], None, _PROJECT_NAMES[len(convs)])
        return BlockParts(convs[0] if len(convs) > 1 else None, convs[-1], project, bool(self.use_res_connect))


class FusedDense(FusedLayer):
    """A sequence of a dense convolution, its norm and its activation: a stem, or a pointwise convolution."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(input)
        else:
            return self._forward_fused(input)

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        return tuple(self.__dict__["_modules"].values())

    @torch.jit.unused
    def _parts(self) -> ConvParts | str:
        return conv_parts(list(self), ("0", "1", "2"), "it")


class FusedModel(FusedUnit):
    """A module with units inside.

    Assigning to ``fused`` or ``recompute`` sets it in all units inside, too. Raises ValueError for an unknown
    ``recompute``.
    """

    _unit_by_unit: bool = False  # run the units one by one, not as one operator; see `unit_by_unit`

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "recompute" and value not in training.RECOMPUTE:
            raise ValueError(f"recompute should be one of {', '.join(training.RECOMPUTE)}, got {value!r}")
        super().__setattr__(name, value)
        if name in ("fused", "recompute"):
            for unit in self.modules():
                if unit is not self and isinstance(unit, FusedUnit):
                    setattr(unit, name, value)


class Entry(NamedTuple):
    """A unit of a network's operator, and the module that it reads. See `specs.Step` for source and tap."""

    unit: Unit
    module: nn.Module
    source: int
    tap: bool = False


class FusedSequential(FusedModel):
    """An ``nn.Sequential`` of units, which runs as one operator, or a slice of one, whose map stays channels_last from
    unit to unit. The output has the memory format of the plain output.
    """

    _is_slice: bool = False  # code that slices at every call would pack the operator's weights each time

    @torch.jit.unused
    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found._is_slice = True
        return found

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(input)
        else:
            return self._forward_fused(input)

    @torch.jit.unused
    def _forward_fused(self, input: Tensor) -> Tensor:
        if not self.fused or call.call_reason(input) is not None or input.dim() != 4:
            return self._forward_plain(input)
        y = None if self._is_slice else as_one(self, input, inside=False)
        if y is not None:
            return y
        walk = Walk(input)
        for unit in self:
            walk.step(unit)
        return walk.plain()

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        if len(self) < 2:
            return "it has fewer than two units"
        *entries, last = chain(self)
        return [*entries, last._replace(tap=True)]

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [] if self._is_slice else [(NETWORK, self)]

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        return tuple(self.__dict__["_modules"].values())


class Walk:
    """A map on its way through units that are called one by one.

    x: the map. Behind a fused unit it is channels_last, even if plain PyTorch's would be contiguous.
    fusible: whether a fused unit could take it.
    """

    def __init__(self, x: Tensor) -> None:
        self._set(x)

    def _set(self, x: Tensor) -> None:
        self.x = x
        self.fusible = call.call_reason(x) is None and x.dim() == 4
        self._channels_last = not self.fusible or is_channels_last(x)  # whether plain PyTorch's map would be

    def step(self, link: Any) -> None:
        """Passes the map through `link`, a module or a part of one that runs as a unit."""
        if isinstance(link, FusedSequential) and link.fused and not runs_as_module(link):
            for inner in link:
                self.step(inner)
            return
        if not _runs_inside(link):
            # Hooks and plain code must see the memory format of a plain network.
            self._set(link(self.plain()))
            return
        with region(link):
            found = run_inside(link._unit, link, self.x, self._channels_last) if self.fusible else None
            if found is None:
                self._set(link._forward_plain(self.plain()))
            else:
                self.x, self._channels_last = found

    def plain(self) -> Tensor:
        """The map in the memory format that plain PyTorch would give it."""
        return self.x if self._channels_last else to_contiguous(self.x)

    def tap(self) -> Tensor:
        """The same, to be an output beside others. Gradients of later outputs reach it, as they do in plain PyTorch."""
        x = self.plain()
        if x.requires_grad:
            self._set(x)
        return x


def is_unit(module: nn.Module) -> bool:
    """Whether `module` is a fused layer whose class does not override the fused forward."""
    return isinstance(module, FusedLayer) and type(module).forward in (FusedBlock.forward, FusedDense.forward)


def keeps_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` whose class does not override the forward."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _runs_inside(link: Any) -> bool:
    """Whether a network may run the link's operator without calling it. Links that are no modules cannot be called."""
    return not isinstance(link, nn.Module) or (is_unit(link) and link.fused and not runs_as_module(link))


# ------------------------------------------------------------------------------------------------- reading, training


def _read_network(network: nn.Module, train: bool) -> NetworkSpec | str:
    """The spec of the network, or the reason why its units have to run one by one."""
    if network.training and torch.is_grad_enabled():  # most likely a unit trains, and this is known without a reading
        return "it is in training mode"
    entries = network._entries()
    if isinstance(entries, str):
        return entries
    steps = []
    for unit, module, source, tap in entries:
        called = isinstance(module, nn.Module) and module is not network
        if unit is None or not module.fused or (called and runs_as_module(module)):
            return "a unit is of another class, switched off or hooked"
        spec = unit.read(module, False)
        if isinstance(spec, str):
            return spec
        steps.append(Step(spec, source, tap))
    return join(steps)


def as_one(sequence: nn.Module, x: Tensor, inside: bool) -> Tensor | None:
    """The output of `sequence` as one operator's; None if its units have to run one by one."""
    if not isinstance(sequence, FusedSequential) or not sequence.fused:
        return None
    outputs = run(NETWORK, sequence, x, inside=inside)
    return None if outputs is None else outputs[0]


def unit_of(module: nn.Module) -> Unit | None:
    """The unit that computes a call of `module`; None if it is no fused layer."""
    return module._unit if is_unit(module) else None


def chain(modules: Iterable[nn.Module]) -> list[Entry]:
    """The entries of units that take the images and then one another's outputs."""
    return [Entry(unit_of(module), module, i + IMAGES) for i, module in enumerate(modules)]


def _read_block(block: nn.Module, train: bool) -> Any:
    return read_block(block._parts(), train)


def _read_dense(layer: nn.Module, train: bool) -> Any:
    return read_dense(layer._parts(), train)


def _layer_key(layer: nn.Module) -> tuple[Any, ...]:
    return layer._key()


BLOCK = Unit(operators.INVERTED_RESIDUAL, _read_block, _layer_key, training.prepare, training.train_block)
DENSE = Unit(operators.DENSE, _read_dense, _layer_key, training.prepare, training.train_dense)
NETWORK = Unit(operators.NETWORK, _read_network, lambda network: network._network_key(), alongside=True)

FusedBlock._unit = BLOCK
FusedDense._unit = DENSE
