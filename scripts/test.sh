#!/usr/bin/env bash
# Sets up, builds, and runs the tests; GPU tests join in where GPUs are. Arguments go to pytest.
source "$(dirname "$0")/common.sh"
set_up
need pytest pytest_timeout hypothesis || say "note: some test packages are missing; their tests are skipped"
has_modules pytest || die "pytest is needed and nothing may be installed into $PYTHON"
say "building the test double"
"$PYTHON" tests/native/build.py module >/dev/null || die "the test double of the driver (tests/native) can't be built"
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest "$@"
