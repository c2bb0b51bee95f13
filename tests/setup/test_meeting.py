"""How ranks meet over a c10d store: whatever each of them has tried before, and whatever the store can do. Ranks are
threads; where it says processes, they are processes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

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
