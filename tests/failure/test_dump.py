"""The last operations of all groups told on demand: by a call, and by a signal while the main thread waits."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks

import mnnvl_backend
from mnnvl_backend import registration
from mnnvl_backend.compiled import load_compiled

ROW = r" +{sequence}  {operation} +{bytes} +{dtype} +cpu +{how} *{state} +[0-9.]+ s ago\n"


def row(sequence: int, operation: str, nbytes: int, state: str, how: str = "", dtype: str = "Float") -> str:
    return ROW.format(sequence=sequence, operation=operation, bytes=nbytes, dtype=dtype, how=how, state=state)


def head(rank: int, group: str) -> str:
    return rf"mnnvl: the last operations of rank {rank} in {group}"


def by_call_body(rank: Rank) -> None:
    pair = dist.new_group([1, 2], backend="mnnvl", group_desc="pair")
    unused = dist.new_group(backend="mnnvl")
    dist.all_reduce(torch.ones(100))
    if rank.rank > 0:
        dist.broadcast(torch.ones(3, dtype=torch.int64), 1, group=pair)
    out = io.StringIO()
    mnnvl_backend.dump_operations(out)
    columns = r" \(sequence, operation, bytes, dtype, device, state, when it was begun\):\n"
    expected = head(rank.rank, r"group 0 \(default_pg\) of all 3 ranks") + columns
    expected += row(1, "all_reduce", 400, "completed")
    if rank.rank > 0:
        expected += head(rank.rank - 1, r"group \w+ \(pair\) of ranks 1, 2") + columns
        expected += row(1, "broadcast", 24, "completed", dtype="Long")
    expected += head(rank.rank, r"a group of 3 ranks: none\n")
    count = 3 if rank.rank > 0 else 2
    expected = rf"mnnvl: the groups of process {os.getpid()}: {count}\n" + expected
    assert re.fullmatch(expected, out.getvalue()), f"{out.getvalue()}\n{expected}"
    dist.destroy_process_group(unused)


def test_all_groups_by_a_call():
    """In processes of its own, which have no groups of other tests."""
    run_ranks(by_call_body, 3)


def to_standard_error_body(rank: Rank) -> None:
    dist.barrier()
    mnnvl_backend.dump_operations()


def test_to_standard_error(ranks, capfd):
    ranks(to_standard_error_body, 2)
    log = capfd.readouterr().out
    for rank in range(2):
        assert re.search(rf"\[rank{rank}\] +1  barrier +0  - ", log), log


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def tell_when_enqueued(rank: Rank, count: int) -> None:
    """On a thread: the main one waits."""
    until(lambda: [o["state"] for o in mnnvl_backend.last_operations()][count:] == ["enqueued"])
    rank.store.set("waits", str(os.getpid()))


def wait_for_the_peer(operation: str, x: torch.Tensor) -> None:
    if operation == "all_reduce":
        dist.all_reduce(x)
    elif operation == "broadcast":
        dist.broadcast(x, 1, async_op=True).wait()
    else:
        dist.recv(x, 1)


def signalled_body(rank: Rank, operation: str, file: str, install: bool) -> None:
    """Rank 1 comes only when rank 0, whose main thread waits for it, has told of that."""
    x = torch.full((100,), 1.0 + rank.rank)
    dist.all_reduce(x)
    if rank.rank == 0:
        seen: list[int] = []
        if install:
            signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append(signum))
            mnnvl_backend.dump_on_signal()
            mnnvl_backend.dump_on_signal()  # the same again
        log, old = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.dup(2)
        os.dup2(log, 2)
        try:
            thread = threading.Thread(target=tell_when_enqueued, args=(rank, 1))
            thread.start()
            wait_for_the_peer(operation, x)
            thread.join()
        finally:
            os.dup2(old, 2)
        assert x.tolist() == [{"all_reduce": 6.0, "broadcast": 3.0, "recv": 3.0}[operation]] * 100
        assert seen == [signal.SIGUSR1] * install  # the handler that was there: once, and after the wait
        text = Path(file).read_text()
        assert text.count("mnnvl: the groups of process") == 1, text
        return
    rank.store.wait(["waits"], timedelta(seconds=30))
    os.kill(int(rank.store.get("waits")), signal.SIGUSR1)
    how = "" if operation == "all_reduce" else "async"
    sequence = 1 if operation == "recv" else 2
    expected = head(0, "group 0 .*\n") + row(1, "all_reduce", 400, "completed")
    expected += row(sequence, operation, 400, "enqueued", how)
    until(lambda: re.search(expected, Path(file).read_text()))
    if operation == "all_reduce":
        dist.all_reduce(x)
    elif operation == "broadcast":
        dist.broadcast(x, 1)
    else:
        dist.send(x, 0)


@pytest.mark.parametrize("operation", ["all_reduce", "broadcast", "recv"])
def test_a_signal_while_the_main_thread_waits(operation, tmp_path):
    run_ranks(signalled_body, 2, args=(operation, str(tmp_path / "log"), True))


def test_a_variable_installs_it(tmp_path):
    """Over the handler of faulthandler, which this suite's launcher has in C, and which runs as well."""
    file = tmp_path / "log"
    run_ranks(signalled_body, 2, env={"MNNVL_DUMP_SIGNAL": "USR1"}, args=("all_reduce", str(file), False))


def refused_body(rank: Rank) -> None:
    for signum in (signal.SIGTERM, signal.SIGSEGV, signal.SIGKILL, 0, -1, 1000):
        with pytest.raises(ValueError, match=f"signum: expected SIGUSR1, SIGUSR2 or a real-time signal, got {signum}"):
            mnnvl_backend.dump_on_signal(signum)
    mnnvl_backend.dump_on_signal(signal.SIGRTMIN)
    mnnvl_backend.dump_on_signal(signal.SIGUSR2)
    # A child has no thread that could tell anything: the default action is back.
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGUSR2
    os.kill(os.getpid(), signal.SIGUSR2)  # here it ends nothing

    seen: list[int] = []
    signal.signal(signal.SIGUSR2, lambda signum, frame: seen.append(signum))
    with pytest.raises(RuntimeError, match=f"signal {signal.SIGUSR2} has another handler now"):
        mnnvl_backend.dump_on_signal(signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    until(lambda: seen == [signal.SIGUSR2])
    # As a program does that puts back what Python knew before: then it can be installed anew.
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    mnnvl_backend.dump_on_signal(signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)


def child_body(rank: Rank) -> None:
    """A forked child that makes a group of its own has the handler too."""
    child = os.fork()
    if child == 0:
        try:
            registration._dump_on_signal(load_compiled(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_in_a_forked_child():
    run_ranks(child_body, 1, env={"MNNVL_DUMP_SIGNAL": "USR2"})


def test_what_is_refused():
    run_ranks(refused_body, 1, backend=None)
