#!/usr/bin/env bash
# Everything that takes a GPU, in parts of a few minutes.
#
#   bench/gpu_session.sh first       build, is it right, how fast is each launch, and what binds
#   bench/gpu_session.sh peers       torch.compile, and compute-sanitizer
#   bench/gpu_session.sh ab OLD      the launches of this tree and of the tree OLD, in turns
#   bench/gpu_session.sh STEP...     single steps: build smoke tests network launches ncu plans compiled blocks memcheck
#                                    racecheck
#
# first starts fresh; everything else adds to the files of the run before. Needs python3 with the modules named below,
# nvcc 12 or later and a GPU; downloads nothing. Logs, gpu.json and gpu.md go to $OUT, or to bench/results. A step that
# fails or takes too long is recorded, and the next one begins; but if the smoke test fails, compute-sanitizer looks at
# its first wrong line instead. MINUTES (default 6) is the limit for all steps together.
set -uo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results}
mkdir -p "$out" build/gpu_session || exit 1
out=$(cd "$out" && pwd)
site=$PWD/build/gpu_session/site
end=$(python3 -c "print(int(60 * ${MINUTES:-6}))") || exit 1
unset TORCH_CUDA_ARCH_LIST # the GPU that is here decides
PATH="$(python3 -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
export PATH MNV2_FUSED_CUDA=1 PYTHONUNBUFFERED=1
# A later run reuses what torch.compile has compiled and tuned.
export TORCHINDUCTOR_CACHE_DIR=$PWD/build/gpu_session/inductor
# Imports the package that was built, not the source tree. PYTHONSAFEPATH keeps python from putting the tree first.
with_site() { echo "$1:$PWD/bench:$PWD/tests${PYTHONPATH_BEFORE:+:$PYTHONPATH_BEFORE}"; }
export PYTHONPATH_BEFORE=${PYTHONPATH_BEFORE-${PYTHONPATH:-}} PYTHONSAFEPATH=1
export PYTHONPATH=${PYTHONPATH_OF_STEP:-$(with_site "$site")}

say() { echo "$*" | tee -a "$out/gpu_session.txt"; }

failed=0
step() { # step NAME SECONDS LOG COMMAND...
  local name=$1 limit=$2 log=$out/$3 start=$SECONDS left=$((end - SECONDS)) rc=0
  shift 3
  case $steps in *" $name "*) ;; *) return 0 ;; esac
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    [ "$name" = compiled ] || failed=1
    say "$name: not begun, no time left"
    return 1
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
  return "$rc"
}

has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

build() { # build TREE SITE
  (
    cd "$1" || exit 1
    python3 -m pip install -v --no-build-isolation --no-deps --upgrade --target "$2" . && exit
    echo "pip could not build it; the same by cmake alone"
    torch=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))') || exit 1
    mapfile -t options < <(PYTHONPATH=build_tools python3 -c '
import pathlib, sys, cuda_build
print(*(o for o in cuda_build.cmake_options(pathlib.Path(sys.argv[1]))), sep="\n")' "$torch" | grep ^-D)
    cmake -S . -B build/gpu_session/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release "-DTORCH_DIR=$torch" \
      "-DMNV2_FUSED_VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)" \
      "-DMNV2_FUSED_TORCH_VERSION=$(python3 -c 'import torch; print(torch.__version__)')" \
      "-DPython_EXECUTABLE=$(python3 -c 'import sys; print(sys.executable)')" \
      "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)" "${options[@]}" &&
      cmake --build build/gpu_session/cmake &&
      cmake --install build/gpu_session/cmake --prefix "$2/mnv2_fused" &&
      cp -r mnv2_fused "$2/"
  )
}

tests() {
  local parallel=()
  if has xdist; then parallel=(-n 4); fi
  python3 -m pytest tests/cuda/test_gpu_*.py -q --maxfail=60 --durations=5 --tb=short -p no:cacheprovider "${parallel[@]}"
}

smoke() { python3 bench/smoke_cuda.py | tee build/gpu_session/smoke.txt; }

# The first line of the smoke test that was wrong or did not come, alone.
suspect() {
  local line
  line=$(grep -m 1 WRONG build/gpu_session/smoke.txt | cut -d: -f1)
  [ -n "$line" ] || line=$(python3 bench/smoke_cuda.py --next <build/gpu_session/smoke.txt)
  sanitizer memcheck bench/smoke_cuda.py "$line"
  CUDA_LAUNCH_BLOCKING=1 python3 bench/smoke_cuda.py "$line"
  MNV2_FUSED_DEPENDENT_LAUNCH=0 python3 bench/smoke_cuda.py "$line"
}

sanitizer() { # sanitizer TOOL SCRIPT [OPTIONS...]
  local program tool=$1
  shift
  program=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not installed"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --report-api-errors no --kernel-name kns=mnv2 \
    --error-exitcode 9 python3 "$@"
}

