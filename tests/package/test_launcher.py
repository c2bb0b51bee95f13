"""The launcher itself, over gloo and without any group: it must not depend on what it tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Died, Rank, RankFailure, run_ranks


def gather_ranks(rank: Rank, base: int) -> list[int]:
    x = torch.zeros(rank.world_size, dtype=torch.int64)
    x[rank.rank] = base + rank.rank
    dist.all_reduce(x)
    print("hello")
    return x.tolist()


def fail_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        raise ValueError("planted")
    time.sleep(60)


def die_on_one(rank: Rank) -> str:
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def sleep_long(rank: Rank) -> None:
    time.sleep(60)


def read_variable(rank: Rank) -> str | None:
    rank.meet()
    return os.environ.get("MNNVL_HOST_ID")


def process_id(rank: Rank) -> int:
    return os.getpid()


def test_results_come_in_rank_order(ranks, capsys):
    assert ranks(gather_ranks, 3, args=(10,), backend="gloo") == [[10, 11, 12]] * 3
    assert "[rank2] hello" in capsys.readouterr().out


def test_processes_are_kept_until_a_failure_and_all_tracebacks_shown(ranks):
    before = ranks(process_id, 2, backend=None)
    assert ranks(process_id, 2, backend=None) == before
    with pytest.raises(RankFailure, match=r"(?s)\[rank0\] killed.*\[rank1\] .*ValueError: planted"):
        ranks(fail_on_one, 2, backend=None)
    assert set(ranks(process_id, 2, backend=None)).isdisjoint(before)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_time_out_kills(ranks, capsys):
    start = time.monotonic()
    with pytest.raises(RankFailure, match="no answer within 1 s"):
        ranks(sleep_long, 2, backend=None, timeout=1)
    assert time.monotonic() - start < 10
    assert "in sleep_long" in capsys.readouterr().out


def test_dead_rank(ranks):
    assert run_ranks(die_on_one, 2, backend=None, may_die=[1]) == ["alive", Died(-signal.SIGKILL)]
    with pytest.raises(RankFailure, match="died with exit code -9"):
        ranks(die_on_one, 2, backend=None)


def test_no_orphans_when_the_caller_is_killed(tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import test_launcher
from launcher import RankPool
if __name__ == "__main__":
    pool = RankPool()
    print(*pool.run(test_launcher.process_id, 2, backend=None), flush=True)
    pool.run(test_launcher.sleep_long, 2, backend=None)
""")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        ranks = list(map(int, caller.stdout.readline().split()))
        assert len(ranks) == 2
        time.sleep(0.5)  # into sleep_long
        caller.kill()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def test_environment_is_of_one_body(ranks):
    assert ranks(read_variable, 2, backend=None, env={"MNNVL_HOST_ID": "a"}) == ["a", "a"]
    assert ranks(read_variable, 2, backend=None) == [None, None]
