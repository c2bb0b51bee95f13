"""CUDA graphs of collectives. Every rank's transport must be set up before a capture (one eager call does it), since
nothing may be allocated or loaded inside one; after that a graph can be replayed any number of times, between eager
calls of any other kind."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks
from reference import INTEGER_OF, random_input, rank_order_sum

import mnnvl_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

VARIANTS = 4  # inputs prepared per call; a replay takes one at random, so a result left from the last one shows
REPLAYS = 100
# Both sides of every crossover between algorithms, and more than one launch can carry.
SIZES = [(7, torch.bfloat16), (5001, torch.float32), (300_001, torch.bfloat16), (70_000, torch.float16),
         (9_000_001, torch.bfloat16), (8, torch.float32), (1_100_000, torch.float32)]  # fmt: skip


def world_sizes() -> list[int]:
    """2, 3 and 4 as far as there are GPUs; two ranks on a single one."""
    count = torch.cuda.device_count()
    return [n for n in (2, 3, 4) if n <= max(2, count)]


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.view(INTEGER_OF[actual.dtype]), expected.view(INTEGER_OF[expected.dtype]))


@dataclass
class Step:
    """One collective of a graph: `source` is filled before a replay, the graph copies it to `result` and works there,
    so that a graph replayed twice gives the same again."""

    what: str
    source: torch.Tensor
    result: torch.Tensor
    mine: list[torch.Tensor]  # inputs of this rank, by variant
    expected: list[torch.Tensor]
    run: Callable[[], None]
    chosen: int = 0

    def choose(self, variant: int) -> None:
        self.chosen = variant
        self.source.copy_(self.mine[variant])

    def check(self, when: str) -> None:
        assert same_bits(self.result, self.expected[self.chosen]), f"{when}: {self.what}"


def exchange(rank: Rank, out: torch.Tensor, into: torch.Tensor, group: dist.ProcessGroup | None, batch: bool) -> None:
    """To the next rank, from the one before."""
    after, before = ((rank.rank + step) % rank.world_size for step in (1, -1))
    if batch:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, after, group), dist.P2POp(dist.irecv, into, before, group)]
        )
    else:
        works = [dist.isend(out, after, group), dist.irecv(into, before, group)]
    for work in works:
        work.wait()


def make_step(
    rank: Rank, kind: str, numel: int, dtype: torch.dtype, seed: int, group: dist.ProcessGroup | None = None
) -> Step:
    n = rank.world_size
    inputs = [[random_input(r, numel, dtype, seed * 10 + v) for r in range(n)] for v in range(VARIANTS)]
    root = seed % n
    if kind == "all_gather":
        expected = [torch.cat(variant) for variant in inputs]
    elif kind == "broadcast":
        expected = [variant[root] for variant in inputs]
    elif kind in ("messages", "batch"):
        expected = [variant[(rank.rank - 1) % n] for variant in inputs]
    else:
        expected = [rank_order_sum(variant) for variant in inputs]
    source = torch.zeros(numel, dtype=dtype, device=rank.device)
    result = torch.zeros(expected[0].numel(), dtype=dtype, device=rank.device)

    def run() -> None:
        if kind == "all_gather":
            dist.all_gather_into_tensor(result, source, group=group)
            return
        if kind in ("messages", "batch"):
            exchange(rank, source, result, group, kind == "batch")
            return
        result.copy_(source)
        if kind == "broadcast":
            dist.broadcast(result, root, group=group)
        elif kind == "async":
            dist.all_reduce(result, group=group, async_op=True).wait()
        elif kind == "side stream":
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                dist.all_reduce(result, group=group)
            current.wait_stream(side)
        else:
            dist.all_reduce(result, group=group)

    mine = [variant[rank.rank].to(rank.device) for variant in inputs]
    return Step(f"{kind} of {numel} x {dtype}", source, result, mine, [e.to(rank.device) for e in expected], run)


def capture(steps: list[Step], group: dist.ProcessGroup | None = None) -> torch.cuda.CUDAGraph:
    """Also sees to it that the collectives themselves allocate nothing while captured."""
    for step in steps:  # the eager call that sets up, and warms up whatever torch allocates
        step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for step in steps:
            step.run()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert allocated == 0, f"{allocated} allocations inside the capture"
    return graph


def eager_call(rank: Rank, plan: random.Random, number: int) -> None:
    """Something else in the same workspace."""
    kind = plan.choice(["all_reduce", "all_reduce", "async", "broadcast", "all_gather", "messages", "batch"])
    numel, dtype = int(2 ** plan.uniform(0, 18)), plan.choice([torch.float32, torch.float16, torch.bfloat16])
    inputs = [random_input(r, numel, dtype, number) for r in range(rank.world_size)]
    x = inputs[rank.rank].to(rank.device)
    if kind == "all_gather":
        out = torch.empty(rank.world_size * numel, dtype=dtype, device=rank.device)
        dist.all_gather_into_tensor(out, x)
        x, expected = out, torch.cat(inputs)
    elif kind in ("messages", "batch"):
        out = torch.empty_like(x)
        exchange(rank, x, out, None, kind == "batch")
        x, expected = out, inputs[(rank.rank - 1) % rank.world_size]
    elif kind == "broadcast":
        root = plan.randrange(rank.world_size)
        dist.broadcast(x, root)
        expected = inputs[root]
    else:
        work = dist.all_reduce(x, async_op=kind == "async")
        if work is not None:
            work.wait()
        expected = rank_order_sum(inputs)
    assert same_bits(x, expected.to(rank.device)), f"eager {kind} of {numel} x {dtype} after replay {number}"


def replay_and_check(
    rank: Rank, graphs: list[tuple[torch.cuda.CUDAGraph, list[Step]]], seed: int, replays: int = REPLAYS
) -> None:
    plan = random.Random(seed)
    for replay in range(replays):
        graph, steps = plan.choice(graphs)
        for step in steps:
            step.choose(plan.randrange(VARIANTS))
        for _ in range(plan.choice([1, 1, 3])):
            graph.replay()
        for step in steps:
            step.check(f"replay {replay}")
        if plan.random() < 0.5:
            eager_call(rank, plan, replay)


def sizes_body(rank: Rank, replays: int) -> None:
    assert len(SIZES) % 2 == 1  # so that generations don't come round to where they were at the capture
    steps = [make_step(rank, "all_reduce", numel, dtype, i) for i, (numel, dtype) in enumerate(SIZES)]
    replay_and_check(rank, [(capture(steps), steps)], seed=1, replays=replays)


@pytest.mark.parametrize("strategy", ["auto", "oneshot", "twoshot", "windows"])
@pytest.mark.parametrize("world_size", world_sizes())
def test_sizes_replayed_between_eager_calls(ranks, world_size, strategy):
    """Replays of an odd number of calls, fresh inputs each time, every bit checked."""
    windows = {"strategy": "twoshot", "workspace_bytes": 2 << 20}  # of 64 KiB, in which ranks on one GPU take turns
    options, replays = (windows, 20) if strategy == "windows" else ({"strategy": strategy}, 100)
    ranks(sizes_body, world_size, "cuda", args=(replays,), timeout=115, options=options)


def kinds_body(rank: Rank) -> None:
    kinds = ["all_reduce", "broadcast", "all_gather", "async", "side stream"]
    steps = [make_step(rank, kind, 1001 + 7000 * i, torch.bfloat16, i) for i, kind in enumerate(kinds)]
    replay_and_check(rank, [(capture(steps), steps)], seed=2)


@pytest.mark.parametrize("world_size", world_sizes())
def test_every_collective_async_and_on_a_side_stream(ranks, world_size):
    ranks(kinds_body, world_size, "cuda", timeout=115)


def moves_body(rank: Rank) -> None:
    """Messages of a few bytes, and more than any ring holds, among collectives that use the same memory."""
    kinds = [("batch", 1001), ("broadcast", 5000), ("messages", 8), ("all_gather", 70_001), ("batch", 4_000_001),
             ("messages", 3_000_000), ("broadcast", 1), ("all_gather", 3), ("all_reduce", 1001)]  # fmt: skip
    steps = [make_step(rank, kind, numel, torch.bfloat16, i) for i, (kind, numel) in enumerate(kinds)]
    replay_and_check(rank, [(capture(steps), steps)], seed=5, replays=1000)


@pytest.mark.timeout(330)
@pytest.mark.parametrize("world_size", world_sizes())
def test_messages_broadcasts_and_gathers_replayed_a_thousand_times(ranks, world_size):
    ranks(moves_body, world_size, "cuda", timeout=300)


def several_graphs_body(rank: Rank) -> None:
    """Graphs of one, two and three calls in one workspace, replayed in random order."""
    graphs = []
    for count in (1, 2, 3):
        picked = [(SIZES[(count + i) % len(SIZES)], i) for i in range(count)]
        steps = [make_step(rank, "all_reduce", numel, dtype, 20 * count + i) for (numel, dtype), i in picked]
        graphs.append((capture(steps), steps))
    replay_and_check(rank, graphs, seed=3)


@pytest.mark.parametrize("world_size", world_sizes())
def test_several_graphs_in_random_order(ranks, world_size):
    ranks(several_graphs_body, world_size, "cuda", timeout=115)


def groups_body(rank: Rank) -> None:
    """Groups of all three strategies in one graph: each has a workspace, and the graph orders them."""
    steps = []
    for seed, strategy in enumerate(["oneshot", "twoshot", "auto"]):
        group = dist.new_group(backend="mnnvl", pg_options=rank.options(strategy=strategy))
        numels = [9, 40_001, 200_000]
        steps += [make_step(rank, "all_reduce", n, torch.float16, 5 + seed, group) for n in numels]
    replay_and_check(rank, [(capture(steps), steps)], seed=4)


@pytest.mark.parametrize("world_size", world_sizes())
def test_groups_of_every_strategy_in_one_graph(ranks, world_size):
    ranks(groups_body, world_size, "cuda", timeout=115)


def unprepared_body(rank: Rank) -> None:
    """Set-up needs the host and the driver: without an eager call before, a capture must fail, not hang or corrupt."""
    x = torch.ones(8, device=rank.device)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    rank.meet()
    dist.destroy_process_group()
    rank.init(prefix="again")
    dist.all_reduce(x)
    assert x.tolist() == [rank.world_size] * 8


def test_capture_before_set_up_is_an_error():
    run_ranks(unprepared_body, 2, "cuda")


def late_replay_body(rank: Rank) -> None:
    """A rank that doesn't replay: the others' graph ends at the timeout, and says whom it waited for."""
    rank.init(timeout=timedelta(seconds=2))
    step = make_step(rank, "all_reduce", 1000, torch.float32, 1)
    graph = capture([step])
    rank.meet("captured")
    if rank.rank == 0:
        graph.replay()
        torch.cuda.synchronize()
        with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
            step.run()
    rank.meet("failed")
    del graph
    dist.destroy_process_group()
    rank.init(prefix="again")
    step.choose(1)
    step.run()
    step.check("new group")


def test_late_rank_in_a_replay(ranks):
    ranks(late_replay_body, 2, "cuda", backend=None)


def pool_body(rank: Rank) -> None:
    """Tensors of asynchronous calls in a capture: what wait() has ordered may be used again, as in eager mode."""
    numel, rounds = 1 << 20, 8
    x = torch.ones(numel, device=rank.device)
    dist.all_reduce(x, async_op=True).wait()
    torch.cuda.synchronize()
    total = torch.zeros(numel, device=rank.device)
    addresses = set()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(rounds):
            x = torch.full((numel,), float(i + rank.rank), device=rank.device)
            addresses.add(x.data_ptr())
            work = dist.all_reduce(x, async_op=True)
            work.wait()
            total += x
            del work, x
    assert len(addresses) <= 2, (
        f"{rounds} tensors, one alive at a time, took {len(addresses)} blocks of the graph's pool"
    )
    n = rank.world_size
    for replay in range(1, 4):
        graph.replay()
        expected = replay * sum(n * i + n * (n - 1) // 2 for i in range(rounds))
        assert torch.equal(total, torch.full_like(total, float(expected))), f"replay {replay}"


def test_memory_of_captured_async_calls_is_used_again(ranks):
    ranks(pool_body, 2, "cuda")


def invalidated_body(rank: Rank) -> None:
    """A capture that something else has spoilt: the collective must not run eagerly in its place, on one rank alone."""
    x = torch.ones(1000, device=rank.device)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    if rank.rank == 0:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            with pytest.raises(RuntimeError):
                stream.synchronize()  # not permitted in a capture, and the end of this one
            for async_op in (False, True):
                with pytest.raises(RuntimeError, match="(?i)captur"):
                    dist.all_reduce(x, async_op=async_op)
            with pytest.raises(RuntimeError):
                graph.capture_end()
    torch.cuda.synchronize()
    rank.meet("spoilt")
    y = torch.full((1000,), float(rank.rank + 1), device=rank.device)
    dist.all_reduce(y)
    assert y.tolist() == [sum(range(1, rank.world_size + 1))] * 1000


def test_a_collective_in_an_invalidated_capture_raises():
    """In processes of their own, since torch's allocator remembers a capture that ended so."""
    run_ranks(invalidated_body, 2, "cuda")


