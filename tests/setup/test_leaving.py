"""How ranks leave a meeting over a c10d store, and who hears of it: those that give up, that go without a word, that die,
and their children by fork(). Ranks are threads; where it says processes, they are processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from meeting import (
    AT_ONCE,
    PREFIX,
    SIZES,
    Threads,
    WithCheck,
    all_set_up,
    assert_all_work,
    exchange,
    make_stores,
    set_up,
    wait_until_present,
)


@pytest.mark.parametrize("when", ["before", "waited for", "late"])
@pytest.mark.parametrize("size", SIZES)
def test_giving_up_is_heard_at_once(when: str, size: int, tmp_path: Path) -> None:
    stores = make_stores("tcp", size, tmp_path)
    last = size - 1
    threads = Threads()

    def others() -> None:
        for rank in range(last):
            threads.start(rank, lambda rank=rank: set_up(stores[rank], rank, size))

    giving = exchange(stores[last], last, size)
    if when == "before":
        giving.give_up("a bad argument")
        others()
    elif when == "waited for":
        others()
        for rank in range(last):
            wait_until_present(stores[last], rank)
        giving.give_up("a bad argument")
    else:  # after meeting
        met = threading.Barrier(size)

        def meet_then(rank: int) -> None:
            ranks = exchange(stores[rank], rank, size)
            ranks.all_gather(b"")
            met.wait()
            ranks.all_gather(b"")

        for rank in range(last):
            threads.start(rank, lambda rank=rank: meet_then(rank))
        giving.all_gather(b"")
        met.wait()
        giving.give_up("a bad argument")
    for error, seconds in threads.join().values():
        assert isinstance(error, dist.DistBackendError), error
        assert f"rank {last} gave it up: a bad argument" in str(error)
        assert seconds < 2 * AT_ONCE
    with pytest.raises(dist.DistBackendError, match="gave it up"):
        giving.all_gather(b"")
    assert_all_work(all_set_up(stores))


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_leaves_without_a_word_is_named(size: int, tmp_path: Path) -> None:
    stores = make_stores("hash", size, tmp_path)
    met = threading.Barrier(size)

    def body(rank: int) -> None:
        ranks = exchange(stores[rank], rank, size)
        ranks.all_gather(b"")
        met.wait()
        if rank != 1:
            ranks.all_gather(b"")

    threads = Threads()
    for rank in range(size):
        threads.start(rank, lambda rank=rank: body(rank))
    for rank, (error, seconds) in threads.join().items():
        assert seconds < AT_ONCE
        if rank != 1:
            assert isinstance(error, dist.DistBackendError), error
            # A rank may notice one that noticed first.
            assert "left it before, or began anew" in str(error)
            assert size > 2 or "waited for rank 1 to reach step 1" in str(error)
    assert_all_work(all_set_up(stores))


def forked_rank(path: Path, rank: int, size: int, rounds: int) -> int:
    """A process that takes part in some rounds and then in no more; gives its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            ranks = exchange(dist.FileStore(str(path), size), rank, size, seconds=60)
            for _ in range(rounds):
                ranks.all_gather(b"of a process")
            (path.parent / "through").touch()
            signal.pause()
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_process_killed_before_it_met_is_replaced(size: int, tmp_path: Path) -> None:
    """What it left in the store looks like a rank that is there."""
    stores = make_stores("file", size, tmp_path)
    pid = forked_rank(tmp_path / "store", 1, size, rounds=1)
    left = wait_until_present(stores[0], 1)
    kill(pid)
    threads = Threads()
    for rank in (0, *range(2, size)):
        threads.start(rank, lambda rank=rank: set_up(stores[rank], rank, size))
    for rank in (0, *range(2, size)):
        wait_until_present(stores[0], rank)
    assert stores[0].get(f"{PREFIX}/here/1") == left
    threads.start(1, lambda: set_up(stores[1], 1, size))
    assert_all_work(threads.join())


def test_a_process_killed_in_mid_set_up_is_replaced(tmp_path: Path) -> None:
    stores = make_stores("file", 2, tmp_path)
    pid = forked_rank(tmp_path / "store", 1, 2, rounds=1)
    ranks = exchange(stores[0], 0, 2)
    assert ranks.all_gather(b"here") == [b"here", b"of a process"]
    kill(pid)
    threads = Threads()
    threads.start("waits", lambda: ranks.all_gather(b""))
    threads.start("new", lambda: set_up(stores[1], 1, 2))
    end = time.monotonic() + 5
    while "waits" not in threads.results and time.monotonic() < end:
        time.sleep(0.01)
    error, seconds = threads.results["waits"]
    assert isinstance(error, dist.DistBackendError)
    assert "waited for rank 1 to reach step 1" in str(error)
    assert seconds < AT_ONCE
    threads.start("again", lambda: set_up(stores[0], 0, 2))  # meets the one that is still there
    results = threads.join()
    assert results["new"][0] is True
    assert results["again"][0] is True


