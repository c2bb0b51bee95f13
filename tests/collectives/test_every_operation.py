"""Every operation in every form, of every dtype, by every ReduceOp, as tests/operations.py lists them: random sizes, offsets,
roots and payloads, in place or not, a few calls in flight at once. All bytes are checked on all ranks: what came, what was only
read, and what lies around.

MNNVL_TEST_CASES: how many for each world size (default 600); MNNVL_TEST_SEED: the first one's seed. A failure shows the case, whose
seed runs it again alone: MNNVL_TEST_CASES=1 MNNVL_TEST_SEED=<seed>; to shrink it, change it: MNNVL_TEST_CASE='Case(...)'.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from operations import COMBINATIONS, LEAST_SEEDS, MOST_OFFSET, REDUCTIONS, SUPPORT, TOGETHER, WORLDS, Case
from reference import EVERY_DTYPE, all_reduce_works

CASES = int(os.environ.get("MNNVL_TEST_CASES", "600"))
FIRST_SEED = int(os.environ.get("MNNVL_TEST_SEED", "1"))
ONE_CASE = os.environ.get("MNNVL_TEST_CASE")
SECONDS = 60 + CASES / 5  # more than enough
GUARD = 32  # bytes behind what is read or written

Tensors = list[torch.Tensor]
Works = list[Any]  # None of a call that isn't asynchronous
Group = dist.ProcessGroup | None  # None: the default one
Places = Sequence[AbstractContextManager[Any]]  # streams that calls take turns in, by their seeds
NO_STREAM: Places = (nullcontext(),)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


class Memory:
    """Parts on the device, each in a storage of its own or all in one. `wanted`: what must be there in the end."""

    def __init__(self, parts: Tensors, together: bool, dtype: torch.dtype, offset: int, device: torch.device) -> None:
        self.wanted, self._together, self._offset, self._size = list(parts), together, offset, dtype.itemsize
        # Made on the CPU: the device only copies, so no kernel of torch is loaded while a call is in flight.
        self._storages = [image.to(device, copy=True) for image in self._images()]
        groups = [self.wanted] if together else [[part] for part in self.wanted]
        self.tensors = [
            storage.view(dtype)[self._begin(i) : self._begin(i) + sum(part.numel() for part in group)]
            for i, (storage, group) in enumerate(zip(self._storages, groups, strict=True))
        ]

    def part(self, number: int) -> torch.Tensor:
        if not self._together:
            return self.tensors[number]
        begin = sum(part.numel() for part in self.wanted[:number])
        return self.tensors[0][begin : begin + self.wanted[number].numel()]

    def check(self) -> None:
        for i, (storage, image) in enumerate(zip(self._storages, self._images(), strict=True)):
            found = storage.cpu()
            if torch.equal(found, image):
                continue
            at = int((found != image).nonzero()[0]) // self._size
            got, wanted = (
                x[at * self._size : (at + 1) * self._size].flip(0).numpy().tobytes().hex() for x in (found, image)
            )
            count = int((found != image).view(-1, self._size).any(1).sum())
            raise AssertionError(
                f"{count} elements of tensor {i} differ, first [{at - self._begin(i)}]: {got} is not {wanted}"
            )

    def flip_a_bit(self, chance: random.Random) -> None:
        storage = chance.choice(self._storages)
        spoilt = storage.cpu()
        spoilt[chance.randrange(spoilt.numel())] ^= 1 << chance.randrange(8)
        storage.copy_(spoilt)

    def _begin(self, number: int) -> int:
        return (self._offset + number) % MOST_OFFSET if self._offset else 0

    def _images(self) -> Tensors:
        """The storages' bytes, as they are wanted."""

        def guard(size: int) -> torch.Tensor:
            return torch.full((size,), 0xA5, dtype=torch.uint8)

        contents = [_bytes(part) for part in self.wanted]
        groups = [contents] if self._together else [[content] for content in contents]
        return [torch.cat([guard(self._begin(i) * self._size), *group, guard(GUARD)]) for i, group in enumerate(groups)]


class Prepared:
    """A case on one rank: its memory, the call, the check."""

    def __init__(self, rank: Rank, case: Case, group: Group = None) -> None:
        self.case, self.rank, self.group = case, rank, group
        n, me, together = rank.world_size, rank.rank, case.form in TOGETHER
        given, wanted = case.inputs(me, n), case.results(me, n)

        def memory(parts: Tensors, place: int) -> Memory:
            offset = case.offset and (case.offset + place + me) % MOST_OFFSET
            return Memory(parts, together, case.dtype, offset, rank.device)

        garbage = [(_bytes(part) ^ 0xFF).view(case.dtype) for part in wanted]
        if case.operation in ("all_reduce", "reduce", "broadcast"):
            source = result = memory(given, 0)
            self.ins = self.outs = source.tensors
        elif case.in_place and len(wanted) == n and len(given) == 1:
            source = result = memory([given[0] if r == me else garbage[r] for r in range(n)], 0)
            self.ins, self.outs = [result.part(me)], result.tensors
        elif case.in_place and len(given) == n and len(wanted) == 1:
            source = result = memory(given, 0)
            wanted = [wanted[0] if r == me else given[r] for r in range(n)]
            self.ins, self.outs = source.tensors, [source.part(me)]
        else:
            source, result = memory(given, 0), memory(garbage, n)
            self.ins, self.outs = source.tensors, result.tensors
        result.wanted = list(wanted)
        self.memories = [source] if source is result else [source, result]

    def begin(self) -> Works:
        return CALLS[self.case.operation](self)

    def check(self) -> None:
        for memory in self.memories:
            memory.check()

    @property
    def op(self) -> Any:
        if self.case.op == "PREMUL_SUM":
            return dist._make_nccl_premul_sum(self.case.factor(self.rank.rank))
        return getattr(dist.ReduceOp, self.case.op)


