"""What tests on a GPU share. Without a GPU, importing this skips the file.

float32 is tested twice: with TF32 allowed in convolutions (`torch.backends.cudnn.allow_tf32`), and without. Whether
cuDNN then uses TF32 depends on the shape. So "plain" with TF32 is computed here in float32, with the operands of
convolutions without groups rounded to TF32.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from oracle import assert_close, randomize, to_tf32
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mnv2_fused import MobileNetV2, reference
from mnv2_fused import functional as ops

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU that it can use", allow_module_level=True)

DEVICE = torch.device("cuda")
ARITHMETICS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
WIDTHS = [0.35, 0.5, 0.75, 1.0, 1.4]
SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]
NETWORK = ["network"]

every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)


@contextlib.contextmanager
def tf32(allowed: bool):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class RoundedToTF32(TorchFunctionMode):
    """Rounds what tensor cores would round: both operands of convolutions without groups."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is torch.conv2d and arguments[0].dtype == torch.float32 and (arguments[6:] or (1,))[0] == 1:
            arguments = (*map(to_tf32, arguments[:2]), *arguments[2:])
        return function(*arguments, **(keywords or {}))


def rounding(arithmetic: str) -> contextlib.AbstractContextManager:
    return RoundedToTF32() if arithmetic == "tf32" else contextlib.nullcontext()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def block_weights(c_in: int, c_hidden: int, c_out: int, kernel: int = 3, expand: bool = True) -> list[Tensor | None]:
    """Weights that keep activations of order one, so that both bounds of the clamps apply."""
    weights: list[Tensor | None] = []
    for shape in [(c_hidden, c_in, 1, 1), (c_hidden, 1, kernel, kernel), (c_out, c_hidden, 1, 1)]:
        weights += [randn(*shape) * 2 / (shape[1] * shape[2] * shape[3]) ** 0.5, randn(shape[0])]
    return weights if expand else [None, None, *weights[2:]]


def check_block(
    x: Tensor,
    weights: list[Tensor | None],
    arithmetic: str = "float16",
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, ...] | None = None,
    activation: tuple[float, float] = (0.0, 6.0),
    project_activation: tuple[float, float] | None = None,
) -> Tensor:
    dtype = ARITHMETICS[arithmetic]
    x, weights = x.to(dtype), cast(weights, dtype)
    reach = (weights[2].shape[-1] - 1) * dilation
    padding = (reach // 2,) * 4 if padding is None else padding
    keeps = stride == 1 and padding[0] + padding[2] == padding[1] + padding[3] == reach
    options = {"stride": stride, "dilation": dilation, "padding": padding, "activation": activation}
    options["project_activation"] = project_activation
    options["residual"] = keeps and x.shape[1] == weights[4].shape[0]
    with tf32(arithmetic == "tf32"):
        got = ops.run_block(x, ops.pack_block(*weights), **options)
    with rounding(arithmetic):
        expected = reference.inverted_residual(x.clone(), *weights, **options)  # a clone is aligned; cuDNN may need it
    assert_close(got, expected, reference.inverted_residual(x.double(), *cast(weights, torch.float64), **options))
    assert got.device == x.device and got.stride() == torch.empty_like(got, memory_format=format_of(x)).stride()
    return got


def format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def make_model(width: float = 1.0, classes: int = 100, size: int = 64, **options) -> MobileNetV2:
    """A network on the GPU, in eval mode, with random batch-norm statistics."""
    model = MobileNetV2(classes, width, **options)
    return randomize(model, torch.randn(4, 3, size, size)).to(DEVICE)


def make_small(**options) -> MobileNetV2:
    return make_model(0.5, 7, 40, inverted_residual_setting=SMALL, **options)


def captured(model: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), torch.no_grad():
        y = model(x)
    return graph, y


def _step(model: nn.Module) -> None:
    parameter = model.features[1].conv[-2].weight
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


CHANGES = {
    "in place": lambda m: m.features[2].conv[0][0].weight.mul_(1.5),
    "one element": lambda m: m.features[0][0].weight[0, 0, 0, 0].add_(1.0),
    "statistics": lambda m: m.features[1].conv[0][1].running_var.mul_(1.5),
    "other tensor": lambda m: setattr(m.classifier[1].bias, "data", m.classifier[1].bias.data + 1),
    "optimizer": _step,
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
}
