"""Optional packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mnv2_fused import extras


def test_missing_package_is_named_with_its_command():
    with pytest.raises(
        ImportError, match=r'no_such_package cannot be imported .*pip install "mnv2_fused\[detection\]"'
    ):
        extras.use("no_such_package.part", "detection")


def test_importing_the_package_imports_no_extra():
    extra = ("torchvision", "torchmetrics", "pycocotools")
    code = f"import sys, mnv2_fused; print(*(name for name in {extra} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_torchvision_imports_beside_this_torch():
    pytest.importorskip("PIL")
    try:
        module = extras.use("torchvision", "detection")
    except ImportError as error:
        pytest.skip(str(error))
    assert module.models.detection.ssd.SSD
