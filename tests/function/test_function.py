"""trtllm_mnnvl_allreduce and its workspace, over ranks."""

from __future__ import annotations

import pickle
import random
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import assert_bits, every_16_bit_pattern, random_input
from reference import rank_order_sum as sum_of

from mnnvl_backend import Mapping, trtllm_mnnvl_allreduce
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.flashinfer.comm import StoreComm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_input(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


def rank_order_sum(world_size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    total = make_input(0, shape, dtype, seed).float()
    for rank in range(1, world_size):
        total += make_input(rank, shape, dtype, seed).float()
    return total.to(dtype)


def workspace_of(rank: Rank, **arguments: Any) -> Workspace:
    mapping = Mapping(rank.world_size, rank.rank, tp_size=rank.world_size)
    return Workspace(mapping, device=rank.device, options=rank.options(timeout=rank.group_timeout), **arguments)


def sums_body(rank: Rank) -> None:
    with workspace_of(rank, max_num_tokens=64, hidden_dim=1024, dtype=torch.float32) as workspace:
        assert (workspace.backend, workspace.rank, workspace.tp_size) == ("mnnvl", rank.rank, rank.world_size)
        assert workspace.workspace_size_bytes == 3 * workspace.buffer_size_bytes
        for seed, (shape, dtype, strategy) in enumerate(
            (shape, dtype, strategy)
            for shape in ((1, 8), (3, 1000), (5, 7), (64, 1024), (1, 1), (0, 16))
            for dtype in DTYPES
            for strategy in Strategy
        ):
            if not workspace.is_buffer_size_sufficient(rank.world_size, *shape, dtype, strategy):
                continue
            x = make_input(rank.rank, shape, dtype, seed).to(rank.device)
            before = x.clone()
            expected = rank_order_sum(rank.world_size, shape, dtype, seed)
            result = trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy)
            assert torch.equal(result.cpu(), expected), (shape, dtype, strategy)
            assert torch.equal(x, before)
            output = torch.empty_like(x)
            assert trtllm_mnnvl_allreduce(x, workspace, True, output, strategy) is output
            assert torch.equal(output.cpu(), expected), (shape, dtype, strategy)
            assert trtllm_mnnvl_allreduce(x, workspace, False, x, strategy) is x
            assert torch.equal(x.cpu(), expected), (shape, dtype, strategy)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums(ranks, device, world_size):
    ranks(sums_body, world_size, device)


def errors_body(rank: Rank) -> None:
    workspace = workspace_of(rank, buffer_size_in_bytes=4096)
    x = torch.ones(2, 16, device=rank.device)
    bad: list[tuple[str, dict[str, Any]]] = [
        (r"input: expected 2-D .*got 1-D \(32,\)", {"input": x.flatten()}),
        (r"output: expected 2-D .*got 3-D \(1, 2, 16\)", {"output": torch.empty(1, 2, 16, device=rank.device)}),
        (
            r"output: expected input's shape \(2, 16\), got \(16, 2\)",
            {"output": torch.empty(16, 2, device=rank.device)},
        ),
        (r"output: expected input's dtype torch.float32, got torch.float16", {"output": x.half()}),
        (r"input: expected dtype float32, float16 or bfloat16, got torch.int32", {"input": x.int()}),
        (
            r"input: expected a contiguous tensor, got strides \(1, 2\)",
            {"input": torch.ones(16, 2, device=x.device).t()},
        ),
        (r"output: expected a contiguous tensor", {"output": torch.ones(16, 2, device=x.device).t()}),
        (r"input: expected a tensor on the workspace's device .*, got meta", {"input": x.to("meta")}),
    ]
    for text, arguments in bad:
        with pytest.raises(ValueError, match=text):
            trtllm_mnnvl_allreduce(**{"input": x, "workspace": workspace, "launch_with_pdl": False, **arguments})
    big = torch.ones(1024, 1024, device=rank.device)
    needed = workspace.get_required_buffer_size_bytes(rank.world_size, 1024, 1024, big.dtype, Strategy.TWOSHOT)
    with pytest.raises(ValueError, match=rf"buffer of {workspace.buffer_size_bytes} bytes .* requires {needed} bytes"):
        trtllm_mnnvl_allreduce(big, workspace, False, strategy=Strategy.TWOSHOT)
    # Nothing was enqueued: the workspace still works.
    assert (trtllm_mnnvl_allreduce(x, workspace, False) == rank.world_size).all()
    workspace.destroy()
    workspace.destroy()
    assert workspace.destroyed
    with pytest.raises(RuntimeError, match="workspace: it was destroyed"):
        trtllm_mnnvl_allreduce(x, workspace, False)


def test_errors(ranks, device):
    ranks(errors_body, 2, device)


def tensor_parallel_body(rank: Rank) -> None:
    """Two tensor-parallel groups of two, out of a world of four, each by its own sum."""
    mapping = Mapping(4, rank.rank, tp_size=2, pp_size=2)
    with Workspace(
        mapping, buffer_size_in_bytes=1 << 16, device=rank.device, options=rank.options(timeout=rank.group_timeout)
    ) as workspace:
        x = torch.full((2, 8), float(10**rank.rank), device=rank.device)
        expected = sum(10.0**r for r in mapping.tp_group)
        assert (trtllm_mnnvl_allreduce(x, workspace, False) == expected).all()


def test_a_larger_group_is_split(ranks, device):
    ranks(tensor_parallel_body, 4, device, backend="gloo")


class GroupComm:
    """A caller's own communicator, as FlashInfer's users write them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def Get_rank(self) -> int:
        return dist.get_rank()

    def Get_size(self) -> int:
        return dist.get_world_size()

    def allgather(self, data: Any) -> tuple[Any, ...]:
        self.calls.append("allgather")
        result = [None] * self.Get_size()
        dist.all_gather_object(result, data)
        return tuple(result)

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data)[root]

    def barrier(self) -> None:
        dist.barrier()

    def Split(self, color: int, key: int) -> GroupComm:
        raise AssertionError("not needed here")


def own_comm_body(rank: Rank) -> None:
    comm = GroupComm()
    with workspace_of(rank, buffer_size_in_bytes=1 << 16, comm_backend=comm) as workspace:
        assert comm.calls
        assert (trtllm_mnnvl_allreduce(torch.ones(1, 8, device=rank.device), workspace, False) == rank.world_size).all()
    with pytest.raises(ValueError, match=r"comm_backend: .*rank \d of 2, but mapping says tp_rank"):
        Workspace(Mapping(2, 1 - rank.rank, tp_size=2), buffer_size_in_bytes=1024, comm_backend=comm, device="cpu")


def test_own_comm_backend(ranks, device):
    ranks(own_comm_body, 2, device, backend="gloo")


def compiled_body(rank: Rank) -> None:
    with workspace_of(rank, buffer_size_in_bytes=1 << 18) as workspace:

        def model(x: torch.Tensor) -> torch.Tensor:
            y = trtllm_mnnvl_allreduce(x * 2, workspace, False)
            return trtllm_mnnvl_allreduce(y + 1, workspace, False, strategy=Strategy.TWOSHOT) - 1

        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for tokens in (4, 7, 9):  # the second shape makes the sizes symbolic
            x = make_input(rank.rank, (tokens, 32), torch.float32).to(rank.device)
            assert torch.equal(compiled(x), model(x))


def test_compile(ranks, device):
    ranks(compiled_body, 2, device, timeout=110)


def opcheck_body(rank: Rank) -> None:
    import mnnvl_backend.flashinfer.allreduce  # noqa: F401  # defines the op

    with workspace_of(rank, buffer_size_in_bytes=1 << 16) as workspace:
        x = torch.ones(2, 8, device=rank.device)
        op = torch.ops.mnnvl.trtllm_allreduce.default
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, (x, torch.empty_like(x), workspace.handle, 0, False), test_utils=tests)


def test_custom_op_is_well_formed(ranks, device):
    ranks(opcheck_body, 1, device)


# One workspace, calls of every kind.


def random_calls_body(rank: Rank, calls: int, seed: int) -> None:
    """What a call must clear depends on what the one before it left, whatever its size, dtype and strategy."""
    plan = random.Random(seed)
    hidden_dims = [1, 7, 8, 64, 1000, 2048]
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        for i in range(calls):
            hidden = plan.choice(hidden_dims)
            dtype = plan.choice(DTYPES)
            strategy = plan.choice(list(Strategy))
            tokens = max(1, int(2 ** plan.uniform(0, 16)) // hidden)
            while not workspace.is_buffer_size_sufficient(rank.world_size, tokens, hidden, dtype, strategy):
                tokens //= 2
            inputs = [random_input(r, tokens * hidden, dtype, i).view(tokens, hidden) for r in range(rank.world_size)]
            x = inputs[rank.rank].clone().to(rank.device)
            where = plan.choice(["new", "given", "in place"])
            output = {"new": None, "given": torch.full_like(x, 3.0), "in place": x}[where]
            result = trtllm_mnnvl_allreduce(x, workspace, plan.random() < 0.5, output, strategy)
            assert output is None or result is output
            what = f"call {i}: {strategy.name} of [{tokens}, {hidden}] {dtype}, output {where}"
            assert_bits(result, sum_of(inputs), what)
            if where != "in place":
                assert_bits(x, inputs[rank.rank], f"input of {what}")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_random_calls_on_one_workspace(ranks, device, world_size):
    ranks(random_calls_body, world_size, device, timeout=115, args=(500, world_size))


def back_to_back_body(rank: Rank) -> None:
    """Calls of alternating sizes and strategies, nobody looking at a result until the end."""
    shapes = [(1, 8), (64, 1024), (3, 5), (2, 64), (128, 512)]
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        inputs = {s: [random_input(r, s[0] * s[1], torch.bfloat16, 1).view(s) for r in range(rank.world_size)]
                  for s in shapes}  # fmt: skip
        xs = {s: inputs[s][rank.rank].clone().to(rank.device) for s in shapes}
        plan = random.Random(7)
        results = []
        for _ in range(100):
            shape, strategy = plan.choice(shapes), plan.choice([Strategy.ONESHOT, Strategy.TWOSHOT])
            results.append((shape, trtllm_mnnvl_allreduce(xs[shape], workspace, True, strategy=strategy)))
        for i, (shape, result) in enumerate(results):
            assert_bits(result, sum_of(inputs[shape]), f"call {i}, {shape}")


def test_calls_back_to_back(ranks, device):
    ranks(back_to_back_body, 3, device)


def patterns_body(rank: Rank) -> None:
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        for dtype in (torch.float16, torch.bfloat16):
            inputs = [every_16_bit_pattern(r, dtype).view(256, 256) for r in range(rank.world_size)]
            for strategy in Strategy:
                result = trtllm_mnnvl_allreduce(inputs[rank.rank].to(rank.device), workspace, False, strategy=strategy)
                assert_bits(result, sum_of(inputs), f"{dtype}, {strategy.name}")


def test_every_bit_pattern(ranks, device):
    ranks(patterns_body, 3, device)


def full_workspaces_body(rank: Rank) -> None:
    """A workspace made for a problem serves it to the last byte, and every number of tokens below; one byte less is
    refused with both counts, and then a call that fits goes through."""
    hidden, most, n = 1536, 100, rank.world_size
    with workspace_of(rank, max_num_tokens=most, hidden_dim=hidden, dtype=torch.bfloat16) as workspace:
        for tokens in (1, 2, 3, 57, most - 1, most):
            inputs = [random_input(r, tokens * hidden, torch.bfloat16, tokens).view(-1, hidden) for r in range(n)]
            result = trtllm_mnnvl_allreduce(inputs[rank.rank].clone().to(rank.device), workspace, False)
            assert_bits(result, sum_of(inputs), f"{tokens} tokens")
    for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
        needed = Workspace.get_required_buffer_size_bytes(n, 10, 24, torch.float32, strategy)
        inputs = [random_input(r, 240, torch.float32, 4).view(10, 24) for r in range(n)]
        x = inputs[rank.rank].clone().to(rank.device)
        with workspace_of(rank, buffer_size_in_bytes=needed) as workspace:
            assert_bits(trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy), sum_of(inputs))
        with workspace_of(rank, buffer_size_in_bytes=needed - 1) as workspace:
            held = workspace.buffer_size_bytes
            if held < needed:  # it may be rounded up
                with pytest.raises(ValueError, match=rf"buffer of {held} bytes is too small.*requires {needed} bytes"):
                    trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy)
            small = x[:2].contiguous()
            assert_bits(trtllm_mnnvl_allreduce(small, workspace, False), sum_of([i[:2] for i in inputs]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_workspaces_filled_to_the_last_byte(ranks, device, world_size):
    ranks(full_workspaces_body, world_size, device)


def two_workspaces_body(rank: Rank) -> None:
    """Beside each other and beside the process group's own; what one is destroyed of, the others keep."""
    first = workspace_of(rank, buffer_size_in_bytes=1 << 16)
    second = workspace_of(rank, buffer_size_in_bytes=1 << 17)
    for i in range(20):
        inputs = [random_input(r, 16 * (i + 1), torch.float16, i).view(i + 1, 16) for r in range(rank.world_size)]
        x = inputs[rank.rank].to(rank.device)
        results = [trtllm_mnnvl_allreduce(x, w, False) for w in ((first, second) if i < 10 else (second,))]
        y = x.clone()
        dist.all_reduce(y)
        for result in (*results, y):
            assert_bits(result, sum_of(inputs), f"round {i}")
        if i == 9:
            rank.meet()
            first.destroy()
    second.destroy()


def test_two_workspaces_and_the_process_group(ranks, device):
    ranks(two_workspaces_body, 2, device)


class SplittingComm(GroupComm):
    """Of the whole job; a workspace of fewer ranks splits it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def Get_rank(self) -> int:
        return dist.get_rank(self.group)

    def Get_size(self) -> int:
        return dist.get_world_size(self.group)

    def allgather(self, data: Any) -> tuple[Any, ...]:
        result = [None] * self.Get_size()
        dist.all_gather_object(result, data, group=self.group)
        return tuple(result)

    def Split(self, color: int, key: int) -> SplittingComm:
        colors = self.allgather(color)
        groups = {c: dist.new_group([r for r, theirs in enumerate(colors) if theirs == c], backend="gloo")
                  for c in sorted(set(colors))}  # fmt: skip
        return SplittingComm(groups[color])


def split_comm_body(rank: Rank) -> None:
    mapping = Mapping(4, rank.rank, tp_size=2, pp_size=2)
    options = rank.options(timeout=rank.group_timeout)
    with Workspace(mapping, buffer_size_in_bytes=1 << 16, comm_backend=SplittingComm(), device=rank.device,
                   options=options) as workspace:  # fmt: skip
        assert (workspace.rank, workspace.tp_size) == (rank.rank % 2, 2)
        inputs = [random_input(r, 40, torch.float32, 2).view(5, 8) for r in mapping.tp_group]
        x = inputs[mapping.tp_rank].clone().to(rank.device)
        assert_bits(trtllm_mnnvl_allreduce(x, workspace, False), sum_of(inputs))


def test_own_comm_backend_that_is_split(ranks, device):
    ranks(split_comm_body, 4, device, backend="gloo")


def late_call_body(rank: Rank) -> None:
    options = rank.options(timeout=timedelta(seconds=1))
    mapping = Mapping(rank.world_size, rank.rank, tp_size=rank.world_size)
    workspace = Workspace(mapping, buffer_size_in_bytes=1 << 16, device=rank.device, options=options)
    x = torch.ones(2, 8, device=rank.device)
    trtllm_mnnvl_allreduce(x, workspace, False)
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
            for _ in range(2):  # what a kernel ran into is raised by the next call
                trtllm_mnnvl_allreduce(x, workspace, False)
                if rank.device.type == "cuda":
                    torch.cuda.synchronize()
        with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
            trtllm_mnnvl_allreduce(x, workspace, False)
    rank.meet()
    workspace.destroy()
    with workspace_of(rank, buffer_size_in_bytes=1 << 16) as fresh:
        assert (trtllm_mnnvl_allreduce(x, fresh, False) == rank.world_size).all()


def test_a_rank_that_does_not_call(ranks, device):
    """The workspace's timeout, the rank's name, and a new workspace that works."""
    ranks(late_call_body, 2, device)


def captured_body(rank: Rank) -> None:
    """An odd number of calls of both strategies in one graph, replayed with fresh inputs between eager calls."""
    shapes = [(1, 16), (64, 512), (7, 100), (128, 1024), (2, 8)]
    n, plan = rank.world_size, random.Random(11)

    def draw(shape: tuple[int, int], seed: int) -> list[torch.Tensor]:
        return [random_input(r, shape[0] * shape[1], torch.bfloat16, seed).view(shape) for r in range(n)]

    with workspace_of(rank, buffer_size_in_bytes=1 << 21) as workspace:
        pools = {shape: [draw(shape, seed) for seed in range(4)] for shape in shapes}
        expected = {shape: [sum_of(inputs).to(rank.device) for inputs in pools[shape]] for shape in shapes}
        statics = [torch.zeros(shape, dtype=torch.bfloat16, device=rank.device) for shape in shapes]
        strategies = [Strategy.ONESHOT, Strategy.TWOSHOT, Strategy.TWOSHOT, Strategy.AUTO, Strategy.ONESHOT]
        outputs = [torch.empty_like(x) for x in statics]
        for x, out in zip(statics, outputs, strict=True):
            trtllm_mnnvl_allreduce(x, workspace, False, out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i, (x, out, strategy) in enumerate(zip(statics, outputs, strategies, strict=True)):
                trtllm_mnnvl_allreduce(x, workspace, i % 2 == 1, out, strategy)
        for replay in range(100):
            chosen = [plan.randrange(4) for _ in shapes]
            for x, shape, pick in zip(statics, shapes, chosen, strict=True):
                x.copy_(pools[shape][pick][rank.rank])
            graph.replay()
            eager = plan.choice(shapes)
            strategy = plan.choice([Strategy.ONESHOT, Strategy.TWOSHOT])
            mine = pools[eager][0][rank.rank].to(rank.device)
            result = trtllm_mnnvl_allreduce(mine, workspace, False, strategy=strategy)
            assert_bits(result, expected[eager][0], f"eager call after replay {replay}")
            for out, shape, pick in zip(outputs, shapes, chosen, strict=True):
                assert_bits(out, expected[shape][pick], f"replay {replay}, {shape}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("world_size", [2, 4])
def test_cuda_graph(ranks, world_size):
    if world_size > max(2, torch.cuda.device_count()):
        pytest.skip(f"fewer than {world_size} CUDA devices")
    ranks(captured_body, world_size, "cuda", timeout=115)


# The store's communicator, without any workspace.


def store_comm_body(rank: Rank) -> None:
    comm = StoreComm(rank.store, rank.rank, rank.world_size, rank.group_timeout)
    for round in range(5):
        assert comm.allgather((round, rank.rank)) == [(round, r) for r in range(rank.world_size)]
    assert comm.bcast(rank.rank, 2) == 2
    comm.barrier()
    sub = comm.Split(color=rank.rank % 2, key=-rank.rank)
    members = sorted((r for r in range(rank.world_size) if r % 2 == rank.rank % 2), reverse=True)
    assert (sub.Get_rank(), sub.Get_size()) == (members.index(rank.rank), len(members))
    assert sub.allgather(rank.rank) == members
    rank.meet()  # nothing stays behind
    keys = [f"{round}/{who}" for round in range(8) for who in [*range(rank.world_size), "read"]]
    assert not any(rank.store.check([key]) for key in keys)


def test_store_comm(ranks):
    ranks(store_comm_body, 5, backend=None)


def late_rank_body(rank: Rank) -> None:
    if rank.rank != 1:
        comm = StoreComm(rank.store, rank.rank, rank.world_size, timedelta(seconds=0.5))
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 3 did not come"):
            comm.allgather(b"x")
    rank.meet()


def test_store_comm_names_who_is_late(ranks):
    ranks(late_rank_body, 3, backend=None)


def test_strategies_can_be_pickled():
    assert pickle.loads(pickle.dumps(Strategy.TWOSHOT)) is Strategy.TWOSHOT
