"""Decides whether the CUDA library is built, with which compiler, and for which GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SWITCH = "MNV2_FUSED_CUDA"
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
# The kernels' oldest capability, with PTX that newer GPUs compile at load, and Hopper.
DEFAULT = ["80", "90a-real"]
OLDEST = 80
# The first CUDA release whose compiler has C++20 and Hopper.
OLDEST_NVCC = 12
# Names of GPU generations that PyTorch's extensions accept in place of capabilities.
NAMES = {
    "Kepler": "3.5",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0;5.2",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1",
    "Volta": "7.0",
    "Volta+Tegra": "7.2",
    "Turing": "7.5",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
USUAL_HOME = Path("/usr/local/cuda")
MISSING = f"there is no nvcc on the PATH, in CUDA_HOME, in CUDA_PATH or in {USUAL_HOME}"


def find_nvcc() -> str | None:
    """The path of nvcc in CUDA_HOME, CUDA_PATH, the PATH or USUAL_HOME, in this order; None if there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [*(os.path.join(home, "bin") for home in homes if home), os.environ.get("PATH", ""), USUAL_HOME / "bin"]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def nvcc_version(nvcc: str) -> str | None:
    """The CUDA release of a compiler, such as "13.0"; None if it does not print one."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else None


def nvcc_reason(nvcc: str | None) -> str | None:
    """Why `nvcc` cannot build the kernels; None if it can."""
    if nvcc is None:
        return MISSING
    version = nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} --version names no release"
    if int(version.split(".")[0]) < OLDEST_NVCC:
        return f"{nvcc} is of CUDA {version}, and the kernels need {OLDEST_NVCC}.0 or later"
    return None


def cuda_of(torch: Path) -> str | None:
    """The CUDA version of the torch package in the directory `torch`, read without importing it; None without CUDA."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\s*(?::[^=]*)?=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return match[1] if match else None


def listed_architectures(text: str) -> list[str]:
    """CMAKE_CUDA_ARCHITECTURES for a list in the form of PyTorch's extensions: "8.0;9.0a+PTX", "8.0 9.0", "Hopper".

    +PTX adds code that newer GPUs compile at load. Capabilities below 8.0 are left out. Raises SystemExit if an entry
    is neither a capability nor a name, or if none is left.
    """
    found = []
    named = [NAMES.get(entry, entry) for entry in re.split(r"[;\s]+", text.strip())]
    for entry in ";".join(named).split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(
                f'mnv2_fused: {ARCHITECTURES} must list compute capabilities, such as "8.0;9.0a+PTX", '
                f'or names such as "Hopper"; got {entry!r}'
            )
        major, minor, variant, ptx = match.groups()
        if int(major + minor) >= OLDEST:
            found.append(major + minor + variant + ("" if ptx else "-real"))
    if not found:
        raise SystemExit(f"mnv2_fused: the CUDA kernels need compute capability 8.0; {ARCHITECTURES} is {text!r}")
    return list(dict.fromkeys(found))


def architectures_of(capabilities: Iterable[str]) -> list[str]:
    """CMAKE_CUDA_ARCHITECTURES for GPUs of these compute capabilities ("9.0"); DEFAULT if none is 8.0 or later."""
    numbers = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", "\n".join(capabilities))})
    # Plain 9.0 would leave out Hopper's own instructions.
    return [f"{n}a-real" if n == 90 else f"{n}-real" for n in numbers if n >= OLDEST] or DEFAULT


def gpus_here() -> list[str]:
    """Compute capabilities of this machine's GPUs."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def cmake_options(torch: Path) -> list[str]:
    """CMake's options for a build against the torch package in the directory `torch`; prints the decision and why.

    Raises SystemExit if MNV2_FUSED_CUDA has a wrong value, or is 1 and there is no usable nvcc.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"mnv2_fused: {SWITCH} must be 0 or 1; got {switch!r}")
    nvcc = find_nvcc()
    if switch == "0":
        reason = f"{SWITCH}=0"
    elif switch == "" and cuda_of(torch) is None:
        reason = f"the torch in {torch} has no CUDA"
    elif (missing := nvcc_reason(nvcc)) is not None:
        if switch == "1":
            raise SystemExit(f"mnv2_fused: {SWITCH}=1, but {missing}")
        reason = missing
    else:
        listed = os.environ.get(ARCHITECTURES)
        architectures = listed_architectures(listed) if listed else architectures_of(gpus_here())
        print(f"mnv2_fused: CUDA kernels for {', '.join(architectures)}, by {nvcc}", flush=True)
        return [
            f"-D{SWITCH}=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
        ]
    print(f"mnv2_fused: no CUDA kernels: {reason}", flush=True)
    return [f"-D{SWITCH}=OFF"]
