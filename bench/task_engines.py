"""SSDLite and DeepLabv3 in the engines that a user could run them with, in fp32: inference, and a training step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from engines import FILES, export, reason_of
from runtimes import onnx_runtime, openvino
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused.tools import measure
from mnv2_fused.weights import randomize_batch_norm

FUSED, PLAIN, MASK = "fused", "eager channels_last", "fused, predict_mask"
SSDLITE, DEEPLAB = "SSDLite 320", "DeepLabv3 513"
RESOLUTION = {SSDLITE: 320, DEEPLAB: 513}

Run = Callable[[], object]


class Outputs(nn.Module):
    """A network as a function from normalised images to a tuple of tensors, without boxes and suppression."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        call = getattr(self.model, "head_outputs", self.model)
        return tuple(call(x).values())


@functools.cache
def network(name: str, fused: bool) -> Outputs:
    """A network with 91 or 21 classes in eval mode, with the same weights for every `fused`. It is shared."""
    torch.manual_seed(0)
    make = mnv2_fused.ssdlite320_mobilenet_v2 if name == SSDLITE else mnv2_fused.deeplabv3_mobilenet_v2
    model = make(fused=fused).eval()
    randomize_batch_norm(model)
    return Outputs(model)


def images(name: str, batch: int = 1) -> Tensor:
    size = RESOLUTION[name]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@functools.cache
def _onnx(name: str) -> str:
    FILES.mkdir(exist_ok=True)
    return export(network(name, False), images(name), FILES / f"{name.replace(' ', '-')}.onnx")


def build(name: str, threads: int) -> tuple[dict[str, Run], dict[str, str]]:
    """The engines by name, ready to run one image, and the reasons why others could not be built, by name.

    Raises:
        RuntimeError: an engine's result differs from the plain network's.
    """
    x = images(name)
    with measure.threads(threads), torch.no_grad():
        expected = network(name, False)(x)
        plain = copy.deepcopy(network(name, False)).to(memory_format=torch.channels_last)
        last = _channels_last(x)
        makers: dict[str, Callable[[], Run]] = {
            FUSED: lambda: lambda: network(name, True)(last),
            PLAIN: lambda: lambda: plain(last),
        }
        for engine, run in (("ONNX Runtime", onnx_runtime), ("OpenVINO", openvino)):
            makers[engine] = lambda run=run: run(_onnx(name), x, [torch.empty_like(y) for y in expected], threads)
        engines: dict[str, Run] = {}
        missing: dict[str, str] = {}
        for engine, make in makers.items():
            try:
                made = make()
                got = made()
            except Exception as error:
                if engine == FUSED:
                    raise
                missing[engine] = reason_of(error)
                continue
            relative = max(measure.difference(a, b)[1] for a, b in zip(got, expected, strict=True))
            if not relative < 1e-4:
                raise RuntimeError(
                    f"{engine} differs from plain PyTorch by {relative:.1g} of the largest value: {name}"
                )
            engines[engine] = made
    return engines, missing


@dataclass
class Trainee:
    """A network that trains on one batch again and again. DeepLab's loss is cross entropy at full size."""

    name: str
    fused: bool
    batch: int
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        size = RESOLUTION[self.name]
        detects = self.name == SSDLITE
        make = mnv2_fused.ssdlite320_mobilenet_v2 if detects else mnv2_fused.deeplabv3_mobilenet_v2
        model = make(fused=self.fused).train()
        randomize_batch_norm(model)
        self.model = model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        if detects:
            self.x = list(torch.rand(self.batch, 3, size, size, generator=generator))
            corner = size / 2 * torch.rand(self.batch, 5, 2, generator=generator)
            boxes = torch.cat([corner, corner + size / 8 + size / 4 * torch.rand(corner.shape, generator=generator)], 2)
            self.target = [{"boxes": each, "labels": torch.arange(1, 6)} for each in boxes]
        else:
            self.x = _channels_last(images(self.name, self.batch))
            self.target = torch.randint(21, (self.batch, size, size), generator=generator)

    def loss(self) -> Tensor:
        if self.name == SSDLITE:
            return sum(self.model(self.x, self.target).values())
        return nn.functional.cross_entropy(self.model(self.x)["out"], self.target)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
