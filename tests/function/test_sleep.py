"""A workspace's memory given back and made anew: checkpoint_prepare() and checkpoint_restore()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only, want_gpus
from reference import assert_bits, random_input, rank_order_sum
from workspaces import workspace_of

from mnnvl_backend import Mapping, trtllm_mnnvl_allreduce
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.flashinfer.control import StoreComm


def check_sums(rank: Rank, workspace: Workspace, seed: int) -> None:
    for tokens, strategy in ((1, Strategy.ONESHOT), (4, Strategy.TWOSHOT), (33, Strategy.AUTO)):
        inputs = [random_input(r, tokens * 64, torch.bfloat16, seed).view(tokens, 64) for r in range(rank.world_size)]
        x = inputs[rank.rank].clone().to(rank.device)
        result = trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy)
        assert_bits(result, rank_order_sum(inputs), f"{strategy.name}, seed {seed}")


def sleeping_body(rank: Rank) -> None:
    """Right before and after, twice; in between every call is refused, and both steps done again change nothing."""
    x = torch.ones(2, 64, device=rank.device)
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        for seed in range(2):
            check_sums(rank, workspace, seed)
            freed = workspace.checkpoint_prepare()
            least = (
                workspace.workspace_size_bytes if rank.device.type == "cuda" else 1
            )  # on the CPU it is of another size
            assert freed >= least if rank.world_size > 1 else freed == 0
            assert workspace.checkpoint_prepare() == 0
            for refused in (x, x[:0]):
                with pytest.raises(RuntimeError, match="not attached"):
                    trtllm_mnnvl_allreduce(refused, workspace, False)
            workspace.checkpoint_restore()
            workspace.checkpoint_restore()
        check_sums(rank, workspace, 2)
        workspace.checkpoint_prepare()  # destroyed while asleep
    for call in (workspace.checkpoint_prepare, workspace.checkpoint_restore):
        with pytest.raises(RuntimeError, match="destroyed"):
            call()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sleeps_and_wakes(ranks, device, world_size):
    ranks(sleeping_body, world_size, device)


def wrong_comm_body(rank: Rank) -> None:
    """Refused on sight, and the restore by the right one works; that one serves from then on."""
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        workspace.checkpoint_prepare()
        n = rank.world_size
        for wrong in (
            StoreComm(rank.store, rank.rank, n + 1, rank.group_timeout),
            StoreComm(rank.store, (rank.rank + 1) % n, n, rank.group_timeout),
        ):
            with pytest.raises(ValueError, match=rf"comm_backend: expected rank {rank.rank} of {n}, as .* got rank"):
                workspace.checkpoint_restore(wrong)
        with pytest.raises(TypeError, match=r"comm_backend: .*without Get_rank"):
            workspace.checkpoint_restore(object())  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="not attached"):
            trtllm_mnnvl_allreduce(torch.ones(1, 8, device=rank.device), workspace, False)
        dist.destroy_process_group()  # with what the set-up went over
        workspace.checkpoint_restore(StoreComm(rank.store, rank.rank, n, rank.group_timeout, "another"))
        check_sums(rank, workspace, 1)
        workspace.checkpoint_prepare()
        workspace.checkpoint_restore()
        check_sums(rank, workspace, 2)


def test_a_communicator_of_other_ranks(ranks, device):
    ranks(wrong_comm_body, 2, device, backend="gloo")


class FailingComm(StoreComm):
    """Fails on rank 1 in its `fails`th all-gather, on the others as their peer's absence."""

    fails = 0

    def allgather(self, data: Any) -> list[Any]:
        self.fails -= 1
        if self.fails == 0 and self.Get_rank() == 1:
            self.give_up("the test's")
            raise RuntimeError("the test's")
        return super().allgather(data)


def broken_restore_body(rank: Rank) -> None:
    """Every all-gather of a restore fails once: all ranks raise, stay without memory, and the next try works."""
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        for fails in range(1, 100):
            workspace.checkpoint_prepare()
            comm = FailingComm(rank.store, rank.rank, rank.world_size, rank.group_timeout, f"failing/{fails}")
            comm.fails = fails
            text = ""
            try:
                workspace.checkpoint_restore(comm)
            except RuntimeError as error:
                text = str(error)
            if text:
                # Who comes to a step that the failed rank has left by then hears which rank that was, and not why.
                assert "the test's" in text or "rank 0 waited for rank 1" in text, text
                with pytest.raises(RuntimeError, match="not attached"):
                    trtllm_mnnvl_allreduce(torch.ones(1, 8, device=rank.device), workspace, False)
                workspace.checkpoint_restore(StoreComm(rank.store, rank.rank, rank.world_size, rank.group_timeout))
                check_sums(rank, workspace, fails)
                continue
            break
        assert fails > 3
        check_sums(rank, workspace, 0)


