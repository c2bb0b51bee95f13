"""The workspace of trtllm_mnnvl_allreduce: communicators, groups, capacity, time-outs, and the store's communicator."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import assert_bits, random_input, rank_order_sum
from workspaces import workspace_of

from mnnvl_backend import Mapping, trtllm_mnnvl_allreduce
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.flashinfer.control import StoreComm


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


def full_workspaces_body(rank: Rank) -> None:
    """A workspace made for a problem serves it to the last byte, and every number of tokens below; one byte less is
    refused with both counts, and then a call that fits goes through."""
    hidden, most, n = 1536, 100, rank.world_size
    with workspace_of(rank, max_num_tokens=most, hidden_dim=hidden, dtype=torch.bfloat16) as workspace:
        for tokens in (1, 2, 3, 57, most - 1, most):
            inputs = [random_input(r, tokens * hidden, torch.bfloat16, tokens).view(-1, hidden) for r in range(n)]
            result = trtllm_mnnvl_allreduce(inputs[rank.rank].clone().to(rank.device), workspace, False)
            assert_bits(result, rank_order_sum(inputs), f"{tokens} tokens")
    for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
        needed = Workspace.get_required_buffer_size_bytes(n, 10, 24, torch.float32, strategy)
        inputs = [random_input(r, 240, torch.float32, 4).view(10, 24) for r in range(n)]
        x = inputs[rank.rank].clone().to(rank.device)
        with workspace_of(rank, buffer_size_in_bytes=needed) as workspace:
            assert_bits(trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy), rank_order_sum(inputs))
        with workspace_of(rank, buffer_size_in_bytes=needed - 1) as workspace:
            held = workspace.buffer_size_bytes
            if held < needed:  # it may be rounded up
                with pytest.raises(ValueError, match=rf"buffer of {held} bytes is too small.*requires {needed} bytes"):
                    trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy)
            small = x[:2].contiguous()
            assert_bits(trtllm_mnnvl_allreduce(small, workspace, False), rank_order_sum([i[:2] for i in inputs]))


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
            assert_bits(result, rank_order_sum(inputs), f"round {i}")
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
        assert_bits(trtllm_mnnvl_allreduce(x, workspace, False), rank_order_sum(inputs))


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
