#!/usr/bin/env bash
# Everything that takes a GPU, in under nine minutes: build, tests, benchmarks, compute-sanitizer, torch.compile.
#
#   bench/gpu_session.sh [STEP...]
#
# Steps, in their order: build tests network memcheck racecheck compiled blocks. `compiled` runs again at the end for
# the subjects that it did not reach. It uses all time that is left, so stopping it is no failure. Without steps the
# script starts fresh and runs all of them. With steps it adds to the files of the last run: `bench/gpu_session.sh
# compiled` continues if that run's torch.compile ran out of time.
#
# Needs python3 with the modules named below, nvcc 12 or later and a GPU; downloads nothing. Logs, gpu.json and gpu.md
# go to $OUT, or to bench/results. A step that fails or takes too long is recorded, and the next one begins. MINUTES
# (default 8.8) is the limit for all steps together.
set -uo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results}
mkdir -p "$out" build/gpu_session || exit 1
out=$(cd "$out" && pwd)
site=$PWD/build/gpu_session/site
end=$(python3 -c "print(int(60 * ${MINUTES:-8.8}))") || exit 1
unset TORCH_CUDA_ARCH_LIST # the GPU that is here decides
PATH="$(python3 -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
export PATH MNV2_FUSED_CUDA=1 PYTHONUNBUFFERED=1
# A later run reuses what torch.compile has compiled and tuned.
export TORCHINDUCTOR_CACHE_DIR=$PWD/build/gpu_session/inductor
# Imports the package that was built, not the source tree. PYTHONSAFEPATH keeps python from putting the tree first.
export PYTHONSAFEPATH=1 PYTHONPATH="$site:$PWD/bench:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "$*" | tee -a "$out/gpu_session.txt"; }

failed=0
step() { # step NAME SECONDS LOG COMMAND...
  local name=$1 limit=$2 log=$out/$3 start=$SECONDS left=$((end - SECONDS)) rc=0
  shift 3
  case $steps in *" $name "*) ;; *) return ;; esac
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    [ "$name" = compiled ] || failed=1
    say "$name: not begun, no time left"
    return
  fi
  echo "===== $name, at most $limit s"
  # On INT pytest still prints its failures.
  timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 || rc=$?
  tail -n 15 "$log"
  case $rc,$name in
    0,*) say "$name: ok, $((SECONDS - start)) s" ;;
    124,compiled | 137,compiled) say "$name: stopped after $((SECONDS - start)) s" ;;
    124,* | 137,*) failed=1 && say "$name: FAILED, stopped after $((SECONDS - start)) s" ;;
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
    "-DMNV2_FUSED_VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)" \
    "-DMNV2_FUSED_TORCH_VERSION=$(python3 -c 'import torch; print(torch.__version__)')" \
    "-DPython_EXECUTABLE=$(python3 -c 'import sys; print(sys.executable)')" \
    "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)" "${options[@]}" &&
    cmake --build build/gpu_session/cmake &&
    cmake --install build/gpu_session/cmake --prefix "$site/mnv2_fused" &&
    cp -r mnv2_fused "$site/"
}

tests() {
  local parallel=()
  if has xdist; then parallel=(-n 4); fi
  python3 -m pytest tests/cuda/test_gpu_*.py -q --maxfail=60 --durations=5 --tb=short -p no:cacheprovider "${parallel[@]}"
}

sanitize() { # sanitize TOOL
  local program
  program=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not installed"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$1" --error-exitcode 9 python3 bench/sanitize_cuda.py
}

measure() { python3 bench/measure_cuda.py "$@" --json "$out/gpu.json"; }

# timeout runs programs, not functions, so a step runs this script again.
if [ "${1:-}" = --run ]; then
  shift
  "$@"
  exit
fi
again=(bash bench/gpu_session.sh --run)

steps=" build tests network memcheck racecheck compiled blocks "
for name in "$@"; do
  case $steps in *" $name "*) ;; *) echo "there is no step $name; steps:$steps" >&2 && exit 2 ;; esac
done
[ $# -eq 0 ] || steps=" $* "
: >"$out/gpu_session.txt"
say "$(date -u +%FT%TZ), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"
say "$(python3 -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__)' 2>&1 | tail -n 1)"
say "$(nvcc --version 2>&1 | tail -n 1)"
# No step works without these.
lacking=()
for module in torch numpy setuptools pybind11; do
  has "$module" || lacking+=("python3's $module")
done
for program in nvcc cmake ninja; do
  command -v "$program" >/dev/null || lacking+=("$program")
done
if [ ${#lacking[@]} -gt 0 ]; then
  say "$(printf '%s, ' "${lacking[@]}" | sed 's/, $//'): missing here, and needed (python3 is $(command -v python3))"
  exit 1
fi
has pytest || say "python3 has no pytest, which the step tests needs"
for module in PIL rich safetensors; do
  has "$module" || say "python3 has no $module: no step needs it, the command line of what is built does"
done
command -v compute-sanitizer >/dev/null || say "there is no compute-sanitizer on the PATH, for memcheck and racecheck"
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  say "torch sees no GPU that it can use"
  exit 1
fi

[ $# -gt 0 ] || rm -f "$out/gpu.json" "$out/gpu.md" "$out"/gpu_*.log
step build 240 gpu_build.log "${again[@]}" build
say "CUDA kernels: $(python3 -c '
from mnv2_fused._core import library as _library
print(_library.cuda_missing or _library.gpu_reason(0) or "loaded")' 2>&1 | tail -n 1)"
step tests 120 gpu_tests.log "${again[@]}" tests
step network 90 gpu_bench.log "${again[@]}" measure network
step memcheck 45 gpu_memcheck.log "${again[@]}" sanitize memcheck
step racecheck 45 gpu_racecheck.log "${again[@]}" sanitize racecheck
# All time that is left, minus the limit of the next step.
step compiled $((end - SECONDS - 100)) gpu_bench.log "${again[@]}" measure compiled --missing
step blocks 100 gpu_bench.log "${again[@]}" measure blocks
step compiled 600 gpu_bench.log "${again[@]}" measure compiled --missing

printf '\n===== after %d s\n' "$SECONDS"
cat "$out/gpu_session.txt"
[ ! -f "$out/gpu.md" ] || cat "$out/gpu.md"
exit "$failed"
