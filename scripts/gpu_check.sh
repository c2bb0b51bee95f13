#!/usr/bin/env bash
# What must be run on a GPU machine whenever GPU code changes: the tests on the first 2, 3 and 4 GPUs as far as there are so
# many, every kernel under compute-sanitizer, the benchmark. Leaves dated records in a folder (default docs/results).
# Tests run with the test double built before, so that no test waits for a compiler.
# usage: gpu_check.sh [folder] [extra pytest arguments...]
source "$(dirname "$0")/common.sh"
set_up
OUTPUT=${1:-docs/results}
shift || true
mkdir -p "$OUTPUT"
GPUS=$(nvidia-smi -L | wc -l)
DATE=$(date +%F)
NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | sed 's/^NVIDIA //; s/ .*//' | tr '[:upper:]' '[:lower:]')
RECORD=$OUTPUT/$DATE-gpu-tests-${GPUS}x$NAME.md
export OMP_NUM_THREADS=1
"$PYTHON" tests/native/build.py module >/dev/null || die "the test double of the driver (tests/native) can't be built"

{
  echo "# GPU tests, $DATE"
  echo
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed 's/^/- /'
  "$PYTHON" -c 'import torch, mnnvl_backend._C as c; print(f"- torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}, kernels {c.build_info()}")'
  echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
} >"$RECORD"

# A section of the record: the command, its closing lines, and its exit status. The log stays in build/.
record() {
  local title=$1 status=0
  shift
  say "$title: $*"
  "$@" >"build/gpu_check.log" 2>&1 || status=$?
  cp build/gpu_check.log "build/gpu_check-$(echo "$title" | tr -c 'a-z0-9\n' '-').log"
  { printf '\n## %s\n\n    %s\n\nexit status %s\n\n' "$title" "$*" "$status"
    grep -E '^(FAILED|ERROR)|passed|failed|ERROR SUMMARY' build/gpu_check.log | sort | uniq -c | sed 's/^/    /'; } >>"$RECORD"
  tail -n 3 build/gpu_check.log
}

for count in 2 3 4; do
  [ "$count" -le "$GPUS" ] || continue
  record "tests on $count gpus" env CUDA_VISIBLE_DEVICES="$(seq -s, 0 $((count - 1)))" \
    "$PYTHON" -m pytest -q tests -k "cuda or graphs or memory" --timeout 150 "$@"
done

say "compute-sanitizer"
SANITIZE_BUILT=1 bash scripts/sanitize.sh --record "$RECORD" || say "compute-sanitizer found errors, or did not run"
OPERATIONS=all_reduce,reduce_scatter,reduce,all_gather,gather,broadcast,scatter,all_to_all,barrier,send_recv
BENCH=$([ "$GPUS" -ge 4 ] && echo 4 || echo "$GPUS")
record "benchmark" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$BENCH" \
  -m mnnvl_backend bench --operation "$OPERATIONS" --output "$OUTPUT"
cat "$RECORD"
