"""Ranks whose calls differ: an error that names both calls, never one call's data in the other's result."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only

TOLD_WITHIN = 5.0  # seconds; the group's timeout is 30


def ones(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(numel, dtype=dtype)


# What a rank may be in, and how errors name it.
CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "48": (lambda: dist.all_reduce(ones(48)), r"all_reduce of 192 bytes float32 sum \(one-shot\)"),
    "192": (lambda: dist.all_reduce(ones(192)), r"all_reduce of 768 bytes float32 sum \(one-shot\)"),
    "avg": (lambda: dist.all_reduce(ones(48), op=dist.ReduceOp.AVG), "all_reduce of 192 bytes float32 avg"),
    "half": (lambda: dist.all_reduce(ones(96, torch.float16)), "all_reduce of 192 bytes float16 sum"),
    "bfloat": (lambda: dist.all_reduce(ones(96, torch.bfloat16)), "all_reduce of 192 bytes bfloat16 sum"),
    # Many steps of two-shot, where the others take one.
    "large": (lambda: dist.all_reduce(ones(1_000_000)), r"all_reduce of 4000000 bytes float32 sum \(two-shot\)"),
    "larger": (lambda: dist.all_reduce(ones(1_100_000)), r"all_reduce of 4400000 bytes float32 sum \(two-shot\)"),
    "gather": (
        lambda: dist.all_gather_into_tensor(torch.empty(48 * dist.get_world_size()), ones(48)),
        "all_gather of 192 bytes a rank",
    ),
    "root 0": (lambda: dist.broadcast(ones(48), 0), "broadcast of 192 bytes from root 0"),
    "root 1": (lambda: dist.broadcast(ones(48), 1), "broadcast of 192 bytes from root 1"),
    "root 1, short": (lambda: dist.broadcast(ones(4), 1), "broadcast of 16 bytes from root 1"),
    "reduce": (lambda: dist.reduce(ones(48), 0), "reduce of 192 bytes float32 sum to root 0"),
    "reduce to 1": (lambda: dist.reduce(ones(48), 1), "reduce of 192 bytes float32 sum to root 1"),
    "gather to 0": (lambda: gather(48, 0), "gather of 192 bytes a rank to root 0"),
    "scatter": (
        lambda: dist.scatter(ones(48), [ones(48)] * dist.get_world_size() if dist.get_rank() == 1 else None, 1),
        "scatter of 192 bytes a rank from root 1",
    ),
    "reduce_scatter": (
        lambda: dist.reduce_scatter_tensor(ones(48), ones(48 * dist.get_world_size())),
        "reduce_scatter of 192 bytes a rank float32 sum",
    ),
    "max": (
        lambda: dist.reduce_scatter_tensor(ones(48), ones(48 * dist.get_world_size()), op=dist.ReduceOp.MAX),
        "reduce_scatter of 192 bytes a rank float32 max",
    ),
    "all_to_all": (lambda: exchange(torch.float32), "all_to_all of float32"),
    "all_to_all of half": (lambda: exchange(torch.float16), "all_to_all of float16"),
    "barrier": (lambda: dist.barrier(), "barrier"),
}


def gather(numel: int, root: int) -> None:
    outs = [ones(numel) for _ in range(dist.get_world_size())] if dist.get_rank() == root else None
    dist.gather(ones(numel), outs, root)


def exchange(dtype: torch.dtype) -> None:
    x = ones(8 * dist.get_world_size(), dtype)
    dist.all_to_all_single(torch.empty_like(x), x)


def works(rank: Rank) -> None:
    x = torch.full((1001,), float(rank.rank + 1))
    dist.all_reduce(x)
    n = rank.world_size
    assert x.tolist() == [n * (n + 1) / 2] * 1001


def failure(rank: Rank, call: Callable[[], object]) -> str:
    """The text of a call that must fail, of which every later call must say the same, in a group that is then left."""
    start = time.monotonic()
    with pytest.raises(dist.DistBackendError) as raised:
        call()
    assert time.monotonic() - start < TOLD_WITHIN
    for again in ("48", "barrier"):
        with pytest.raises(dist.DistBackendError) as repeated:
            CALLS[again][0]()
        assert str(repeated.value) == str(raised.value)
    dist.destroy_process_group()
    rank.meet("failed")
    rank.init(prefix="again")
    works(rank)
    return str(raised.value)


def mismatch_body(rank: Rank, odd: int, odd_call: str, others: str, before: int) -> str:
    for _ in range(before):
        works(rank)
    return failure(rank, CALLS[odd_call if rank.rank == odd else others][0])


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("48", "192"),
        ("48", "avg"),
        ("48", "half"),
        ("half", "bfloat"),
        ("48", "gather"),
        ("48", "barrier"),
        ("48", "large"),
        ("large", "larger"),
        ("gather", "barrier"),
        ("large", "gather"),
        ("48", "reduce_scatter"),
        ("reduce_scatter", "max"),
        ("reduce_scatter", "all_to_all"),
        ("all_to_all", "all_to_all of half"),
        ("all_to_all", "48"),
        ("reduce", "48"),
        ("reduce", "reduce to 1"),
        ("gather to 0", "all_to_all"),
    ],
)
def test_two_ranks_that_both_post(ranks, mine, theirs, before):
    """Each sees what the other is in, so both errors name both."""
    texts = ranks(mismatch_body, 2, args=(0, mine, theirs, before))
    named = {0: CALLS[mine][1], 1: CALLS[theirs][1]}
    for rank, text in enumerate(texts):
        peer = 1 - rank
        assert_names(text, rank, named[rank], peer, named[peer])


def assert_names(text: str, rank: int, mine: str, peer: int, theirs: str) -> None:
    assert re.search(rf"rank {peer} came with another call than rank {rank}\b", text), text
    assert re.search(rf"rank {rank} is in {mine}.*, rank {peer} in {theirs}", text), text


@pytest.mark.parametrize(
    ("odd_call", "others"), [("48", "192"), ("gather", "48"), ("larger", "large"), ("root 1", "48"), ("all_to_all", "reduce_scatter"),
                            ("max", "reduce_scatter"), ("scatter", "all_to_all")],
)  # fmt: skip
@pytest.mark.parametrize("odd", [0, 2])
def test_one_of_three(ranks, odd, odd_call, others):
    """Whoever doesn't see it is told by one who did, and where it began."""
    texts = ranks(mismatch_body, 3, args=(odd, odd_call, others, 1))
    found = [text for text in texts if "came with another call" in text]
    assert any(f"rank {odd}" in text for text in found), texts
    for text in texts:
        assert text in found or "its call or message differs from that of rank" in text, text


