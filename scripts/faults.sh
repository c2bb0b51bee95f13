#!/usr/bin/env bash
# Tries every fault of tests/failure/faults.py often (MNNVL_TEST_TRIES, default 20), and leaves a dated table for each device.
# usage: faults.sh [folder, default docs/results] [pytest arguments...]
MNNVL_FAULTS_RECORD=$(realpath "${1:-$(dirname "$0")/../docs/results}")
export MNNVL_FAULTS_RECORD MNNVL_TEST_TRIES=${MNNVL_TEST_TRIES:-20}
shift || true
exec bash "$(dirname "$0")/test.sh" tests/failure/test_faults.py "$@"
