"""The process group beside all_reduce: how groups are made, broadcast, gathers, barrier, Work, streams, the layers of
torch above it, and what is refused."""

from __future__ import annotations

import copy
import itertools
import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import DTYPES, assert_bits, random_input, rank_order_sum

from mnnvl_backend.registration import load_compiled

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")

EVERY_DTYPE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
               torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32,
               torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
               torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]  # fmt: skip
SLEEP_CYCLES = 100_000_000  # of torch.cuda._sleep: some 50 ms, far longer than anything the host does meanwhile


def values(rank: int, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all (0 and 1 for bool): what is copied must not be looked at. Every rank can make any rank's."""
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def raw_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.uint8).cpu()


def in_the_middle(x: torch.Tensor, offset: int, device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """A copy of `x` on `device`, `offset` elements into a larger storage, and a check that the rest is untouched."""
    size, begin, end = x.dtype.itemsize, offset * x.dtype.itemsize, (offset + x.numel()) * x.dtype.itemsize
    storage = torch.full((end + 8 * size,), 0xA5, dtype=torch.uint8, device=device)
    storage[begin:end] = raw_bytes(x).to(device)

    def check() -> None:
        around = torch.cat([storage[:begin], storage[end:]])
        assert torch.equal(around, torch.full_like(around, 0xA5)), "wrote beside the tensor"

    return storage.view(x.dtype)[offset : offset + x.numel()], check


def all_reduce_works(rank: Rank, group: dist.ProcessGroup | None = None) -> None:
    """What every refusal must leave behind: a group that adds up."""
    world_size = dist.get_world_size(group)
    inputs = [random_input(r, 37, torch.float32, 5) for r in range(world_size)]
    x = inputs[dist.get_rank(group)].clone().to(rank.device)
    dist.all_reduce(x, group=group)
    assert_bits(x, rank_order_sum(inputs))


# How groups are made.


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


# broadcast, gathers, barrier.


def broadcast_body(rank: Rank, dtypes: list[torch.dtype], sizes: list[int]) -> None:
    for seed, (dtype, numel) in enumerate(itertools.product(dtypes, sizes)):
        for root in range(rank.world_size):
            offset = (seed + root) % 4
            x, check = in_the_middle(values(rank.rank, numel, dtype, seed), offset, rank.device)
            dist.broadcast(x, root)
            expected = values(root, numel, dtype, seed)
            assert torch.equal(raw_bytes(x), raw_bytes(expected)), f"{numel} x {dtype} at {offset} from {root}"
            check()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_broadcast_of_every_dtype_from_every_root(ranks, device, world_size):
    ranks(broadcast_body, world_size, device, args=(EVERY_DTYPE, [0, 1, 3, 1001]), timeout=120)


def test_broadcast_of_large_tensors(ranks, device):
    """More than a workspace holds, and not a multiple of anything."""
    options = {"workspace_bytes": 1 << 20}
    ranks(broadcast_body, 3, device, args=([torch.uint8, torch.bfloat16], [3_000_001]), options=options)


def gather_body(rank: Rank, dtypes: list[torch.dtype], sizes: list[int]) -> None:
    n = rank.world_size
    for seed, (dtype, numel) in enumerate(itertools.product(dtypes, sizes)):
        what = f"{numel} x {dtype}"
        expected = [raw_bytes(values(r, numel, dtype, seed)) for r in range(n)]
        offset = seed % 4
        x, check_input = in_the_middle(values(rank.rank, numel, dtype, seed), offset, rank.device)
        zero = values(0, n * numel, dtype, seed + 1)
        out, check_output = in_the_middle(zero, (offset + 1) % 4, rank.device)
        dist.all_gather_into_tensor(out, x)
        assert torch.equal(raw_bytes(out), torch.cat(expected)), f"into_tensor of {what}"
        outs, checks = zip(*[in_the_middle(zero[:numel], (offset + r) % 4, rank.device) for r in range(n)], strict=True)
        dist.all_gather(list(outs), x)
        for r in range(n):
            assert torch.equal(raw_bytes(outs[r]), expected[r]), f"all_gather of {what}, rank {r}'s"
        for check in (check_input, check_output, *checks):
            check()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_gather_of_every_dtype(ranks, device, world_size):
    ranks(gather_body, world_size, device, args=(EVERY_DTYPE, [0, 1, 3, 1001]), timeout=120)


def test_all_gather_of_large_tensors(ranks, device):
    options = {"workspace_bytes": 1 << 20}
    ranks(gather_body, 3, device, args=([torch.uint8, torch.float32], [1_500_001]), options=options)


def layouts_body(rank: Rank) -> None:
    n = rank.world_size
    contributions = [torch.arange(20.0).view(4, 5) + 100 * r for r in range(n)]
    x = contributions[rank.rank].to(rank.device)
    wide = torch.zeros(4, 10, device=rank.device)
    outs = [torch.zeros(5, 4, device=rank.device).t(), wide[:, ::2], torch.zeros(4, 5, device=rank.device)]
    dist.all_gather(outs, x)
    for r in range(n):
        assert torch.equal(outs[r].cpu(), contributions[r])
    assert torch.equal(wide[:, 1::2].cpu(), torch.zeros(4, 5)), "wrote between the columns"
    work = dist.all_gather(outs, x.t().contiguous().t() + 1, async_op=True)
    work.wait()
    assert all(torch.equal(outs[r].cpu(), contributions[r] + 1) for r in range(n))


def test_all_gather_with_outputs_that_are_not_contiguous(ranks, device):
    """Logical elements count: transposed and strided outputs, a transposed input."""
    ranks(layouts_body, 3, device)


def uneven_objects_body(rank: Rank) -> None:
    mine = {"tensor": torch.arange(rank.rank * 1000), "nested": [rank.rank] * rank.rank}
    gathered: list[Any] = [None] * rank.world_size
    dist.all_gather_object(gathered, mine)
    assert [len(g["tensor"]) for g in gathered] == [1000 * r for r in range(rank.world_size)]
    objects: list[Any] = [mine, rank.rank]
    dist.broadcast_object_list(objects, src=2, device=rank.device)
    assert objects[1] == 2
    assert objects[0]["nested"] == [2, 2]


def test_object_collectives_of_different_lengths(ranks, device):
    ranks(uneven_objects_body, 3, device)


def barrier_body(rank: Rank, late: int, async_op: bool) -> tuple[float, float]:
    all_reduce_works(rank)  # set-up is a barrier of its own
    if rank.rank == late:
        time.sleep(0.3)
    device_ids = [rank.device.index] if rank.device.type == "cuda" else None
    came = time.monotonic()  # one clock for all processes of a host
    work = dist.barrier(async_op=async_op, device_ids=device_ids)
    if async_op:
        work.wait()
    return came, time.monotonic()


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("late", [0, 2])
def test_barrier_waits_for_the_last(ranks, device, late, async_op):
    times = ranks(barrier_body, 3, device, args=(late, async_op))
    assert max(came for came, _ in times) <= min(left for _, left in times)


# Work, and streams.


def work_body(rank: Rank) -> None:
    n = rank.world_size
    all_reduce_works(rank)
    x = torch.full((7,), float(rank.rank + 1), device=rank.device)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        assert not work.is_completed(), "completed before the others began"
        rank.store.set("seen", "1")
    else:
        rank.store.wait(["seen"], rank.group_timeout)
        work = dist.all_reduce(x, async_op=True)
    doubled = work.get_future().then(lambda f: f.value()[0] * 2)
    assert work.wait()
    total = n * (n + 1) / 2
    assert x.tolist() == [total] * 7
    assert doubled.wait().tolist() == [2 * total] * 7
    assert [t.data_ptr() for t in work.result()] == [x.data_ptr()]
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    assert work.is_completed()
    # Sync calls queue behind async ones, and any order of waiting will do.
    xs = [torch.full((1000,), float(i), device=rank.device) for i in range(20)]
    works = [dist.all_reduce(xs[i], async_op=True) for i in range(19)]
    dist.all_reduce(xs[19])
    for work in reversed(works):
        work.wait()
    assert [x[0].item() for x in xs] == [float(i * n) for i in range(20)]


def test_async_work_and_its_future(ranks, device):
    ranks(work_body, 3, device)


def wait_with_timeout_body(rank: Rank) -> None:
    all_reduce_works(rank)
    x = torch.ones(3, device=rank.device)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(dist.DistBackendError, match="did not end within 100 ms"):
            work.wait(timedelta(milliseconds=100))
        rank.store.set("waited", "1")
        work.wait()
    else:
        rank.store.wait(["waited"], rank.group_timeout)
        dist.all_reduce(x)
    assert x.tolist() == [rank.world_size] * 3


def test_wait_with_a_timeout_of_its_own(ranks, device):
    """It raises, and the collective goes on."""
    ranks(wait_with_timeout_body, 2, device)


def streams_body(rank: Rank) -> None:
    n = rank.world_size
    all_reduce_works(rank)
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    total = n * (n + 1) / 2
    for async_op in (False, True):
        x = torch.zeros(100_000, device=rank.device)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            x.fill_(rank.rank + 1)
            work = dist.all_reduce(x, async_op=async_op)
            assert not side.query(), "the call waited for its stream on the host"
            if async_op:
                work.wait()
            y = x + 1
        side.synchronize()
        assert torch.equal(y, torch.full_like(y, total + 1))
    # One group, several streams, nothing between the calls: they must not be in the workspace at once.
    xs = [torch.full((50_001,), float(rank.rank + 1), device=rank.device) for _ in range(30)]
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        with torch.cuda.stream((torch.cuda.default_stream(), side, other)[i % 3]):
            if i % 7 == 0:
                torch.cuda._sleep(SLEEP_CYCLES // 20)
            dist.all_reduce(x, async_op=i % 2 == 0)
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        assert torch.equal(x, torch.full_like(x, total)), f"call {i}"


@cuda_only
def test_current_stream_and_several_streams(ranks):
    ranks(streams_body, 2, "cuda")


def freed_while_in_flight_body(rank: Rank) -> None:
    """Memory of an async call's tensors must not be handed out before the call has ended."""
    all_reduce_works(rank)
    gathered = []
    for i in range(20):
        torch.cuda._sleep(SLEEP_CYCLES // 20)
        x = torch.full((1 << 18,), float(i), device=rank.device)
        out = torch.empty(rank.world_size << 18, device=rank.device)
        work = dist.all_gather_into_tensor(out, x, async_op=True)
        del x
        torch.full((1 << 18,), -1.0, device=rank.device)  # would take x's place
        work.wait()
        gathered.append(out[:: 1 << 16].clone())
        del out, work
    for i, g in enumerate(gathered):
        assert g.tolist() == [float(i)] * g.numel()


@cuda_only
def test_tensors_freed_while_in_flight(ranks):
    ranks(freed_while_in_flight_body, 2, "cuda")


# What torch builds on it.


def functional_body(rank: Rank) -> None:
    import torch.distributed._functional_collectives as funcol

    n, group = rank.world_size, dist.group.WORLD
    x = torch.full((3, 2), float(rank.rank + 1), device=rank.device)
    reduced = funcol.wait_tensor(funcol.all_reduce(x, "sum", group))
    assert reduced.tolist() == [[n * (n + 1) / 2] * 2] * 3
    assert funcol.wait_tensor(funcol.broadcast(x, 1, group)).tolist() == [[2.0] * 2] * 3


def functional_gather_body(rank: Rank) -> None:
    import torch.distributed._functional_collectives as funcol

    x = torch.full((3, 2), float(rank.rank + 1), device=rank.device)
    gathered = funcol.wait_tensor(funcol.all_gather_tensor(x, 0, dist.group.WORLD))
    assert gathered[:, 0].tolist() == [float(r + 1) for r in range(rank.world_size) for _ in range(3)]


def test_functional_collectives(ranks, device):
    ranks(functional_body, 2, device)


def test_functional_all_gather(ranks, device):
    """torch 2.13 takes it through allgather_into_tensor_coalesced."""
    ranks(functional_gather_body, 2, device)


def compiled_body(rank: Rank) -> None:
    def step(x):
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    inputs = [random_input(r, 50, torch.float32, 3) for r in range(rank.world_size)]
    expected = rank_order_sum([x * 2 for x in inputs]) + 1
    x = inputs[rank.rank].to(rank.device)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(2):
            assert_bits(compiled(x), expected, backend)


def test_torch_compile(ranks, device):
    ranks(compiled_body, 2, device, timeout=110)


def dtensor_body(rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    n = rank.world_size
    mesh = init_device_mesh(rank.device.type, (n,))
    local = torch.full((2, 3), float(rank.rank + 1), device=rank.device)
    reduced = DTensor.from_local(local, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
    assert reduced.tolist() == [[n * (n + 1) / 2] * 3] * 2
    full = DTensor.from_local(local, mesh, [Shard(0)]).full_tensor()
    assert full[:, 0].tolist() == [float(r + 1) for r in range(n) for _ in range(2)]


def test_dtensor(ranks, device):
    """Partial to replicated is an all_reduce, sharded to replicated an all_gather."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("a mesh wants a GPU per rank")
    ranks(dtensor_body, 2, device)


DETAIL = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def detail_body(rank: Rank) -> None:
    all_reduce_works(rank)
    broadcast_body(rank, [torch.int64, torch.bfloat16], [0, 5])
    gather_body(rank, [torch.uint8, torch.float32], [3])
    dist.barrier()
    uneven_objects_body(rank)
    group = dist.new_group([0, 2], backend="mnnvl", pg_options=rank.options())
    if rank.rank != 1:
        all_reduce_works(rank, group)
    mine = torch.ones(4 + (rank.rank == 1), device=rank.device)
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.all_reduce(mine)
    dtype = torch.float16 if rank.rank == 1 else torch.float32
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.all_reduce(torch.ones(4, dtype=dtype, device=rank.device))
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.barrier() if rank.rank == 1 else dist.broadcast(mine, 0)
    all_reduce_works(rank)


def test_debug_detail(ranks, device):
    """Everything works under torch's debug wrapper, which reports ranks that call different things."""
    ranks(detail_body, 3, device, env=DETAIL)


# What is refused: an error that says what, and a group that still works.


def refused_body(
    rank: Rank, calls: Callable[[Rank], dict[str, tuple[Callable[[], Any], type[Exception], str]]]
) -> None:
    for name, (call, kind, text) in calls(rank).items():
        with pytest.raises(kind, match=text):
            call()
            pytest.fail(f"{name} was accepted")
        all_reduce_works(rank)


def unsupported(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    n, x = rank.world_size, torch.ones(4, device=rank.device)
    parts = [torch.ones(4, device=rank.device) for _ in range(n)]
    whole = torch.ones(4 * n, device=rank.device)
    root, peer = rank.rank == 0, (rank.rank + 1) % n
    calls: dict[str, tuple[Callable[[], Any], str]] = {
        "reduce": (lambda: dist.reduce(x, 0), "reduce"),
        "gather": (lambda: dist.gather(x, parts if root else None, dst=0), "gather"),
        "scatter": (lambda: dist.scatter(x, parts if root else None, src=0), "scatter"),
        "reduce_scatter": (lambda: dist.reduce_scatter(x, parts), "reduce_scatter"),
        "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(x, whole), "reduce_scatter"),
        "all_to_all": (lambda: dist.all_to_all(parts, parts), "alltoall"),
        "all_to_all_single": (lambda: dist.all_to_all_single(whole.clone(), whole), "alltoall"),
        "send": (lambda: dist.send(x, peer), "send"),
        "isend": (lambda: dist.isend(x, peer), "send"),
        "recv": (lambda: dist.recv(x, peer), "recv"),
        "recv from anyone": (lambda: dist.recv(x), "recv"),
    }
    return {name: (call, RuntimeError, rf"(?i)\bmnnvl\b.*\b_?{text}") for name, (call, text) in calls.items()}


def test_unsupported_operations_name_backend_and_operation(ranks, device):
    ranks(refused_body, 2, device, args=(unsupported,))


def bad_input(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    n, device = rank.world_size, rank.device
    x, grid = torch.ones(4, device=device), torch.ones(4, 6, device=device)
    dense = "expected a dense, non-overlapping tensor.*contiguous"

    def several(*args, **kwargs):
        return [torch.empty(*args, device=kwargs.pop("device", device), **kwargs) for _ in range(n)]

    return {
        "sparse": (lambda: dist.all_reduce(grid.to_sparse()), ValueError, "mnnvl all_reduce.*dense.*Sparse"),
        "fp8": (lambda: dist.all_reduce(x.to(torch.float8_e5m2)), TypeError, "mnnvl all_reduce.*dtype.*Float8_e5m2"),
        "uint32": (lambda: dist.all_reduce(x.to(torch.uint32)), TypeError, "mnnvl all_reduce.*dtype.*got UInt32"),
        "BAND": (lambda: dist.all_reduce(x, op=dist.ReduceOp.BAND), ValueError, "mnnvl all_reduce.*BAND.*Float"),
        "AVG": (lambda: dist.all_reduce(x.int(), op=dist.ReduceOp.AVG), ValueError, "mnnvl all_reduce.*AVG.*Int"),
        "columns": (lambda: dist.all_reduce(grid[:, ::2]), ValueError, f"mnnvl all_reduce.*{dense}"),
        "expanded": (lambda: dist.all_reduce(x[:1].expand(5)), ValueError, f"mnnvl all_reduce.*{dense}"),
        "broadcast of columns": (lambda: dist.broadcast(grid[:, ::2], 0), ValueError, f"mnnvl broadcast.*{dense}"),
        "broadcast root": (lambda: dist.broadcast(x, n), ValueError, f"root: expected 0 to {n - 1}, got {n}"),
        "gather of columns": (lambda: dist.all_gather(several(4, 3), grid[:, ::2]), ValueError, dense),
        "short list": (lambda: dist.all_gather(several(4)[1:], x), ValueError, f"expected {n} tensors, got {n - 1}"),
        "list's numel": (lambda: dist.all_gather(several(3), x), ValueError, "4 elements like the input, got 3"),
        "list's dtype": (lambda: dist.all_gather(several(4, dtype=torch.half), x), ValueError, "dtypes"),
        "list on meta": (lambda: dist.all_gather(several(4, device="meta"), x), ValueError, "expected a tensor on"),
        "output's numel": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n + 1, device=device), x),
                           ValueError, f"expected {4 * n} elements, got {4 * n + 1}"),
        "output's dtype": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n, dtype=torch.half, device=device), x),
                           TypeError, "output: expected dtype Float, got Half"),
        "output's strides": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n, 2, device=device)[:, 0], x),
                             ValueError, "mnnvl all_gather_into_tensor: output"),
    }  # fmt: skip


