"""What happens when a rank dies, is late, or gives up: an error that names it, in time, and a process that goes on."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Died, Rank, run_ranks

NOTICED_WITHIN = 5.0  # seconds, of a death; the group's timeout in those tests is far longer
SHORT = timedelta(seconds=2)  # the timeout of groups that run into it


def call(rank: Rank, numel: int = 1000, group: dist.ProcessGroup | None = None) -> None:
    """One all_reduce whose failure has shown when this returns: that of a kernel is raised by the wait() after it."""
    work = dist.all_reduce(torch.ones(numel, device=rank.device), group=group, async_op=True)
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    work.wait()


def works(rank: Rank, group: dist.ProcessGroup | None = None) -> None:
    x = torch.full((1001,), float(dist.get_rank(group) + 1), device=rank.device)
    dist.all_reduce(x, group=group)
    n = dist.get_world_size(group)
    assert x.tolist() == [n * (n + 1) / 2] * 1001


def new_default_group_works(rank: Rank, prefix: str = "again") -> None:
    """After a failure: out of the old group, everybody meets elsewhere, into a new one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    rank.meet(f"before {prefix}")
    rank.init(prefix=prefix)
    works(rank)
    dist.barrier()


# A rank's process ends.


def die_at(moment: float, tell: Callable[[str], None]) -> None:
    def die() -> None:
        tell(str(time.monotonic()))  # one clock for all processes of a host
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Timer(moment, die).start()


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


# A rank that doesn't call.


def late_body(rank: Rank) -> list[str]:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    texts = []
    if rank.rank != 1:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError) as raised:
            call(rank)
        waited = time.monotonic() - start
        assert 1.8 < waited < 4, f"raised after {waited:.1f} s"
        texts.append(str(raised.value))
        device_ids = [rank.device.index] if rank.device.type == "cuda" else None
        x = torch.ones(1, device=rank.device)
        for again in (
            lambda: call(rank),
            lambda: dist.barrier(device_ids=device_ids),
            lambda: dist.broadcast(x, 0),
        ):
            start = time.monotonic()
            with pytest.raises(dist.DistBackendError) as raised:
                again()
            assert time.monotonic() - start < 1, "a broken group must not wait again"
            texts.append(str(raised.value))
    rank.meet("failed")
    if rank.rank == 1:
        with pytest.raises(dist.DistBackendError):  # it is told, though it never waited
            call(rank)
    new_default_group_works(rank)
    return texts


def test_a_rank_that_does_not_call(device):
    """The others raise at the group's timeout and name it, later calls say the same, and a new group works."""
    texts = run_ranks(late_body, 3, device, backend=None)
    for rank in (0, 2):
        assert "rank 1" in texts[rank][0]
        assert texts[rank] == [texts[rank][0]] * 4
    assert "timeout" in texts[0][0] + texts[2][0] or "deadline" in texts[0][0] + texts[2][0]


def pending_body(rank: Rank) -> None:
    """Async calls queued behind one that fails all fail, and destroy doesn't wait for each one's timeout."""
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    if rank.rank == 0:
        start = time.monotonic()
        xs = [torch.ones(100, device=rank.device) for _ in range(5)]
        pending = [dist.all_reduce(x, async_op=True) for x in xs]
        futures = [work.get_future() for work in pending]
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        for work in pending:
            with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
                work.wait()
        if rank.device.type == "cpu":
            for future in futures:
                with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
                    future.wait()
        dist.destroy_process_group()
        assert time.monotonic() - start < 5
    rank.meet("failed")
    new_default_group_works(rank)


def test_pending_calls_fail_together(device):
    run_ranks(pending_body, 2, device, backend=None)


def blocking_wait_body(rank: Rank) -> None:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
            dist.all_reduce(torch.ones(3, device=rank.device))
    rank.meet("failed")


def test_blocking_wait_raises_where_it_happened(device):
    """MNNVL_BLOCKING_WAIT=1: without any synchronisation the call that failed raises. On the CPU it always does."""
    run_ranks(blocking_wait_body, 2, device, backend=None, env={"MNNVL_BLOCKING_WAIT": "1"})


