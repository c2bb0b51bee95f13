#!/usr/bin/env bash
# Runs PyTorch's own tests of process groups with mnnvl in the place of gloo (CPU) or NCCL (GPUs), and compares with that.
# Fails if a test that passes there fails or is skipped here, but for those listed in tests/conformance/expectations.py.
# usage: conformance.sh [--backend mnnvl|gloo|nccl] [--device cpu|cuda] [--world N] [-k TEXT] [--output docs/results]
source "$(dirname "$0")/common.sh"
set_up
export OMP_NUM_THREADS=1 PYTHONPATH="$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m conformance.runner "$@"
