"""What tests of meetings share: stores that can less, ranks as threads, and a set-up in small."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from stores import Minimal, WithCheck

from mnnvl_backend import _C

PREFIX = "mnnvl/test"
SIZES = [2, 3, 5]
AT_ONCE = 1.0  # seconds; time-outs that would end a wait otherwise are longer


class Failing(WithCheck):
    """Loses its server after some calls of get()."""

    def __init__(self, inner: dist.Store, gets: int) -> None:
        super().__init__(inner)
        self.gets = gets

    def get(self, key: str) -> bytes:
        self.gets -= 1
        if self.gets < 0:
            raise ConnectionError("the server is gone")
        return self.inner.get(key)


def make_stores(kind: str, size: int, folder: Path) -> list[dist.Store]:
    """A store for each rank, all over the same content."""
    if kind == "file":
        return [dist.FileStore(str(folder / "store"), size) for _ in range(size)]
    if kind == "tcp":
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(size - 1)]
        return [server, *clients]
    shared = dist.HashStore()
    wrap: dict[str, Callable[[dist.Store], dist.Store]] = {
        "hash": lambda store: store,
        "minimal": Minimal,
        "with check": WithCheck,
    }
    return [wrap[kind](shared) for _ in range(size)]


class Threads:
    """Bodies that run beside each other; their results, or what they raised."""

    def __init__(self) -> None:
        self.results: dict[Any, Any] = {}
        self.threads: list[threading.Thread] = []

    def start(self, name: Any, body: Callable[[], Any]) -> None:
        def run() -> None:
            start = time.monotonic()
            try:
                result = body()
            except Exception as error:
                result = error
            self.results[name] = result, time.monotonic() - start

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self) -> dict[Any, Any]:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a wait without an end"
        return self.results


def exchange(store: dist.Store, rank: int, size: int, seconds: float = 10) -> Any:
    return _C.StoreExchange(store, PREFIX, rank, size, int(seconds * 1000))


def set_up(store: dist.Store, rank: int, size: int, seconds: float = 10, rounds: int = 3) -> bool:
    """A set-up of some rounds; every rank's bytes must come, in order."""
    ranks = exchange(store, rank, size, seconds)
    for turn in range(rounds):
        expected = [b"%d of %d\0" % (r, turn) * r for r in range(size)]
        assert ranks.all_gather(expected[rank]) == expected
    return True


def all_set_up(stores: list[dist.Store], ranks: list[int] | None = None) -> dict[Any, Any]:
    threads = Threads()
    for rank in range(len(stores)) if ranks is None else ranks:
        threads.start(rank, lambda rank=rank: set_up(stores[rank], rank, len(stores)))
    return threads.join()


def assert_all_work(results: dict[Any, Any]) -> None:
    assert [value for value, _ in results.values()] == [True] * len(results), results


def wait_until_present(store: dist.Store, rank: int, before: bytes = b"") -> bytes:
    """Until the rank has written a record other than `before`."""
    key = f"{PREFIX}/here/{rank}"
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if store.check([key]) and store.get(key) != before:
            return bytes(store.get(key))
        time.sleep(0.002)
    raise AssertionError(f"rank {rank} did not come")