def never_arrives_body(rank: Rank) -> str:
    rank.init(timeout=SHORT)
    text = ""
    if rank.rank != 2:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError) as raised:
            call(rank)
        assert time.monotonic() - start < 8
        text = str(raised.value)
    rank.meet("failed")
    new_default_group_works(rank)
    return text


def test_a_rank_that_never_arrives_at_set_up(device):
    texts = run_ranks(never_arrives_body, 3, device, backend=None)
    for rank in (0, 1):
        assert "rank 2" in texts[rank], texts[rank]


def disagreeing_body(rank: Rank) -> bool:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    start = time.monotonic()
    raised = False
    try:
        for _ in range(2):
            call(rank, 10_000_000) if rank.rank == 0 else dist.barrier()
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
    except dist.DistBackendError:
        raised = True
    assert time.monotonic() - start < 10
    new_default_group_works(rank)
    return raised


def test_ranks_that_call_different_things_do_not_hang(device):
    """Outside debug mode nothing compares the calls, but an all_reduce of many chunks against barriers ends by the
    timeout at the latest, and a new group works."""
    assert any(run_ranks(disagreeing_body, 2, device, backend=None))


# abort() and destroy.


def abort_body(rank: Rank) -> None:
    works(rank)
    rank.meet("ready")
    backend = dist.group.WORLD._get_backend(rank.device)
    start = time.monotonic()
    if rank.rank == 0:
        timer = threading.Timer(0.3, backend.abort)
        timer.start()
        with pytest.raises(dist.DistBackendError, match="abort"):
            call(rank)
        timer.join()
    elif rank.rank == 1:
        with pytest.raises(dist.DistBackendError, match=r"rank 0\b"):  # waits too, and is told
            call(rank)
    assert time.monotonic() - start < 5
    rank.meet("told")
    backend.abort()
    backend.abort()
    with pytest.raises(dist.DistBackendError):
        call(rank)
    new_default_group_works(rank)


def test_abort_from_another_thread_ends_waits_everywhere(device):
    """Of this rank and of its peers, long before the timeout; rank 2 never calls."""
    run_ranks(abort_body, 3, device)


def abort_in_set_up_body(rank: Rank) -> None:
    rank.init(timeout=timedelta(seconds=4))
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        returned: list[float] = []
        start = time.monotonic()

        def abort() -> None:
            backend.abort()
            returned.append(time.monotonic() - start)

        timer = threading.Timer(0.3, abort)
        timer.start()
        with pytest.raises(dist.DistBackendError):
            call(rank)
        timer.join()
        assert returned[0] < 2, f"abort() itself took {returned[0]:.1f} s"
    rank.meet("failed")
    new_default_group_works(rank)


def test_abort_during_set_up_does_not_wait_for_it(device):
    """Rank 1 never comes to the set-up; abort() from another thread returns at once all the same."""
    run_ranks(abort_in_set_up_body, 2, device, backend=None)


def abort_idle_body(rank: Rank) -> None:
    dist.group.WORLD._get_backend(rank.device).abort()
    dist.destroy_process_group()
    new_default_group_works(rank)


def test_abort_before_any_collective(device):
    run_ranks(abort_idle_body, 2, device)


def destroy_body(rank: Rank) -> None:
    dist.destroy_process_group()  # nothing done
    rank.init(prefix="used")
    works(rank)
    backend = dist.group.WORLD._get_backend(rank.device)
    subgroup = dist.new_group([0, 1], backend="mnnvl", pg_options=rank.options())
    works(rank, subgroup)
    rank.meet("done")
    backend.shutdown()
    backend.shutdown()
    with pytest.raises(dist.DistBackendError, match="has been shut down"):
        call(rank)
    dist.destroy_process_group()
    with pytest.raises((AssertionError, ValueError)):
        dist.destroy_process_group()  # torch's own refusal
    with pytest.raises(dist.DistBackendError, match="has been shut down"):
        backend.allreduce([torch.ones(1, device=rank.device)])
    del backend, subgroup
    gc.collect()
    new_default_group_works(rank)


def test_destroy_idle_used_and_twice(ranks, device):
    ranks(destroy_body, 2, device)


