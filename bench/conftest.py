"""Options and the networks that all benchmarks compare."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mnv2_fused
from mnv2_fused import measure
from mnv2_fused.weights import randomize_batch_norm


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, default=2.0, help="about how long to measure each engine in each case (default 2)"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["mnv2_fused"] = measure.environment()


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--seconds")


@pytest.fixture(scope="session")
def fused() -> nn.Module:
    torch.manual_seed(0)
    model = mnv2_fused.MobileNetV2().eval()
    randomize_batch_norm(model)
    return model


@pytest.fixture(scope="session")
def plain(fused: nn.Module) -> nn.Module:
    """The same weights in plain PyTorch, in the layout that suits PyTorch best."""
    model = mnv2_fused.MobileNetV2(fused=False).eval()
    model.load_state_dict(fused.state_dict())
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="session")
def plain_contiguous(fused: nn.Module) -> nn.Module:
    model = mnv2_fused.MobileNetV2(fused=False).eval()
    model.load_state_dict(fused.state_dict())
    return model


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Leaves every single timing out of what is stored: medians and extra_info are what counts."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
