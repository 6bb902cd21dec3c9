"""The build backend's search for torch, facts that several files state, and imports without circles."""

from __future__ import annotations

import ast
import graphlib
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
from mnv2_fused._core import library as _library

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "build_tools" / "backend.py"


def build_tool(path: Path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend():
    pytest.importorskip("setuptools", reason="the build backend needs setuptools")
    return build_tool(BACKEND)


@pytest.fixture
def target(backend, monkeypatch, tmp_path):
    """Makes a target environment. Returns a function that installs a torch of some version into it."""
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
    """Like pip's build isolation: the target's interpreter without the target's packages."""
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


# ------------------------------------------------------------------------------------------------------------ CUDA


@pytest.fixture
def cuda_build(monkeypatch, tmp_path):
    """The module cuda_build, with a torch that has CUDA in tmp_path / "torch", no GPU, and no nvcc unless a test makes
    one.
    """
    module = build_tool(ROOT / "build_tools" / "cuda_build.py")
    for name in ("MNV2_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "USUAL_HOME", tmp_path / "usual")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n", encoding="utf-8")
    return module


def make_tool(path: Path, script: str = "exit 0") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def nvcc_of(version: str) -> str:
    return (
        f"echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'Cuda compilation tools, release {version}, V{version}.8'"
    )


def test_where_nvcc_is_looked_for(cuda_build, monkeypatch, tmp_path):
    assert cuda_build.find_nvcc() is None
    usual = make_tool(tmp_path / "usual" / "bin" / "nvcc")
    assert cuda_build.find_nvcc() == usual
    on_path = make_tool(tmp_path / "bin" / "nvcc")
    assert cuda_build.find_nvcc() == on_path
    for name in ("CUDA_PATH", "CUDA_HOME"):
        of_home = make_tool(tmp_path / name / "bin" / "nvcc")
        monkeypatch.setenv(name, str(tmp_path / name))
        assert cuda_build.find_nvcc() == of_home


@pytest.mark.parametrize(
    ("content", "version"),
    [("cuda: Optional[str] = '13.0'\n", "13.0"), ('cuda = "12.8"', "12.8"), ("cuda: Optional[str] = None\n", None)],
)
def test_cuda_of_torch_is_read_without_importing(cuda_build, tmp_path, content, version):
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{content}", encoding="utf-8")
    assert cuda_build.cuda_of(tmp_path / "torch") == version


def test_cuda_of_the_torch_in_use(cuda_build):
    assert cuda_build.cuda_of(Path(torch.__file__).parent) == torch.version.cuda


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("8.0;9.0a+PTX", ["80-real", "90a"]),
        ("7.0 7.5 8.6 8.6 12.0+PTX", ["86-real", "120"]),
        (" 10.0f ", ["100f-real"]),
        ("Hopper", ["90"]),
        ("Turing;Ampere 9.0a", ["80-real", "86", "90a-real"]),
        ("Ampere+Tegra", ["87-real"]),
    ],
)
def test_architectures_as_pytorch_lists_them(cuda_build, text, architectures):
    assert cuda_build.listed_architectures(text) == architectures