def destroy_under_threads_body(rank: Rank) -> None:
    """One thread waits in a call for a rank that never comes, others have queued behind it; destroy ends them all."""
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        failures: list[Exception] = []

        def waits(opts: dist.AllreduceOptions) -> None:
            try:
                backend.allreduce([torch.ones(100, device=rank.device)], opts).wait()
                if rank.device.type == "cuda":
                    torch.cuda.synchronize()
                    backend.allreduce([torch.ones(100, device=rank.device)], opts).wait()
            except dist.DistBackendError as error:
                failures.append(error)

        threads = []
        for async_op in (False, True, True):
            opts = dist.AllreduceOptions()
            opts.asyncOp = async_op
            threads.append(threading.Thread(target=waits, args=(opts,)))
            threads[-1].start()
            time.sleep(0.1)  # so that each is inside its call
        start = time.monotonic()
        dist.destroy_process_group()
        for thread in threads:
            thread.join(NOTICED_WITHIN)
        assert not any(thread.is_alive() for thread in threads)
        assert time.monotonic() - start < NOTICED_WITHIN
        assert len(failures) == 3
    rank.meet("destroyed")
    new_default_group_works(rank)


def test_destroy_while_other_threads_wait(device):
    run_ranks(destroy_under_threads_body, 2, device, backend=None, timeout=20)


def destroy_with_work_in_flight_body(rank: Rank) -> list[float]:
    """destroy waits for what was enqueued."""
    works(rank)
    xs = [torch.full((300_000,), float(rank.rank + 1), device=rank.device) for _ in range(10)]
    works_in_flight = [dist.all_reduce(x, async_op=True) for x in xs]
    dist.destroy_process_group()
    del works_in_flight
    return [x[-1].item() for x in xs]


def test_destroy_with_work_in_flight(ranks, device):
    assert ranks(destroy_with_work_in_flight_body, 2, device) == [[3.0] * 10] * 2


def footprint() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("memfd:mnnvl" in line for line in maps)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": mappings,
    }


def leaks_body(rank: Rank, cycles: int) -> tuple[dict[str, int], dict[str, int]]:
    def cycle(i: int) -> None:
        rank.init(prefix=f"cycle{i}", workspace_bytes=1 << 20)
        works(rank)
        work = dist.all_reduce(torch.ones(5, device=rank.device), async_op=True)
        work.wait()
        if i == 1 and rank.device.type == "cpu":
            assert footprint()["mappings"] == rank.world_size
        dist.destroy_process_group()

    for i in range(2):
        cycle(i)
    before = footprint()
    for i in range(2, cycles):
        cycle(i)
    return before, footprint()


def test_30_groups_leave_nothing(ranks, device):
    """No descriptor, thread or mapping per group that came and went."""
    for before, after in ranks(leaks_body, 2, device, args=(30,), backend=None, timeout=120):
        assert after == before
        assert after["mappings"] == 0


def failed_set_up_leaks_body(rank: Rank) -> tuple[dict[str, int], dict[str, int]]:
    def cycle(i: int) -> None:
        os.environ["MNNVL_HOST_ID"] = str(rank.rank)
        rank.init(prefix=f"cycle{i}")
        with pytest.raises(RuntimeError, match="hosts?"):
            works(rank)
        dist.destroy_process_group()

    cycle(0)
    before = footprint()
    for i in range(1, 20):
        cycle(i)
    return before, footprint()


def test_20_failed_set_ups_leave_nothing(ranks, device):
    for before, after in ranks(failed_set_up_leaks_body, 2, device, backend=None):
        assert after == before


if __name__ == "__main__":
    script_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))


def late_to_set_up_body(rank: Rank) -> None:
    """Rank 1 comes when rank 0 has given up: it is told at once, and a further attempt brings them together."""
    rank.init(timeout=timedelta(seconds=2))
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError, match="waited 2 s for rank 1"):
            call(rank)
    rank.meet("given up")
    if rank.rank == 1:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError, match="rank 0 waited 2 s for rank 1"):
            call(rank)
        assert time.monotonic() - start < 1
    rank.meet("told")
    works(rank)


def test_late_to_the_set_up(device):
    run_ranks(late_to_set_up_body, 2, device, backend=None)
