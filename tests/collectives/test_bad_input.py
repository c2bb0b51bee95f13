"""What is refused: an error that says what, and a group that still works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from reference import (
    DTYPES,
    all_reduce_works,
    assert_bits,
    random_input,
    rank_order_sum,
)
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllToAllOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
    ScatterOptions,
)


def refused_body(
    rank: Rank, calls: Callable[[Rank], dict[str, tuple[Callable[[], Any], type[Exception], str]]]
) -> None:
    for name, (call, kind, text) in calls(rank).items():
        with pytest.raises(kind, match=text):
            call()
            pytest.fail(f"{name} was accepted")
        all_reduce_works(rank)


def bad_input(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    n, device = rank.world_size, rank.device
    x, grid = torch.ones(4, device=device), torch.ones(4, 6, device=device)
    dense = "expected a dense, non-overlapping tensor.*contiguous"

    def several(*args, **kwargs):
        return [torch.empty(*args, device=kwargs.pop("device", device), **kwargs) for _ in range(n)]

    return {
        "sparse": (lambda: dist.all_reduce(grid.to_sparse()), ValueError, "mnnvl all_reduce.*dense.*Sparse"),
        "fp8": (lambda: dist.all_reduce(x.to(torch.float8_e5m2fnuz)), TypeError, "mnnvl all_reduce.*dtype.*e5m2fnuz"),
        "uint32": (lambda: dist.all_reduce(x.to(torch.uint32)), TypeError, "mnnvl all_reduce.*dtype.*got UInt32"),
        "BAND": (lambda: dist.all_reduce(x, op=dist.ReduceOp.BAND), ValueError, "mnnvl all_reduce.*BAND.*Float"),
        "AVG": (lambda: dist.all_reduce(x.bool(), op=dist.ReduceOp.AVG), ValueError, "mnnvl all_reduce.*AVG.*Bool"),
        "PREMUL_SUM": (lambda: dist.all_reduce(x.int(), op=dist._make_nccl_premul_sum(2.0)), ValueError,
                       "mnnvl all_reduce.*PREMUL_SUM.*Int"),
        "complex factor": (lambda: dist.reduce(x, 0, op=dist._make_nccl_premul_sum(torch.ones(1) * 1j)), TypeError,
                           "mnnvl reduce: op: expected a real PREMUL_SUM factor, got ComplexFloat"),
        "columns": (lambda: dist.all_reduce(grid[:, ::2]), ValueError, f"mnnvl all_reduce.*{dense}"),
        "expanded": (lambda: dist.all_reduce(x[:1].expand(5)), ValueError, f"mnnvl all_reduce.*{dense}"),
        "broadcast of columns": (lambda: dist.broadcast(grid[:, ::2], 0), ValueError, f"mnnvl broadcast.*{dense}"),
        "broadcast root": (lambda: dist.broadcast(x, n), ValueError, f"root: expected 0 to {n - 1}, got {n}"),
        "short list": (lambda: dist.all_gather(several(4)[1:], x), ValueError, f"expected {n} tensors, got {n - 1}"),
        "list's numel": (lambda: dist.all_gather(several(3), x), ValueError, "4 elements.*got 3"),
        "list's dtype": (lambda: dist.all_gather(several(4, dtype=torch.half), x), ValueError, "dtypes"),
        "list on meta": (lambda: dist.all_gather(several(4, device="meta"), x), ValueError, "tensor_list: expected a .*tensor.*meta"),
        "output's numel": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n + 1, device=device), x),
                           ValueError, f"expected {4 * n} elements, got {4 * n + 1}"),
        "output's dtype": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n, dtype=torch.half, device=device), x),
                           TypeError, "output: expected dtype Float, got Half"),
        "output's strides": (lambda: dist.all_gather_into_tensor(torch.empty(4 * n, 2, device=device)[:, 0], x),
                             ValueError, "mnnvl all_gather_into_tensor: output"),
    }  # fmt: skip


def test_bad_input_leaves_the_group_usable(ranks, device):
    ranks(refused_body, 2, device, args=(bad_input,))


def bad_operations(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """Of what this rank itself can see, so that nothing has been sent; on roots and on the others."""
    n, me, device = rank.world_size, rank.rank, rank.device
    x, whole, grid = (torch.ones(shape, device=device) for shape in ((4,), (4 * n,), (4, 6)))
    group, root = dist.group.WORLD, rank.rank == 0
    dense = "expected a dense, non-overlapping tensor.*contiguous"
    expanded = torch.ones(1, device=device).expand(4)
    own = "this rank's own"

    def several(*shape, **kwargs):
        return [torch.ones(*shape, device=device, **kwargs) for _ in range(n)]

    def unlike(count):
        """As many as ranks, of which the own one differs."""
        return [torch.ones(count if r == me else 4, device=device) for r in range(n)]

    def single(out=whole, go=None, come=None, into=None):
        return lambda: dist.all_to_all_single(whole.clone() if into is None else into, out, come, go)

    rs, a2a = "mnnvl reduce_scatter", "mnnvl all_to_all_single"
    return {
        "reduce columns": (lambda: dist.reduce(grid[:, ::2], 0), ValueError, f"mnnvl reduce.*{dense}"),
        "reduce root": (lambda: group.reduce([x], reduce_opts(n)), ValueError, f"mnnvl reduce: root: expected 0 to {n - 1}"),
        "reduce uint32": (lambda: dist.reduce(x.to(torch.uint32), 0), TypeError, "mnnvl reduce: tensor.*got UInt32"),
        "reduce_scatter list": (lambda: dist.reduce_scatter(x, several(4)[1:]), ValueError, f"{rs}: input_list: expected {n}"),
        "reduce_scatter own": (lambda: dist.reduce_scatter(x, unlike(5)), ValueError, f"{rs}: .*{own}.*expected 4 elements, got 5"),
        "reduce_scatter expanded": (lambda: dist.reduce_scatter(expanded, several(4)), ValueError, f"{rs}: output.*expanded"),
        "reduce_scatter BAND": (lambda: dist.reduce_scatter(x, several(4), op=dist.ReduceOp.BAND), ValueError, f"{rs}: op: BAND.*Float"),
        "tensor numel": (lambda: dist.reduce_scatter_tensor(x, whole[1:]), ValueError, f"{rs}_tensor: input: expected {4 * n} elements"),
        "tensor dtype": (lambda: dist.reduce_scatter_tensor(x.half(), whole), TypeError, f"{rs}_tensor: output: expected dtype Float"),
        "scatter root": (lambda: group.scatter([x], [], scatter_opts(-1)), ValueError, "mnnvl scatter: root: expected 0"),
        "scatter list": (lambda: group.scatter([x], [several(4)[1:] if root else several(4)], scatter_opts(0)), ValueError,
                         f"mnnvl scatter: scatter_list: expected {n if root else 0} tensors, got {n - 1 if root else n}"),
        "scatter numel": (lambda: group.scatter([x], [unlike(5)], scatter_opts(me)), ValueError, "scatter_list: expected 4 elements, got 5"),
        "scatter expanded": (lambda: dist.scatter(expanded, several(4) if root else None, 0), ValueError, "mnnvl scatter: tensor.*expanded"),
        "gather root": (lambda: group.gather([], [x], gather_opts(n)), ValueError, "mnnvl gather: root: expected 0"),
        "gather list": (lambda: group.gather([several(4)[1:] if root else several(4)], [x], gather_opts(0)), ValueError,
                        f"mnnvl gather: gather_list: expected {n if root else 0} tensors, got {n - 1 if root else n}"),
        "gather numel": (lambda: group.gather([unlike(5)], [x], gather_opts(me)), ValueError, "gather_list: expected 4 elements, got 5"),
        "gather dtype": (lambda: group.gather([several(4, dtype=torch.half)], [x], gather_opts(me)), TypeError, "gather_list: expected dtype"),
        "all_to_all list": (lambda: dist.all_to_all(several(4), several(4)[1:]), ValueError, f"mnnvl all_to_all: input.*expected {n} tensors"),
        "all_to_all own": (lambda: dist.all_to_all(several(4), unlike(5)), ValueError, f"mnnvl all_to_all: output.*{own}.*20 bytes.*got 16"),
        "rows": (single(whole[1:]), ValueError, f"{a2a}: input: expected dim 0 to be divisible by {n}"),
        "scalar": (single(whole.sum()), ValueError, f"{a2a}: input: expected at least one dimension"),
        "sum of splits": (single(go=[1] * n), ValueError, f"{a2a}: input_split_sizes: expected {n} sizes that add up to.*{4 * n}"),
        "negative split": (single(come=[-1, 4 * n + 1] + [0] * (n - 2)), ValueError, f"{a2a}: output_split_sizes: expected"),
        "own split": (single(go=[4 - (r == me) + (r == (me + 1) % n) for r in range(n)]), ValueError, f"{a2a}: output.*{own}"),
        "expanded": (single(into=expanded[:1].expand(4 * n)), ValueError, f"{a2a}: output.*expanded"),
        "lists of lists": (lambda: dist.all_gather_coalesced([several(4)], [x]), ValueError, "all_gather_coalesced: output_tensor_lists.*lists"),
    }  # fmt: skip


def reduce_opts(root: int) -> ReduceOptions:
    opts = ReduceOptions()
    opts.rootRank = root
    return opts


def scatter_opts(root: int) -> ScatterOptions:
    opts = ScatterOptions()
    opts.rootRank = root
    return opts


def gather_opts(root: int) -> GatherOptions:
    opts = GatherOptions()
    opts.rootRank = root
    return opts


def test_bad_operations_leave_the_group_usable(ranks, device):
    ranks(refused_body, 2, device, args=(bad_operations,), timeout=120)


def bad_messages(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """Each is one end's own mistake: nothing has been sent, and the peer knows nothing of it."""
    n, me, device = rank.world_size, rank.rank, rank.device
    peer = (me + 1) % n
    x, grid = torch.ones(4, device=device), torch.ones(4, 6, device=device)
    backend = dist.group.WORLD._get_backend(device)  # torch's own checks stop sparse tensors before
    dense = "expected a dense, non-overlapping tensor.*contiguous"
    cases: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {}
    for name, call, raw, end in (("send", dist.isend, backend.send, "dst"), ("recv", dist.irecv, backend.recv, "src")):
        text = f"mnnvl {name}"
        cases |= {
            f"{name} itself": (lambda call=call: call(x, me), ValueError, f"{text}: {end}.*expected.*got {me}"),
            f"{name} rank n": (lambda call=call: call(x, n), ValueError, f"{text}: {end}.*expected.*got {n}"),
            f"{name} rank -1": (lambda call=call: call(x, -1), ValueError, f"{text}: {end}.*expected.*got -1"),
            f"{name} negative tag": (
                lambda call=call: call(x, peer, tag=-1),
                ValueError,
                f"{text}: tag.*expected.*got -1",
            ),
            f"{name} columns": (lambda call=call: call(grid[:, ::2], peer), ValueError, f"{text}.*{dense}"),
            f"{name} expanded": (lambda call=call: call(x[:1].expand(5), peer), ValueError, f"{text}.*{dense}"),
            f"{name} sparse": (lambda raw=raw: raw([grid.to_sparse()], peer, 0), ValueError, f"{text}.*dense.*Sparse"),
            f"{name} two": (lambda raw=raw: raw([x, x], peer, 0), ValueError, f"{text}.*expected.*one tensor.*got 2"),
        }
    return cases


