"""How ranks meet over a c10d store: whatever each of them has tried before, and whatever the store can do. Ranks are
threads; where it says processes, they are processes."""

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
    Failing,
    Threads,
    WithCheck,
    all_set_up,
    assert_all_work,
    exchange,
    make_stores,
    set_up,
    wait_until_present,
)

from mnnvl_backend import _C


@pytest.mark.parametrize("kind", ["hash", "tcp", "file", "minimal", "with check"])
@pytest.mark.parametrize("size", [1, *SIZES])
def test_meets_again_and_again(kind: str, size: int, tmp_path: Path) -> None:
    stores = make_stores(kind, size, tmp_path)
    for _ in range(4):
        assert_all_work(all_set_up(stores))


@pytest.mark.parametrize("kind", ["hash", "tcp", "minimal"])
@pytest.mark.parametrize("alone", [1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_tried_differently_often_meet(kind: str, alone: int, size: int, tmp_path: Path) -> None:
    stores = make_stores(kind, size, tmp_path)
    for _ in range(alone):
        with pytest.raises(TimeoutError, match=r"rank 0 waited 0.1 s for ranks? 1"):
            set_up(stores[0], 0, size, seconds=0.1)
    # Those who come late hear it at once.
    for rank, (error, seconds) in all_set_up(stores, list(range(1, size))).items():
        assert isinstance(error, TimeoutError), (rank, error)
        assert "rank 0 waited 0.1 s for rank" in str(error)
        assert seconds < AT_ONCE + (kind == "minimal")  # which is asked by waits
    # And the next attempt works, whoever is first.
    assert_all_work(all_set_up(stores))
    assert_all_work(all_set_up(stores))


@pytest.mark.parametrize("size", SIZES)
def test_a_time_out_is_heard_by_all_and_names_who_is_missing(size: int, tmp_path: Path) -> None:
    stores = make_stores("hash", size, tmp_path)
    threads = Threads()
    for rank in range(size - 1):
        threads.start(rank, lambda rank=rank: set_up(stores[rank], rank, size, seconds=0.5 if rank == 0 else 20))
    for error, seconds in threads.join().values():
        assert isinstance(error, TimeoutError)
        assert f"rank 0 waited 0.5 s for rank {size - 1} to reach step 0 of {PREFIX}" in str(error)
        assert seconds < 0.5 + AT_ONCE
    with pytest.raises(TimeoutError, match="rank 0 waited 0.5 s"):
        set_up(stores[size - 1], size - 1, size)
    assert_all_work(all_set_up(stores))


@pytest.mark.parametrize("rounds", [0, 1])
def test_ranks_that_time_out_together_name_the_same_one(rounds: int, tmp_path: Path) -> None:
    """The last to give up finds the first one gone; that isn't who was missing."""
    for turn in range(20):
        stores = make_stores("hash", 4, tmp_path)

        def body(rank: int, stores: list[dist.Store] = stores, stagger: int = turn % 3) -> None:
            ranks = exchange(stores[rank], rank, 4, seconds=0.05 + 0.002 * (rank + stagger))
            for _ in range(rounds + (rank != 3)):
                ranks.all_gather(b"")
            if rank == 3:
                time.sleep(0.3)  # present, and late for the next round

        threads = Threads()
        for rank in range(4):
            if rounds or rank != 3:
                threads.start(rank, lambda rank=rank, body=body: body(rank))
        for rank, (error, _) in threads.join().items():
            if rank != 3:
                assert isinstance(error, TimeoutError), error
                assert "(ranks [3] of 4 did not come)" in str(error)


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


def test_a_rank_that_gives_up_tells_who_began_anew(tmp_path: Path) -> None:
    """It will not try again, and who waits for it has begun another try since they met."""
    stores = make_stores("hash", 2, tmp_path)
    first = [exchange(store, rank, 2) for rank, store in enumerate(stores)]
    threads = Threads()
    for rank in range(2):
        threads.start(("met", rank), lambda rank=rank: first[rank].all_gather(b"") == [b"", b""])
    assert_all_work(threads.join())
    before = wait_until_present(stores[0], 1)
    threads.start("anew", lambda: set_up(stores[1], 1, 2))
    wait_until_present(stores[0], 1, before)
    first[0].give_up("a bad argument")
    error, seconds = threads.join()["anew"]
    assert "rank 0 gave it up: a bad argument" in str(error)
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


def test_two_processes_of_one_rank(tmp_path: Path) -> None:
    """The later one has the place; the earlier one says so and doesn't disturb."""
    stores = make_stores("hash", 2, tmp_path)
    threads = Threads()
    threads.start("earlier", lambda: set_up(stores[1], 1, 2))
    before = wait_until_present(stores[0], 1)
    threads.start("later", lambda: set_up(stores[1], 1, 2))
    wait_until_present(stores[0], 1, before)
    threads.threads[0].join(AT_ONCE)
    assert "has taken the place of rank 1" in str(threads.results["earlier"][0])
    threads.start(0, lambda: set_up(stores[0], 0, 2))
    results = threads.join()
    assert results["later"][0] is True
    assert results[0][0] is True


class Slow(WithCheck):
    """Its rank learns that everybody has posted only after `go`."""

    def __init__(self, inner: dist.Store, go: threading.Event) -> None:
        super().__init__(inner)
        self.go = go

    def check(self, keys: list[str]) -> bool:
        if keys[0].endswith("/0/0") and not self.go.is_set():
            self.go.wait(20)
            return False  # as it was before
        return self.inner.check(keys)


@pytest.mark.parametrize("others", ["gone", "in the next set-up"])
@pytest.mark.parametrize("size", SIZES)
def test_a_slow_rank_has_met_though_the_others_went_on(size: int, others: str, tmp_path: Path) -> None:
    stores = make_stores("hash", size, tmp_path)
    go = threading.Event()
    through, proceed = threading.Barrier(size), threading.Event()

    def quick(rank: int) -> bool:
        set_up(stores[rank], rank, size, rounds=1)
        through.wait(20)
        proceed.wait(20)
        return set_up(stores[rank], rank, size)

    def slow(rank: int) -> bool:
        set_up(Slow(stores[rank], go), rank, size, rounds=1)
        return set_up(stores[rank], rank, size)

    threads = Threads()
    threads.start(1, lambda: slow(1))
    quick_ranks = [rank for rank in range(size) if rank != 1]
    for rank in quick_ranks:
        threads.start(rank, lambda rank=rank: quick(rank))
    through.wait(20)
    if others == "gone":
        go.set()
        threads.threads[0].join(0.2)  # it may well be in its next set-up by now
        proceed.set()
    else:
        gone = {rank: stores[0].get(f"{PREFIX}/here/{rank}") for rank in quick_ranks}
        proceed.set()
        for rank in quick_ranks:
            wait_until_present(stores[0], rank, gone[rank])
        go.set()
    assert_all_work(threads.join())


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_come_and_go_at_random_meet_in_the_end(size: int, tmp_path: Path) -> None:
    """Each tries with short time-outs of its own until it has worked; then all try together once more."""
    stores = make_stores("hash", size, tmp_path)
    done = threading.Barrier(size)

    def body(rank: int) -> int:
        tries = 0
        for seconds in [0.01 * (1 + (rank * 7 + i * 3) % 5) for i in range(10)]:
            try:
                set_up(stores[rank], rank, size, seconds)
            except (TimeoutError, dist.DistBackendError):
                time.sleep(0.003 * rank)
        done.wait()
        while True:
            tries += 1
            try:
                set_up(stores[rank], rank, size)
                return tries
            except (TimeoutError, dist.DistBackendError):
                assert tries < 10

    threads = Threads()
    for rank in range(size):
        threads.start(rank, lambda rank=rank: body(rank))
    results = threads.join()
    assert all(isinstance(value, int) for value, _ in results.values()), results


def test_nothing_piles_up_in_the_store(tmp_path: Path) -> None:
    stores = make_stores("hash", 3, tmp_path)
    counts = []
    for _ in range(5):
        assert_all_work(all_set_up(stores))
        counts.append(stores[0].num_keys())
    assert counts == [counts[0]] * 5
    # A record, a count and the last contribution of each rank.
    assert counts[0] <= 3 * 3


@pytest.mark.parametrize("gets", [0, 1, 2, 3, 5])
def test_a_store_that_fails_is_named(gets: int, tmp_path: Path) -> None:
    shared = dist.HashStore()
    threads = Threads()
    threads.start(0, lambda: set_up(Failing(shared, gets), 0, 2, rounds=20))
    threads.start(1, lambda: set_up(WithCheck(shared), 1, 2, seconds=1, rounds=20))
    results = threads.join()
    text = str(results[0][0])
    assert text.startswith("mnnvl set-up: rank 0 could not use the c10d store (get of mnnvl/test): ")
    assert "the server is gone" in text
    assert isinstance(results[1][0], (TimeoutError, dist.DistBackendError))


@pytest.mark.parametrize("milliseconds", [109500 * 24 * 3600 * 1000, 2**62, 2**63 - 1])
def test_no_time_out_overflows(milliseconds: int) -> None:
    store = dist.HashStore()
    threads = Threads()
    for rank in range(2):
        ranks = _C.StoreExchange(store, PREFIX, rank, 2, milliseconds)
        threads.start(rank, lambda ranks=ranks: ranks.all_gather(b"x"))
    assert [value for value, _ in threads.join().values()] == [[b"x", b"x"]] * 2
