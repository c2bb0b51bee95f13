"""Messages that go wrong: ends that differ, a peer that never posts, dies or aborts. An error that names both ranks, soon,
and a group that is broken for all of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, SHORT, call, new_default_group_works, works
from launcher import Died, Rank, run_ranks

TOLD_WITHIN = 5.0  # seconds after both have called; the group's timeout is 30
NO_RING_HOLDS = 64 << 20  # bytes

# A message as an end describes it: elements, dtype, and how errors name it.
ENDS: dict[str, tuple[int, torch.dtype, str]] = {
    "empty": (0, torch.float32, " 0 bytes"),
    "short": (25, torch.float32, "100 bytes"),
    "48": (48, torch.float32, "192 bytes float32"),
    "half": (96, torch.float16, "192 bytes float16"),
    "integers": (48, torch.int32, "192 bytes int32"),
    "large": (1_000_000, torch.float32, "4000000 bytes"),
    "larger": (1_000_001, torch.float32, "4000004 bytes"),
}


def failure(rank: Rank, work: dist.Work) -> str:
    """The text of a work that must fail."""
    with pytest.raises(dist.DistBackendError) as raised:
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        work.wait()
    return str(raised.value)


def broken(rank: Rank) -> str:
    """The text with which this rank's next collective fails: the first waits for ranks that don't come."""
    with pytest.raises(dist.DistBackendError) as raised:
        while True:
            call(rank)
    with pytest.raises(dist.DistBackendError) as repeated:
        dist.isend(torch.ones(3, device=rank.device), (rank.rank + 1) % rank.world_size)
    assert str(repeated.value) == str(raised.value)
    return str(raised.value)


def mismatch_body(
    rank: Rank, sent: str, expected: str, receiver_first: bool, tags: tuple[int, int], batch: bool
) -> str:
    works(rank)
    numel, dtype, _ = ENDS[sent if rank.rank == 0 else expected]
    x = torch.ones(numel, dtype=dtype, device=rank.device)
    work = None
    if rank.rank < 2:
        if (rank.rank == 1) != receiver_first:
            rank.store.wait(["posted"], rank.group_timeout)
        operation = dist.irecv if rank.rank else dist.isend
        if batch:
            (work,) = dist.batch_isend_irecv([dist.P2POp(operation, x, 1 - rank.rank, tag=tags[rank.rank])])
        else:
            work = operation(x, 1 - rank.rank, tag=tags[rank.rank])
        rank.store.set("posted", "")
    rank.meet("both")
    start = time.monotonic()
    text = failure(rank, work) if rank.rank == 1 else broken(rank)
    assert time.monotonic() - start < TOLD_WITHIN, text
    if rank.rank == 1 and rank.device.type == "cpu":  # a GPU finds out while the bytes come in
        assert x.tolist() == [1] * numel, "another message's bytes were handed out"
    broken(rank)
    new_default_group_works(rank)
    return text


def assert_names(text: str, *parts: str) -> None:
    for part in ("rank 0", "rank 1", *parts):
        assert part in text, f"no {part!r} in {text!r}"


@pytest.mark.parametrize("receiver_first", [False, True])
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("48", "short"),
        ("short", "48"),
        ("48", "half"),
        ("48", "integers"),
        ("48", "empty"),
        ("empty", "48"),
        ("48", "large"),
        ("large", "48"),
        ("large", "larger"),
    ],
)
def test_ends_that_differ(ranks, device, sent, expected, receiver_first):
    """The receiver's error has both ends' figures; whoever isn't at an end is told in its next call."""
    texts = ranks(mismatch_body, 3, device, args=(sent, expected, receiver_first, (5, 5), False))
    assert_names(texts[1], ENDS[sent][2], ENDS[expected][2])


def test_ends_that_differ_in_a_batch(ranks, device):
    texts = ranks(mismatch_body, 2, device, args=("48", "short", False, (0, 0), True))
    assert_names(texts[1], "192 bytes", "100 bytes")


@pytest.mark.parametrize("receiver_first", [False, True])
@pytest.mark.parametrize("size", ["48", "large"])
def test_tags_that_differ_on_a_gpu(ranks, device, size, receiver_first):
    """Where messages are taken in order, the first one's tag must be the receive's."""
    if device == "cpu":
        pytest.skip("tags are matched out of order")
    texts = ranks(mismatch_body, 2, device, args=(size, size, receiver_first, (31, 42), False))
    assert_names(texts[1], "tag 31", "tag 42")


def never_body(rank: Rank, waiting: Callable[[Rank], dist.Work | None]) -> str:
    """Rank 0 waits for what rank 1 never does; it is told so at the group's timeout."""
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    start = time.monotonic()
    work = waiting(rank)
    text = ""
    if rank.rank == 0:
        assert work is not None
        text = failure(rank, work)
        waited = time.monotonic() - start
        assert SHORT.total_seconds() * 0.8 < waited < SHORT.total_seconds() + 5, f"{waited:.1f} s: {text}"
    rank.meet("told")
    assert "rank 0" in broken(rank)
    new_default_group_works(rank)
    return text


def receive_alone(rank: Rank) -> dist.Work | None:
    return dist.irecv(torch.zeros(8, device=rank.device), 1) if rank.rank == 0 else None


def send_alone(rank: Rank) -> dist.Work | None:
    return dist.isend(torch.zeros(NO_RING_HOLDS // 4, device=rank.device), 1) if rank.rank == 0 else None


def batch_alone(rank: Rank) -> dist.Work | None:
    if rank.rank:
        return None
    x, y = torch.zeros(NO_RING_HOLDS // 4, device=rank.device), torch.zeros(8, device=rank.device)
    return dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1), dist.P2POp(dist.irecv, y, 1)])[0]


