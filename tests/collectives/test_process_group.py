"""How groups are made: forms of init, subgroups, options, devices, splitting, timeouts."""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only, two_gpus
from reference import (
    all_reduce_works,
    assert_bits,
    random_input,
    rank_order_sum,
)

from mnnvl_backend.registration import load_compiled


def whole_life_body(rank: Rank, form: str) -> None:
    for life in range(2):
        dist.init_process_group(form, store=dist.PrefixStore(f"life{life}", rank.store), rank=rank.rank,
                                world_size=rank.world_size, timeout=rank.group_timeout)  # fmt: skip
        x = torch.ones(5, device=rank.device)
        dist.all_reduce(x)
        assert x.tolist() == [rank.world_size] * 5
        dist.barrier()
        gathered: list[Any] = [None] * rank.world_size
        dist.all_gather_object(gathered, {"rank": rank.rank, "text": "x" * rank.rank})
        assert gathered == [{"rank": r, "text": "x" * r} for r in range(rank.world_size)]
        objects = [("root", 1), None] if rank.rank == 1 else [None, None]
        dist.broadcast_object_list(objects, src=1)
        assert objects == [("root", 1), None]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # hasHooks() of a group without a default backend would warn
            warnings.filterwarnings("ignore", message=".*using the device under current context")  # torch's own advice
            group = dist.new_group([0, 1])
            if rank.rank < 2:
                dist.barrier(group=group)
            dist.destroy_process_group()
        assert not dist.is_initialized()


@pytest.mark.parametrize("form", ["mnnvl", "cpu:mnnvl", "cuda:mnnvl", "cpu:gloo,cuda:mnnvl", "cpu:mnnvl,cuda:gloo",
                                  "cpu:mnnvl,cuda:nccl"])  # fmt: skip
def test_forms_of_init_process_group(ranks, device, form):
    """Collectives, barrier, objects, subgroup and destroy, twice, for mnnvl alone and beside other backends."""
    served = "mnnvl" in form.partition("cuda:")[2] if device == "cuda" else form not in ("cuda:mnnvl",)
    if not served and form != "mnnvl":
        pytest.skip(f"{form} does nothing of ours for {device} tensors")
    if "nccl" in form and not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    world_size = 3 if device == "cpu" else min(3, max(2, torch.cuda.device_count()))
    env = {"MNNVL_BOOTSTRAP": "store"} if device == "cuda" and world_size > torch.cuda.device_count() else {}
    ranks(whole_life_body, world_size, device, backend=None, args=(form,), env=env)


def subgroups_body(rank: Rank) -> None:
    members = [[0, 1, 2], [1, 2, 3], [3, 0], [2], [3, 2, 1, 0]]
    strategies = itertools.cycle(["oneshot", "twoshot", "auto"])
    groups = [
        dist.new_group(m, backend="mnnvl", pg_options=rank.options(strategy=s))
        for m, s in zip(members, strategies, strict=False)
    ]
    for seed, (ids, group) in enumerate(zip(members, groups, strict=True)):
        ids = sorted(ids)
        if rank.rank not in ids:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
            continue
        inputs = [random_input(r, 1001, torch.bfloat16, seed) for r in ids]
        x = inputs[ids.index(rank.rank)].clone().to(rank.device)
        works = [dist.all_reduce(x, group=group, async_op=True)]
        y = torch.full((3,), float(rank.rank), device=rank.device)
        works.append(dist.broadcast(y, src=ids[-1], group=group, async_op=True))
        for work in works:
            work.wait()
        assert_bits(x, rank_order_sum(inputs), f"group {ids}")
        assert y.tolist() == [ids[-1]] * 3
        dist.destroy_process_group(group)
    all_reduce_works(rank)


def test_overlapping_subgroups_with_options(ranks, device):
    ranks(subgroups_body, 4, device)


