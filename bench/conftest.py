"""Options of all benchmarks, and the facts that are stored beside their figures."""

from __future__ import annotations

import pytest

from mnv2_fused.tools import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, default=2.0, help="about how long to measure each engine in each case (default 2)"
    )
    parser.addoption(
        "--compile-training", action="store_true", help="measure torch.compile in training too, minutes to compile"
    )


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--seconds")


def _quick(config: pytest.Config) -> bool:
    return config.getoption("--seconds") < 0.5


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether this is a short try. Then slow measurements run once, on fewer images."""
    return _quick(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "training_batch" in metafunc.fixturenames:
        metafunc.parametrize("training_batch", [16] if _quick(metafunc.config) else [16, 32])
    if "step_batch" in metafunc.fixturenames:
        metafunc.parametrize("step_batch", [16] if _quick(metafunc.config) else [2, 8, 16, 32])


@pytest.fixture(scope="session")
def compile_training(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--compile-training")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["mnv2_fused"] = measure.environment()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Stores medians and extra_info without the single timings, which nothing reads."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