def another_tag(rank: Rank) -> dist.Work | None:
    if rank.rank:
        return dist.isend(torch.zeros(8), 0, tag=2)
    return dist.irecv(torch.zeros(8), 1, tag=1)


def from_anybody(rank: Rank) -> dist.Work | None:
    return dist.irecv(torch.zeros(8)) if rank.rank == 0 else None


@pytest.mark.parametrize(("waiting", "operation"), [(receive_alone, "recv"), (send_alone, "send"), (batch_alone, "")])
def test_a_peer_that_never_posts(ranks, device, waiting, operation):
    text = ranks(never_body, 2, device, args=(waiting,), backend=None)[0]
    assert_names(text, operation)


def test_a_tag_that_never_comes(ranks):
    assert_names(ranks(never_body, 2, args=(another_tag,), backend=None)[0], "recv")


def test_nobody_sends_anything(ranks):
    text = ranks(never_body, 2, args=(from_anybody,), backend=None)[0]
    assert "rank 0" in text
    assert "recv" in text


def nobody_receives_body(rank: Rank) -> float:
    """A small message that nobody takes is no failure, and the group goes when it is told to."""
    works(rank)
    if rank.rank == 0:
        dist.send(torch.ones(4, device=rank.device), 1)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
    works(rank)
    start = time.monotonic()
    dist.destroy_process_group()
    return time.monotonic() - start


def test_a_message_that_nobody_takes(ranks, device):
    for took in ranks(nobody_receives_body, 2, device):
        assert took < 5


def destroyed_body(rank: Rank) -> None:
    """A group destroyed with a receive outstanding: it ends by its deadline, and a new group works."""
    rank.init(timeout=SHORT)
    works(rank)
    work = receive_alone(rank)
    start = time.monotonic()
    dist.destroy_process_group()
    assert time.monotonic() - start < SHORT.total_seconds() + 5
    if work is not None:
        with pytest.raises(dist.DistBackendError):
            work.wait()
    new_default_group_works(rank)


def test_destroyed_with_a_receive_outstanding(device):
    run_ranks(destroyed_body, 2, device, backend=None)


def dies_body(rank: Rank, sends: bool) -> str:
    works(rank)
    numel = NO_RING_HOLDS // 4 if sends else 8
    if rank.rank == 1:
        rank.store.wait(["posted"], rank.group_timeout)
        rank.store.set("died", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.zeros(numel, device=rank.device)
    work = (dist.isend if sends else dist.irecv)(x, 1) if rank.rank == 0 else None
    if rank.rank == 0:
        rank.store.set("posted", "")
    text = failure(rank, work) if work is not None else broken(rank)
    late = time.monotonic() - float(rank.store.get("died"))
    assert late < NOTICED_WITHIN, f"noticed after {late:.1f} s: {text}"
    return text


@pytest.mark.parametrize("sends", [False, True])
def test_the_peer_dies(device, sends):
    """Long before the timeout; the third rank, who waits in a collective, hears too."""
    results = run_ranks(dies_body, 3, device, args=(sends,), may_die=[1])
    assert results[1] == Died(-signal.SIGKILL)
    for text in (results[0], results[2]):
        assert "rank 1" in text


def last_words_body(rank: Rank) -> list[float]:
    works(rank)
    if rank.rank == 1:
        dist.send(torch.arange(8.0), 0)
        rank.store.set("died", "")
        os.kill(os.getpid(), signal.SIGKILL)
    rank.store.wait(["died"], rank.group_timeout)
    x = torch.zeros(8)
    dist.recv(x, 1)
    return x.tolist()


def test_what_a_dead_rank_had_sent_arrives():
    assert run_ranks(last_words_body, 2, may_die=[1])[0] == list(range(8))


def abort_body(rank: Rank) -> None:
    """Of a rank that waits in a receive, from another thread; its peer waits too, and is told."""
    works(rank)
    work = dist.irecv(torch.zeros(8, device=rank.device), 1 - rank.rank)
    rank.meet("waiting")
    start = time.monotonic()
    if rank.rank == 0:
        timer = threading.Timer(0.3, dist.group.WORLD._get_backend(rank.device).abort)
        timer.start()
        assert "abort" in failure(rank, work)
        timer.join()
    else:
        assert "rank 0" in failure(rank, work)
    assert time.monotonic() - start < TOLD_WITHIN
    new_default_group_works(rank)


def test_abort_ends_outstanding_messages(device):
    run_ranks(abort_body, 2, device)


def late_body(rank: Rank) -> None:
    """A failure elsewhere ends what is outstanding between ranks that did nothing wrong."""
    works(rank)
    work = dist.irecv(torch.zeros(8, device=rank.device), 1 - rank.rank) if rank.rank < 2 else None
    rank.meet("posted")
    start = time.monotonic()
    if rank.rank == 2:
        dist.isend(torch.zeros(8, device=rank.device), 3)
        broken(rank)
    elif rank.rank == 3:
        failure(rank, dist.irecv(torch.zeros(9, device=rank.device), 2))
    else:
        assert work is not None
        failure(rank, work)
    assert time.monotonic() - start < TOLD_WITHIN
    new_default_group_works(rank)


def test_a_failure_between_two_ends_the_others_messages(ranks, device):
    ranks(late_body, 4, device)
