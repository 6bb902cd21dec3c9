"""Both ways in which a block trains, for tests whose inputs are so small that all would take the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mnv2_fused import _C


@pytest.fixture(params=["by channels", "closed form"])
def both_ways(request) -> Iterator[str]:
    before = _C.limit_channels(_C.CHANNELS_PIXELS if request.param == "by channels" else 0)
    yield request.param
    _C.limit_channels(before)
