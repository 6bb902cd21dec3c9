"""Fixtures and helpers for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `import oracle`


# One thread a test process: pytest -n runs several of them, and threads of theirs that wait for one another spin.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


_libraries: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def torchvision_mobilenetv2():
    """torchvision.models.mobilenetv2, or a skip with the reason."""
    try:
        import torchvision.models.mobilenetv2 as module

        return module
    except ImportError as error:
        if "torchvision" not in sys.modules and "torchvision" in str(error):
            pytest.skip("torchvision is not installed (pip install --no-deps 'torchvision==0.28.*')")
        pytest.skip(f"torchvision cannot be imported: {error}")
    except RuntimeError:
        # A CUDA build beside a CPU-only torch: its import only wants these operators to exist.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
    try:
        import torchvision.models.mobilenetv2 as module
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return module
