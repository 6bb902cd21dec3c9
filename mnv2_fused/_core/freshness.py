"""Whether packed weights are still up to date. Weights are packed once, and packed again after any change.

`Guard` watches modules. `Packed` watches tensors: they must be the same objects, with the same address, shape, strides,
dtype and size of storage. In addition,

- on the CPU, a fingerprint of their contents must be the same, because a write through ``.data`` leaves no other trace.
  Tensors of up to 64 KiB are read in full. A larger tensor is sampled, one cache line (64 bytes) in every row and in
  every column of lines, and its version counter is watched as well;
- on a GPU, their version counters must be the same. Reading contents would make every forward wait for the GPU;
- tensors that fit neither check are compared with a copy in full: tensors on a GPU without a version counter, and
  tensors on the CPU with gaps in their memory.

Tensors made under ``torch.inference_mode`` have no version counter. On the CPU two kinds of writes to a tensor over
64 KiB can therefore be missed if they change neither a whole row nor a whole column: writes through ``.data`` or NumPy,
and any write to a tensor made under ``torch.inference_mode``. Optimizer steps, ``copy_`` and ``load_state_dict`` change
all elements and are always seen.

A replayed CUDA graph leaves no trace on the host, so packed weights on a GPU are dropped when a module changes between
training and evaluation.
"""

from __future__ import annotations

import contextlib
import operator
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core import library as _library

_SameObjects = _library._C.SameObjects
_SameTensors = _library._C.SameTensors
_Watch = _library._C.Watch
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DICTS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)

# pack(tensors, eps, dtype): folds and packs weights for inputs of that dtype.
Pack = Callable[[Sequence[Tensor | None], Sequence[float], torch.dtype], Tensor]

# Caches by name. _owned: those of living modules. _foreign: names that no living module owns, as in an exported program
# that another process loaded.
_owned: weakref.WeakValueDictionary[str, Cache] = weakref.WeakValueDictionary()
_foreign: OrderedDict[str, Cache] = OrderedDict()
_MAX_FOREIGN = 512
# Packed weights that CUDA graphs of `cached_*` operators read, by the cache's name. Such a graph outlives the module.
_captured: dict[str, list[Packed]] = {}


class Guard:
    """The state of `modules` and all their children that a reading depends on: their types, the entries of their
    ``__dict__``, their parameters, buffers, children and hooks. ``same.holds()`` tells in microseconds whether it is
    unchanged.

    A unit passes its children here and not itself, so that its cache does not keep it alive.
    """

    __slots__ = ("same",)

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = [m for root in modules for m in root.modules()]
        dicts = [m.__dict__ for m in found]
        dicts += [d[name] for d in dicts for name in _DICTS]
        self.same = _SameObjects(found, dicts)