def test_a_restore_that_fails_can_be_tried_again(ranks, device):
    ranks(broken_restore_body, 2, device)


def two_workspaces_body(rank: Rank) -> None:
    """One sleeps beside another, and beside the process group."""
    first, second = (workspace_of(rank, buffer_size_in_bytes=1 << 20) for _ in range(2))
    first.checkpoint_prepare()
    check_sums(rank, second, 0)
    y = torch.ones(5, device=rank.device)
    dist.all_reduce(y)
    assert (y == rank.world_size).all()
    second.checkpoint_prepare()
    first.checkpoint_restore()
    check_sums(rank, first, 1)
    second.checkpoint_restore()
    check_sums(rank, second, 2)
    first.destroy()
    second.destroy()


def test_one_of_two(ranks, device):
    ranks(two_workspaces_body, 2, device)


def graph_body(rank: Rank) -> None:
    """Captured before, replayed after with fresh inputs: the right bits, three sleeps in a row. The device gets at least
    the workspace's bytes back meanwhile; more, where ranks share it."""
    shapes = [(1, Strategy.ONESHOT), (4, Strategy.TWOSHOT), (300, Strategy.TWOSHOT)]
    with workspace_of(rank, buffer_size_in_bytes=64 << 20) as workspace:
        sources = [torch.zeros(tokens, 2048, dtype=torch.bfloat16, device=rank.device) for tokens, _ in shapes]
        results = [torch.zeros_like(source) for source in sources]

        def calls() -> None:
            for source, result, (_, strategy) in zip(sources, results, shapes, strict=True):
                trtllm_mnnvl_allreduce(source, workspace, True, output=result, strategy=strategy)

        def check(seed: int) -> None:
            expected = []
            for source in sources:
                inputs = [random_input(r, source.numel(), source.dtype, seed) for r in range(rank.world_size)]
                source.copy_(inputs[rank.rank].view_as(source))
                expected.append(rank_order_sum(inputs).view_as(source))
            graph.replay()
            for result, wanted, shape in zip(results, expected, shapes, strict=True):
                assert_bits(result, wanted, f"{shape}, seed {seed}")

        calls()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        for seed in range(0, 30, 10):
            for step in range(4):  # the generations end elsewhere each time
                check(seed + step + seed // 10)
            torch.cuda.synchronize()
            rank.meet(f"before {seed}")
            before = torch.cuda.mem_get_info(rank.device)[0]
            rank.meet(f"seen {seed}")
            freed = workspace.checkpoint_prepare()
            after = torch.cuda.mem_get_info(rank.device)[0]
            assert freed >= workspace.workspace_size_bytes
            assert after - before >= freed, (before, after, freed)
            rank.meet(f"asleep {seed}")
            workspace.checkpoint_restore()
            check(seed + 5)
            calls()
            check(seed + 6)


@cuda_only
@pytest.mark.parametrize("world_size", [2, 4])
def test_graphs_captured_before(ranks, world_size):
    if world_size > 2:
        want_gpus("cuda", world_size)
    ranks(graph_body, world_size, "cuda", timeout=120)


def timid_mapping_body(rank: Rank) -> None:
    """A part of a larger job, whose communicator was split: it serves again."""
    mapping = Mapping(4, rank.rank, tp_size=2, pp_size=2)
    options = rank.options(timeout=rank.group_timeout)
    with Workspace(mapping, buffer_size_in_bytes=1 << 16, device=rank.device, options=options) as workspace:
        workspace.checkpoint_prepare()
        workspace.checkpoint_restore()
        x = torch.full((2, 8), float(10**rank.rank), device=rank.device)
        assert (trtllm_mnnvl_allreduce(x, workspace, False) == sum(10.0**r for r in mapping.tp_group)).all()


def test_a_part_of_a_larger_group(ranks, device):
    ranks(timid_mapping_body, 4, device, backend="gloo")
