"""What 72 ranks ask of the c10d store while they are set up: requests grow with the ranks, and don't pile up while ranks
wait for a late one. Each request names every rank's key, so bytes grow with the square."""

from __future__ import annotations

import time
from collections import Counter

import torch.distributed as dist
from meeting import Threads, WithCheck, assert_all_work, set_up

WORLD = 72
ROUNDS = 20  # a GPU's set-up takes about so many


class Counting(WithCheck):
    """Counts what one rank asks for."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__(inner)
        self.requests: Counter[str] = Counter()

    def set(self, key: str, value: bytes) -> None:
        self.requests["set"] += 1
        super().set(key, value)

    def get(self, key: str) -> bytes:
        self.requests["get"] += 1
        return super().get(key)

    def add(self, key: str, value: int) -> int:
        self.requests["add"] += 1
        return super().add(key, value)

    def check(self, keys: list[str]) -> bool:
        self.requests["check of one" if len(keys) == 1 else "check"] += 1
        return super().check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests["multi_get"] += 1
        return self.inner.multi_get(keys)  # type: ignore[no-any-return, attr-defined]

    def has_extended_api(self) -> bool:
        return True


def meet(rounds: int, late_seconds: float) -> tuple[list[Counter[str]], float]:
    shared = dist.HashStore()
    stores = [Counting(shared) for _ in range(WORLD)]
    threads = Threads()
    begin = time.monotonic()
    for rank in range(WORLD):
        if rank == WORLD - 1:
            time.sleep(late_seconds)
        threads.start(rank, lambda rank=rank: set_up(stores[rank], rank, WORLD, seconds=30, rounds=rounds))
    assert_all_work(threads.join())
    return [store.requests for store in stores], time.monotonic() - begin


def test_requests_of_a_rank_do_not_grow_with_the_ranks() -> None:
    requests, seconds = meet(ROUNDS, late_seconds=0)
    looks = seconds / 0.01  # at what peers say, while a rank waits: the first after 10 ms, later ones further apart
    for rank, asked in enumerate(requests):
        assert asked["set"] <= ROUNDS + 3, (rank, asked)  # its record at the begin and the end, a higher count
        assert asked["get"] + asked["add"] <= 4, (rank, asked)
        assert asked["multi_get"] <= ROUNDS + 2 + looks, (rank, asked)


def test_ranks_that_wait_for_a_late_one_ask_seldom() -> None:
    requests, seconds = meet(1, late_seconds=1.5)
    for rank, asked in enumerate(requests[:-1]):
        # Some at once, then one in 28.8 ms.
        assert asked["check"] <= 20 + seconds / 0.0288, (rank, seconds, asked)