class Coalesced:
    """Three calls of one kind as one, of sizes of their own."""

    def __init__(self, rank: Rank, case: Case, group: Group = None) -> None:
        self.case, self.rank, self.group = case, rank, group
        cases = [replace(case, form="tensor", numel=case.numel + more) for more in (0, 3, 1)]
        self._calls = [Prepared(rank, one, group) for one in cases]
        self.memories = [memory for call in self._calls for memory in call.memories]

    def begin(self) -> Works:
        with dist._coalescing_manager(self.group, async_ops=self.case.asynchronous) as manager:
            for call in self._calls:
                call.begin()
        return [manager] if self.case.asynchronous else []

    def check(self) -> None:
        for call in self._calls:
            call.check()


def all_reduce(p: Prepared) -> Works:
    return [dist.all_reduce(p.outs[0], p.op, group=p.group, async_op=p.case.asynchronous)]


def reduce(p: Prepared) -> Works:
    return [dist.reduce(p.outs[0], p.case.root, p.op, group=p.group, async_op=p.case.asynchronous)]


def reduce_scatter(p: Prepared) -> Works:
    if p.case.form == "tensor":
        return [dist.reduce_scatter_tensor(p.outs[0], p.ins[0], p.op, group=p.group, async_op=p.case.asynchronous)]
    return [dist.reduce_scatter(p.outs[0], p.ins, p.op, group=p.group, async_op=p.case.asynchronous)]


def all_gather(p: Prepared) -> Works:
    if p.case.form == "tensor":
        return [dist.all_gather_into_tensor(p.outs[0], p.ins[0], group=p.group, async_op=p.case.asynchronous)]
    if p.case.form == "lists":
        return [
            dist.all_gather_coalesced([[out] for out in p.outs], p.ins, group=p.group, async_op=p.case.asynchronous)
        ]
    return [dist.all_gather(p.outs, p.ins[0], group=p.group, async_op=p.case.asynchronous)]


def broadcast(p: Prepared) -> Works:
    return [dist.broadcast(p.outs[0], p.case.root, group=p.group, async_op=p.case.asynchronous)]


def scatter(p: Prepared) -> Works:
    return [dist.scatter(p.outs[0], p.ins or None, p.case.root, group=p.group, async_op=p.case.asynchronous)]


def gather(p: Prepared) -> Works:
    return [dist.gather(p.ins[0], p.outs or None, p.case.root, group=p.group, async_op=p.case.asynchronous)]


def all_to_all(p: Prepared) -> Works:
    case, n, me = p.case, p.rank.world_size, p.rank.rank
    if case.form == "tensor":
        return [dist.all_to_all_single(p.outs[0], p.ins[0], group=p.group, async_op=case.asynchronous)]
    if case.form == "splits":
        come, go = [case.numel_of(r, me) for r in range(n)], [case.numel_of(me, r) for r in range(n)]
        return [dist.all_to_all_single(p.outs[0], p.ins[0], come, go, group=p.group, async_op=case.asynchronous)]
    return [dist.all_to_all(p.outs, p.ins, group=p.group, async_op=case.asynchronous)]


def send_recv(p: Prepared) -> Works:
    """In a ring."""
    me, n = p.rank.rank, p.rank.world_size
    following, previous = (me + 1) % n, (me - 1) % n
    if p.case.form == "batch":
        ends = [(dist.isend, p.ins[0], following), (dist.irecv, p.outs[0], previous)]
        return [*dist.batch_isend_irecv([dist.P2POp(*end, p.group) for end in ends])]
    if p.case.asynchronous:
        return [dist.isend(p.ins[0], following, p.group), dist.irecv(p.outs[0], previous, p.group)]
    if me == 0:  # whoever waits for a receiver waits for one that waits for it
        dist.send(p.ins[0], following, p.group)
    dist.recv(p.outs[0], previous, p.group)
    if me != 0:
        dist.send(p.ins[0], following, p.group)
    return []


def barrier(p: Prepared) -> Works:
    if p.case.form == "monitored":
        return [(p.group or dist.group.WORLD).monitored_barrier(p.rank.group_timeout)]
    ids = [p.rank.device.index] if p.rank.device.type == "cuda" else None
    return [dist.barrier(p.group, p.case.asynchronous, device_ids=ids)]


