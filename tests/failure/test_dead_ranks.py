"""A rank's process ends: an error that names it, soon, and survivors that go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, call, die_at, works
from launcher import Died, Rank, run_ranks


def killed_body(rank: Rank, victim: int, numel: int) -> str:
    works(rank)
    if rank.rank == victim:
        die_at(0.3, lambda text: rank.store.set("died", text))
    with pytest.raises(dist.DistBackendError) as raised:
        while True:
            call(rank, numel)
    late = time.monotonic() - float(rank.store.get("died"))
    assert late < NOTICED_WITHIN, f"noticed after {late:.1f} s: {raised.value}"
    with pytest.raises(dist.DistBackendError, match=rf"rank {victim}\b"):
        call(rank)
    start = time.monotonic()
    dist.destroy_process_group()
    assert time.monotonic() - start < NOTICED_WITHIN
    x = torch.ones(3, device=rank.device)  # the context of a GPU is still good
    assert (x + 1).tolist() == [2.0] * 3
    return str(raised.value)


@pytest.mark.parametrize(("world_size", "victim", "numel"), [(2, 0, 1000), (3, 2, 1000), (4, 1, 3_000_000)])
def test_killed_in_mid_collective(device, world_size, victim, numel):
    """SIGKILL at a random place of a loop of calls: every other rank names it, soon."""
    results = run_ranks(killed_body, world_size, device, args=(victim, numel), may_die=[victim])
    assert results[victim] == Died(-signal.SIGKILL)
    for survivor in set(range(world_size)) - {victim}:
        assert f"rank {victim}" in results[survivor]


def dies_between_body(rank: Rank) -> str:
    works(rank)
    if rank.rank == 1:
        rank.store.set("died", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    rank.store.wait(["died"], rank.group_timeout)
    with pytest.raises(dist.DistBackendError, match=r"rank 1\b") as raised:
        while True:
            call(rank)
    assert time.monotonic() - float(rank.store.get("died")) < NOTICED_WITHIN
    return str(raised.value)


def test_killed_between_collectives(device):
    run_ranks(dies_between_body, 2, device, may_die=[1])


def subgroup_survives_body(rank: Rank) -> None:
    survivors = dist.new_group([0, 1], backend="mnnvl", pg_options=rank.options())
    works(rank)
    if rank.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(dist.DistBackendError, match=r"rank 2\b"):
        while True:
            call(rank)
    works(rank, survivors)
    works(rank, survivors)


def test_a_group_without_the_dead_rank_goes_on(device):
    """Its transport is made after the death."""
    run_ranks(subgroup_survives_body, 3, device, may_die=[2])


def script_rank(rank: int, world_size: int, device_type: str, port: int) -> None:
    """A user's program: when a collective fails it destroys the group and returns from main."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    index = rank % torch.cuda.device_count() if device_type == "cuda" else None
    me = Rank(rank, world_size, torch.device(device_type, index), store, timedelta(seconds=60))
    if device_type == "cuda":
        torch.cuda.set_device(me.device)
    me.init()
    works(me)
    if rank == 1:
        die_at(0.3, lambda text: store.set("died", text))
    try:
        while True:
            call(me)
    except dist.DistBackendError as error:
        print("RAISED", error)
    dist.destroy_process_group()


def test_the_survivor_exits_cleanly(device, tmp_path):
    """A whole process, to its very end: exit code 0, and soon."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    outputs = [open(tmp_path / str(rank), "w+") for rank in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), "2", device, str(store.port)], env=env,
                         stdout=outputs[rank], stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert processes[1].wait(60) == -signal.SIGKILL
        code = processes[0].wait(2 * NOTICED_WITHIN)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
            output.close()
    assert code == 0, texts
    assert re.search(r"RAISED.*rank 1\b", texts[0])


if __name__ == "__main__":
    script_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