def few_blocks_body(rank: Rank) -> None:
    """Everything that a launch's blocks are dealt out by, on very few; and large all-reduces, which go in parts."""
    n, device = rank.world_size, rank.device
    for count in (1, 3):
        group = dist.new_group(backend="mnnvl", pg_options=rank.options(max_ctas=count, workspace_bytes=1 << 20))
        for numel in (7, 100_001, 2_000_003):
            inputs = [random_input(r, numel, torch.bfloat16, numel) for r in range(n)]
            mine, expected = inputs[rank.rank].to(device), rank_order_sum(inputs)
            x = mine.clone()
            for _ in range(2):
                dist.all_reduce(x.copy_(mine), group=group)
                assert_bits(x, expected, f"{numel} on {count}")
            whole = torch.empty(n * numel, dtype=torch.bfloat16, device=device)
            dist.all_gather_into_tensor(whole, mine, group=group)
            assert_bits(whole, torch.cat(inputs), f"{numel} gathered on {count}")
            dist.reduce_scatter_tensor(x, whole, group=group)
            part = inputs[rank.rank]
            assert_bits(x, rank_order_sum([part] * n), f"{numel} scattered on {count}")
            numbers = torch.arange(numel, device=device)
            largest = numbers * (rank.rank + 1)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            assert (largest == numbers * n).all()
        dist.destroy_process_group(group)
    differ = dist.new_group(backend="mnnvl", pg_options=rank.options(max_ctas=1 + rank.rank))
    with pytest.raises(ValueError, match="options differ: rank 0 has .* max_ctas 1; rank 1 has .* max_ctas 2"):
        dist.all_reduce(torch.ones(1, device=device), group=differ)


def test_on_few_blocks(ranks, device):
    ranks(few_blocks_body, 2, device, timeout=120)


def asynchronous_here_body(rank: Rank) -> None:
    """The same call may be asynchronous on some ranks, and then has blocks of its own number there; in many windows."""
    n, device = rank.world_size, rank.device
    options = rank.options(async_max_ctas=1 + 4 * rank.rank, workspace_bytes=2 << 20)
    group = dist.new_group(backend="mnnvl", pg_options=options)
    for i, numel in enumerate((7, 100_001, 2_000_003)):
        inputs = [random_input(r, numel, torch.bfloat16, numel) for r in range(n)]
        mine, expected = inputs[rank.rank].to(device), rank_order_sum(inputs)
        whole, part = torch.cat([mine] * n), torch.empty_like(mine)
        for turn in range(n + 1):
            here = (rank.rank + turn) % (n + 1) != 0
            x = mine.clone()
            works = [dist.all_reduce(x, async_op=here, group=group)]
            works.append(dist.reduce_scatter_tensor(part, whole, async_op=not here, group=group))
            for work in filter(None, works):
                work.wait()
            assert_bits(x, expected, f"{numel}, turn {turn} of call {i}")
            assert_bits(part, expected, f"{numel} scattered, turn {turn} of call {i}")


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_asynchronous_on_some_ranks(ranks, device, world_size):
    if device == "cpu" and world_size > 3:
        pytest.skip("about what a launch takes of a GPU")
    ranks(asynchronous_here_body, world_size, device, timeout=120)


def wrong_options_body(rank: Rank) -> None:
    with pytest.raises(TypeError, match=r"expected mnnvl_backend\.Options, got dict"):
        dist.new_group(backend="mnnvl", pg_options={"strategy": "oneshot"})
    os.environ["MNNVL_STRATEGY"] = "fast"
    with pytest.raises(ValueError, match="MNNVL_STRATEGY: expected oneshot, twoshot or auto, got 'fast'"):
        dist.new_group(backend="mnnvl", pg_options=rank.options())
    del os.environ["MNNVL_STRATEGY"]
    group = dist.new_group(backend="mnnvl", pg_options=rank.options())
    all_reduce_works(rank, group)


def test_wrong_options_and_variables(ranks, device):
    ranks(wrong_options_body, 2, device)


