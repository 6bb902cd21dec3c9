"""PEP 517 backend: setuptools' own, but it builds against the torch of the environment that the wheel is for.

Build isolation hides that environment's site-packages. The extension should still be built against exactly the torch
that it will run with, and pip should not download a second one. The isolated build runs under the target's
interpreter, so `sysconfig` names the target's directories. If they hold a torch, their directory is added to the end of
`sys.path`, behind the build environment's own packages. If they hold none, torch becomes a build requirement.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks taken over unchanged)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

TORCH_FLOOR = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11,<2.14"
CMAKE_FLOOR = (3, 24)


def _version(text: str) -> tuple[int, int] | None:
    """The first `major.minor` in `text`, or None."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def target_directories() -> list[Path]:
    """Directories that hold the target environment's packages, even if build isolation hides them."""
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return list(dict.fromkeys(Path(name) for name in names if name))


def torch_version(directory: Path) -> tuple[int, int] | None:
    """`(major, minor)` of the torch installed in `directory`, read without importing it; None if there is none."""
    try:
        text = (directory / "torch" / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return _version(match[1]) if match else None


def find_target_torch() -> Path | None:
    """The target's directory that holds a torch of at least TORCH_FLOOR, or None."""
    for directory in target_directories():
        version = torch_version(directory)
        if version is not None and version >= TORCH_FLOOR:
            return directory
    return None


def add_target_to_path() -> None:
    """Appends the target's directory that holds torch to `sys.path`."""
    directory = find_target_torch()
    if directory is not None and str(directory) not in sys.path:
        sys.path.append(str(directory))


def _tool_is_missing(tool: str, floor: tuple[int, int] | None = None) -> bool:
    path = shutil.which(tool)
    if path is None:
        return True
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return True
    version = _version(answer)
    return version is None or (floor is not None and version < floor)


def build_requirements() -> list[str]:
    """Requirements of the build that this machine does not meet."""
    add_target_to_path()
    requirements = []
    if find_target_torch() is None:
        requirements.append(TORCH_REQUIREMENT)
    if _tool_is_missing("cmake", CMAKE_FLOOR):
        requirements.append(f"cmake>={CMAKE_FLOOR[0]}.{CMAKE_FLOOR[1]}")
    if _tool_is_missing("ninja"):
        requirements.append("ninja")
    if importlib.util.find_spec("pybind11") is None:
        requirements.append("pybind11>=2.13")
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *build_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *build_requirements()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    add_target_to_path()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    add_target_to_path()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
