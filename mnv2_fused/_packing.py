"""Weights folded and packed once, and seen to be out of date whenever anything has changed since.

The order of evidence, cheap to dear: the same tensor objects; their storage, version counter, shape and strides; a
fingerprint of their memory, because writes through ``.data`` leave no other trace. Tensors without a version counter
(made under ``torch.inference_mode``) or with gaps in their memory are compared in full.
"""

from __future__ import annotations

import operator
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from .ops import fold_bn

_Fingerprint = _library._C.Fingerprint
_data_ptr = Tensor.data_ptr
_stride = Tensor.stride
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Pack = Callable[[Sequence[Tensor | None], Sequence[float]], Tensor]

# Caches of living modules by name, and of names that no living module owns (an exported program loaded elsewhere).
_owned: weakref.WeakValueDictionary[str, Cache] = weakref.WeakValueDictionary()
_foreign: OrderedDict[str, Cache] = OrderedDict()
_MAX_FOREIGN = 512


class Cache:
    """What one unit remembers between calls. Whoever replaces a value publishes it by one assignment: threads that
    read or pack at the same time do the same work twice, and nothing else happens.
    """

    __slots__ = ("__weakref__", "name", "reading", "traced")

    def __init__(self, name: str | None = None) -> None:
        self.name = name or uuid.uuid4().hex
        self.reading: Any = None  # of the module itself, see modules.current
        self.traced: Packed | None = None  # of the cached_* operators
        if name is None:
            _owned[self.name] = self

    def packed(self, tensors: Sequence[Tensor | None], eps: Sequence[float], pack: Pack) -> Tensor:
        """``pack(tensors, eps)``, from memory where neither argument has changed since the last call."""
        packed = self.traced
        if packed is None or not packed.holds(tensors) or packed.eps != tuple(eps):
            self.traced = packed = Packed(tensors, eps, pack)
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
        "data",
        "digest",
        "eps",
        "exact",
        "fingerprint",
        "live",
        "pins",
        "pointers",
        "shapes",
        "strides",
        "tensors",
        "versioned",
        "versions",
    )

    def __init__(self, tensors: Sequence[Tensor | None], eps: Sequence[float], pack: Pack) -> None:
        # The state is taken before the weights are read, so that a write in between is seen by the next call.
        self.tensors = list(tensors)
        self.eps = tuple(eps)
        self.live = [t for t in self.tensors if t is not None]
        with torch.inference_mode(False), torch.no_grad():
            # The aliases keep the storages alive: no other tensor can come to lie at a remembered address.
            self.pins = [t.detach() for t in self.live]
            self.pointers = list(map(_data_ptr, self.live))
            self.shapes = [t.shape for t in self.live]
            self.strides = list(map(_stride, self.live))
            self.versioned = [t for t in self.live if not t.is_inference()]
            self.versions = [t._version for t in self.versioned]
            regions, self.exact = [], []
            for t in self.live:
                region = None if t.is_inference() else _region(t)
                if region is None:
                    self.exact.append((t, _bits(t).clone()))
                else:
                    regions.append(region)
            self.fingerprint = _Fingerprint(regions)
            self.digest = self.fingerprint.value()
            self.data = pack(self.tensors, self.eps)

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether packing `tensors` now would give the same as it did then."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and list(map(_data_ptr, self.live)) == self.pointers
            and [t._version for t in self.versioned] == self.versions
            and [t.shape for t in self.live] == self.shapes
            and list(map(_stride, self.live)) == self.strides
            and self.fingerprint.value() == self.digest
            and all(torch.equal(_bits(t), bits) for t, bits in self.exact)
        )


def _region(t: Tensor) -> tuple[int, int, int] | None:
    """Address, rows and bytes a row of a tensor without gaps, in the order of memory; None where there are gaps."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        rows = t.shape[0] if t.dim() > 1 else 1
        return t.data_ptr(), rows, t.nbytes // max(rows, 1)
    return None


def _bits(t: Tensor) -> Tensor:
    # Compared as integers: NaN differs from itself.
    return t.detach().contiguous().view(_BITS[t.element_size()])


# ------------------------------------------------------------------------------------------------- fold and pack


def _fold(tensors: Sequence[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    weight, bias, gamma, beta, mean, var = tensors
    return fold_bn(weight, bias, gamma, beta, mean, var, eps)


def pack_block(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack a block's unfolded tensors, six a convolution (see `_inspect.BlockSpec`)."""
    expand = _fold(tensors[:6], eps[0]) if len(tensors) == 18 else (None, None)
    depthwise = _fold(tensors[-12:-6], eps[-2])
    project = _fold(tensors[-6:], eps[-1])
    return torch.ops.mnv2_fused.pack_block.default(*expand, *depthwise, *project)


def pack_stem(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack the stem's six unfolded tensors."""
    return torch.ops.mnv2_fused.pack_stem.default(*_fold(tensors, eps[0]))


def pack_head(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack the last convolution's six unfolded tensors and the classifier's two."""
    weight, bias = tensors[6], tensors[7]
    weight = weight.detach().float().contiguous()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float().contiguous()
    return torch.ops.mnv2_fused.pack_head.default(*_fold(tensors[:6], eps[0]), weight, bias)
