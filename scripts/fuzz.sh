#!/usr/bin/env bash
# The parsers of what comes from outside (tests/fuzz). Without a number: replays the corpora under AddressSanitizer and
# UBSan, with any compiler. With one: fuzzes each harness for so many seconds, with clang's libFuzzer, and adds what it
# finds to a corpus of its own below build/fuzz; crashes stay there too. --minimise puts the smallest files that cover
# as much into tests/fuzz/corpus.
# usage: fuzz.sh [SECONDS [--minimise] [harness...]]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
corpus=$PWD/tests/fuzz/corpus
export ASAN_OPTIONS="detect_leaks=1 ${ASAN_OPTIONS:-}" UBSAN_OPTIONS="print_stacktrace=1 ${UBSAN_OPTIONS:-}"
if [ $# -eq 0 ]; then
  built=$("$PYTHON" tests/native/build.py fuzz)
  for folder in "$corpus"/*/; do
    harness=$built/$(basename "$folder")
    timeout 60 "$harness" "$folder"* && continue
    for file in "$folder"*; do timeout 10 "$harness" "$file" >/dev/null 2>&1 || echo "fails: $file" >&2; done
    exit 1
  done
  exit
fi

seconds=$1 minimise=
shift
if [ "${1:-}" = --minimise ]; then minimise=1 && shift; fi
export CXX=${CXX:-$(compgen -c clang++ | sort -V | tail -n 1)}
built=$("$PYTHON" tests/native/build.py fuzz --engine libfuzzer)
[ $# -gt 0 ] || set -- $(ls "$corpus")
for name in "$@"; do
  found=build/fuzz/$name
  mkdir -p "$found" "$corpus/$name"
  # A parser that wants more than 64 MiB at once has believed a size.
  timeout $((seconds + 60)) "$built/$name" -max_total_time="$seconds" -max_len=512 -timeout=10 -malloc_limit_mb=64 \
    -print_final_stats=1 -artifact_prefix="build/fuzz/crash-$name-" "$found" "$corpus/$name"
  if [ -n "$minimise" ]; then
    rm -rf build/fuzz/small && mkdir build/fuzz/small
    timeout 120 "$built/$name" -set_cover_merge=1 -use_counters=0 -max_len=200 build/fuzz/small "$found" "$corpus/$name"
    find "$corpus/$name" -name '*-*' -exec cp {} build/fuzz/small \; # those that people have named stay
    rm -rf "${corpus:?}/$name" && mv build/fuzz/small "$corpus/$name"
  fi
done