def test_bad_messages_leave_the_group_usable(ranks, device):
    ranks(refused_body, 2, device, args=(bad_messages,))


def from_anybody(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x = torch.ones(4, device=rank.device)
    refused = (RuntimeError, "mnnvl recv.*any source.*CPU")
    return {"recv": (lambda: dist.recv(x), *refused), "irecv": (lambda: dist.irecv(x), *refused)}


@cuda_only
def test_cuda_does_not_receive_from_any_source(ranks):
    ranks(refused_body, 2, "cuda", args=(from_anybody,))


def views(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """What the backend object's own methods are given hasn't passed torch's resolution of lazy views."""
    n, device = rank.world_size, rank.device
    backend = dist.group.WORLD._get_backend(device)
    conjugate = torch.ones(4, dtype=torch.complex64, device=device).conj()
    negative = torch._neg_view(torch.ones(4, device=device))
    assert conjugate.is_conj()
    assert negative.is_neg()
    cases: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {}
    for kind, x in (("conj", conjugate), ("neg", negative)):
        dense = x.clone().contiguous() if kind == "neg" else x.resolve_conj()
        parts = [torch.empty_like(dense) for _ in range(n)]
        whole = torch.empty(4 * n, dtype=x.dtype, device=device)
        bad_whole = whole.conj() if kind == "conj" else torch._neg_view(whole)
        calls = {
            "all_reduce": lambda x=x: backend.allreduce([x], dist.AllreduceOptions()),
            "broadcast": lambda x=x: backend.broadcast([x], dist.BroadcastOptions()),
            "all_gather": lambda x=x, parts=parts: backend.allgather([parts], [x], AllgatherOptions()),
            "all_gather: tensor_list": lambda x=x, parts=parts, dense=dense: backend.allgather(
                [[x, *parts[1:]]], [dense], AllgatherOptions()
            ),
            "send": lambda x=x: backend.send([x], (rank.rank + 1) % n, 0),
            "recv": lambda x=x: backend.recv([x], (rank.rank + 1) % n, 0),
            "all_gather_into_tensor: input": lambda x=x, whole=whole: backend._allgather_base(
                whole, x, AllgatherOptions()
            ),
            "reduce": lambda x=x: backend.reduce([x], ReduceOptions()),
            "reduce_scatter: input_list": lambda x=x, parts=parts, dense=dense: backend.reduce_scatter(
                [dense], [[x, *parts[1:]]], ReduceScatterOptions()
            ),
            "reduce_scatter_tensor: input": lambda bad_whole=bad_whole, dense=dense: backend._reduce_scatter_base(
                dense, bad_whole, ReduceScatterOptions()
            ),
            "scatter": lambda x=x: backend.scatter([x], [], ScatterOptions()),
            "gather": lambda x=x: backend.gather([], [x], GatherOptions()),
            "all_to_all": lambda x=x, parts=parts: backend.alltoall(parts, [x, *parts[1:]], AllToAllOptions()),
            "all_to_all_single: output": lambda whole=whole, bad_whole=bad_whole: backend.alltoall_base(
                bad_whole, whole, [], [], AllToAllOptions()
            ),
            "all_gather_into_tensor: output": lambda dense=dense, bad_whole=bad_whole: backend._allgather_base(
                bad_whole, dense, AllgatherOptions()
            ),
        }
        for name, call in calls.items():
            cases[f"{kind} {name}"] = (call, ValueError, f"mnnvl {name}.*{kind}")
    return cases


def quantized(rank: Rank) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x = torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.quint8)
    backend = dist.group.WORLD._get_backend(rank.device)
    text = "mnnvl {}: tensor.*quantized.*int_repr"
    return {
        "all_reduce": (lambda: backend.allreduce([x], dist.AllreduceOptions()), TypeError, text.format("all_reduce")),
        "gather": (lambda: backend.gather([[x] * 2], [x], gather_opts(rank.rank)), TypeError, text.format("gather")),
        "send": (lambda: backend.send([x], 1 - rank.rank, 0), TypeError, text.format("send")),
    }


def test_quantized_tensors(ranks):
    ranks(refused_body, 2, args=(quantized,))


def test_conjugate_and_negative_views(ranks, device):
    ranks(refused_body, 2, device, args=(views,))


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
                            timeout=rank.group_timeout, pg_options=rank.options(bootstrap="nccl"))  # fmt: skip
    with pytest.raises(RuntimeError, match="share one device.*store") as raised:
        dist.all_reduce(torch.ones(1, device="cuda:0"))
    return str(raised.value)


@cuda_only
def test_two_ranks_on_one_gpu_with_the_nccl_exchange(ranks):
    assert len(set(ranks(same_gpu_body, 2, "cuda", backend=None))) == 1
