#!/usr/bin/env bash
# Sets up, builds, and runs the demo on min(4, GPUs) GPUs, or on 4 CPU ranks. DEMO_RANKS overrides the number.
source "$(dirname "$0")/common.sh"
set_up
need rich || say "note: without rich, progress is plain text"
need sklearn || say "note: without scikit-learn, the training part will be skipped"

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
if [ "$gpus" -gt 0 ]; then ranks=$((gpus < 4 ? gpus : 4)) device=cuda; else ranks=4 device=cpu; fi
ranks=${DEMO_RANKS:-$ranks}
say "running on $ranks $device ranks"
export OMP_NUM_THREADS=1
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m mnnvl_backend demo --device "$device" "$@"
