"""What tests of strangers share: their processes, the names that they find, and a store that holds ranks back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from stores import WithCheck

NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be a stranger to itself (another uid)")


def names() -> list[str]:
    with open("/proc/net/unix") as table:
        return [line.partition("@mnnvl-")[2].strip() for line in table if "@mnnvl-" in line]


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


class Held(WithCheck):
    """The ranks' store: it lets nobody learn the address of a socket before the strangers have dealt with it."""

    def __init__(self, inner: dist.Store, strangers: dist.Store) -> None:
        super().__init__(inner)
        self.strangers, self.released = strangers, 0.0

    def set(self, key: str, value: bytes) -> None:
        for name in names():
            if name.encode() in bytes(value):
                self.strangers.wait([f"full {name}"], timedelta(seconds=20))
                self.released = time.monotonic()
        self.inner.set(key, value)

    def deleteKey(self, key: str) -> bool:
        return self.inner.delete_key(key)


@contextmanager
def processes(commands: list[list[str]]) -> Iterator[dist.TCPStore]:
    """Runs Python with these arguments and, as the last one, the port of the store in which strangers tell what they
    did. They have begun when each has added 1 to "strangers"."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen([sys.executable, *command, str(store.port)], env=env, start_new_session=True)
        for command in commands
    ]
    try:
        end = time.monotonic() + 60
        while store.add("strangers", 0) < len(running):
            assert time.monotonic() < end, "the strangers did not come"
            assert all(process.poll() is None for process in running), "a stranger has ended"
            time.sleep(0.05)
        yield store
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