class Replacing(WithCheck):
    """Between noticing that rank 1 is dead and leaving word of it, its rank looks at its own record: then `act` runs."""

    def __init__(self, inner: dist.Store, act: Callable[[], Any]) -> None:
        super().__init__(inner)
        self.act: Callable[[], Any] | None = act
        self.noticed = False

    def check(self, keys: list[str]) -> bool:
        self.noticed = len(keys) == 1 and keys[0].endswith("/1/1")
        return self.inner.check(keys)

    def get(self, key: str) -> bytes:
        if key.endswith("/here/0") and self.noticed and self.act:
            act, self.act = self.act, None
            act()
        return self.inner.get(key)


def test_word_of_a_rank_that_died_is_not_meant_for_the_one_that_took_its_place(tmp_path: Path) -> None:
    stores = make_stores("file", 2, tmp_path)
    threads = Threads()

    def replace() -> None:
        before = stores[0].get(f"{PREFIX}/here/1")
        threads.start("in its place", lambda: set_up(stores[1], 1, 2))
        wait_until_present(stores[0], 1, before)

    pid = forked_rank(tmp_path / "store", 1, 2, rounds=1)
    store = Replacing(stores[0], replace)
    ranks = exchange(store, 0, 2)
    ranks.all_gather(b"")
    kill(pid)
    with pytest.raises(dist.DistBackendError, match=f"whose process .pid {pid}. has ended"):
        ranks.all_gather(b"")
    assert store.act is None
    time.sleep(0.3)  # it looks at the records every 100 ms
    threads.start("again", lambda: set_up(stores[0], 0, 2))
    assert_all_work(threads.join())


@pytest.mark.parametrize("why", ["gives up", "has a failure of its own"])
def test_a_rank_that_fails_by_itself_tells_who_began_anew(why: str, tmp_path: Path) -> None:
    """It may not try again, and who waits for it has begun another try since they met."""
    stores = make_stores("hash", 2, tmp_path)
    first = [exchange(store, rank, 2) for rank, store in enumerate(stores)]
    threads = Threads()
    for rank in range(2):
        threads.start(("met", rank), lambda rank=rank: first[rank].all_gather(b"") == [b"", b""])
    assert_all_work(threads.join())
    before = wait_until_present(stores[0], 1)
    threads.start("anew", lambda: set_up(stores[1], 1, 2))
    wait_until_present(stores[0], 1, before)
    if why == "gives up":
        first[0].give_up("a bad argument")
    else:
        with pytest.raises(dist.DistBackendError, match="what rank 0 contributes has 2097152 bytes"):
            first[0].all_gather(bytes(2 << 20))
    error, seconds = threads.join()["anew"]
    told = {"gives up": "rank 0 gave it up: a bad argument"}.get(why, "what rank 0 contributes has 2097152 bytes")
    assert told in str(error)
    assert seconds < AT_ONCE


def test_a_reason_too_long_for_a_record_is_cut(tmp_path: Path) -> None:
    stores = make_stores("hash", 2, tmp_path)
    reason = "too long " * (1 << 18)
    exchange(stores[1], 1, 2).give_up(reason)
    with pytest.raises(dist.DistBackendError) as raised:
        set_up(stores[0], 0, 2)
    told, cut = str(raised.value)[:60], str(raised.value)[-30:]
    start = "mnnvl set-up: rank 1 gave it up: "
    assert told.startswith(start + "too long too long")
    assert cut.endswith(f"... ({len(start + reason)} bytes)")
    assert_all_work(all_set_up(stores))


def test_a_forked_child_says_nothing_in_its_parents_name(tmp_path: Path) -> None:
    stores = make_stores("file", 2, tmp_path)
    threads = Threads()
    child_is_gone = threading.Event()

    def peer() -> bool:
        ranks = exchange(stores[0], 0, 2)
        ranks.all_gather(b"")
        child_is_gone.wait(20)
        return ranks.all_gather(b"peer") == [b"peer", b"parent"]

    threads.start("peer", peer)
    ranks = exchange(stores[1], 1, 2)
    ranks.all_gather(b"")
    before = stores[1].get(f"{PREFIX}/here/1")
    pid = os.fork()
    if pid == 0:
        try:
            with pytest.raises(dist.DistBackendError, match=f"belongs to process {os.getppid()}, "):
                ranks.all_gather(b"child")
            ranks.give_up("a child's reason")
            del ranks
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert stores[1].get(f"{PREFIX}/here/1") == before
    child_is_gone.set()
    assert ranks.all_gather(b"parent") == [b"peer", b"parent"]
    assert_all_work(threads.join())