measure() { python3 bench/measure_cuda.py "$@" --json "$out/gpu.json"; }

launches() {
  measure launches
  MNV2_FUSED_DEPENDENT_LAUNCH=0 measure launches --variant "one after the other"
  MNV2_FUSED_CARVEOUT=-1 measure launches --variant "L1 by the driver's choice" --batches 1
}

in_turns() { # in_turns OLD_SITE
  for _ in 1 2; do
    PYTHONPATH=$(with_site "$1") measure launches --variant old
    measure launches --variant new
  done
}

counters() {
  command -v ncu >/dev/null || { echo "ncu is not installed"; return 1; }
  local section sections=()
  for section in SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis WarpStateStats SchedulerStats Occupancy; do
    sections+=(--section "$section")
  done
  # Every launch of the second of two calls at batch 256.
  ncu --clock-control none --cache-control none -k 'regex:block_kernel|pool_kernel|classify_kernel' --launch-skip 19 \
    --launch-count 19 "${sections[@]}" --csv --page raw python3 bench/smoke_cuda.py --calls 256
}

# timeout runs programs, not functions, so a step runs this script again.
if [ "${1:-}" = --run ]; then
  shift
  "$@"
  exit
fi
again=(bash bench/gpu_session.sh --run)

every=" build smoke tests network launches ncu plans compiled blocks memcheck racecheck "
old=
part=${1:-first}
case $part in
  first) steps=" build smoke tests network launches ncu " ;;
  peers) steps=" compiled memcheck racecheck " ;;
  ab)
    steps=" build smoke ab "
    old=${2:?ab needs the folder of the older tree}
    ;;
  *)
    for name in "$@"; do
      case $every in *" $name "*) ;; *) echo "there is no step $name; steps:$every" >&2 && exit 2 ;; esac
    done
    steps=" $* "
    ;;
esac
[ "$part" != first ] || : >"$out/gpu_session.txt"
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
for module in pytest rich; do
  has "$module" || say "python3 has no $module, which steps need"
done
for program in compute-sanitizer ncu; do
  command -v "$program" >/dev/null || say "there is no $program on the PATH"
done
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  say "torch sees no GPU that it can use"
  exit 1
fi

[ "$part" != first ] || rm -f "$out/gpu.json" "$out/gpu.md" "$out"/gpu_*.log "$out/gpu_ncu.csv"
clocks=build/gpu_session/clocks.csv
nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits -lms 500 >"$clocks" 2>/dev/null &
sampler=$!
trap 'kill $sampler 2>/dev/null' EXIT

step build 150 gpu_build.log "${again[@]}" build . "$site"
say "CUDA kernels: $(python3 -c '
from mnv2_fused._core import library as _library
print(_library.cuda_missing or _library.gpu_reason(0) or "loaded")' 2>&1 | tail -n 1)"
if ! step smoke 60 gpu_session.txt "${again[@]}" smoke; then
  steps=" suspect "
  step suspect 90 gpu_suspect.log "${again[@]}" suspect
fi
step ab 240 gpu_build.log "${again[@]}" build "$old" "$PWD/build/gpu_session/old" &&
  step ab 120 gpu_bench.log "${again[@]}" in_turns "$PWD/build/gpu_session/old"
step tests 120 gpu_tests.log "${again[@]}" tests
step network 75 gpu_bench.log "${again[@]}" measure network --seconds 0.3
step launches 60 gpu_bench.log "${again[@]}" launches
step ncu 75 gpu_ncu.csv "${again[@]}" counters
step plans 90 gpu_bench.log python3 bench/cuda_plans.py --seconds 60 --csv "$out/plans.csv"
# All time that is left, minus what the sanitizers need.
case $steps in *check*) reserve=80 ;; *) reserve=0 ;; esac
step compiled $((end - SECONDS - reserve)) gpu_bench.log "${again[@]}" measure compiled --missing
step blocks 100 gpu_bench.log "${again[@]}" measure blocks
step memcheck 45 gpu_sanitize.log "${again[@]}" sanitizer memcheck bench/sanitize_cuda.py float16
step racecheck 45 gpu_sanitize.log "${again[@]}" sanitizer racecheck bench/sanitize_cuda.py float16

kill $sampler 2>/dev/null
say "SM clock and power: $(python3 - "$clocks" <<'PYTHON'
import statistics, sys
rows = [line.split(",") for line in open(sys.argv[1]) if line.count(",") == 1]
clock, power = ([float(row[i]) for row in rows] or [0.0] for i in (0, 1))
print(f"{min(clock):.0f} to {max(clock):.0f} MHz, median {statistics.median(clock):.0f}; at most {max(power):.0f} W")
PYTHON
)"
printf '\n===== after %d s\n' "$SECONDS"
cat "$out/gpu_session.txt"
[ ! -f "$out/gpu.md" ] || cat "$out/gpu.md"
exit "$failed"
