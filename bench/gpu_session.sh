#!/usr/bin/env bash
# Everything that takes a GPU, in under nine minutes: build, tests, benchmarks, compute-sanitizer, torch.compile.
#
#   bench/gpu_session.sh [STEP...]     steps: build tests bench memcheck racecheck compiled (default: all, in this order)
#
# Needs python3 with torch, nvcc and a GPU; downloads nothing. Logs, cuda.json and cuda.md go to $OUT, or to
# bench/results/gpu. A step that fails or takes too long is recorded, and the next one begins. MINUTES (default 8.8) is
# the time for all steps together.
set -uo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results/gpu}
mkdir -p "$out" build/gpu_session || exit 1
out=$(cd "$out" && pwd)
site=$PWD/build/gpu_session/site
end=$(python3 -c "print(int(60 * ${MINUTES:-8.8}))") || exit 1
if [ $# -gt 0 ]; then steps=" $* "; else steps=" build tests bench memcheck racecheck compiled "; fi
unset TORCH_CUDA_ARCH_LIST # the GPU that is here decides
PATH="$(python3 -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH:/usr/local/cuda/bin"
export PATH MNV2_FUSED_CUDA=1 PYTHONUNBUFFERED=1
# What was built, and not what may lie in the source tree; python's own additions to the path would put that first.
export PYTHONSAFEPATH=1 PYTHONPATH="$site:$PWD/bench:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "$*" | tee -a "$out/session.txt"; }

failed=0
step() { # step NAME SECONDS LOG COMMAND...
  local name=$1 limit=$2 log=$out/$3 start=$SECONDS left=$((end - SECONDS)) rc=0
  shift 3
  case $steps in *" $name "*) ;; *) return ;; esac
  if [ "$left" -lt 5 ]; then
    failed=1
    say "$name: not begun, no time left"
    return
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  echo "===== $name, at most $limit s"
  timeout -k 3 "$limit" "$@" >>"$log" 2>&1 || rc=$?
  tail -n 15 "$log"
  case $rc in
    0) say "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) failed=1 && say "$name: FAILED, stopped after $((SECONDS - start)) s" ;;
    *) failed=1 && say "$name: FAILED with $rc, $((SECONDS - start)) s" ;;
  esac
}

has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

build() {
  python3 -m pip install -v --no-build-isolation --no-deps --upgrade --target "$site" . && return
  echo "pip could not build it; the same by cmake alone"
  local torch options
  torch=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return 1
  mapfile -t options < <(PYTHONPATH=build_tools python3 -c '
import pathlib, sys, cuda_build
print(*(o for o in cuda_build.cmake_options(pathlib.Path(sys.argv[1]))), sep="\n")' "$torch" | grep ^-D)
  cmake -S . -B build/gpu_session/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release "-DTORCH_DIR=$torch" \
    "-DMNV2_FUSED_TORCH_VERSION=$(python3 -c 'import torch; print(torch.__version__)')" \
    "-DPython_EXECUTABLE=$(python3 -c 'import sys; print(sys.executable)')" \
    "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)" "${options[@]}" &&
    cmake --build build/gpu_session/cmake &&
    cmake --install build/gpu_session/cmake --prefix "$site/mnv2_fused" &&
    cp mnv2_fused/*.py "$site/mnv2_fused/"
}

tests() {
  local parallel=()
  if has xdist; then parallel=(-n 4); fi
  python3 -m pytest tests/test_cuda.py -q --maxfail=60 --durations=5 --tb=short -p no:cacheprovider "${parallel[@]}"
}

sanitize() { # sanitize TOOL
  local program
  program=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not installed"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$1" --error-exitcode 9 python3 bench/sanitize_cuda.py
}

measure() { python3 bench/measure_cuda.py "$@" --json "$out/cuda.json"; }

# timeout runs programs, not functions: this script again.
if [ "${1:-}" = --run ]; then
  shift
  "$@"
  exit
fi
again=(bash bench/gpu_session.sh --run)

: >"$out/session.txt"
say "$(date -u +%FT%TZ), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"
say "$(python3 -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__)' 2>&1 | tail -n 1)"
say "$(nvcc --version 2>&1 | tail -n 1)"
for module in setuptools pybind11 numpy PIL rich safetensors pytest xdist tabulate; do
  has "$module" || say "python3 has no $module"
done
for program in cmake ninja compute-sanitizer; do
  command -v "$program" >/dev/null || say "there is no $program on the PATH"
done

step build 240 build.log "${again[@]}" build
say "CUDA kernels: $(python3 -m mnv2_fused info 2>&1 | awk '/^ *cuda kernels/ { $1 = $2 = ""; sub(/^ */, ""); print }')"
step tests 150 tests.log "${again[@]}" tests
step bench 120 bench.log "${again[@]}" measure network blocks
step memcheck 60 memcheck.log "${again[@]}" sanitize memcheck
step racecheck 60 racecheck.log "${again[@]}" sanitize racecheck
step compiled 600 bench.log "${again[@]}" measure compiled

printf '\n===== after %d s\n' "$SECONDS"
cat "$out/session.txt"
[ ! -f "$out/cuda.md" ] || cat "$out/cuda.md"
exit "$failed"
