"""The mixin of networks for classification, and their head."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnv2_fused import training
from mnv2_fused._core import call, operators
from mnv2_fused._core.decide import Unit
from mnv2_fused._core.profile import region
from mnv2_fused._core.read import ConvParts, read_dense, read_head, runs_as_module
from mnv2_fused._core.run import run
from mnv2_fused._core.specs import DenseSpec, HeadSpec
from mnv2_fused.models.fused import (
    NETWORK,
    Asked,
    Entry,
    FusedModel,
    FusedSequential,
    Walk,
    as_one,
    chain,
    keeps_forward,
    layer_parts,
)

__all__ = ["HEAD", "LAST", "FusedNetwork", "features_reason"]


class FusedNetwork(FusedModel):
    """A network: `features`, pooling over all pixels, and a `classifier`."""

    _plain_methods = (("_forward_impl", "_forward_plain"),)  # torchvision's forward only calls this method

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        else:
            return self._forward_fused(x)

    @torch.jit.unused
    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (n, 3, h, w) to the last convolution's output (n, channels, h_out, w_out), as `features` does.
        `forward_head` continues.
        """
        return self.features(x)

    @torch.jit.unused
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps the output of `forward_features` to the classifier's output; with ``pre_logits`` to the pooled features
        (n, channels), which the classifier takes.
        """
        return _pooled(x) if pre_logits else self._tail_plain(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        outputs = run(NETWORK, self, x)
        if outputs is not None:
            return outputs[0]
        if not self._units_run_here(x):
            return self._forward_plain(x)
        y = as_one(self.features, x, inside=True)
        return self._forward_units(x) if y is None else self._tail_plain(y)

    @torch.jit.unused
    def _units_run_here(self, x: Tensor) -> bool:
        """Whether the units may run without a call of `features`."""
        return self.fused and features_reason(self) is None and call.call_reason(x) is None and x.dim() == 4

    @torch.jit.unused
    def _forward_units(self, x: Tensor) -> Tensor:
        *units, last = self.features
        walk = Walk(x)
        for unit in units:
            walk.step(unit)
        if walk.fusible:
            with region(self, "head"):
                y = run(HEAD, self, walk.x)
            if y is not None:
                return y
        walk.step(last)
        return self._tail_plain(walk.x)

    @torch.jit.unused
    def _asked(self) -> list[Asked]:
        last = self.features[-1] if isinstance(self.features, nn.Sequential) and len(self.features) > 0 else None
        # Without a classifier that HEAD can compute, the head is the last convolution; what follows runs as it is.
        return [Asked("head", LAST if isinstance(_read_head(self, False), str) else HEAD, self, last)]

    @torch.jit.unused
    def _wholes(self) -> list[tuple[Unit, Any]]:
        return [(NETWORK, self), (HEAD, self)]

    @torch.jit.unused
    def _entries(self) -> list[Entry] | str:
        reason = features_reason(self)
        if reason is not None:
            return reason
        if len(self.features) < 2:
            return "there is no unit before the head"
        entries = chain(list(self.features)[:-1])
        return [*entries, Entry(HEAD, self, len(entries) - 1, tap=True)]

    @torch.jit.unused
    def _network_key(self) -> tuple[Any, ...]:
        children = self.__dict__["_modules"]
        return children["features"], children["classifier"], self.__dict__["training"]

    def _tail_plain(self, x: Tensor) -> Tensor:
        return self.classifier(_pooled(x))


def _pooled(x: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


def features_reason(network: nn.Module) -> str | None:
    """Why the units of `network` must be called as its plain forward calls them."""
    reason = _sequence_reason(network)
    return "features has hooks" if reason is None and runs_as_module(network.features) else reason


def _sequence_reason(network: nn.Module) -> str | None:
    """Why the last of the features does not compute their output."""
    features = network.features
    if not keeps_forward(features, nn.Sequential) and not keeps_forward(features, FusedSequential):
        return "features has a forward of its own"
    return None if len(features) > 0 else "features is empty"


def _last_parts(network: nn.Module) -> ConvParts | str:
    """The parts of the last convolution, or the reason why it must run plain."""
    return _sequence_reason(network) or layer_parts(network.features[-1], "features.-1")


def _read_head(network: nn.Module, train: bool) -> HeadSpec | DenseSpec | str:
    """The spec of the head. In training only the last convolution runs fused, so this is the convolution's spec."""
    parts = features_reason(network) or _last_parts(network)
    if not train:
        return read_head(parts, network.classifier)
    if not isinstance(parts, str):
        trains = torch.is_grad_enabled() or parts.norm.training or torch.is_autocast_enabled("cpu")
        if trains:
            return read_dense(parts, train=True)
    head = read_head(parts, network.classifier)
    return head if isinstance(head, str) else "there is nothing to train"


def _read_last(network: nn.Module, train: bool) -> DenseSpec | str:
    spec = read_dense(_last_parts(network), train)
    return spec if isinstance(spec, str) or spec.shape.kernel == 1 else "features.-1 is not a 1x1 convolution"


def _train_head(x: Tensor, spec: DenseSpec, prepared: Any, network: nn.Module) -> Tensor:
    return network._tail_plain(training.train_dense(x, spec, prepared, network))


def _head_key(network: nn.Module) -> tuple[Any, ...]:
    children = network.__dict__["_modules"]
    return children["features"], children["classifier"]


HEAD = Unit(operators.HEAD, _read_head, _head_key, training.prepare, _train_head)
LAST = Unit(operators.DENSE, _read_last, _head_key, training.prepare, _train_head)
