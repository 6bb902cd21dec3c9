#!/usr/bin/env bash
# The emulator's own tests and a part of the kernels' tests, with every variant and schedule, under AddressSanitizer and
# UndefinedBehaviorSanitizer. Usage: tests/cuda_emulator/run.sh [OPTIONS OF PYTEST]. Needs cmake, ninja and g++.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Python is linked with neither library. libstdc++ is preloaded too, so that AddressSanitizer can intercept exceptions.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
MNV2_FUSED_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$preload \
  exec python3 -m pytest -p no:cacheprovider -n auto tests/cuda/test_cuda_{emulator,kernels,ends,networks,large}.py \
  -k "test_cuda_emulator or every or split or images or random or stem or joined or head or network and not blocks" "$@"
