"""The build backend's search for the target's torch, and the facts that several files state."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mnv2_fused
from mnv2_fused import _C

ROOT = Path(__file__).resolve().parent.parent
BACKEND = ROOT / "build_tools" / "backend.py"


@pytest.fixture
def backend():
    pytest.importorskip("setuptools", reason="the build backend needs setuptools")
    spec = importlib.util.spec_from_file_location("backend_under_test", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def target(backend, monkeypatch, tmp_path):
    """A target environment; returns a function that installs a torch of some version into it."""
    directory = tmp_path / "site-packages"
    directory.mkdir()
    monkeypatch.setattr(backend, "target_directories", lambda: [tmp_path / "none", directory])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def install(content: str) -> Path:
        (directory / "torch").mkdir()
        (directory / "torch" / "version.py").write_text(content, encoding="utf-8")
        return directory

    return install


@pytest.mark.parametrize(
    ("content", "version"),
    [
        ("__version__ = '2.13.0+cpu'\n", (2, 13)),
        ('from typing import Optional\n__all__ = ["__version__"]\n__version__ = "2.11.0a0+git12"\n', (2, 11)),
        ("__version__: str = '3.0.1'", (3, 0)),
        ("debug = False\n", None),
        ("", None),
    ],
)
def test_torch_version_is_read_without_importing(backend, target, content, version):
    assert backend.torch_version(target(content)) == version


def test_torch_version_of_the_one_in_use(backend):
    got = backend.torch_version(Path(torch.__file__).parent.parent)
    assert got == tuple(int(part) for part in torch.__version__.split(".")[:2])


def test_a_torch_in_the_target_is_taken(backend, target):
    directory = target("__version__ = '2.12.1'")
    assert backend.find_target_torch() == directory
    assert not [r for r in backend.build_requirements() if r.startswith("torch")]
    assert sys.path[-1] == str(directory), "at the end: the build environment's own packages come first"
    backend.add_target_to_path()
    assert sys.path.count(str(directory)) == 1


@pytest.mark.parametrize("content", [None, "__version__ = '2.10.2'", "nothing"])
def test_without_a_usable_torch_one_is_required(backend, target, content):
    if content:
        target(content)
    assert backend.find_target_torch() is None
    before = list(sys.path)
    assert "torch>=2.11,<2.14" in backend.build_requirements()
    assert sys.path == before


def test_tools_are_required_only_where_they_are_missing(backend, target, monkeypatch, tmp_path):
    target("__version__ = '2.13.0'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [re.split(r"\W", r)[0] for r in backend.build_requirements()] == ["cmake", "ninja", "pybind11"]

    (tmp_path / "bin").mkdir()
    for tool, answer in {"cmake": "cmake version 3.30.1", "ninja": "1.11"}.items():
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert backend.build_requirements() == []


@pytest.mark.parametrize("answer", ["echo cmake version 3.10.2", "exit 1", "echo hello"])
def test_an_old_or_broken_cmake_does_not_count(backend, target, monkeypatch, tmp_path, answer):
    (tmp_path / "cmake").write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cmake>=3.24" in backend.build_requirements()


def test_every_hook_is_there(backend):
    for kind in ("wheel", "editable"):
        for hook in ("build", "get_requires_for_build", "prepare_metadata_for_build"):
            assert callable(getattr(backend, f"{hook}_{kind}"))
    assert backend.build_sdist is backend.build_meta.build_sdist, "a source archive needs no torch"
    assert backend.get_requires_for_build_sdist is backend.build_meta.get_requires_for_build_sdist


def test_torch_is_found_where_site_packages_are_hidden(tmp_path):
    """As in pip's build isolation: the target's interpreter, without the target's packages."""
    home = Path(torch.__file__).parent.parent
    if str(home) not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        pytest.skip(f"torch is not in this environment's own site-packages but in {home}")
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("from . import build_meta", encoding="utf-8")
    (tmp_path / "setuptools" / "build_meta.py").write_text("def __getattr__(name): return None", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(
        "import site, sys\nsys.path = [path for path in sys.path if path not in site.getsitepackages()]",
        encoding="utf-8",
    )
    code = (
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "import backend; requirements = backend.build_requirements()\n"
        "assert not [r for r in requirements if r.startswith('torch')], requirements\n"
        "print(importlib.util.find_spec('torch').origin)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(BACKEND.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == torch.__file__


def toml() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_one_floor_for_torch_and_no_ceiling_at_run_time(backend):
    assert re.search(r'"torch>=2\.11"', toml())
    assert backend.TORCH_REQUIREMENT.startswith("torch>={}.{},<".format(*backend.TORCH_FLOOR))
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    floor = re.search(r"cmake_minimum_required\(VERSION (\d+)\.(\d+)", cmake)
    assert backend.CMAKE_FLOOR == (int(floor[1]), int(floor[2]))


def test_one_version():
    version = re.search(r'^version = "(.+)"', toml(), re.MULTILINE)[1]
    built = _C.build_info()["version"]
    if built == "0.0.0":
        pytest.skip("these binaries were built by cmake alone, without setup.py")
    assert built == version == mnv2_fused.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
