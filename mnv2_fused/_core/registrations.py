"""What torch knows about the inference operators besides their kernels: fake kernels, gradients, batching,
decompositions. On CUDA also the kernels of the `cached_*` operators.

A traced graph cannot hold Python code that inspects data, so it holds `cached_*` operators. They take a unit's
parameters and buffers unpacked, and check at run time whether the packed weights in the cache of that name are up to
date. A captured CUDA graph would skip that check, so these operators are tagged cudagraph_unsafe.

If a network is frozen, a graph of torch.compile holds `frozen_network` instead, which calls the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._decomp import meta_table, register_decomposition
from torch._library.utils import get_layout_constraint_tag

from mnv2_fused._core.batching import loop_over_batches
from mnv2_fused._core.call import tf32
from mnv2_fused._core.decompositions import DECOMPOSITIONS, gradients
from mnv2_fused._core.freshness import by_name
from mnv2_fused._core.geometry import FLOATS
from mnv2_fused._core.operators import NETWORK, OPERATORS, Operator
from mnv2_fused._core.run import run_traced
from mnv2_fused._core.when_imported import when_imported

# The kernels of the `cached_*` operators on CUDA.
CUDA_KERNELS: dict[torch._ops.OpOverload, Callable[..., Tensor | list[Tensor]]] = {}


def _check_input(x: Tensor, operator: str) -> None:
    torch._check(x.dim() == 4, lambda: f"{operator}: x must have 4 dimensions (n, c, h, w); got {x.dim()}")
    torch._check(x.dtype in FLOATS, lambda: f"{operator}: x must be float32, bfloat16 or float16; got {x.dtype}")


def _empty(x: Tensor, size: tuple) -> Tensor:
    if len(size) == 2:
        return x.new_empty(size)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _register(operator: Operator) -> None:
    name = operator.name

    def empty(x: Tensor, fields: list[int] | str) -> Tensor | list[Tensor]:
        outputs = [_empty(x, size) for size in operator.sizes(x, fields)]
        return outputs if operator.several else outputs[0]

    @torch.library.register_fake(f"mnv2_fused::{name}")
    def _(x, packed, *arguments, **named):
        _check_input(x, name)
        return empty(x, named[operator.fields] if operator.fields in named else arguments[0])

    def fake(x, tensors, cache, eps, fields, bounds):
        _check_input(x, f"cached_{name}")
        return empty(x, fields)

    def on_cuda(x, tensors, cache, eps, fields, bounds):
        packed = by_name(cache).packed(tensors, eps, x.dtype, operator.pack)
        if operator.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return operator.run(x, packed, fields, bounds, tf32(x))

    for cached in (operator.cached, operator.cached_grad):
        torch.library.register_fake(cached, fake)
        torch.library.impl(cached.name(), "cuda", on_cuda)
        CUDA_KERNELS[cached] = on_cuda
        loop_over_batches(cached)
        register_decomposition(cached)(DECOMPOSITIONS[cached])
        # Fake tensors of symbolic sizes would otherwise run the decomposition instead of the fake kernel.
        meta_table[cached] = DECOMPOSITIONS[cached]
        cached.tags.append(torch.Tag.cudagraph_unsafe)  # torch's stable C++ interface has no tags


class _Gradients(torch.autograd.Function):
    """A `cached_*_grad` operator, with the gradients of its decomposition. `torch.library.register_autograd` sees no
    tensors in a list that holds None.
    """

    @staticmethod
    def forward(operator, there, others, x, *given):
        with torch._C._AutoDispatchBelowAutograd():
            y = operator.cached(x, _spread(given, there), *others)
        return tuple(y) if operator.several else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, ctx.there, ctx.others, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *dys):
        x, *given = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        arguments = (x, _spread(given, ctx.there), *ctx.others)
        return None, None, None, *gradients(ctx.operator.cached, arguments, (x, *given), needs, dys)


def _spread(given: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    """The list of tensors of which `given` are those that are not None."""
    rest = iter(given)
    return [next(rest) if is_there else None for is_there in there]


def _register_gradients(operator: Operator) -> None:
    @torch.library.impl(operator.cached_grad.name(), "Autograd")
    def _(x, tensors, *others):
        given = [t for t in tensors if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given)):
            if torch._C._are_functorch_transforms_active():  # which take no autograd.Function here
                return DECOMPOSITIONS[operator.cached](x, tensors, *others)
            y = _Gradients.apply(operator, [t is not None for t in tensors], others, x, *given)
            return list(y) if operator.several else y
        with torch._C._AutoDispatchBelowAutograd():
            return operator.cached(x, tensors, *others)


def _register_frozen() -> None:
    frozen = torch.ops.mnv2_fused.frozen_network.default

    @torch.library.register_fake(frozen)
    def _(x, cache, units):
        _check_input(x, "frozen_network")
        return [_empty(x, size) for size in NETWORK.sizes(x, units)]

    @torch.library.impl(frozen.name(), ("cpu", "cuda"))
    def _(x, cache, units):
        y = run_traced(by_name(cache), x, units)
        if y is None:
            raise RuntimeError(
                "frozen_network: the network must be what it was when this graph was traced, and run as one operator, "
                "but it has changed or is gone; the next call of the compiled function traces it anew"
            )
        return y

    loop_over_batches(frozen)
    frozen.tags.append(torch.Tag.cudagraph_unsafe)


def _call_from_inductor(lowering: ModuleType) -> None:
    """Makes Inductor call the `cached_*` operators. It would by itself, but if the environment has the variable CI, it
    takes a registered decomposition of such an operator for a mistake.
    """
    for cached in DECOMPOSITIONS:
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(cached, with_default=True))
        lowering.make_fallback(cached, constraint, warn=False)


for _operator in OPERATORS:
    _register(_operator)
    _register_gradients(_operator)
_register_frozen()
when_imported("torch._inductor.lowering", _call_from_inductor)
