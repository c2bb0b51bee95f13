"""The one launcher of multi-rank tests: a function runs on N ranks, each a process with a fresh process group.

    def body(rank: Rank, scale):          # a top-level function: it is pickled by name
        x = torch.ones(3, device=rank.device) * scale
        dist.all_reduce(x)
        return x.tolist()

    results = run_ranks(body, 4, args=(2.0,))

Importing torch takes seconds per process, so ranks are forked off a server that has imported it (multiprocessing's
forkserver, which never touches CUDA), and a RankPool keeps them for the next body. The store lives in the caller's
process: no port is guessed, and it outlives every rank.
"""

from __future__ import annotations

import faulthandler
import fcntl
import itertools
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mnnvl_backend

GRACE_SECONDS = 5.0  # how long the others may take to fail too, so that their tracebacks are seen
PATIENCE = float(os.environ.get("MNNVL_TEST_PATIENCE", "1"))  # times all seconds given to bodies and groups
F_SETSIG = 10  # linux/fcntl.h; Python doesn't have it
_jobs = itertools.count()


@dataclass
class Rank:
    """What a body is given."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store  # of this body alone
    group_timeout: timedelta

    def options(self, **options: Any) -> mnnvl_backend.Options:
        """Options for any group of this body."""
        return mnnvl_backend.Options(**options)

    def init(
        self, backend: str = "mnnvl", prefix: str = "group", timeout: timedelta | None = None, **options: Any
    ) -> None:
        """The default process group; a later one in the same body needs another `prefix`."""
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(prefix, self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout or self.group_timeout,
            pg_options=self.options(**options) if "mnnvl" in backend else None,
        )

    def meet(self, name: str = "meet") -> None:
        """A barrier through the store alone, for tests that must not use the group. Each name once per body."""
        if self.store.add(f"{name}/count", 1) == self.world_size:
            self.store.set(f"{name}/done", "1")
        self.store.wait([f"{name}/done"], self.group_timeout)


@dataclass(frozen=True)
class Died:
    """The result of a rank in `may_die` whose process ended; `exitcode` is negative for a signal."""

    exitcode: int | None


class RankFailure(AssertionError):
    """Every rank's traceback or fate."""


@dataclass
class Job:
    pickled: bytes  # (fn, args)
    rank: int
    world_size: int
    device: str
    port: int
    prefix: str
    backend: str | None
    options: dict[str, Any]
    group_timeout: float
    env: dict[str, str]


@dataclass
class Worker:
    process: Any
    connection: Connection
    log: Path
    read: int = 0  # how much of the log has been shown

    def new_output(self) -> str:
        data = self.log.read_bytes()[self.read :]
        self.read += len(data)
        return data.decode(errors="replace")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it may not have made its process group yet
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.connection.close()