def test_bad_input_leaves_the_group_usable(ranks, device):
    ranks(refused_body, 2, device, args=(bad_input,))


def meta_body(rank: Rank) -> None:
    """torch itself answers collectives on meta tensors, with nothing; they must not reach the transport."""
    x = torch.ones(4, device="meta")
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    all_reduce_works(rank)


def test_meta_tensors_do_nothing(ranks, device):
    ranks(meta_body, 2, device)


def mixed_devices(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    n, x, on_cpu = rank.world_size, torch.ones(4, device=rank.device), torch.ones(4)
    cases: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
        "list on the CPU": (lambda: dist.all_gather([torch.empty(4) for _ in range(n)], x), ValueError, "expected a tensor on cuda"),
        "input on the CPU": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n, device=rank.device), on_cpu), ValueError, "expected a tensor on"),
    }  # fmt: skip
    if torch.cuda.device_count() > 1:
        elsewhere = torch.device("cuda", (rank.device.index + 1) % torch.cuda.device_count())
        cases["another GPU"] = (lambda: dist.all_reduce(x.to(elsewhere)), ValueError, "a rank has one GPU")
    return cases


@cuda_only
def test_mixed_devices(ranks):
    ranks(refused_body, 2, "cuda", args=(mixed_devices,))


def both_devices_body(rank: Rank) -> None:
    all_reduce_works(rank)
    on_cpu = [random_input(r, 500, dtype, 1) for r in range(rank.world_size) for dtype in DTYPES]
    for i, dtype in enumerate(DTYPES):
        inputs = on_cpu[i :: len(DTYPES)]
        x, y = inputs[rank.rank].clone(), inputs[rank.rank].to(rank.device)
        works = [dist.all_reduce(x, async_op=True), dist.all_reduce(y, async_op=True)]
        for work in works:
            work.wait()
        assert_bits(x, rank_order_sum(inputs), f"CPU {dtype}")
        assert_bits(y, rank_order_sum(inputs), f"CUDA {dtype}")