class Cache:
    """What one unit remembers between calls. Each value is replaced by one assignment, so threads that read or pack at
    the same time at worst do the same work twice.
    """

    __slots__ = ("__weakref__", "captured", "name", "networks", "parts", "readings", "refusals", "released", "traced")

    def __init__(self, name: str | None = None, parts: Iterable[str] = ()) -> None:
        self.name = name or uuid.uuid4().hex
        self.readings: dict[torch.dtype | None, Any] = {}  # `decide.Reading` by autocast's dtype, None without it
        self.refusals: dict[tuple, Refusal] = {}  # by what was read, and how
        # The network's unit, and what gives the network, or None if it is gone; by the text of its units.
        self.networks: dict[str, tuple[Any, Callable[[], Any]]] = {}
        self.traced: dict[torch.dtype, Packed] = {}  # packed by cached_* operators on a GPU, by the input's dtype
        self.captured = _captured.get(self.name, [])  # read by CUDA graphs
        self.released: Any = None  # the unit of which only packed weights are left; "all" if none are left here
        self.parts = {part: Cache() for part in parts}  # of units inside the unit that are no modules of their own
        if name is None:
            _owned[self.name] = self

    def __del__(self, forget: Callable[[str], None] = _library._C.forget) -> None:
        forget(self.name)

    def packed(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> Tensor:
        """The result of ``pack(tensors, eps, dtype)``, from the cache if nothing has changed since the last call."""
        packed = self.traced.get(dtype)
        if packed is None or not packed.is_of(tensors, eps) or not packed.holds():
            packed = self.pack(tensors, eps, dtype, pack)
            if not packed.in_graph:
                others = {d: p for d, p in self.traced.items() if d != dtype and p.same.holds()}
                self.traced = others | {dtype: packed}
        return self.use(packed, lasting=True)

    def pack(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> Packed:
        """Packs the weights. If CUDA graphs read the old packed weights, the new ones are copied into the same memory,
        so that the graphs see them, and later calls with these tensors reuse that packing.
        """
        for packed in self.captured:
            if packed.layout[:2] == (pack, dtype) and packed.is_of(tensors, eps) and packed.holds():
                return packed
        packed = Packed(tensors, eps, dtype, pack)
        graphs = [] if packed.in_graph else [i for i, p in enumerate(self.captured) if p.layout == packed.layout]
        if graphs:
            _synchronize(packed.device)  # a graph may be reading the old weights
            for i in graphs:
                self.captured[i].stale = True
                self.captured[i].data.copy_(packed.data)
            _synchronize(packed.device)
            packed.data = self.captured[graphs[0]].data
            self.captured[graphs[0]] = packed
        return packed

    def forget(self) -> None:
        """Drops the packed weights that are on a GPU. The next use packs them again."""
        self.readings = {d: r for d, r in self.readings.items() if not _writes_unseen(r.packed.device)}
        self.traced = {d: p for d, p in self.traced.items() if not _writes_unseen(p.device)}
        for packed in self.captured:
            packed.stale = True
        for part in self.parts.values():
            part.forget()

    def clear(self) -> None:
        """Drops all packed weights, and whatever else keeps the weights alive. Parts stay."""
        _library._C.forget(self.name)
        self.readings, self.refusals, self.traced = {}, {}, {}

    def all(self) -> list[Cache]:
        """This cache and those of its parts."""
        return [self, *self.parts.values()]

    def use(self, packed: Packed, lasting: bool = False) -> Tensor:
        """The packed weights, for work on the current stream. Set ``lasting`` if a graph that captures them may outlive
        the cache.
        """
        if packed.in_graph:
            return packed.data
        if _capturing(packed.device):
            if packed not in self.captured:
                self.captured.append(packed)
            if lasting:
                _captured[self.name] = self.captured
        elif packed.device.type == "cuda":
            stream = torch.cuda.current_stream(packed.device)
            if stream.cuda_stream not in packed.streams:
                packed.data.record_stream(stream)  # the allocator reuses the memory only after this stream has read it
                packed.streams.add(stream.cuda_stream)
        return packed.data


class Refusal:
    """The reason why a module could not be read, with the state that tells whether it still holds.

    key: everything that the reading depends on. Modules in it count with their state, their children and the places of
    their tensors.
    """

    __slots__ = ("guard", "key", "reason", "tensors")

    def __init__(self, reason: str, key: tuple[Any, ...]) -> None:
        self.reason, self.key = reason, key
        roots = [entry for entry in key if isinstance(entry, nn.Module)]
        self.guard = Guard(roots)
        tensors = [t for root in roots for ts in (root.parameters(), root.buffers()) for t in ts]
        self.tensors: Any = None  # if it cannot be watched, the module is read at each call
        if all(type(t) in (Tensor, nn.Parameter) and _watchable(t) for t in tensors):
            with contextlib.suppress(RuntimeError), torch.inference_mode(False), torch.no_grad():
                self.tensors = _SameTensors([(t, _Watch.PLACE) for t in tensors])

    def holds(self, key: tuple[Any, ...], places: bool = True) -> bool:
        """Without `places`, the tensors' places do not count."""
        if self.tensors is None or self.key != key or not self.guard.same.holds():
            return False
        return not places or self.tensors.holds()


def _watchable(t: Tensor) -> bool:
    return t.layout is torch.strided and (t.is_cpu or t.is_cuda)


def by_name(name: str) -> Cache:
    """The cache of that name. If no living module has the name, a cache is made for it, and the oldest such cache is
    dropped if there are more than _MAX_FOREIGN.
    """
    cache = _owned.get(name)
    if cache is None:
        cache = _foreign.get(name)
        if cache is None:
            cache = _foreign[name] = Cache(name)
            while len(_foreign) > _MAX_FOREIGN:
                _foreign.popitem(last=False)
    return cache


class Packed:
    """Packed weights and the state of the tensors they were made of.

    Raises RuntimeError if a tensor's storage holds fewer bytes than the tensor needs, as after
    ``t.untyped_storage().resize_(0)``.
    """

    __slots__ = (
        "bits",
        "data",
        "device",
        "eps",
        "exact",
        "in_graph",
        "layout",
        "same",
        "stale",
        "streams",
        "tensors",
    )

    def __init__(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> None:
        # The state is recorded before the weights are read, so that the next call sees a write in between.
        self.tensors = list(tensors)
        self.eps = tuple(eps)
        live = [t for t in self.tensors if t is not None]
        self.device = live[0].device
        self.streams: set[int] = set()  # streams recorded as readers of `data`
        self.stale = False  # overwritten or dropped
        # Packing during a capture becomes part of the graph: each replay packs, and only the graph uses the result.
        self.in_graph = _capturing(self.device)
        with torch.inference_mode(False), torch.no_grad():
            watched = [(t, _watch(t)) for t in live]
            self.same = _SameTensors(watched)
            self.exact = [t for t, watch in watched if watch == _Watch.PLACE]
            self.bits = [] if self.in_graph else [bits.clone() for bits in _bits(self.exact)]
            self.data = pack(self.tensors, self.eps, dtype)
        # Only weights with an equal layout may be packed into the same memory, because graphs read it in this layout.
        self.layout = (pack, dtype, self.device, [(id(t), None if t is None else t.shape) for t in self.tensors])
        if self.device.type == "cuda" and not self.in_graph:
            torch.cuda.current_stream(self.device).synchronize()  # other streams will read `data`

    def is_of(self, tensors: Sequence[Tensor | None], eps: Sequence[float]) -> bool:
        """Whether these tensors and epsilons were packed."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and tuple(eps) == self.eps
        )

    def release(self) -> None:
        """Drops the tensors. From here on nothing tells whether the packed weights hold."""
        self.tensors, self.exact, self.bits, self.same = [], [], [], None

    def holds(self) -> bool:
        """Whether packing again would give the same bytes. False if a capture forbids the comparison."""
        if self.stale or not self.same.holds():
            return False
        return not self.exact or (not _capturing(self.device) and all(map(torch.equal, _bits(self.exact), self.bits)))


def _capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is capturing a CUDA graph. A capture must not wait for the GPU."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _writes_unseen(device: torch.device) -> bool:
    return device.type == "cuda"


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _watch(t: Tensor) -> _Watch:
    """How to watch `t`. With `PLACE` its contents must be compared in full as well."""
    if t.is_cuda:
        return _Watch.PLACE if t.is_inference() else _Watch.VERSION
    # Dense means: without gaps, and with the first dimension outermost.
    dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
    return _Watch.CONTENTS if dense else _Watch.PLACE


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The contents of `tensors` as integers, because NaN differs from itself. On a GPU they are joined into one tensor,
    so that a comparison waits once.
    """
    bits = [t.detach().contiguous() for t in tensors]
    if bits and bits[0].is_cuda:
        return [torch.cat([t.flatten().view(torch.uint8) for t in bits])]
    return [t.view(_BITS[t.element_size()]) for t in bits]
