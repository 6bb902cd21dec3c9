#!/usr/bin/env bash
# The torch-free CPU code under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
# Usage: tests/sanitize/run.sh [ROUNDS]. Needs cmake, ninja and g++ (or CXX).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for sanitizers in address,undefined thread; do
  echo "== $sanitizers"
  cmake -G Ninja -S "$here" -B "$build/$sanitizers" -DSANITIZE="$sanitizers" >/dev/null
  cmake --build "$build/$sanitizers" | tail -n 1
  # TSan refuses some address-space layouts. setarch -R switches their randomisation off, if the system allows it.
  runner=()
  if [ "$sanitizers" = thread ] && setarch -R true 2>/dev/null; then runner=(setarch -R); fi
  "${runner[@]}" "$build/$sanitizers/sanitize" "${1:-40}"
done
