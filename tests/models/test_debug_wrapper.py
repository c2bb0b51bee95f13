"""TORCH_DISTRIBUTED_DEBUG=DETAIL: torch wraps the backend, and reports ranks that call different things before they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import all_reduce_works, broadcast_body, gather_body, uneven_objects_body

DETAIL = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def calls(rank: Rank, numel: int) -> dict[str, tuple[Callable[[], object], Callable[[], list[float]]]]:
    """What to call with `numel` elements a rank, and what it leaves: rank r's elements are r + 1."""
    n, me, device = rank.world_size, rank.rank, rank.device
    x, whole = torch.full((numel,), me + 1.0, device=device), torch.full((n * numel,), me + 1.0, device=device)
    parts, outs = list(whole.chunk(n)), [torch.zeros(numel, device=device) for _ in range(n)]
    out, out_whole = torch.zeros(numel, device=device), torch.zeros(n * numel, device=device)
    root = 1

    def first_of(*tensors: torch.Tensor) -> Callable[[], list[float]]:
        return lambda: [t[0].item() for t in tensors]

    return {
        "all_gather": (lambda: dist.all_gather(outs, x), first_of(*outs)),
        "all_gather_into_tensor": (
            lambda: dist.all_gather_into_tensor(out_whole, x), lambda: out_whole.view(n, numel)[:, 0].tolist(),
        ),
        "reduce_scatter": (lambda: dist.reduce_scatter(out, parts), first_of(out)),
        "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(out, whole), first_of(out)),
        "all_to_all": (lambda: dist.all_to_all(outs, parts), first_of(*outs)),
        "all_to_all_single": (
            lambda: dist.all_to_all_single(out_whole, whole), lambda: out_whole.view(n, numel)[:, 0].tolist(),
        ),
        "gather": (lambda: dist.gather(x, outs if me == root else None, root), first_of(*outs)),
        "scatter": (lambda: dist.scatter(out, parts if me == root else None, root), first_of(out)),
        "reduce": (lambda: dist.reduce(x, root), first_of(x)),
        "all_reduce": (lambda: dist.all_reduce(x), first_of(x)),
        "broadcast": (lambda: dist.broadcast(x, root), first_of(x)),
    }  # fmt: skip


def expected(name: str, n: int, me: int) -> list[float] | None:
    everybodys, total, root = [r + 1.0 for r in range(n)], n * (n + 1) / 2, 1
    if name.startswith(("all_gather", "all_to_all")):
        return everybodys
    if name == "gather":
        return everybodys if me == root else [0.0] * n
    if name == "reduce":
        return [total] if me == root else None  # of the others nothing is said
    return [{"scatter": root + 1.0, "broadcast": root + 1.0}.get(name, total)]


def wrapped_body(rank: Rank, name: str) -> None:
    """It works; with another size on one rank, and with another operation, all ranks are told; it works again."""
    n, me = rank.world_size, rank.rank
    other = "all_reduce" if name == "broadcast" else "broadcast"

    def works() -> None:
        call, result = calls(rank, 3)[name]
        call()
        wanted = expected(name, n, me)
        assert wanted is None or result() == wanted

    works()
    if not name.startswith("all_to_all"):  # of these the wrapper compares no sizes, which may differ
        with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
            calls(rank, 4 if me == 0 else 3)[name][0]()
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        calls(rank, 3)[other if me == 0 else name][0]()
    works()


NAMES = ["all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all",
         "all_to_all_single", "gather", "scatter", "reduce", "all_reduce", "broadcast"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_mismatches_are_told(ranks, device, name):
    ranks(wrapped_body, 2, device, env=DETAIL, args=(name,))


def detail_body(rank: Rank) -> None:
    all_reduce_works(rank)
    broadcast_body(rank, [torch.int64, torch.bfloat16], [0, 5])
    gather_body(rank, [torch.uint8, torch.float32], [3])
    dist.barrier()
    dist.group.WORLD.monitored_barrier(rank.group_timeout, True)  # torch's function of that name takes gloo only
    uneven_objects_body(rank)
    group = dist.new_group([0, 2], backend="mnnvl", pg_options=rank.options())
    if rank.rank != 1:
        all_reduce_works(rank, group)
    dtype = torch.float16 if rank.rank == 1 else torch.float32
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.all_reduce(torch.ones(4, dtype=dtype, device=rank.device))
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.barrier() if rank.rank == 1 else dist.broadcast(torch.ones(4, device=rank.device), 0)
    all_reduce_works(rank)


def test_debug_detail(ranks, device):
    """Everything works under torch's debug wrapper, which reports ranks that call different things."""
    ranks(detail_body, 3, device, env=DETAIL)
