#!/usr/bin/env bash
# Sets up, builds, and runs the tests; GPU tests join in where GPUs are. Arguments go to pytest.
source "$(dirname "$0")/common.sh"
set_up
need pytest pytest_timeout hypothesis matplotlib || say "note: some test packages are missing; their tests are skipped"
has_modules pytest || die "pytest is needed and nothing may be installed into $PYTHON"
say "building the test double"
"$PYTHON" tests/native/build.py module >/dev/null || die "the test double of the driver (tests/native) can't be built"
export OMP_NUM_THREADS=1

# Every process that a test starts inherits this mark; none may outlive the run.
export PYTEST_RUN_MARK=$$.$RANDOM
left() (
  mark=$PYTEST_RUN_MARK
  unset PYTEST_RUN_MARK # or what runs here would find itself
  grep -lz "^PYTEST_RUN_MARK=$mark\$" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3
)
status=0
"$PYTHON" -m pytest "$@" || status=$?
for _ in $(seq 50); do # those that notice that their parent has gone need a moment
  orphans=$(left || true)
  [ -n "$orphans" ] || exit $status
  sleep 0.2
done
ps -o pid,ppid,etime,args -p "$(echo $orphans | tr ' ' ,)" >&2
kill -KILL $orphans 2>/dev/null || true
die "the tests left processes behind"
