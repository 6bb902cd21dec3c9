"""Builds the binaries with CMake and ninja and puts them beside the Python files. pyproject.toml has the rest."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, os.fspath(ROOT / "build_tools"))
import cuda_build  # noqa: E402


def package_directory(name: str) -> Path:
    """The directory of the installed package `name`. It is not imported, because importing torch takes seconds."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"mnv2_fused: the build needs {name}, which this environment ({sys.prefix}) does not have. "
            "Without build isolation install the build requirements first: "
            'pip install "setuptools>=77" cmake ninja pybind11 "torch>=2.11"'
        )
    return Path(spec.origin).parent


def tool(name: str) -> str:
    """The path of a build tool."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"mnv2_fused: the build needs {name} on the PATH. Install it with: pip install {name}")
    return path


def run(*command: str | os.PathLike) -> None:
    line = [os.fspath(part) for part in command]
    print("+", shlex.join(line), flush=True)
    if subprocess.run(line).returncode != 0:
        raise SystemExit(f"mnv2_fused: the build failed in: {shlex.join(line)}. The compiler's output is above.")


class CMakeBuild(build_ext):
    """One CMake project builds every binary. setuptools knows only the extension `_C`; the libraries come with it."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = tool("cmake"), tool("ninja")
        torch, pybind11 = package_directory("torch"), package_directory("pybind11")
        # build_ext copies only _C into the source tree, so CMake installs all binaries to their final place.
        editable = self.editable_mode or self.inplace
        destination = ROOT / "mnv2_fused" if editable else Path(self.build_lib).resolve() / "mnv2_fused"
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        destination.mkdir(parents=True, exist_ok=True)
        # Build environments are temporary: cached paths into the last one are wrong, but object files stay valid.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(
            cmake,
            "-S",
            ROOT,
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DTORCH_DIR={torch}",
            f"-DMNV2_FUSED_TORCH_VERSION={runpy.run_path(os.fspath(torch / 'version.py'))['__version__']}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}",
            f"-DMNV2_FUSED_VERSION={self.distribution.get_version()}",
            *cuda_build.cmake_options(torch),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        run(cmake, "--build", build, *([f"-j{self.parallel}"] if self.parallel else []))
        run(cmake, "--install", build, "--prefix", destination)
        if editable:  # build_ext looks for _C at this path
            built = Path(self.get_ext_fullpath(ext.name))
            source = destination / built.name
            if built.resolve() != source.resolve():
                built.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, built)


setup(ext_modules=[Extension("mnv2_fused._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
