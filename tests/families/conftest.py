"""Optional libraries of the tests of other libraries' models."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def timm(torchvision_mobilenetv2):
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def blocks(timm):
    return pytest.importorskip("timm.models._efficientnet_blocks")