def test_world_size_over_72():
    settings = {"timeout_ms": 1000, "workspace_bytes": 0, "strategy": 99, "multicast": False, "bootstrap": 1,
                "host_id": "", "blocking_wait": False, "nccl_path": ""}  # fmt: skip
    make = load_compiled().ProcessGroupMNNVL
    with pytest.raises(ValueError, match="world size: expected 1 to 72, got 73"):
        make(dist.HashStore(), 0, 73, **settings)
    with pytest.raises(ValueError, match="rank: expected 0 to 71, got 72"):
        make(dist.HashStore(), 72, 72, **settings)
    assert make(dist.HashStore(), 71, 72, **settings).size() == 72


def two_hosts_body(rank: Rank) -> str:
    os.environ["MNNVL_HOST_ID"] = f"host{rank.rank % 2}"
    rank.init()
    with pytest.raises(RuntimeError) as raised:
        dist.all_reduce(torch.ones(3, device=rank.device))
    del os.environ["MNNVL_HOST_ID"]
    all_reduce_works(rank, dist.new_group(backend="mnnvl", pg_options=rank.options()))
    return str(raised.value)


def test_ranks_on_two_hosts(ranks, device):
    """The same error on every rank, at once; what is no longer said to be on two hosts works."""
    start = time.monotonic()
    texts = ranks(two_hosts_body, 3, device, backend=None)
    assert time.monotonic() - start < 20
    assert len(set(texts)) == 1
    expected = ["on 2", "rank 1", "host0", "host1"] + (["fabric"] if device == "cuda" else ["gloo"])
    assert [e for e in expected if e not in texts[0]] == []


def eager_body(rank: Rank) -> None:
    dist.init_process_group("mnnvl", store=dist.PrefixStore("eager", rank.store), rank=rank.rank,
                            world_size=rank.world_size, timeout=rank.group_timeout, device_id=rank.device,
                            pg_options=rank.options())  # fmt: skip
    all_reduce_works(rank)
    dist.barrier()
    group = dist.new_group([1], pg_options=rank.options())  # rank 0, outside, goes through perform_nocolor_split
    if rank.rank == 1:
        all_reduce_works(rank, group)
    split = dist.split_group(split_ranks=[[0, 1]])
    all_reduce_works(rank, split)
    all_reduce_works(rank)


@cuda_only
def test_device_id_makes_the_transport_at_once(ranks):
    """device_id: eager set-up, subgroups and split_group."""
    ranks(eager_body, 2, "cuda", backend=None)


def split_body(rank: Rank) -> None:
    """dist.split_group wants an accelerator; the C++ group's own splitting serves CPU tensors too."""
    mine = [0, 1] if rank.rank < 2 else [2]
    group = dist.group.WORLD.split_group(mine, timeout=rank.group_timeout, group_name=f"split{mine}")
    assert (group.rank(), group.size()) == (mine.index(rank.rank), len(mine))
    x = torch.full((4,), float(rank.rank + 1), device=rank.device)
    group.allreduce([x]).wait()
    assert x.tolist() == [sum(r + 1 for r in mine)] * 4
    group.shutdown()
    all_reduce_works(rank)


def test_split(ranks, device):
    ranks(split_body, 3, device)


def options_property_body(rank: Rank) -> float:
    """What dist.split_group does before it splits."""
    options = copy.deepcopy(dist.group.WORLD._get_backend(rank.device).options)
    return options._timeout.total_seconds()


def test_options_can_be_read_and_copied(ranks, device):
    assert ranks(options_property_body, 2, device, group_timeout=17) == [17.0, 17.0]


