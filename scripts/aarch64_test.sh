#!/usr/bin/env bash
# Compiles the C++ below torch for aarch64 and runs its native tests under emulation: the NEON reductions against the
# portable ones and the CPU protocol, on an instruction set with weaker memory order than x86's (which an emulator on x86
# does not weaken: what it proves is bits and system calls, not orders).
# usage: aarch64_test.sh [--percent N] [name of a test...]
set -euo pipefail
cd "$(dirname "$0")/.."
export CXX=${AARCH64_CXX:-aarch64-linux-gnu-g++}
EMULATOR=${AARCH64_EMULATOR:-qemu-aarch64}
PYTHON=${PYTHON:-python3}

if [ "$(uname -m)" = aarch64 ]; then
  EMULATOR=env
  CXX=${AARCH64_CXX:-c++}
fi
if ! command -v "$CXX" >/dev/null || ! command -v "$EMULATOR" >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing g++-aarch64-linux-gnu and qemu-user"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
      g++-aarch64-linux-gnu qemu-user; } >/dev/null
  else
    echo "error: $CXX and $EMULATOR are needed; on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user" >&2
    exit 1
  fi
fi
executable=$("$PYTHON" tests/native/build.py tests --name tests-aarch64 --static)
[ $# -gt 0 ] || set -- --percent 25 -world_72_setup # of so many ranks slow there, and no other than elsewhere
exec timeout --kill-after=10 "${NATIVE_TEST_SECONDS:-300}" "$EMULATOR" "$executable" "$@"
