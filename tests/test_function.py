"""trtllm_mnnvl_allreduce and its workspace, over ranks."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank

from mnnvl_backend import Mapping, trtllm_mnnvl_allreduce
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.comm import StoreComm

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
    import mnnvl_backend.functional  # noqa: F401  # defines the op

    with workspace_of(rank, buffer_size_in_bytes=1 << 16) as workspace:
        x = torch.ones(2, 8, device=rank.device)
        op = torch.ops.mnnvl.trtllm_allreduce.default
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, (x, torch.empty_like(x), workspace.handle, 0, False), test_utils=tests)


def test_custom_op_is_well_formed(ranks, device):
    ranks(opcheck_body, 1, device)


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