def timeout_body(rank: Rank) -> list[str]:
    """What every way of giving a timeout leads to: the text has the seconds that were waited at most."""
    texts = []
    short, long = timedelta(seconds=0.5), timedelta(seconds=30)
    by_options = dist.new_group(backend="mnnvl", timeout=long, pg_options=rank.options(timeout=short))
    by_group = dist.new_group(backend="mnnvl", timeout=short, pg_options=rank.options())
    set_later = dist.new_group(backend="mnnvl", timeout=long, pg_options=rank.options())
    for i, group in enumerate([by_options, by_group, set_later]):
        x = torch.ones(3, device=rank.device)
        work = dist.all_reduce(x, group=group, async_op=True)
        work.wait()
        if group is set_later:
            group._get_backend(rank.device).set_timeout(short)
        rank.meet(f"group{i}")
        if rank.rank == 0:
            start = time.monotonic()
            with pytest.raises(dist.DistBackendError, match=r"rank 1\b") as raised:
                dist.all_reduce(x, group=group)
                if rank.device.type == "cuda":
                    torch.cuda.synchronize()
                    dist.all_reduce(x, group=group)
            assert 0.4 < time.monotonic() - start < 5
            texts.append(str(raised.value))
        rank.meet(f"waited{i}")
    return texts


def test_timeouts(ranks, device):
    """The group's own, Options.timeout before it, and set_timeout of a group in use."""
    texts, _ = ranks(timeout_body, 2, device)
    assert len(texts) == 3


def long_timeouts_body(rank: Rank, timeout: timedelta) -> None:
    """Whatever torch can carry is a timeout, and in the options whatever Python can: none is too long to count with."""
    rank.init(timeout=timeout)
    backend = dist.group.WORLD._get_backend(rank.device)
    all_reduce_works(rank)
    backend.set_timeout(timeout)
    all_reduce_works(rank)
    x = torch.ones(3, device=rank.device)
    opts = dist.AllreduceOptions()
    opts.timeout, opts.asyncOp = timeout, True
    assert backend.allreduce([x], opts).wait(timeout)
    group = dist.new_group(backend="mnnvl", pg_options=rank.options(timeout=timedelta.max))
    all_reduce_works(rank, group)
    dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None)


@pytest.mark.parametrize("timeout", [timedelta(days=109_500), timedelta(days=10**8)], ids=str)
def test_very_long_timeouts(ranks, device, timeout):
    ranks(long_timeouts_body, 2, device, backend=None, args=(timeout,), timeout=30)


def own_methods_body(rank: Rank) -> None:
    """torch's own helpers know NCCL and gloo only; the group's methods work."""
    group, backend = dist.group.WORLD, dist.group.WORLD._get_backend(rank.device)
    all_reduce_works(rank)
    before = backend._get_sequence_number_for_group()
    backend._set_sequence_number_for_group()
    all_reduce_works(rank)
    assert backend._get_sequence_number_for_group() == before + 1
    setters = (group.set_timeout, backend.set_timeout, backend._set_default_timeout)
    for seconds, set_timeout in enumerate(setters, 41):
        set_timeout(timedelta(seconds=seconds))
        assert backend.options._timeout == timedelta(seconds=seconds)
    all_reduce_works(rank)
    with pytest.raises(ValueError, match="timeout.*expected"):
        backend.set_timeout(timedelta(0))


def test_sequence_numbers_and_timeouts_of_the_group(ranks, device):
    ranks(own_methods_body, 2, device)


@two_gpus
def test_handles_over_nccl(ranks):
    """Forced: by default descriptors don't go that way."""
    ranks(all_reduce_works, min(4, torch.cuda.device_count()), "cuda", options={"bootstrap": "nccl"})


def same_store_body(rank: Rank) -> None:
    """Under torchrun the store outlives a group, and torch gives the next one the same prefix."""
    for _ in range(3):
        rank.init(prefix="same")
        all_reduce_works(rank)
        dist.destroy_process_group()


def test_groups_made_again_in_the_same_store(ranks, device):
    ranks(same_store_body, 3, device, backend=None)


def different_options_body(rank: Rank) -> str:
    rank.init(strategy="oneshot" if rank.rank == 1 else "twoshot")
    with pytest.raises(ValueError, match="options differ.*rank 1") as raised:
        dist.all_reduce(torch.ones(100_000, device=rank.device))
    return str(raised.value)


