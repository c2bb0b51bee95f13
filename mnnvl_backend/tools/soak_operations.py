"""The operations that are served, as data: what the README's tables show, what `mnnvl soak` draws from, and what
tests/collectives/test_every_operation.py goes through. All from here, so that none can claim more than another.

A case is one call on every rank. What a rank puts in and what it gets are lists of parts: part (s, d) is what rank s
has for rank d. Every rank can make every part, so each knows alone what must come out.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache

import torch

from mnnvl_backend.tools.soak_reference import EVERY_DTYPE, reduced

WORLDS = [2, 3, 4, 5, 8]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
NUMBERS = [*FLOATS, *INTEGERS]
BITS = [*INTEGERS, torch.bool]
REDUCTIONS = {
    "SUM": [*NUMBERS, torch.bool, *COMPLEX],
    "AVG": [*NUMBERS, *COMPLEX],
    "PRODUCT": [*NUMBERS, torch.bool],
    "MIN": [*NUMBERS, torch.bool],
    "MAX": [*NUMBERS, torch.bool],
    "PREMUL_SUM": [*FLOATS, *COMPLEX],
    "BAND": BITS,
    "BOR": BITS,
    "BXOR": BITS,
}


@dataclass(frozen=True)
class Operation:
    """`forms`: how it can be called, by a short name, and what the README calls that."""

    forms: dict[str, str]
    reduces: bool = False
    rooted: bool = False
    every_dtype: bool = True


SUPPORT = {
    "all_reduce": Operation({"tensor": "`all_reduce`", "coalesced": "coalesced"}, reduces=True),
    "reduce": Operation({"tensor": "`reduce`"}, reduces=True, rooted=True),
    "reduce_scatter": Operation(
        {"list": "`reduce_scatter`", "uneven": "of uneven sizes", "tensor": "`reduce_scatter_tensor`",
         "coalesced": "coalesced"}, reduces=True,
    ),
    "all_gather": Operation(
        {"list": "`all_gather`", "uneven": "of uneven sizes", "tensor": "`all_gather_into_tensor`",
         "coalesced": "coalesced", "lists": "`all_gather_coalesced`"},
    ),
    "broadcast": Operation({"tensor": "`broadcast`"}, rooted=True),
    "scatter": Operation({"list": "`scatter`"}, rooted=True),
    "gather": Operation({"list": "`gather`"}, rooted=True),
    "all_to_all": Operation(
        {"list": "`all_to_all`", "uneven": "of uneven sizes", "tensor": "`all_to_all_single`",
         "splits": "with split sizes"},
    ),
    "send_recv": Operation({"tensor": "`send`, `recv`, `isend`, `irecv`", "batch": "`batch_isend_irecv`"}),
    "barrier": Operation({"nothing": "`barrier`", "monitored": "`monitored_barrier` of the group"}, every_dtype=False),
}  # fmt: skip
TOGETHER = ("tensor", "splits", "coalesced")  # forms whose parts lie one after another in one tensor

Combination = tuple[str, str, torch.dtype, str]  # operation, form, dtype, ReduceOp or ""


def every_combination() -> list[Combination]:
    """All that SUPPORT promises, in an order that mixes it."""
    combinations: list[Combination] = []
    for name, operation in SUPPORT.items():
        if operation.reduces:
            kinds = [(dtype, op) for op, dtypes in REDUCTIONS.items() for dtype in dtypes]
        else:
            kinds = [(dtype, "") for dtype in (EVERY_DTYPE if operation.every_dtype else [torch.uint8])]
        combinations += [(name, form, *kind) for form, kind in itertools.product(operation.forms, kinds)]
    random.Random(0).shuffle(combinations)
    return combinations


COMBINATIONS = every_combination()
LEAST_SEEDS = -(-len(COMBINATIONS) // len(WORLDS))  # with which the worlds together go through all of them
MOST_BYTES = 5 << 20
# Bytes, and how often.
BOUNDARIES = {16: 4, 64: 4, 128: 4, 512: 3, 4096: 3, 16 << 10: 2, 64 << 10: 1, 256 << 10: 1}
MOST_OFFSET = 16  # elements


@dataclass(frozen=True)
class Case:
    """Its repr is Python: to shrink a failure, change it and give it to MNNVL_TEST_CASE."""

    seed: int
    operation: str
    form: str
    dtype: torch.dtype
    op: str = ""
    payload: str = "bits"
    numel: int = 1  # of a part
    offset: int = 0  # of tensors in their storages, but for 0 another one for each tensor and rank
    root: int = 0
    in_place: bool = False
    asynchronous: bool = False

    @staticmethod
    def random(seed: int, world_size: int) -> Case:
        chance = random.Random(f"{seed} {world_size}")
        world = WORLDS.index(world_size) if world_size in WORLDS else world_size
        name, form, dtype, op = COMBINATIONS[(seed + world * LEAST_SEEDS) % len(COMBINATIONS)]
        floating = op and (dtype in FLOATS or dtype in COMPLEX)
        return Case(
            seed, name, form, dtype, op,
            payload=chance.choice(["bits", "numbers", "numbers", "integers"]) if floating else "bits",
            numel=_random_numel(chance, dtype, world_size),
            offset=chance.choice([0, 0, 1, 2, 3, 4, 7, 8]),
            root=chance.randrange(world_size) if SUPPORT[name].rooted else 0,
            in_place=chance.random() < 0.3,
            asynchronous=chance.random() < 0.5,
        )  # fmt: skip

    def numel_of(self, source: int, destination: int) -> int:
        if self.form not in ("uneven", "splits"):
            return self.numel
        one = {"all_gather": source, "reduce_scatter": destination}.get(self.operation, (source, destination))
        chance = random.Random(f"{self.seed} {one}")
        return chance.choice([0, 1, self.numel // 2, self.numel, self.numel + 1, self.numel + 7])

    def part(self, source: int, destination: int = 0) -> torch.Tensor:
        numel = self.numel_of(source, destination)
        return piece(self.dtype, self.payload, numel, f"{self.seed} {source} {destination}")

    def factor(self, rank: int) -> float:
        """Of PREMUL_SUM."""
        return random.Random(f"{self.seed} {rank}").choice([0.5, 3.0, -1.25, 0.1, 1.0])

    def inputs(self, rank: int, world_size: int) -> list[torch.Tensor]:
        """The parts that `rank` puts in."""
        if self.operation == "barrier" or (self.operation == "scatter" and rank != self.root):
            return []
        if self.operation in ("reduce_scatter", "scatter", "all_to_all"):
            return [self.part(rank, d) for d in range(world_size)]
        return [self.part(rank)]

    def results(self, rank: int, world_size: int) -> list[torch.Tensor]:
        """The parts that `rank` gets. All of a reduce but its root get nothing: their tensor is as it was."""
        everyone = range(world_size)
        at_root = rank == self.root
        if self.operation == "all_reduce" or (self.operation == "reduce" and at_root):
            return [self._reduced(0, world_size)]
        if self.operation == "reduce":
            return [self.part(rank)]
        if self.operation == "reduce_scatter":
            return [self._reduced(rank, world_size)]
        if self.operation == "all_gather" or (self.operation == "gather" and at_root):
            return [self.part(r) for r in everyone]
        if self.operation == "broadcast":
            return [self.part(self.root)]
        if self.operation == "scatter":
            return [self.part(self.root, rank)]
        if self.operation == "all_to_all":
            return [self.part(r, rank) for r in everyone]
        return [self.part((rank - 1) % world_size)] if self.operation == "send_recv" else []

    def _reduced(self, destination: int, world_size: int) -> torch.Tensor:
        parts = [self.part(r, destination) for r in range(world_size)]
        return reduced(self.op, parts, [self.factor(r) for r in range(world_size)])


def _random_numel(chance: random.Random, dtype: torch.dtype, world_size: int) -> int:
    """Few elements, or about a boundary of bytes, of a part or of all parts; now and then more than a CPU segment
    holds."""
    kind = chance.random()
    if kind < 0.05:
        return 0
    if kind < 0.3:
        return chance.choice([1, 2, 3, 5, 7, 13, 31, 97, 1001])
    if kind < 0.985:
        size = chance.choices(list(BOUNDARIES), list(BOUNDARIES.values()))[0] // chance.choice([1, world_size])
    else:
        size = chance.randrange(1 << 20, 4 << 20) // chance.choice([1, world_size, world_size])
    return max(0, size // dtype.itemsize + chance.choice([-1, 0, 0, 1]))


@cache
def _bits() -> torch.Tensor:
    """Bytes, for every dtype the same."""
    generator = torch.Generator().manual_seed(4)
    raw = torch.randint(-(1 << 63), (1 << 63) - 1, (MOST_BYTES // 8,), generator=generator)
    raw[torch.rand(raw.shape, generator=generator) < 0.05] = -0x7FFFFFFF_80000000  # the sentinel, twice
    return raw.view(torch.uint8)


@cache
def _pool(dtype: torch.dtype, payload: str) -> torch.Tensor:
    """What all parts are cut from. bits: any at all, so NaNs, what protocols mark things with, bools of 2 and 3.
    numbers: over several binades, so that another order of additions shows. integers: small, so that every order gives
    the same sum."""
    if payload == "bits":
        return (_bits() & 3 if dtype == torch.bool else _bits()).view(dtype)
    generator = torch.Generator().manual_seed(len(payload))
    if dtype in COMPLEX:
        return _pool(dtype.to_real(), payload).view(dtype)
    if payload == "integers":
        x = torch.randint(-3, 4, (200_003,), generator=generator)
    else:
        x = torch.randn(200_003, generator=generator, dtype=torch.float64)
        x *= torch.exp2(torch.randint(-5, 5, x.shape, generator=generator))
    raw = x.to(dtype).view(torch.uint8)
    return raw.repeat(MOST_BYTES // raw.numel() + 1)[:MOST_BYTES].view(dtype)


def piece(dtype: torch.dtype, payload: str, numel: int, seed: str) -> torch.Tensor:
    """Of the pool, where the seed says; not to be written to."""
    pool = _pool(dtype, payload)
    begin = random.Random(seed).randrange(pool.numel() - numel + 1)
    return pool[begin : begin + numel]


def fill_pools() -> None:
    """For who measures memory, or asks from several threads."""
    for dtype in EVERY_DTYPE:
        _pool(dtype, "bits")
    for dtype, payload in itertools.product([*FLOATS, *COMPLEX], ["numbers", "integers"]):
        _pool(dtype, payload)
