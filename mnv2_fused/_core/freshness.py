"""Whether packed weights are still those of the module: weights are packed once, and again after any change.

`Guard` watches modules. `Packed` watches tensors: that they are the same objects with the same address, shape, strides,
dtype and size of storage, and besides, by where they are,

- on the CPU, a fingerprint of their contents, because a write through ``.data`` leaves no other trace. Tensors up to
  64 KiB are read in full. Of a larger one each row, and each column of 64 bytes, is read in one place, and its version
  counter is watched as well;
- on a GPU, their version counters alone, because reading contents would wait for the GPU before every forward;
- if neither will do, their contents, compared with a copy in full: those of a GPU's tensors without a version counter,
  and of the CPU's tensors with gaps in their memory.

Tensors that were made under ``torch.inference_mode`` have no version counter. So two kinds of writes to tensors over
64 KiB on the CPU may be missed, if they change neither all of a row nor all of a column: writes through ``.data`` or
NumPy, and any writes to tensors made under ``torch.inference_mode``. Optimizer steps, ``copy_`` and ``load_state_dict``
change all elements and are always seen.

A replayed CUDA graph leaves no evidence on the host: packed weights on a GPU are dropped between training and
evaluation.
"""

from __future__ import annotations

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

# What packs tensors and epsilons for inputs of a dtype.
Pack = Callable[[Sequence[Tensor | None], Sequence[float], torch.dtype], Tensor]

# Caches of living modules by name, and of names that no living module owns (an exported program loaded elsewhere).
_owned: weakref.WeakValueDictionary[str, Cache] = weakref.WeakValueDictionary()
_foreign: OrderedDict[str, Cache] = OrderedDict()
_MAX_FOREIGN = 512
# What CUDA graphs read that captured `cached_*` operators, by the cache's name: their program outlives any owner.
_captured: dict[str, list[Packed]] = {}


class Guard:
    """Remembers the state of `modules` and all their children that a successful reading rests on: their types, all that
    lies in their ``__dict__``, their parameters, buffers, children and hooks. ``same.holds()`` tells in microseconds
    whether it is unchanged.

    Holds no reference to the unit itself, only to its children.
    """

    __slots__ = ("same",)

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = [m for root in modules for m in root.modules()]
        dicts = [m.__dict__ for m in found]
        dicts += [d[name] for d in dicts for name in _DICTS]
        self.same = _SameObjects(found, dicts)


class Cache:
    """What one unit remembers between calls. A value is replaced by one assignment: threads that read or pack at the
    same time do the same work twice, and nothing else happens.
    """

    __slots__ = ("__weakref__", "captured", "name", "readings", "traced")

    def __init__(self, name: str | None = None) -> None:
        self.name = name or uuid.uuid4().hex
        self.readings: dict[torch.dtype | None, Any] = {}  # of the module itself, see units.current
        self.traced: dict[torch.dtype, Packed] = {}  # of the cached_* operators, by the input's dtype
        self.captured = _captured.get(self.name, [])  # those that CUDA graphs read
        if name is None:
            _owned[self.name] = self

    def packed(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> Tensor:
        """``pack(tensors, eps, dtype)``, from memory if nothing has changed since the last call."""
        packed = self.traced.get(dtype)
        if packed is None or not packed.is_of(tensors, eps) or not packed.holds():
            packed = self.pack(tensors, eps, dtype, pack)
            if not packed.in_graph:
                others = {d: p for d, p in self.traced.items() if d != dtype and p.same.holds()}
                self.traced = others | {dtype: packed}
        return self.use(packed, lasting=True)

    def pack(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> Packed:
        """Packs again. If CUDA graphs read the old packed weights, the new ones go into the same memory, packed once
        for all who share it.
        """
        for packed in self.captured:
            if packed.layout[:2] == (pack, dtype) and packed.is_of(tensors, eps) and packed.holds():
                return packed
        packed = Packed(tensors, eps, dtype, pack)
        graphs = [] if packed.in_graph else [i for i, p in enumerate(self.captured) if p.layout == packed.layout]
        if graphs:
            _synchronize(packed.device)  # graphs may be reading
            for i in graphs:
                self.captured[i].stale = True
                self.captured[i].data.copy_(packed.data)
            _synchronize(packed.device)
            packed.data = self.captured[graphs[0]].data
            self.captured[graphs[0]] = packed
        return packed

    def forget(self) -> None:
        """Drops packed weights on a GPU: the next use packs them again."""
        self.readings = {d: r for d, r in self.readings.items() if not _writes_unseen(r.packed.device)}
        self.traced = {d: p for d, p in self.traced.items() if not _writes_unseen(p.device)}
        for packed in self.captured:
            packed.stale = True

    def use(self, packed: Packed, lasting: bool = False) -> Tensor:
        """The packed weights, for work on the current stream; ``lasting`` if a graph that captures them may outlive
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
                packed.data.record_stream(stream)  # its memory is no other tensor's before this stream has read it
                packed.streams.add(stream.cuda_stream)
        return packed.data


def by_name(name: str) -> Cache:
    """The cache of that name: a living module's, or one of its own for a name that no living module has."""
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
        # The state is taken before the weights are read, so that a write in between is seen by the next call.
        self.tensors = list(tensors)
        self.eps = tuple(eps)
        live = [t for t in self.tensors if t is not None]
        self.device = live[0].device
        self.streams: set[int] = set()  # that are known to read `data`
        self.stale = False  # overwritten, or forgotten
        # While a graph is captured, packing becomes a part of it: it packs whenever it runs, for itself alone.
        self.in_graph = _capturing(self.device)
        with torch.inference_mode(False), torch.no_grad():
            watched = [(t, _watch(t)) for t in live]
            self.same = _SameTensors(watched)
            self.exact = [t for t, watch in watched if watch == _Watch.PLACE]
            self.bits = [] if self.in_graph else [bits.clone() for bits in _bits(self.exact)]
            self.data = pack(self.tensors, self.eps, dtype)
        # Weights may be packed into the same memory again if this is equal: graphs that read it know no other layout.
        self.layout = (pack, dtype, self.device, [(id(t), None if t is None else t.shape) for t in self.tensors])
        if self.device.type == "cuda" and not self.in_graph:
            torch.cuda.current_stream(self.device).synchronize()  # other streams will read it

    def is_of(self, tensors: Sequence[Tensor | None], eps: Sequence[float]) -> bool:
        """Whether these are the arguments that were packed."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and tuple(eps) == self.eps
        )

    def holds(self) -> bool:
        """Whether packing again would give the same; False if that cannot be told, in a capture."""
        if self.stale or not self.same.holds():
            return False
        return not self.exact or (not _capturing(self.device) and all(map(torch.equal, _bits(self.exact), self.bits)))


def _capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` records a CUDA graph, in which nothing may wait for the GPU."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _writes_unseen(device: torch.device) -> bool:
    return device.type == "cuda"


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _watch(t: Tensor) -> _Watch:
    """What tells whether `t` has changed; with `PLACE`, its contents must be compared in full as well."""
    if t.is_cuda:
        return _Watch.PLACE if t.is_inference() else _Watch.VERSION
    # Dense, and its first dimension is the outermost.
    dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
    return _Watch.CONTENTS if dense else _Watch.PLACE


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What lies in `tensors`, as integers (NaN differs from itself); on a GPU in one piece, to wait once for it."""
    bits = [t.detach().contiguous() for t in tensors]
    if bits and bits[0].is_cuda:
        return [torch.cat([t.flatten().view(torch.uint8) for t in bits])]
    return [t.view(_BITS[t.element_size()]) for t in bits]