def test_names_of_architectures_are_those_of_pytorch(cuda_build, monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    def flags() -> set[str]:
        return {flag for flag in _get_cuda_arch_flags() if "code=sm_" in flag}

    for name, capabilities in cuda_build.NAMES.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
        named = flags()
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", capabilities)
        assert flags() == named


@pytest.mark.parametrize(
    ("text", "message"),
    [("Hoper", "got 'Hoper'"), ("7.5", "need compute capability 8.0"), ("Pascal Volta", "need compute capability 8.0")],
)
def test_architectures_that_cannot_be(cuda_build, text, message):
    with pytest.raises(SystemExit, match=message):
        cuda_build.listed_architectures(text)


def test_architectures_of_the_gpus_that_are_there(cuda_build, tmp_path):
    assert cuda_build.architectures_of(cuda_build.gpus_here()) == ["80", "90a-real"]
    make_tool(tmp_path / "bin" / "nvidia-smi", "echo 9.0; echo 8.6; echo 9.0; echo 7.5")
    assert cuda_build.architectures_of(cuda_build.gpus_here()) == ["86-real", "90a-real"]
    make_tool(tmp_path / "bin" / "nvidia-smi", "echo no driver; exit 9")
    assert cuda_build.architectures_of(cuda_build.gpus_here()) == ["80", "90a-real"]


def test_cuda_kernels_where_torch_has_cuda_and_there_is_nvcc(cuda_build, monkeypatch, tmp_path, capsys):
    without = tmp_path / "without"
    without.mkdir()
    (without / "version.py").write_text("cuda: Optional[str] = None\n", encoding="utf-8")
    off = ["-DMNV2_FUSED_CUDA=OFF"]

    assert cuda_build.cmake_options(tmp_path / "torch") == off
    assert "no CUDA kernels: there is no nvcc" in capsys.readouterr().out
    make_tool(tmp_path / "bin" / "nvcc", nvcc_of("11.8"))
    assert cuda_build.cmake_options(tmp_path / "torch") == off
    assert re.search(r"no CUDA kernels: \S+nvcc is of CUDA 11\.8, and .* 12\.0 or later", capsys.readouterr().out)
    make_tool(tmp_path / "bin" / "nvcc", "exit 1")
    assert cuda_build.cmake_options(tmp_path / "torch") == off
    assert "nvcc --version names no release" in capsys.readouterr().out
    nvcc = make_tool(tmp_path / "bin" / "nvcc", nvcc_of("12.0"))
    assert cuda_build.cmake_options(without) == off
    assert "no CUDA kernels: the torch in" in capsys.readouterr().out
    on = ["-DMNV2_FUSED_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_CUDA_ARCHITECTURES=80;90a-real"]
    assert cuda_build.cmake_options(tmp_path / "torch") == on
    assert capsys.readouterr().out == f"mnv2_fused: CUDA kernels for 80, 90a-real, by {nvcc}\n"

    monkeypatch.setenv("MNV2_FUSED_CUDA", "0")
    assert cuda_build.cmake_options(tmp_path / "torch") == off
    monkeypatch.setenv("MNV2_FUSED_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert cuda_build.cmake_options(without) == [*on[:2], "-DCMAKE_CUDA_ARCHITECTURES=90a-real"]
    make_tool(tmp_path / "bin" / "nvcc", nvcc_of("11.8"))
    with pytest.raises(SystemExit, match=r"MNV2_FUSED_CUDA=1, but \S+nvcc is of CUDA 11\.8"):
        cuda_build.cmake_options(tmp_path / "torch")
    (tmp_path / "bin" / "nvcc").unlink()
    with pytest.raises(SystemExit, match="MNV2_FUSED_CUDA=1, but there is no nvcc"):
        cuda_build.cmake_options(tmp_path / "torch")
    monkeypatch.setenv("MNV2_FUSED_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1; got 'yes'"):
        cuda_build.cmake_options(tmp_path / "torch")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_cuda_operators_are_loaded_only_where_there_is_a_gpu(monkeypatch, tmp_path):
    path = tmp_path / "libmnv2_fused_cuda.so"
    assert _library._load_cuda(path) == "not built"
    path.write_bytes(b"no library")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _library._load_cuda(path) == "torch sees no GPU"


def test_cuda_operators_that_do_not_load_are_a_warning(gpu, tmp_path):
    path = tmp_path / "libmnv2_fused_cuda.so"
    path.write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match=r"libmnv2_fused_cuda.so does not load beside torch .* GPUs run plain"):
        assert _library._load_cuda(path).startswith("does not load: ")


# --------------------------------------------------------------------------------------------------------- structure


def modules() -> dict[str, Path]:
    package = ROOT / "mnv2_fused"
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    # An import of siblings inside a package does not count as an import of the package's __init__.py.
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {module for module in found if module in known} - {name, package, "mnv2_fused"}


def test_no_circle_of_imports():
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert len(graph) > 40 and graph["mnv2_fused.convert"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_house_numbers():
    paths = [path for folder in ("mnv2_fused", "tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    for path in [ROOT / "setup.py", *paths]:
        name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 100, f"{name}: {node.name} is too long"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 170 and len(readme.split()) <= 2000


def test_stub_of_the_compiled_module_names_what_is_there():
    stub = ast.parse((ROOT / "mnv2_fused" / "_C.pyi").read_text(encoding="utf-8"))
    named = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in dir(_C) if not name.startswith("_")}
