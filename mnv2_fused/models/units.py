"""The fused layers of this package's own networks. Each runs plain PyTorch if it cannot run fused."""

# No `from __future__ import annotations`: TorchScript reads these classes' annotations and does not parse strings.

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mnv2_fused._core.read import BlockParts, read_block
from mnv2_fused._core.run import run
from mnv2_fused.models.fused import BLOCK, FusedBlock, FusedDense, FusedSequential
from mnv2_fused.models.layers import Conv2dNormActivation, Conv2dSame

__all__ = [
    "AFTER_EXPANSION",
    "PROJECT_ACTIVATIONS",
    "SHORTCUTS",
    "ExpansionFeatures",
    "ExpansionResidual",
    "Features",
    "FusedConv2dNormActivation",
    "InvertedResidual",
    "TappedInvertedResidual",
    "variant",
]

# The paper's come first. Files and the command line use these names.
PROJECT_ACTIVATIONS = {"linear": None, "relu6": nn.ReLU6}
SHORTCUTS = ("bottleneck", "expansion", "none")


class FusedConv2dNormActivation(FusedDense, Conv2dNormActivation):
    """A `Conv2dNormActivation` that runs as one fused operator: a dense convolution, batch norm and ReLU6 or ReLU.

    Takes `Conv2dNormActivation`'s arguments. Shapes: (n, in_channels, h, w) to (n, out_channels, h_out, w_out), in
    float32, bfloat16 or float16; plain PyTorch computes other dtypes.
    """

    def _forward_plain(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input


class InvertedResidual(FusedBlock):
    """1x1 expand, BN, ReLU6, 3x3 depthwise, BN, ReLU6, 1x1 project, BN, and a shortcut if the shapes allow one.

    Takes torchvision's arguments, has its state-dict keys and attributes, and can be given to torchvision's
    ``MobileNetV2`` as ``block=``. Runs as one fused operator in float32, bfloat16 and float16: on the CPU in inference
    and training, on CUDA GPUs of compute capability 8.0 or later in inference. Everything else runs plain PyTorch;
    `mnv2_fused.explain` tells which, and why.

    Args:
        inp, oup: channels of input and output.
        stride: 1 or 2.
        expand_ratio: hidden channels over input channels; 1 leaves the expansion out.
        norm_layer: makes a norm from a channel count, ``nn.BatchNorm2d`` by default.
        dilation: of the depthwise convolution.
        tf_padding: pad a strided depthwise convolution as TensorFlow's "SAME" does (see `Conv2dSame`).
        project_activation: makes an activation without parameters behind the projection, before the shortcut is added,
            for example ``nn.ReLU6``. None is the paper's linear bottleneck.
        shortcut: what is added if the shapes allow it. ``"bottleneck"``, the paper's: the input to the output.
            ``"expansion"``: the depthwise output of the block before to this block's; it makes an `ExpansionResidual`,
            which runs plain. ``"none"``: nothing.
        fused: False always runs plain PyTorch.

    All values of ``project_activation`` and ``shortcut`` have the same state-dict keys. See section 6.4 and Figure 6 of
    the MobileNetV2 paper.

    Shapes: (n, inp, h, w) to (n, oup, ceil(h / stride), ceil(w / stride)).

    Raises:
        ValueError: ``stride``, ``project_activation`` or ``shortcut`` has another value, or the class is a subclass
            without a shortcut between expansions.
    """

    _shortcuts = ("bottleneck", "none")  # which the class computes

    def __new__(cls, *args: Any, shortcut: str = "bottleneck", **kwargs: Any) -> "InvertedResidual":
        # A class of its own, because its forward takes more than x.
        return super().__new__(ExpansionResidual if cls is InvertedResidual and shortcut == "expansion" else cls)

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dilation: int = 1,
        tf_padding: bool = False,
        project_activation: Callable[..., nn.Module] | None = None,
        shortcut: str = "bottleneck",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        check_shortcut(shortcut)
        if shortcut not in self._shortcuts:
            allowed = " or ".join(self._shortcuts)
            raise ValueError(f"shortcut of a {type(self).__name__} should be {allowed}, got {shortcut!r}")
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        hidden = round(inp * expand_ratio)
        self.stride = stride
        self.use_res_connect = shortcut == "bottleneck" and stride == 1 and inp == oup

        conv_norm_act = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(conv_norm_act(inp, hidden, kernel_size=1))
        conv_layer = Conv2dSame if tf_padding and stride > 1 else nn.Conv2d
        layers += [
            conv_norm_act(hidden, hidden, stride=stride, dilation=dilation, groups=hidden, conv_layer=conv_layer),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            norm_layer(oup),
        ]
        self.conv = nn.Sequential(*layers)
        self.project_activation = make_activation(project_activation)
        self.out_channels = oup
        self._is_cn = stride > 1
        if not fused:
            self.fused = False

    def _forward_plain(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.project_activation is not None:
            y = self.project_activation(y)
        if self.use_res_connect:
            y = x + y
        return y

    @torch.jit.unused
    def _key(self) -> tuple[Any, ...]:
        return *super()._key(), self.project_activation

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        parts = super()._parts()
        if isinstance(parts, str) or self.project_activation is None:
            return parts
        names = (*parts.project.names[:2], "project_activation")
        return parts._replace(project=parts.project._replace(activation=self.project_activation, names=names))


class TappedInvertedResidual(InvertedResidual):
    """An `InvertedResidual` with expansion that can also return its expanded map.

    Takes `InvertedResidual`'s arguments, and has its state-dict keys. ``conv[0]`` is a unit of its own. What follows it
    is another one: a block without expansion.
    """

    def __init__(self, *args: Any, norm_layer: Callable[..., nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, norm_layer=norm_layer, **kwargs)
        conv = self.conv[0][0]
        self.conv[0] = FusedConv2dNormActivation(
            conv.in_channels,
            conv.out_channels,
            kernel_size=1,
            norm_layer=norm_layer or nn.BatchNorm2d,
            activation_layer=nn.ReLU6,
        )

    def forward(self, x: Tensor, with_expansion: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Maps x (n, inp, h, w) to the block's output, and if asked to also to conv.0's output (n, hidden, h, w)."""
        if not with_expansion:
            return super().forward(x)
        expanded = self.conv[0](x)
        y = run(AFTER_EXPANSION, self, expanded)
        if y is None:
            y = expanded
            for module in self.conv[1:]:
                y = module(y)
            if self.project_activation is not None:
                y = self.project_activation(y)
        return (x + y if self.use_res_connect else y), expanded

    def _after_expansion(self) -> BlockParts | str:
        parts = self._parts()
        return parts if isinstance(parts, str) else parts._replace(expand=None, shortcut=False)


AFTER_EXPANSION = BLOCK._replace(
    read=lambda block, train: read_block(block._after_expansion(), train),
    # Not the key of the whole block: both keep their readings in the same cache.
    key=lambda block: (*block._key(), "after the expansion"),
)


class ExpansionResidual(InvertedResidual):
    """An `InvertedResidual` whose shortcut leads from the depthwise output of the block before to its own.

    Takes `InvertedResidual`'s arguments, and has its state-dict keys. Runs plain. A call with x alone has no shortcut.
    ``carried_channels`` is the number of its hidden channels.
    """

    _shortcuts = ("expansion",)

    def __init__(self, *args: Any, shortcut: str = "expansion", **kwargs: Any) -> None:
        super().__init__(*args, shortcut=shortcut, **kwargs)
        self.carried_channels = self.conv[-2].in_channels

    def forward(self, x: Tensor, carried: list[Tensor] | None = None) -> Tensor:
        """Maps x (n, inp, h, w) to (n, oup, h_out, w_out).

        ``carried`` holds nothing, or the map that is added to the depthwise output (n, hidden, h_out, w_out). The sum
        takes its place.
        """
        y = x
        for i, module in enumerate(self.conv):
            if i == len(self.conv) - 2 and carried is not None:  # the next one is the projection
                if len(carried) > 0:
                    y = y + carried.pop()
                carried.append(y)
            y = module(y)
        if self.project_activation is not None:
            y = self.project_activation(y)
        return y

    @torch.jit.unused
    def _parts(self) -> BlockParts | str:
        return "its shortcut takes the expansion of another block"


class Features(FusedSequential, nn.Sequential):
    """The units of a network: an ``nn.Sequential`` that changes the memory format at its ends at most."""

    def _forward_plain(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input


class ExpansionFeatures(nn.Sequential):
    """The units of a network with shortcuts between expansions.

    An `ExpansionResidual` of stride 1 gets the depthwise output of the unit before it, if this is such a block with as
    many hidden channels.
    """

    def forward(self, input: Tensor) -> Tensor:
        carried: list[Tensor] = []
        channels = 0
        for unit in self:
            if hasattr(unit, "carried_channels"):  # TorchScript has no isinstance for modules
                if unit.stride != 1 or unit.carried_channels != channels:
                    carried.clear()
                input = unit(input, carried)
                channels = unit.carried_channels
            else:
                input, channels = unit(input), 0
        return input


def variant(project_activation: str = "linear", shortcut: str = "bottleneck") -> dict[str, Any]:
    """The arguments of `MobileNetV2` and its blocks for a name in `PROJECT_ACTIVATIONS` and one in `SHORTCUTS`."""
    return {"project_activation": PROJECT_ACTIVATIONS[project_activation], "shortcut": shortcut}


def check_shortcut(shortcut: str) -> None:
    """Raises ValueError for a shortcut that does not exist."""
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut should be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")


def make_activation(make: Callable[..., nn.Module] | None) -> nn.Module | None:
    """The activation behind a projection, or None. Raises ValueError."""
    if make is None:
        return None
    activation = make() if callable(make) and not isinstance(make, nn.Module) else None
    if not isinstance(activation, nn.Module) or len(activation.state_dict()) > 0:
        raise ValueError(
            f"project_activation should be None or make a module without parameters, as nn.ReLU6 does; got {make!r}"
        )
    return activation