@dataclass
class RankPool:
    """Processes kept for many bodies. One that fails, times out or loses a rank costs the pool its processes; the next
    body gets new ones. Use as a context manager, or call close()."""

    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "mnnvl_backend", "pytest", __name__])
        self._folder = tempfile.TemporaryDirectory(prefix="mnnvl-ranks-")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # The server of the forks keeps the environment of the first start; ranks are many and cores few.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        # A hardware queue for each stream of messages, of which 8 ranks have 14 each (csrc/README.md, "A list of messages ends").
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._kill()
        self._folder.cleanup()

    def _kill(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def _grow(self, count: int) -> None:
        while len(self.workers) < count:
            ours, theirs = self._context.Pipe()
            log = Path(self._folder.name) / f"{next(_jobs)}.log"
            log.touch()
            process = self._context.Process(target=_work, args=(theirs, str(log)), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(Worker(process, ours, log))

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        device: str = "cpu",
        timeout: float = 60,
        env: dict[str, str] | None = None,
        args: Sequence[Any] = (),
        *,
        backend: str | None = "mnnvl",
        options: dict[str, Any] | None = None,
        group_timeout: float = 30,
        may_die: Iterable[int] = (),
    ) -> list[Any]:
        """Runs fn(rank: Rank, *args) on every rank and returns their results in rank order.

        Args:
            fn: a top-level function; it, `args` and the results are pickled.
            device: "cpu", or "cuda": rank r takes GPU r modulo their number.
            timeout: seconds after which everything is killed; stacks of all threads are then part of the report.
            env: set in the ranks for this body only, before the group is made.
            backend: the default group to make before and destroy after; None: the body makes its own (Rank.init).
            options: of mnnvl_backend.Options, for the default group.
            group_timeout: the group's timeout in seconds.
            may_die: ranks whose process may end; their result is then a Died.

        Raises:
            RankFailure: with every rank's traceback, output and fate.
        """
        timeout, group_timeout = PATIENCE * timeout, PATIENCE * group_timeout
        self._grow(world_size)
        team = self.workers[:world_size]
        pickled = pickle.dumps((fn, tuple(args)))
        prefix = f"job{next(_jobs)}"
        for rank, worker in enumerate(team):
            worker.connection.send(
                Job(pickled, rank, world_size, device, self._store.port, prefix, backend, options or {}, group_timeout,
                    env or {})
            )  # fmt: skip
        answers = self._collect(team, timeout, set(may_die))
        failed = {r: text for r, (ok, text) in answers.items() if not ok}
        output = "".join(_prefixed(rank, worker.new_output()) for rank, worker in enumerate(team))
        if output:
            print(output, end="")
        if failed or any(isinstance(value, Died) for _, value in answers.values()):
            self._kill()
        if failed:
            report = "".join(_prefixed(rank, text) for rank, text in sorted(failed.items()))
            raise RankFailure(f"{fn.__name__} failed on ranks {sorted(failed)} of {world_size} ({device}):\n{report}")
        return [answers[rank][1] for rank in range(world_size)]

    def _collect(self, team: list[Worker], timeout: float, may_die: set[int]) -> dict[int, tuple[bool, Any]]:
        """(True, result) or (False, what happened) for every rank."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(team):
            waiting = {worker.connection: rank for rank, worker in enumerate(team) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._dump_stacks(team[rank] for rank in waiting.values())
                for rank in waiting.values():
                    answers[rank] = (False, f"killed: no answer within {timeout:g} s, or {GRACE_SECONDS:g} s after "
                                            "another rank's failure")  # fmt: skip
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    team[rank].process.join(5)
                    code = team[rank].process.exitcode
                    answers[rank] = (True, Died(code)) if rank in may_die else (False, f"died with exit code {code}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    @staticmethod
    def _dump_stacks(workers: Iterable[Worker]) -> None:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(0.5)


def run_ranks(
    fn: Callable[..., Any], world_size: int, device: str = "cpu", timeout: float = 60, **kwargs: Any
) -> list[Any]:
    """RankPool.run in processes of its own, for bodies that leave something behind (an abort, a dead rank)."""
    with RankPool() as pool:
        return pool.run(fn, world_size, device, timeout, **kwargs)


def _prefixed(rank: int, text: str) -> str:
    return "".join(f"[rank{rank}] {line}\n" for line in text.splitlines())


def _die_with_the_caller() -> None:
    """However the caller ends and whatever this process does then, and the children of a body too.

    The parent is the fork server, which lives as long as its children, so PR_SET_PDEATHSIG would not do. The caller
    holds the other end of the sentinel pipe: the kernel sends SIGKILL to this process group when that end closes.
    """
    os.setpgid(0, 0)
    caller = mp.parent_process()
    assert caller is not None
    fcntl.fcntl(caller.sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(caller.sentinel, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(caller.sentinel, fcntl.F_SETFL, fcntl.fcntl(caller.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([caller.sentinel], 0):  # it was quicker
        os._exit(1)


def _work(connection: Connection, log: str) -> None:
    """A rank's process: bodies one after the other until the caller goes away."""
    _die_with_the_caller()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    faulthandler.enable(file=2)
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        before = dict(os.environ)
        os.environ.update(job.env)
        try:
            answer = (True, _run(job))
            pickle.dumps(answer)
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            os.environ.clear()
            os.environ.update(before)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(answer)


def _run(job: Job) -> Any:
    fn, args = pickle.loads(job.pickled)
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", job.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=job.group_timeout)
    store = dist.PrefixStore(job.prefix, dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=timeout))
    rank = Rank(job.rank, job.world_size, device, store, timeout)
    # A client of TCPStore now and then takes 5 s to connect: bodies that time their calls begin together.
    store.set(f"connected/{job.rank}", "")
    store.wait([f"connected/{r}" for r in range(job.world_size)], timedelta(seconds=60))
    dist.set_debug_level_from_env()
    try:
        if job.backend:
            rank.init(job.backend, **job.options)
        return fn(rank, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Groups are named by a count that a failed init leaves behind, and the next body's ranks must agree on it.
        dist.distributed_c10d._world.group_count = 0