def test_a_rank_whose_peer_posts_nothing_is_told(ranks):
    """Rank 1, in a broadcast from rank 0, only reads: it finds rank 0 in another call, which waits for what never comes."""
    texts = ranks(mismatch_body, 2, args=(0, "48", "root 0", 1))
    assert_names(texts[1], 1, CALLS["root 0"][1], 0, CALLS["48"][1])
    assert "stopped in all_reduce" in texts[0]
    assert (
        "the failure began at rank 0: its call or message differs from that of rank 1, whose error names both"
        in texts[0]
    )


def two_roots_body(rank: Rank, calls: tuple[str, str]) -> str:
    works(rank)
    CALLS[calls[rank.rank]][0]()  # each thinks that it is the root: it posts and reads nothing
    return failure(rank, CALLS["48"][0])


@pytest.mark.parametrize("calls", [("root 0", "root 1"), ("root 0", "root 1, short")])
def test_two_roots_are_found_in_the_next_call(ranks, calls):
    """A root reads from nobody, so its own broadcast can't fail; the ranks' next meeting does."""
    texts = ranks(two_roots_body, 2, args=(calls,))
    for rank, text in enumerate(texts):
        assert f"rank {1 - rank} came with another call than rank {rank} in all_reduce" in text
        assert "both are in all_reduce of 192 bytes" in text
        assert "calls before it differed" in text


def two_large_roots_body(rank: Rank) -> str:
    """Broadcasts of three steps and of one part the ranks' steps: rank 1 is still in them when rank 0 goes on."""
    works(rank)
    dist.broadcast(ones(48) if rank.rank == 0 else ones(190_000), rank.rank)
    return failure(rank, CALLS["48"][0])


def test_roots_of_different_step_counts(ranks):
    texts = ranks(two_large_roots_body, 2)
    assert "rank 0 is in all_reduce of 192 bytes" in texts[0]
    assert "rank 1 in broadcast of 760000 bytes from root 1" in texts[0]
    assert "came with another call" in texts[1] or "its call or message differs from that of rank 0" in texts[1]


def other_root_of_three_body(rank: Rank) -> str:
    for _ in range(2):  # what the slots then hold looks like what rank 0 expects below
        for _ in range(4):
            dist.broadcast(ones(48), 1)
        works(rank)
    for _ in range(3):
        dist.broadcast(ones(48), 1)
    if rank.rank == 0:
        x = torch.full((48,), 5.0)
        text = failure(rank, lambda: dist.broadcast(x, 1))
        assert x.tolist() == [5.0] * 48  # nothing stale was handed out
        return text
    dist.broadcast(ones(48), 2)
    return failure(rank, CALLS["48"][0])


def test_a_stale_slot_is_not_read(ranks):
    """Rank 1 never posts the step that rank 0 waits for, but later ones: what lies in its slot is of an earlier call."""
    texts = ranks(other_root_of_three_body, 3)
    assert "came with another call than rank 0 in broadcast" in texts[0] or "began at rank" in texts[0], texts[0]


def one_call_more_body(rank: Rank) -> str:
    works(rank)
    if rank.rank == 0:
        dist.broadcast(ones(48), 0)
    return failure(rank, CALLS["48"][0])


