"""Fixtures of all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mnv2_fused import _C, extras

sys.path.insert(0, str(Path(__file__).parent))  # for `import oracle`


# One thread a test process: pytest -n runs several processes, and threads that wait for each other would spin.
torch.set_num_threads(1)
# Tests on several threads use them, also if other tests keep the processors busy.
_C.watch_crowding(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def exact_float32():
    """TF32 is off unless a test allows it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def torchvision_mobilenetv2():
    """torchvision.models.mobilenetv2, or a skip with the reason."""
    try:
        return extras.use("torchvision.models.mobilenetv2", "detection")
    except ImportError as error:
        pytest.skip(str(error))
