"""What the tests of training share: the smallest run, and how two runs are compared."""

from __future__ import annotations

import torch

from mnv2_fused import cli, trainer

TINY = {"width": 0.1, "resolution": 32, "batch": 8, "epochs": 2, "threads": 1, "workers": 0}
OPTIONS = [text for key, value in TINY.items() for text in (f"--{key}", str(value))]


def run(*arguments: str) -> int:
    """The exit code of `train`, also if argparse exits by itself."""
    try:
        return cli.main(["train", *arguments])
    except SystemExit as stop:
        return stop.code


def checkpoint(directory) -> dict:
    return torch.load(directory / trainer.CHECKPOINT, weights_only=True)


def assert_same(got, expected, path="checkpoint"):
    assert type(got) is type(expected), path
    if isinstance(got, dict):
        assert got.keys() == expected.keys(), path
        for key in got:
            if key not in ("images_per_s", "peak_memory_bytes", "arguments"):
                assert_same(got[key], expected[key], f"{path}.{key}")
    elif isinstance(got, list):
        assert len(got) == len(expected), path
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"{path}.{i}")
    else:
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected, path
