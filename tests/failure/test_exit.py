"""The end of a program that never destroys its groups: its own exit code, at once, whatever is in flight."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ENDS = {"falls off its end": 0, "raises": 1, "sys.exit(3)": 3}
IN_FLIGHT = (1, 4, 64)
ROUNDS = 5
LIMIT = 15.0  # seconds for a program of milliseconds; the group's timeout is 60


def fork_at_the_end(future: torch.futures.Future[Any]) -> None:
    time.sleep(0.2)  # the program waits for this callback by then
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if time.monotonic() - start > 1.5:
        os._exit(4)  # it has waited for its own program's patience


def program(rank: int, store_file: str, in_flight: int, end: str, device_type: str, turn: int) -> None:
    """A user's program, to where it ends. Its works are dropped, one of them with a callback. In one turn it also receives a
    message that nobody sends; in one its first calls are those in flight, and in one rank 0's, which rank 1 doesn't join;
    in one the callback forks."""
    torch.set_num_threads(1)
    device = torch.device(device_type, rank % torch.cuda.device_count() if device_type == "cuda" else None)
    store = dist.FileStore(store_file, 2)
    dist.init_process_group("mnnvl", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    calls = device_type == "cuda" or turn != 2 or rank == 0  # on a GPU the caller waits for the set-up
    if turn not in (1, 2) or device_type == "cuda":
        dist.all_reduce(torch.ones(2, device=device))
    for _ in range(in_flight * calls):
        dist.all_reduce(torch.ones(1 << 20, device=device), async_op=True)
    if calls:
        dist.all_reduce(torch.ones(4, device=device), async_op=True).get_future().then(
            fork_at_the_end if turn == 3 else lambda future: future.value()
        )
    if (turn, in_flight) == (0, 4):
        dist.irecv(torch.ones(4, device=device), 1 - rank)
    if end == "raises":
        raise LookupError("the program's own error")
    if end == "sys.exit(3)":
        sys.exit(3)


def wait_for(pids: list[int]) -> list[int]:
    """Exit codes, negative for signals; what takes longer than LIMIT is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def all_programs(device_type: str, folder: str) -> None:
    """Forks the ranks of each program, which return from here and end as any interpreter does. The forking process has
    imported torch, so that this takes milliseconds a program instead of seconds."""
    import mnnvl_backend  # noqa: F401

    gc.freeze()  # else each program would look through all that was imported, and copy it, before it ends
    wrong: list[str] = []
    for number, (end, in_flight, turn) in enumerate(itertools.product(ENDS, IN_FLIGHT, range(ROUNDS))):
        seldom = end != "falls off its end" and (turn, in_flight) != (0, 4)
        if seldom or len(wrong) > 1:
            continue
        pids = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                return program(rank, f"{folder}/{number}", in_flight, end, device_type, turn)
            pids.append(pid)
        codes = wait_for(pids)
        if codes != [ENDS[end]] * 2:
            wrong.append(f"{in_flight} in flight, turn {turn}, {end}: exit codes {codes}")
    print("WRONG", *wrong, sep="\n  ")
    print("CHECKED")
    return None


def test_programs_that_end_with_work_in_flight(device, tmp_path):
    """Exit code 0, or the program's own, on both ranks: no abort, no crash, no wait for a timeout."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen([sys.executable, __file__, device, str(tmp_path)], env=env, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            process.wait(100)
        finally:
            with suppress(ProcessLookupError):  # nobody left, as it should be
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            text = output.read()
    assert "CHECKED" in text, text[-4000:]
    verdict = text.rpartition("WRONG")[2]
    assert verdict.strip() == "CHECKED", verdict + text[-4000:]


if __name__ == "__main__":
    all_programs(*sys.argv[1:])