def test_a_call_that_the_others_did_not_make(ranks):
    """Rank 0 is a step ahead; what rank 1 then reads is of the broadcast that it never entered."""
    texts = ranks(one_call_more_body, 2)
    assert_names(texts[1], 1, CALLS["48"][1], 0, CALLS["root 0"][1])
    assert "its call or message differs from that of rank 1" in texts[0]


def empty_body(rank: Rank) -> None:
    for dtype in (torch.float32, torch.float16):
        dist.all_reduce(torch.empty(0, dtype=dtype if rank.rank else torch.bfloat16))
    works(rank)


def uneven_body(rank: Rank) -> str:
    """Rank 1 gives 7 elements, where rank 0 has room for 5."""
    works(rank)
    return failure(
        rank, lambda: dist.all_gather([torch.empty(3), torch.empty(5 + 2 * rank.rank)], ones(3 + 4 * rank.rank))
    )


def pair_body(rank: Rank) -> str:
    """Rank 0 has 3 elements for rank 1, which expects 5 of it; rank 2 knows nothing of that."""
    works(rank)
    inputs = [ones(3) for _ in range(rank.world_size)]
    outs = [ones(5 if (rank.rank, r) == (1, 0) else 3) for r in range(rank.world_size)]
    if rank.rank == 1:
        return failure(rank, lambda: dist.all_to_all(outs, inputs))
    with suppress(dist.DistBackendError):  # what they exchange is in order
        dist.all_to_all(outs, inputs)
    return failure(rank, CALLS["48"][0])


def test_two_ranks_that_disagree_about_what_they_exchange(ranks):
    texts = ranks(pair_body, 3)
    assert "rank 0 sends 12 bytes to rank 1, which expects 20" in texts[1]
    for rank in (0, 2):
        assert "its call or message differs" in texts[rank] or "came with another call" in texts[rank], texts[rank]


def test_lists_that_disagree_about_a_contribution(ranks):
    texts = ranks(uneven_body, 2)
    assert any("came with another call" in text for text in texts), texts
    for rank, text in enumerate(texts):
        assert f"rank {1 - rank}" in text


def test_empty_tensors_of_different_types_are_one_call(ranks):
    """There is no data to misread."""
    ranks(empty_body, 2)


def many_steps_body(rank: Rank) -> None:
    """More steps than a tag counts, in calls that post, don't post, and have several steps."""
    x, y = torch.ones(70_000), torch.ones(1)
    for i in range(9000):
        dist.broadcast(x, i % 2)  # 280,000 bytes: 2 steps
        dist.broadcast(y, 0)
        dist.barrier()
        y.fill_(1.0)
        dist.all_reduce(y)
        dist.all_reduce(y.fill_(1.0), op=dist.ReduceOp.AVG)
        assert y.item() == 1.0
        for _ in range(3):
            dist.broadcast(y, 1)


def test_like_calls_never_differ(ranks):
    """80,000 steps: the tags, of 16 bits, wrap."""
    ranks(many_steps_body, 2, timeout=300)


def gathered(numel: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    dist.all_gather_into_tensor(
        torch.empty(numel * dist.get_world_size(), device=device), torch.ones(numel, device=device)
    )


# What moves on GPUs is compared by its receivers.
MOVES: dict[str, tuple[Callable[[], object], str]] = {
    "gather": (lambda: gathered(48), "all_gather of 192 bytes a rank"),
    "large gather": (lambda: gathered(1_000_000), "all_gather of 4000000 bytes a rank"),
    "broadcast": (lambda: dist.broadcast(torch.ones(48, device="cuda"), 0), "broadcast of 192 bytes from root 0"),
}


def moves_body(rank: Rank, calls: tuple[str, str]) -> str:
    x = torch.ones(7, device=rank.device)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    start = time.monotonic()
    with pytest.raises(dist.DistBackendError) as raised:
        MOVES[calls[rank.rank]][0]()
        while True:  # a sender's own call may end well
            torch.cuda.synchronize()
            dist.all_reduce(x)
    assert time.monotonic() - start < TOLD_WITHIN
    dist.destroy_process_group()
    rank.meet("failed")
    rank.init(prefix="again")
    dist.all_reduce(x.fill_(1.0))
    assert x.tolist() == [2.0] * 7
    return str(raised.value)


@cuda_only
@pytest.mark.parametrize(
    "calls", [("gather", "large gather"), ("large gather", "gather"), ("gather", "broadcast"), ("broadcast", "gather")]
)
def test_moves_that_differ_on_gpus(ranks, calls):
    texts = ranks(moves_body, 2, "cuda", args=(calls,))
    found = [text for text in texts if "came with another call" in text]
    assert found, texts
    for text in found:
        me = int(re.search(r"than rank (\d)", text)[1])
        assert f"rank {me} is in {MOVES[calls[me]][1]}, rank {1 - me} in {MOVES[calls[1 - me]][1]}" in text
    for text in texts:
        assert text in found or "its call or message differs" in text, text
