"""The set-up between processes: descriptors over sockets, fabric handles between network namespaces (two of which stand
for two hosts), processes of another user, at their limit of files, or gone."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from double import run_fake_setup, run_host_setup

CLONE_NEWNET = 0x40000000
Prepare = Callable[[int], None]  # runs in a rank's process before its set-up, given the rank


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where ranks meet: open to other users, as pytest's own directories are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def run_ranks(
    run: Callable[..., dict[str, Any]],
    directory: Path,
    world_size: int,
    prepare: Prepare | None = None,
    seconds: float = 30,
    **config: Any,
) -> list[dict[str, Any] | None]:
    """`run` as rank 0, 1, … in a forked process each; None for a rank that died without a result."""
    children = []
    for rank in range(world_size):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reader)
                if prepare is not None:
                    prepare(rank)
                result = run(world_size=world_size, rank=rank, directory=str(directory), **config)
                # Of the one rank that ran here.
                flat = {
                    key: value[0] if isinstance(value, list) and len(value) == 1 else value
                    for key, value in result.items()
                }
                os.write(writer, json.dumps({**flat, "pid": os.getpid()}).encode())
                status = 0
            except BaseException as error:  # nothing of pytest may run in the child
                os.write(writer, json.dumps({"crashed": repr(error)}).encode())
            finally:
                os._exit(status)
        os.close(writer)
        children.append((pid, reader))
    end = time.monotonic() + seconds
    results = []
    try:
        for _pid, reader in children:
            os.set_blocking(reader, False)
            text = b""
            while time.monotonic() < end:
                with suppress(BlockingIOError):
                    part = os.read(reader, 1 << 20)
                    if not part:
                        break
                    text += part
                time.sleep(0.002)
            results.append(json.loads(text) if text else None)
    finally:
        for pid, reader in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
    for result in results:
        assert result is None or "crashed" not in result, result
    return results


def assert_clean(results: list[dict[str, Any] | None]) -> None:
    for result in results:
        assert result is not None
        assert result.get("leaks", {}) == {}
        assert result["descriptors_leaked"] == 0
        assert result["mappings_leaked"] == 0


def assert_works(results: list[dict[str, Any] | None]) -> None:
    assert_clean(results)
    for result in results:
        assert result is not None
        assert result["errors"] == ""
        assert result["ok"]
        assert result["verified"]


def assert_fails_alike(results: list[dict[str, Any] | None]) -> str:
    assert_clean(results)
    texts = {result["errors"] for result in results if result is not None}
    assert len(texts) == 1, texts
    text: str = texts.pop()
    assert text
    return text


def assert_sees_peers(results: list[dict[str, Any] | None]) -> None:
    pids = [result["pid"] for result in results if result is not None]
    for rank, result in enumerate(results):
        assert result is not None
        seen = result["peer_pids"] if isinstance(result["peer_pids"], list) else [result["peer_pids"]]
        assert seen == [-1 if peer == rank else pid for peer, pid in enumerate(pids)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_host_segments(directory: Path, world_size: int) -> None:
    results = run_ranks(run_host_setup, directory, world_size, repeats=5)
    assert_works(results)
    assert_sees_peers(results)


@pytest.mark.parametrize("clusters", [[""], ["rack"]], ids=["fd", "fabric"])
def test_device_memory(directory: Path, clusters: list[str]) -> None:
    results = run_ranks(run_fake_setup, directory, 3, repeats=5, sleeps=2, clusters=clusters, multicast_support=[0])
    assert_works(results)
    assert_sees_peers(results)
    for result in results:
        assert result is not None
        assert result["asleep"] == {"reservations": 3}
        assert result["handle_types"] == ("fabric" if clusters[0] else "fd")


# --- Two hosts.


def libc_call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


@pytest.fixture
def two_hosts() -> Iterator[dict[str, Any]]:
    """Makes odd ranks another host: by one network namespace of their own, or, where that is not permitted, by word."""
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:  # keeps the namespace until it is killed
        try:
            libc_call("unshare", CLONE_NEWNET)
            os.write(writer, b"made")
        except OSError as error:
            os.write(writer, str(error).encode())
        signal.pause()
    outcome = os.read(reader, 1000).decode()

    def enter(rank: int) -> None:
        if rank % 2 == 1:
            fd = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY)
            libc_call("setns", fd, CLONE_NEWNET)
            os.close(fd)

    if outcome == "made":
        yield {"prepare": enter}
    else:
        warnings.warn(f"no network namespaces here ({outcome}): two hosts are told by host id instead", stacklevel=2)
        yield {"host_ids": ["node-a", "node-b", "node-a", "node-b"]}
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    os.close(reader)
    os.close(writer)


def test_two_hosts_of_one_fabric(directory: Path, two_hosts: dict[str, Any]) -> None:
    results = run_ranks(run_fake_setup, directory, 4, clusters=["rack"], multicast_support=[0], **two_hosts)
    assert_works(results)
    pids = [result["pid"] for result in results if result is not None]
    for rank, result in enumerate(results):
        assert result is not None
        assert result["handle_types"] == "fabric"
        # Pids are for peers of the same host.
        assert result["peer_pids"] == [
            pid if peer != rank and peer % 2 == rank % 2 else -1 for peer, pid in enumerate(pids)
        ]


def test_two_hosts_without_a_fabric(directory: Path, two_hosts: dict[str, Any]) -> None:
    text = assert_fails_alike(run_ranks(run_fake_setup, directory, 4, **two_hosts))
    assert "spans hosts without a shared NVLink fabric" in text
    assert "the ranks are on 2 hosts" in text


def test_two_hosts_in_different_cliques(directory: Path, two_hosts: dict[str, Any]) -> None:
    config = {"clusters": ["rack"], "cliques": [1, 2, 1, 2]}
    text = assert_fails_alike(run_ranks(run_fake_setup, directory, 4, **config, **two_hosts))
    assert "2 different NVLink cliques" in text


def test_two_hosts_share_no_host_memory(directory: Path, two_hosts: dict[str, Any]) -> None:
    text = assert_fails_alike(run_ranks(run_host_setup, directory, 4, **two_hosts))
    assert "CPU tensors are served within one host" in text
    assert len(text.splitlines()) == 1 + 4


def test_a_host_id_that_is_not_true(directory: Path, two_hosts: dict[str, Any]) -> None:
    if "prepare" not in two_hosts:
        pytest.skip("no network namespaces here, so every told host id is as good as true")
    results = run_ranks(run_host_setup, directory, 2, **two_hosts, host_ids=["same"])
    text = assert_fails_alike(results)
    assert "another network namespace" in text


# --- Processes that can't or won't.


def test_a_process_of_another_user_gets_no_descriptor(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can run a rank as another user")

    def become_nobody(rank: int) -> None:
        if rank == 1:
            os.setgid(65534)
            os.setuid(65534)

    began = time.monotonic()
    results = run_ranks(run_host_setup, directory, 3, become_nobody, timeout_ms=10000)
    text = assert_fails_alike(results)
    assert "belongs to another user" in text
    assert time.monotonic() - began < 5


def test_a_process_at_its_limit_of_files(directory: Path) -> None:
    def limit(rank: int) -> None:
        if rank == 1:
            # Enough for the segment, the socket and one more, not for the connections of two peers.
            taken = {int(name) for name in os.listdir("/proc/self/fd")}
            free = [fd for fd in range(4096) if fd not in taken][:3]
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1] + 1, free[-1] + 1))

    began = time.monotonic()
    results = run_ranks(run_host_setup, directory, 3, limit, timeout_ms=10000)
    text = assert_fails_alike(results)
    assert "failed on rank 1 (" in text
    assert "open files" in text
    assert time.monotonic() - began < 5


def test_a_rank_that_never_comes_is_named(directory: Path) -> None:
    def die(rank: int) -> None:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    results = run_ranks(run_host_setup, directory, 3, die, timeout_ms=1000)
    assert results[2] is None
    assert_clean(results[:2])
    for result in results[:2]:
        assert result is not None
        assert result["error_kinds"] == "timeout"
        assert "rank 2 did not come" in result["errors"]
        assert result["seconds"] < 4