CALLS: dict[str, Callable[[Prepared], Works]] = {
    call.__name__: call for call in (all_reduce, reduce, reduce_scatter, all_gather, broadcast, scatter, gather, all_to_all,
                                     send_recv, barrier)
}  # fmt: skip


def prepared(rank: Rank, case: Case, group: Group = None) -> Prepared | Coalesced:
    return Coalesced(rank, case, group) if case.form == "coalesced" else Prepared(rank, case, group)


def run(rank: Rank, cases: list[Case], group: Group = None, places: Places = NO_STREAM) -> list[Prepared | Coalesced]:
    """All in flight before the first wait, as far as they are asynchronous."""

    def place() -> AbstractContextManager[Any]:
        return places[case.seed % len(places)]

    calls, works = [], []
    try:
        for case in cases:
            with place():
                calls.append(prepared(rank, case, group))
        for call in calls:
            case = call.case
            with place():
                works.append(call.begin())
        for call, its_works in zip(calls, works, strict=True):
            case = call.case
            with place():
                for work in its_works:
                    if work is not None:
                        work.wait()
                if rank.device.type == "cuda":  # a copy to the host may wait with the driver's locks in its hand
                    torch.cuda.current_stream().synchronize()
                call.check()
    except Exception as error:
        together = f"\nin flight with it: {cases}" if len(cases) > 1 else ""
        raise AssertionError(f"rank {rank.rank} of {rank.world_size}, {case}: {error}{together}") from error
    return calls


def cases_body(rank: Rank, cases: list[Case], group: Group = None, places: Places = NO_STREAM) -> None:
    while cases:
        count = random.Random(cases[0].seed).randint(1, 4)
        run(rank, cases[:count], group, places)
        cases = cases[count:]


def random_cases(world_size: int) -> list[Case]:
    return [Case.random(seed, world_size) for seed in range(FIRST_SEED, FIRST_SEED + CASES)]


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_operation(ranks, device, world_size):
    cases = [eval(ONE_CASE, {"Case": Case, "torch": torch})] if ONE_CASE else random_cases(world_size)
    ranks(cases_body, world_size, device, args=(cases,), timeout=SECONDS)


def test_every_combination_is_tried():
    """Of operation, form, dtype and ReduceOp, so that what the README promises has been run."""
    assert set(CALLS) == set(SUPPORT)
    cases = [
        Case.random(seed, world_size) for world_size in WORLDS for seed in range(FIRST_SEED, FIRST_SEED + LEAST_SEEDS)
    ]
    assert {(case.operation, case.form, case.dtype, case.op) for case in cases} == set(COMBINATIONS)


def refused_body(rank: Rank) -> None:
    for dtype, op in itertools.product(EVERY_DTYPE, REDUCTIONS):
        if dtype in REDUCTIONS[op]:
            continue
        x = torch.zeros(4 * dtype.itemsize, dtype=torch.uint8).to(rank.device).view(dtype)
        reduce_op = dist._make_nccl_premul_sum(2.0) if op == "PREMUL_SUM" else getattr(dist.ReduceOp, op)
        calls = {
            "all_reduce": partial(dist.all_reduce, x, reduce_op),
            "reduce": partial(dist.reduce, x, 0, reduce_op),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, x[:2], x, reduce_op),
        }
        assert set(calls) == {name for name, operation in SUPPORT.items() if operation.reduces}
        for name, call in calls.items():
            try:
                call()
            except (TypeError, ValueError):
                continue
            raise AssertionError(f"{name} of {dtype} by {op} is not refused")
    all_reduce_works(rank)


def test_what_is_not_listed_is_refused(ranks, device):
    ranks(refused_body, 2, device)


def flipped_bit_body(rank: Rank, cases: list[Case]) -> int:
    """Anywhere: in a result, in what was only read, beside them."""
    chance, tried = random.Random(rank.rank), 0
    for case in cases:
        (call,) = run(rank, [case])
        if memories := [memory for memory in call.memories if memory.tensors]:
            chance.choice(memories).flip_a_bit(chance)
            tried += 1
            with pytest.raises(AssertionError, match="elements of tensor .* differ"):
                call.check()
    return tried


def test_a_flipped_bit_is_found(ranks, device):
    cases = [Case.random(seed, 2) for seed in range(100)]
    assert min(ranks(flipped_bit_body, 2, device, args=(cases,))) == len(cases) - sum(
        case.operation == "barrier" for case in cases
    )


def serves(case: Case) -> bool:
    """Gloo, in the same bits: where the order of a reduction doesn't matter."""
    if case.form in ("coalesced", "uneven", "lists") or case.operation == "reduce":
        return False
    if case.op:
        exact = case.payload == "integers" or not case.dtype.is_floating_point
        return exact and case.op in ("SUM", "MIN", "MAX") and case.dtype in GLOO_DTYPES
    return case.dtype in GLOO_DTYPES


GLOO_DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gloo_agrees_with_the_reference(ranks, world_size):
    """So that reference and test are not only right by what they test."""
    cases = [case for seed in range(1500) if serves(case := Case.random(seed, world_size))]
    assert {case.operation for case in cases} == set(SUPPORT) - {"reduce"}
    ranks(cases_body, world_size, args=(cases,), backend="gloo")