@cuda_only
def test_one_group_serves_cpu_and_cuda_tensors(ranks):
    ranks(both_devices_body, 2, "cuda")


def same_gpu_body(rank: Rank) -> str:
    torch.cuda.set_device(0)
    rank.device = torch.device("cuda", 0)
    dist.init_process_group("mnnvl", store=rank.store, rank=rank.rank, world_size=rank.world_size,
                            timeout=rank.group_timeout)  # fmt: skip
    with pytest.raises(RuntimeError, match="share one device.*store") as raised:
        dist.all_reduce(torch.ones(1, device="cuda:0"))
    return str(raised.value)


@cuda_only
def test_two_ranks_on_one_gpu_with_the_nccl_exchange(ranks):
    assert len(set(ranks(same_gpu_body, 2, "cuda", backend=None))) == 1


FOLDS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: torch.add, dist.ReduceOp.AVG: torch.add, dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or, dist.ReduceOp.BXOR: torch.bitwise_xor,
}  # fmt: skip
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [*DTYPES, torch.float64]
LOGICAL = {dist.ReduceOp.SUM: torch.logical_or, dist.ReduceOp.PRODUCT: torch.logical_and}


def other_reductions_body(rank: Rank, numel: int, ops: list[Any]) -> None:
    """What the all-reduce kernels don't do: folded in rank order, 16-bit floats in float32 and rounded once."""
    for op in ops:
        fold = FOLDS[op]
        bitwise = op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)
        integers = [] if op == dist.ReduceOp.AVG else [*INTEGERS, torch.bool]
        for seed, dtype in enumerate(integers + ([] if bitwise else FLOATS)):
            floating = dtype.is_floating_point
            make = random_input if floating else values
            inputs = [make(r, numel, dtype, seed) for r in range(rank.world_size)]
            x = inputs[rank.rank].clone().to(rank.device)
            dist.all_reduce(x, op=op, async_op=True).wait()
            wide = [i.float() if dtype in DTYPES else i for i in inputs]
            expected = wide[0]
            for theirs in wide[1:]:
                expected = (LOGICAL.get(op, fold) if dtype == torch.bool else fold)(expected, theirs)
            if op == dist.ReduceOp.AVG:
                expected = expected / rank.world_size
            assert x.dtype == dtype
            assert torch.equal(x.cpu(), expected.to(dtype)), f"{op} of {numel} x {dtype}"


@pytest.mark.parametrize("numel", [1, 1001])
def test_every_other_reduction(ranks, device, numel):
    ranks(other_reductions_body, 3, device, args=(numel, list(FOLDS)))


def test_other_reductions_of_large_tensors(ranks, device):
    ranks(other_reductions_body, 2, device, args=(1_100_000, [dist.ReduceOp.MAX]))


def complex_body(rank: Rank) -> None:
    for part in (torch.float32, torch.float64):
        parts = [random_input(r, 60, part, 9) for r in range(rank.world_size)]
        x = torch.view_as_complex(parts[rank.rank].view(30, 2).clone()).to(rank.device)
        dist.all_reduce(x)
        expected = sum(parts[1:], parts[0])
        assert torch.equal(torch.view_as_real(x).flatten().cpu(), expected)


def test_complex_sums_are_sums_of_their_parts(ranks, device):
    ranks(complex_body, 3, device)


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
