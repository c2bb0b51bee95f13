#!/usr/bin/env bash
# Builds and runs the native tests (the C++ below torch: no Python package, no torch), plain or under a sanitizer.
# usage: native_test.sh [none|thread|address] [--percent N] [name of a test...]
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-none}
[ $# -eq 0 ] || shift
case $kind in
  none | thread | address) ;;
  *)
    echo "usage: native_test.sh [none|thread|address] [--percent N] [name of a test...]" >&2
    exit 2
    ;;
esac
PYTHON=${PYTHON:-python3}
executable=$("$PYTHON" tests/native/build.py tests --sanitizer "$kind")
export TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1 ${TSAN_OPTIONS:-}"
export ASAN_OPTIONS="detect_leaks=1 ${ASAN_OPTIONS:-}" UBSAN_OPTIONS="print_stacktrace=1 ${UBSAN_OPTIONS:-}"
command=("$executable" "$@")
# TSan's shadow memory wants addresses where kernels with much address randomisation put libraries.
if [ "$kind" = thread ] && setarch "$(uname -m)" --addr-no-randomize true 2>/dev/null; then
  command=(setarch "$(uname -m)" --addr-no-randomize "${command[@]}")
fi
# Beyond what single tests allow themselves (tests/native/test_main.cpp).
exec timeout --kill-after=10 "${NATIVE_TEST_SECONDS:-300}" "${command[@]}"
