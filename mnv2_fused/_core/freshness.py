"""Weights folded and packed once, and seen to be out of date whenever anything has changed since.

The evidence: the same tensor objects; their place in memory, shape, strides and dtype; on the CPU a fingerprint of
their contents, because writes through ``.data`` leave no other trace; the version counter of those whose fingerprint
may miss a write, and of all on a GPU, where a look at contents would wait for it. Tensors without a version counter
(made under ``torch.inference_mode``), and on the CPU those with gaps in their memory, are compared in full. A replayed
CUDA graph leaves no evidence on the host: between training and evaluation what lies on a GPU is forgotten.
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
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What packs tensors and epsilons for inputs of a dtype.
Pack = Callable[[Sequence[Tensor | None], Sequence[float], torch.dtype], Tensor]

# Caches of living modules by name, and of names that no living module owns (an exported program loaded elsewhere).
_owned: weakref.WeakValueDictionary[str, Cache] = weakref.WeakValueDictionary()
_foreign: OrderedDict[str, Cache] = OrderedDict()
_MAX_FOREIGN = 512
# What CUDA graphs read that captured `cached_*` operators, by the cache's name: their program outlives any owner.
_captured: dict[str, list[Packed]] = {}


class Cache:
    """What one unit remembers between calls. Whoever replaces a value publishes it by one assignment: threads that
    read or pack at the same time do the same work twice, and nothing else happens.
    """

    __slots__ = ("__weakref__", "captured", "name", "readings", "traced")

    def __init__(self, name: str | None = None) -> None:
        self.name = name or uuid.uuid4().hex
        self.readings: dict[torch.dtype | None, Any] = {}  # of the module itself, see modules.current
        self.traced: dict[torch.dtype, Packed] = {}  # of the cached_* operators, by the input's dtype
        self.captured = _captured.get(self.name, [])  # those that CUDA graphs read
        if name is None:
            _owned[self.name] = self

    def packed(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> Tensor:
        """``pack(tensors, eps, dtype)``, from memory where nothing has changed since the last call."""
        packed = self.traced.get(dtype)
        if packed is None or not packed.is_of(tensors, eps) or not packed.holds():
            packed = self.pack(tensors, eps, dtype, pack)
            if not packed.in_graph:
                others = {d: p for d, p in self.traced.items() if d != dtype and p.same.holds()}
                self.traced = others | {dtype: packed}
        return self.use(packed, lasting=True)

    def pack(self, tensors: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype, pack: Pack) -> Packed:
        """Packs anew; where CUDA graphs read the weights as they were, into the same memory, and once for all who
        share it.
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
        """Has weights on a GPU packed again when they are next used."""
        self.readings = {d: r for d, r in self.readings.items() if not _writes_unseen(r.packed.device)}
        self.traced = {d: p for d, p in self.traced.items() if not _writes_unseen(p.device)}
        for packed in self.captured:
            packed.stale = True

    def use(self, packed: Packed, lasting: bool = False) -> Tensor:
        """The packed weights, for work on the current stream; ``lasting`` where a graph that captures them may outlive
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
    """Packed weights and the state of the tensors they were made of."""

    __slots__ = (
        "_pins",
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
        # In a graph that is captured weights are packed whenever it runs, and belong to it alone.
        self.in_graph = _capturing(self.device)
        with torch.inference_mode(False), torch.no_grad():
            # The aliases keep the storages alive: no other tensor can come to lie at a remembered address.
            self._pins = [t.detach() for t in live]
            rows = [_dense_rows(t) for t in live]
            self.same = _SameTensors(list(zip(live, rows, strict=True)))
            self.exact = [t for t, n in zip(live, rows, strict=True) if n == 0]
            self.bits = [] if self.in_graph else [bits.clone() for bits in _bits(self.exact)]
            self.data = pack(self.tensors, self.eps, dtype)
        # What may lie in the same memory when it is packed again: graphs that read it do not know another layout.
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
        """Whether packing again would give the same. Where that cannot be told, in a capture, it does not."""
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


def _dense_rows(t: Tensor) -> int:
    """Rows that the memory of `t` is fingerprinted as; 0 where it must be compared in full, -1 where its version has to
    do: a GPU's memory is not looked at before every forward.
    """
    if t.numel() == 0 or t.is_inference():
        return 0
    if t.is_cuda:
        return -1
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return t.shape[0] if t.dim() > 1 else 1
    return 0


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What lies in `tensors`, as integers (NaN differs from itself); on a GPU in one piece, to wait once for it."""
    bits = [t.detach().contiguous() for t in tensors]
    if bits and bits[0].is_cuda:
        return [torch.cat([t.flatten().view(torch.uint8) for t in bits])]
    return [t.view(_BITS[t.element_size()]) for t in bits]


_DICTS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class Guard:
    """Remembers the state of `modules` and all their children that a successful reading rests on: their types, all that
    lies in their ``__dict__``, their parameters, buffers, children and hooks.

    Holds no reference to the unit itself, only to its children.
    """

    __slots__ = ("same",)

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = [m for root in modules for m in root.modules()]
        dicts = [m.__dict__ for m in found]
        dicts += [d[name] for d in dicts for name in _DICTS]
        self.same = _SameObjects(found, dicts)
