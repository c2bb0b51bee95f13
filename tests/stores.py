"""Stores over another one, for tests that watch, hold up or break what ranks say in it."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


class Minimal(dist.Store):
    """Somebody's own store, with what torch's groups need and no more."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self.inner = inner

    def set(self, key: str, value: bytes) -> None:
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        return self.inner.get(key)

    def add(self, key: str, value: int) -> int:
        return self.inner.add(key, value)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=30)) -> None:
        self.inner.wait(keys, timeout)


class WithCheck(Minimal):
    def check(self, keys: list[str]) -> bool:
        return self.inner.check(keys)
