"""Weights folded and packed once, and seen to be out of date whenever anything has changed since.

The evidence: the same tensor objects; their place in memory, shape and strides; a fingerprint of their contents,
because writes through ``.data`` leave no other trace; the version counter of those whose fingerprint may miss a write.
Tensors without a version counter (made under ``torch.inference_mode``) or with gaps in their memory are compared in
full.
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

_SameTensors = _library._C.SameTensors
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
        if packed is None or not packed.is_of(tensors, eps) or not packed.holds():
            packed = Packed(tensors, eps, pack)
            if not packed.captured:
                self.traced = packed
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

    __slots__ = ("_pins", "captured", "data", "eps", "exact", "same", "tensors")

    def __init__(self, tensors: Sequence[Tensor | None], eps: Sequence[float], pack: Pack) -> None:
        # The state is taken before the weights are read, so that a write in between is seen by the next call.
        self.tensors = list(tensors)
        self.eps = tuple(eps)
        live = [t for t in self.tensors if t is not None]
        with torch.inference_mode(False), torch.no_grad():
            # The aliases keep the storages alive: no other tensor can come to lie at a remembered address.
            self._pins = [t.detach() for t in live]
            rows = [_dense_rows(t) for t in live]
            self.same = _SameTensors(list(zip(live, rows, strict=True)))
            self.exact = [(t, _bits(t).clone()) for t, n in zip(live, rows, strict=True) if n == 0]
            self.data = pack(self.tensors, self.eps)
            # In a graph that is captured weights are packed whenever it runs, and belong to it alone.
            self.captured = self.data.is_cuda and torch.cuda.is_current_stream_capturing()
            if self.data.is_cuda and not self.captured:
                # Other streams will read it, and may still read what it replaces.
                torch.cuda.synchronize(self.data.device)

    def is_of(self, tensors: Sequence[Tensor | None], eps: Sequence[float]) -> bool:
        """Whether these are the arguments that were packed."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and tuple(eps) == self.eps
        )

    def holds(self) -> bool:
        """Whether packing again would give the same."""
        return self.same.holds() and all(torch.equal(_bits(t), bits) for t, bits in self.exact)


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


def _bits(t: Tensor) -> Tensor:
    # Compared as integers: NaN differs from itself.
    return t.detach().contiguous().view(_BITS[t.element_size()])


# ------------------------------------------------------------------------------------------------- fold and pack


def _fold(tensors: Sequence[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    weight, bias, gamma, beta, mean, var = tensors
    return fold_bn(weight, bias, gamma, beta, mean, var, eps)


def pack_block(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack a block's 18 unfolded tensors (see `_inspect.BlockSpec`)."""
    expand = (None, None) if tensors[0] is None else _fold(tensors[:6], eps[0])
    depthwise = _fold(tensors[6:12], eps[1])
    project = _fold(tensors[12:], eps[2])
    return torch.ops.mnv2_fused.pack_block.default(*expand, *depthwise, *project, tensors[12].dtype)


def pack_stem(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack the stem's six unfolded tensors."""
    return torch.ops.mnv2_fused.pack_stem.default(*_fold(tensors, eps[0]), tensors[0].dtype)


def pack_head(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack the last convolution's six unfolded tensors and the classifier's two."""
    weight, bias = tensors[6], tensors[7]
    weight = weight.detach().float().contiguous()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float().contiguous()
    return torch.ops.mnv2_fused.pack_head.default(*_fold(tensors[:6], eps[0]), weight, bias, tensors[0].dtype)


def pack_network(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> Tensor:
    """Pack the tensors of stem, blocks and head one after the other."""
    packed = [pack_stem(tensors[:6], eps[:1])]
    for i in range((len(eps) - 2) // 3):
        packed.append(pack_block(tensors[6 + 18 * i : 24 + 18 * i], eps[1 + 3 * i : 4 + 3 * i]))
    packed.append(pack_head(tensors[-8:], eps[-1:]))
    return torch.ops.mnv2_fused.pack_network.default(packed)