def test_options_that_differ_between_ranks(ranks, device):
    assert len(set(ranks(different_options_body, 3, device, backend=None))) == 1


def crossed_groups_body(rank: Rank) -> None:
    """Rows and columns of a 2 x 2 mesh, large tensors in flight on both at once, begun in another order on each rank."""
    groups = [dist.new_group(ranks, backend="mnnvl") for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    row, column = groups[rank.rank // 2], groups[2 + rank.rank % 2]
    for group in (row, column):  # set up before anything is in flight
        dist.all_reduce(torch.ones(1, device=rank.device), group=group)
    for turn in range(10):
        order = [row, column] if (rank.rank + turn) % 3 else [column, row]
        tensors = [torch.full((3_000_000,), float(rank.rank + 1), device=rank.device) for _ in order]
        works = [dist.all_reduce(x, group=g, async_op=True) for x, g in zip(tensors, order, strict=True)]
        for work in works:
            work.wait()
        for x, group in zip(tensors, order, strict=True):
            expected = sum(r + 1 for r in dist.get_process_group_ranks(group))
            assert bool((x == expected).all())


def test_crossed_groups(ranks, device):
    ranks(crossed_groups_body, 4, device, timeout=120)


def crossed_operations_body(rank: Rank) -> None:
    """Two groups of the same ranks: each kernel, beside each, small and large, begun in another order on each rank."""
    groups = [dist.new_group(backend="mnnvl") for _ in range(2)]

    def begin(group, kind: tuple[str, int]):
        name, numel = kind
        x = torch.full((numel,), float(rank.rank + 1), device=rank.device)
        if name == "gathered":
            out = torch.zeros(rank.world_size * numel, device=rank.device)
            return dist.all_gather_into_tensor(out, x, group=group, async_op=True), out, [1.0, 2.0]
        op = dist.ReduceOp.SUM if name == "sum" else dist.ReduceOp.MAX
        return dist.all_reduce(x, op, group=group, async_op=True), x, [3.0] if name == "sum" else [2.0]

    kinds = [(name, numel) for name in ("sum", "maximum", "gathered") for numel in (1 << 15, 3 << 20)]
    # Set up before anything is in flight; and CUDA loads torch's kernels when they are first used, and then waits.
    for group in groups:
        for kind in kinds:
            begin(group, kind)[0].wait()
    for turn, (first, second) in enumerate((a, b) for a in kinds for b in kinds):
        order = [(groups[0], first), (groups[1], second)]
        begun = [begin(group, kind) for group, kind in (order if (rank.rank + turn) % 2 else order[::-1])]
        for work, x, expected in begun:
            work.wait()
            assert x.view(len(expected), -1).eq(torch.tensor(expected, device=rank.device).view(-1, 1)).all()


def test_crossed_operations(ranks, device):
    ranks(crossed_operations_body, 2, device)


def four_crossed_groups_body(rank: Rank) -> None:
    """As large as fits a GPU four times (README's limits): all in flight, begun in another order on each rank."""
    groups = [dist.new_group(backend="mnnvl") for _ in range(4)]
    for group in groups:
        dist.all_reduce(torch.ones(1, device=rank.device), group=group)
    for turn in range(20):
        order = random.Random(turn * 10 + rank.rank).sample(range(4), 4)
        tensors = [torch.full((1 << 15,), float(rank.rank + i)).to(rank.device) for i in range(4)]
        works = [dist.all_reduce(tensors[i], group=groups[i], async_op=True) for i in order]
        for work in works:
            work.wait()
        found = [sorted(set(x.tolist())) for x in tensors]
        assert found == [[float(sum(r + i for r in range(rank.world_size)))] for i in range(4)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_four_crossed_groups(ranks, device, world_size):
    ranks(four_crossed_groups_body, world_size, device)
