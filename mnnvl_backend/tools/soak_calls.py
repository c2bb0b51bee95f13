"""A case on one rank: its memory, the call, and the check of every byte: of what came, of what was only read, and of
what lies around."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from mnnvl_backend.tools.soak_operations import MOST_OFFSET, TOGETHER, Case

GUARD = 32  # bytes behind what is read or written

Tensors = list[torch.Tensor]
Works = list[Any]  # None of a call that isn't asynchronous
Group = dist.ProcessGroup | None  # None: the default one
Places = Sequence[AbstractContextManager[Any]]  # streams that calls take turns in, by their seeds
NO_STREAM: Places = (nullcontext(),)


class Seat(Protocol):
    """One rank: a `Place` of the tools, or a test's."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


class Mismatch(AssertionError):
    """Bytes that are not what they must be."""


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


class Memory:
    """Parts on the device, each in a storage of its own or all in one. `wanted`: what must be there in the end."""

    def __init__(self, parts: Tensors, together: bool, dtype: torch.dtype, offset: int, device: torch.device) -> None:
        self.wanted, self._together, self._offset, self._size = list(parts), together, offset, dtype.itemsize
        self._given = list(parts)
        # Made on the CPU: the device only copies, so no kernel of torch is loaded while a call is in flight.
        self._storages = [image.to(device, copy=True) for image in self._images(self.wanted)]
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
        for i, (storage, image) in enumerate(zip(self._storages, self._images(self.wanted), strict=True)):
            found = storage.cpu()
            if torch.equal(found, image):
                continue
            at = int((found != image).nonzero()[0]) // self._size
            got, wanted = (
                x[at * self._size : (at + 1) * self._size].flip(0).numpy().tobytes().hex() for x in (found, image)
            )
            count = int((found != image).view(-1, self._size).any(1).sum())
            raise Mismatch(
                f"{count} elements of tensor {i} differ, first [{at - self._begin(i)}]: {got} is not {wanted}"
            )

    def flip_a_bit(self, chance: random.Random) -> None:
        storage = chance.choice(self._storages)
        spoilt = storage.cpu()
        spoilt[chance.randrange(spoilt.numel())] ^= 1 << chance.randrange(8)
        storage.copy_(spoilt)

    def _begin(self, number: int) -> int:
        return (self._offset + number) % MOST_OFFSET if self._offset else 0

    def reset(self) -> None:
        """As it was made, for a graph's next replay."""
        for storage, image in zip(self._storages, self._images(self._given), strict=True):
            storage.copy_(image)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.wanted)

    def _images(self, parts: Tensors) -> Tensors:
        """The storages' bytes."""

        def guard(size: int) -> torch.Tensor:
            return torch.full((size,), 0xA5, dtype=torch.uint8)

        contents = [_bytes(part) for part in parts]
        groups = [contents] if self._together else [[content] for content in contents]
        return [torch.cat([guard(self._begin(i) * self._size), *group, guard(GUARD)]) for i, group in enumerate(groups)]


class Prepared:
    """A case on one rank: its memory, the call, the check."""

    def __init__(self, seat: Seat, case: Case, group: Group = None) -> None:
        self.case, self.seat, self.group = case, seat, group
        n, me, together = seat.world_size, seat.rank, case.form in TOGETHER
        given, wanted = case.inputs(me, n), case.results(me, n)

        def memory(parts: Tensors, place: int) -> Memory:
            offset = case.offset and (case.offset + place + me) % MOST_OFFSET
            return Memory(parts, together, case.dtype, offset, seat.device)

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
            torch_distributed: Any = dist  # not everything is told to type checkers
            return torch_distributed._make_nccl_premul_sum(self.case.factor(self.seat.rank))
        return getattr(dist.ReduceOp, self.case.op)


class Coalesced:
    """Three calls of one kind as one, of sizes of their own."""

    def __init__(self, seat: Seat, case: Case, group: Group = None) -> None:
        self.case, self.seat, self.group = case, seat, group
        cases = [replace(case, form="tensor", numel=case.numel + more) for more in (0, 3, 1)]
        self._calls = [Prepared(seat, one, group) for one in cases]
        self.memories = [memory for call in self._calls for memory in call.memories]

    def begin(self) -> Works:
        with c10d._coalescing_manager(self.group, async_ops=self.case.asynchronous) as manager:
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
    case, n, me = p.case, p.seat.world_size, p.seat.rank
    if case.form == "tensor":
        return [dist.all_to_all_single(p.outs[0], p.ins[0], group=p.group, async_op=case.asynchronous)]
    if case.form == "splits":
        come, go = [case.numel_of(r, me) for r in range(n)], [case.numel_of(me, r) for r in range(n)]
        return [dist.all_to_all_single(p.outs[0], p.ins[0], come, go, group=p.group, async_op=case.asynchronous)]
    return [dist.all_to_all(p.outs, p.ins, group=p.group, async_op=case.asynchronous)]


def send_recv(p: Prepared) -> Works:
    """In a ring."""
    me, n = p.seat.rank, p.seat.world_size
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
        group: Any = p.group or dist.group.WORLD
        return [group.monitored_barrier()]
    ids = [p.seat.device.index] if p.seat.device.type == "cuda" else None
    return [dist.barrier(p.group, p.case.asynchronous, device_ids=ids)]


CALLS: dict[str, Callable[[Prepared], Works]] = {
    call.__name__: call
    for call in (all_reduce, reduce, reduce_scatter, all_gather, broadcast, scatter, gather, all_to_all, send_recv,
                 barrier)
}  # fmt: skip


def prepared(seat: Seat, case: Case, group: Group = None) -> Prepared | Coalesced:
    return Coalesced(seat, case, group) if case.form == "coalesced" else Prepared(seat, case, group)


class Call(Protocol):
    """What `run` takes: a prepared case, or a call of the function (soak_function.py)."""

    @property
    def case(self) -> Any: ...  # has a seed, an operation and a repr
    @property
    def memories(self) -> list[Memory]: ...
    def begin(self) -> Works: ...
    def check(self) -> None: ...


class CallFailed(Exception):
    """A call raised; says which, and what was in flight with it."""


def run(
    calls: Sequence[Call],
    places: Places = NO_STREAM,
    order: Iterable[int] | None = None,
    pause: Callable[[int], None] | None = None,
) -> list[tuple[Call, Mismatch]]:
    """All in flight before the first wait, as far as they are asynchronous; then waited for and checked.

    Args:
        places: streams; a call takes the one that its seed names.
        order: in which they are waited for; None: as they were begun.
        pause: called with each call's number before it begins.

    Returns:
        What differs, by call.

    Raises:
        CallFailed: a call or a wait raised.
    """
    works: list[Works] = []
    found: list[tuple[Call, Mismatch]] = []
    call: Call | None = None

    def place(call: Call) -> AbstractContextManager[Any]:
        seed: int = call.case.seed
        return places[seed % len(places)]

    try:
        for number, call in enumerate(calls):
            if pause is not None:
                pause(number)
            with place(call):
                works.append(call.begin())
        for number in range(len(calls)) if order is None else order:
            call = calls[number]
            with place(call):
                for work in works[number]:
                    if work is not None:
                        work.wait()
                if torch.cuda.is_initialized():  # a copy to the host may wait with the driver's locks in its hand
                    torch.cuda.current_stream().synchronize()
                try:
                    call.check()
                except Mismatch as mismatch:
                    found.append((call, mismatch))
    except Exception as error:
        together = f"\nin flight with it: {[call.case for call in calls]}" if len(calls) > 1 else ""
        raise CallFailed(f"{call and call.case}: {error}{together}") from error
    return found
