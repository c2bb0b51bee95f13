"""torchrun starts a training again whose worker died: the second attempt has fresh groups and goes on from a checkpoint."""

from __future__ import annotations

import re

import pytest
from torchrun import torchrun

# Attempt 0: rank 1 is killed between two steps. The others find out in a collective, or are stopped by torchrun.
SCRIPT = """
import os, signal, sys
import torch, torch.distributed as dist
import mnnvl_backend

path, device_type = sys.argv[1:]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("mnnvl")
rank = dist.get_rank()
device = torch.device(device_type, rank % torch.cuda.device_count()) if device_type == "cuda" else torch.device("cpu")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
first = 0
if os.path.exists(path):
    state = torch.load(path)
    model.module.load_state_dict(state["model"])
    first = state["step"] + 1
for step in range(first, 6):
    if attempt == 0 and step == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.full((2, 4), float(rank + 1) / (step + 1), device=device)
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0:
        torch.save({"model": model.module.state_dict(), "step": step}, path + ".new")
        os.replace(path + ".new", path)
    dist.barrier()
weight = torch.cat([p.detach().flatten() for p in model.parameters()])
everybodys = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
dist.all_gather(everybodys, weight)
assert all(torch.equal(weight, other) for other in everybodys)
if rank == 0:
    print(f"attempt {attempt}: steps {first} to {step}, {dist.get_world_size()} ranks alike")
dist.destroy_process_group()
"""


@pytest.mark.timeout(150)
def test_restart_after_a_death(device, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = torchrun(2, "--max-restarts", "1", str(script), str(tmp_path / "state.pt"), device, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"attempt 1: steps 3 to 5, 2 ranks alike\n", done.stdout), done.stdout
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