def collected_workspace_body(rank: Rank) -> None:
    """The function's workspace goes out of scope while a graph still holds its addresses."""
    workspace = mnnvl_backend.MNNVLAllReduceFusionWorkspace(
        mnnvl_backend.Mapping(world_size=rank.world_size, rank=rank.rank, tp_size=rank.world_size),
        max_num_tokens=16, hidden_dim=1024, dtype=torch.bfloat16,
    )  # fmt: skip
    variants = [
        [random_input(r, 16 * 1024, torch.bfloat16, v) for r in range(rank.world_size)] for v in range(VARIANTS)
    ]
    x = torch.zeros(16, 1024, dtype=torch.bfloat16, device=rank.device)
    out = torch.empty_like(x)
    mnnvl_backend.trtllm_mnnvl_allreduce(x, workspace, False, output=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            mnnvl_backend.trtllm_mnnvl_allreduce(x, workspace, False, output=out)
    collected = weakref.ref(workspace)
    del workspace
    gc.collect()
    assert collected() is None
    rank.meet("collected")
    for replay in range(20):
        inputs = variants[replay % VARIANTS]
        x.copy_(inputs[rank.rank].view(16, 1024))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out.cpu().flatten(), rank_order_sum(inputs)), f"replay {replay}"


def test_a_captured_workspace_may_be_collected():
    """In processes of their own: a graph that reads memory which is gone spoils the context."""
    run_ranks(collected_workspace_body, 2, "cuda")
