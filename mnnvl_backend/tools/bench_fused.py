"""`mnnvl bench --fused` under torchrun: the fused all-reduce beside what does its work without it, in one run.

Every column is verified, then timed, as those of `mnnvl bench` are: CUDA in graphs, CPU eagerly, the median over
samples of the slowest rank's microseconds per call. bfloat16 throughout, on the CPU too: NVFP4 wants 16 bits.

    allreduce          trtllm_mnnvl_allreduce alone
    fused              all-reduce + residual + RMS norm in one call
    fused+fp8          and the norm as FP8, by a scale on the device; fused+dynamic fp8: by a scale to each token
    fused+nvfp4        scales in the linear layout
    unfused            torch.distributed's all_reduce of NCCL (CPU: gloo), then residual add and F.rms_norm, eager
    unfused compiled   add and norm by torch.compile instead (CUDA)
    unfused+fp8        as unfused, then scale, clamp and cast, eager

The quantized columns of ours leave out the norm itself.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace, trtllm_mnnvl_allreduce
from mnnvl_backend.flashinfer.fusion import (
    trtllm_mnnvl_fused_allreduce_add_rmsnorm,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
)
from mnnvl_backend.flashinfer.quantization import NVFP4_BLOCK, MNNVLQuantType, QuantizationSFLayout
from mnnvl_backend.options import Options
from mnnvl_backend.tools.bench import NO_MULTICAST, everybody, times_of
from mnnvl_backend.tools.bench_results import describe, report
from mnnvl_backend.tools.launch import Place, start

DTYPE, FP8 = torch.bfloat16, torch.float8_e4m3fn
EPSILON = 1e-6
FP8_SCALE, FP8_MOST = 1 / 32, torch.finfo(FP8).max  # by which a norm is divided; the greatest value
NVFP4_SCALE = 64.0  # by which scales are multiplied
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}  # of the unfused
OURS = ("allreduce", "fused", "fused+fp8", "fused+dynamic fp8", "fused+nvfp4")
NORMS_OF_PEERS = ("unfused", "unfused compiled")  # what "fused" is compared with


class Problem:
    """What one rank puts in, and what every rank must get."""

    def __init__(self, place: Place, hidden: int, tokens: int) -> None:
        self._place, self.hidden, self.tokens = place, hidden, tokens
        self.x = torch.empty(tokens, hidden, dtype=DTYPE, device=place.device)
        self.residual = torch.empty_like(self.x)
        self.gamma = (1 + self._integers(-1)[0] / 8).to(DTYPE)
        self.size = self.x.numel() * DTYPE.itemsize

    def _integers(self, seed: int) -> torch.Tensor:
        """[tokens, hidden], from -3 to 3, float32: bfloat16 holds their sums over up to 80 ranks exactly, in any order.
        Hashes of the index: alike on every rank and device, and rows differ."""
        index = torch.arange(self.tokens * self.hidden, device=self._place.device) + (seed + 2) * 1_000_003
        return ((index * 2_654_435_761 >> 16) % 7 - 3).float().view(self.tokens, self.hidden)

    def fill_to_verify(self) -> None:
        self.x.copy_(self._integers(self._place.rank))
        self.residual.copy_(self._integers(self._place.world_size))

    def fill_to_time(self) -> Callable[[], Any]:
        """Random values. What is called before each sample: `x` is summed in place by peers, hence so small values,
        which stay finite for 80 calls on 8 ranks."""
        values = (torch.randn_like(self.x, dtype=torch.float32) * 2.0**-120).to(DTYPE)
        self.residual.copy_(torch.randn_like(self.residual, dtype=torch.float32))
        return lambda: self.x.copy_(values)

    @cached_property
    def expected(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of fill_to_verify(), by what it is: the values in float32, and how far off each may be."""
        total = sum((self._integers(rank) for rank in range(self._place.world_size)), torch.zeros_like(self.x).float())
        before = total + self._integers(self._place.world_size)
        norm = F.rms_norm(before, (self.hidden,), self.gamma.float(), EPSILON)
        size = norm.abs()
        # A norm that is off by its own rounding, then half a step of FP8; for small values that of its subnormals.
        fp8, subnormal = size * (2.0**-7 + 2.0**-4), 2.0**-9
        expected = {
            "the sum": (total, total.abs() * 2.0**-7),
            "residual_out": (before, before.abs() * 2.0**-7),
            "the norm": (norm, size * 2.0**-7),
            "the norm in FP8": (norm, fp8 + subnormal * FP8_SCALE),
            "the norm in dynamic FP8": (norm, fp8 + subnormal * size.amax(1, keepdim=True) / FP8_MOST),
        }
        if self.hidden % NVFP4_BLOCK == 0:
            # Half a step is at most a fifth of the value, or of the least step a 24th of the block's greatest.
            most = size.view(self.tokens, -1, NVFP4_BLOCK).amax(2).repeat_interleave(NVFP4_BLOCK, 1)
            expected["the norm in NVFP4"] = (norm, size / 4 + most / 20)
        return expected


@dataclass(frozen=True)
class Prepared:
    """A column's call on a problem, ready for graphs and loops, and how to read its results in float32."""

    call: Callable[[], Any]
    results: Callable[[Any], dict[str, torch.Tensor]]  # of what the call returned; keys as of Problem.expected


Column = Callable[[Problem], Prepared]


def verify(place: Place, name: str, problem: Problem, prepared: Prepared) -> None:
    """Collective.

    Raises:
        RuntimeError: on every rank, if a result is wrong on any.
    """
    problem.fill_to_verify()
    wrong = []
    for what, got in prepared.results(prepared.call()).items():
        expected, allowed = problem.expected[what]
        count = int((~((got.float() - expected).abs() <= allowed)).sum())  # a NaN is wrong
        if count:
            wrong.append(f"{what} has {count} of {got.numel()} elements wrong")
    if any(all_wrong := everybody(wrong)):
        ranks = "; ".join(f"rank {rank}: {', '.join(of)}" for rank, of in enumerate(all_wrong) if of)
        raise RuntimeError(f"{name}: {ranks}")


def _blank(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """An output that holds nothing right of an earlier column: NaN, in bytes of ones."""
    blank = torch.empty(shape, dtype=dtype, device=like.device)
    blank.view(torch.uint8).fill_(255)
    return blank


def _nvfp4_values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack([codes & 15, codes >> 4], 2).flatten(1).long()
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)[nibbles]
    return values * scales.float().repeat_interleave(NVFP4_BLOCK, 1) / NVFP4_SCALE


class Ours:
    """On one workspace, large enough for all problems."""

    def __init__(self, place: Place, hidden: int, tokens: int) -> None:
        mapping = Mapping(place.world_size, place.rank, tp_size=place.world_size)
        self._workspace = MNNVLAllReduceFusionWorkspace(
            mapping, tokens, hidden, DTYPE, device=place.device, options=Options()
        )
        self._fp8_scale = torch.tensor([FP8_SCALE], device=place.device)
        self._nvfp4_scale = torch.tensor([NVFP4_SCALE], device=place.device)

    def all_reduce(self, of: Problem) -> Prepared:
        output = _blank(of.x.shape, DTYPE, of.x)
        return Prepared(
            lambda: trtllm_mnnvl_allreduce(of.x, self._workspace, False, output=output), lambda _: {"the sum": output}
        )

    def fused(self, of: Problem) -> Prepared:
        output, residual_out = (_blank(of.x.shape, DTYPE, of.x) for _ in range(2))

        def call() -> Any:
            return trtllm_mnnvl_fused_allreduce_add_rmsnorm(
                of.x, of.residual, of.gamma, self._workspace, EPSILON, output, residual_out
            )

        return Prepared(call, lambda _: {"residual_out": residual_out, "the norm": output})

    def _quantized(self, of: Problem, values: torch.Tensor, scales: torch.Tensor | None, **how: Any) -> Any:
        """The call and residual_out."""
        residual_out = _blank(of.x.shape, DTYPE, of.x)

        def call() -> Any:
            return trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
                of.x, of.residual, of.gamma, self._workspace, EPSILON, None, residual_out, values, scales,
                layout_code=QuantizationSFLayout.LINEAR, **how,
            )  # fmt: skip

        return call, residual_out

    def fused_fp8(self, of: Problem) -> Prepared:
        values = _blank(of.x.shape, FP8, of.x)
        call, residual_out = self._quantized(
            of, values, None, quant_type=MNNVLQuantType.FP8, output_scale=self._fp8_scale
        )
        return Prepared(
            call, lambda _: {"residual_out": residual_out, "the norm in FP8": values.float() * self._fp8_scale}
        )

    def fused_dynamic_fp8(self, of: Problem) -> Prepared:
        values, scales = _blank(of.x.shape, FP8, of.x), _blank((of.tokens, 1), torch.float32, of.x)
        call, residual_out = self._quantized(of, values, scales, quant_type=MNNVLQuantType.DYNAMIC_FP8)
        return Prepared(
            call, lambda _: {"residual_out": residual_out, "the norm in dynamic FP8": values.float() * scales}
        )

    def fused_nvfp4(self, of: Problem) -> Prepared:
        values = _blank((of.tokens, of.hidden // 2), torch.uint8, of.x)
        scales = _blank((of.tokens, of.hidden // NVFP4_BLOCK), FP8, of.x)
        call, residual_out = self._quantized(
            of, values, scales, quant_type=MNNVLQuantType.NVFP4, output_scale=self._nvfp4_scale
        )
        return Prepared(
            call, lambda _: {"residual_out": residual_out, "the norm in NVFP4": _nvfp4_values(values, scales)}
        )

    def columns(self) -> dict[str, Column]:
        makers = (self.all_reduce, self.fused, self.fused_fp8, self.fused_dynamic_fp8, self.fused_nvfp4)
        return dict(zip(OURS, makers, strict=True))

    def close(self) -> None:
        self._workspace.destroy()


def _add_norm(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    residual_out = x + residual
    return residual_out, F.rms_norm(residual_out, gamma.shape, gamma, EPSILON)


class Unfused:
    """all_reduce in place by a group of some backend, then what torch has for the rest."""

    def __init__(self, place: Place, backend: str) -> None:
        self._place = place
        self._group = dist.new_group(backend=backend)
        dist.all_reduce(torch.zeros(1, device=place.device), group=self._group)  # sets it up, on all ranks
        self._inverse = torch.tensor(1 / FP8_SCALE, device=place.device)

    def eager(self, of: Problem) -> Prepared:
        return self._with(of, _add_norm)

    def compiled(self, of: Problem) -> Prepared:
        """Anew for each shape, as past a few torch would go back to eager code.

        Raises:
            RuntimeError: on every rank, if it can't be compiled on one.
        """
        torch._dynamo.reset()
        add_norm: Callable[..., Any] = torch.compile(_add_norm, dynamic=False, fullgraph=True)
        error = None
        try:
            add_norm(of.x, of.residual, of.gamma)
        except Exception as caught:
            error = f"torch.compile: {type(caught).__name__}: {(str(caught).splitlines() or [''])[0]}"
        if errors := [text for text in everybody(error) if text]:
            raise RuntimeError(errors[0])
        return self._with(of, add_norm)

    def _with(self, of: Problem, add_norm: Callable[..., Any]) -> Prepared:
        def call() -> Any:
            dist.all_reduce(of.x, group=self._group)
            return add_norm(of.x, of.residual, of.gamma)

        return Prepared(call, lambda done: {"residual_out": done[0], "the norm": done[1]})

    def fp8(self, of: Problem) -> Prepared:
        def call() -> Any:
            dist.all_reduce(of.x, group=self._group)
            residual_out, norm = _add_norm(of.x, of.residual, of.gamma)
            return residual_out, (norm * self._inverse).clamp(-FP8_MOST, FP8_MOST).to(FP8)

        return Prepared(
            call, lambda done: {"residual_out": done[0], "the norm in FP8": done[1].float() / self._inverse}
        )

    def columns(self) -> dict[str, Column]:
        columns = {"unfused": self.eager, "unfused compiled": self.compiled, "unfused+fp8": self.fp8}
        return {name: columns[name] for name in _names_of_unfused(self._place)}

    def close(self) -> None:
        dist.destroy_process_group(self._group)


def _names_of_unfused(place: Place) -> tuple[str, ...]:
    compiled = ("unfused compiled",) if place.device.type == "cuda" else ()
    return ("unfused", *compiled, "unfused+fp8")


@dataclass
class Point:
    """One column at one shape: microseconds per call, of the slowest rank."""

    column: str
    hidden: int
    tokens: int
    median: float
    least: float
    most: float
    samples: int


@dataclass
class Results:
    machine: dict[str, Any]
    operation: str = "fused"
    points: list[Point] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Markdown: a row per hidden size and number of tokens; each cell is the median."""
        names = list(dict.fromkeys(p.column for p in self.points))
        cells = {(p.hidden, p.tokens, p.column): p.median for p in self.points}
        rows = [["hidden", "tokens", *names, "fused / best unfused"], ["---:"] * (len(names) + 3)]
        for hidden, tokens in dict.fromkeys((p.hidden, p.tokens) for p in self.points):
            medians = {name: cells[hidden, tokens, name] for name in names if (hidden, tokens, name) in cells}
            peers = [medians[name] for name in NORMS_OF_PEERS if name in medians]
            ratio = f"{medians['fused'] / min(peers):.2f}" if peers and "fused" in medians else "-"
            texts = [f"{medians[name]:.1f}" if name in medians else "-" for name in names]
            rows.append([str(hidden), str(tokens), *texts, ratio])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def markdown(self) -> str:
        return report(f"{self.operation}, µs: median, slowest rank", self.machine, self.table(), self.notes)

    def write(self, folder: Path, place: Place) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.machine['date']}-{place.device.type}-{place.world_size}-{self.operation}.json"
        file.write_text(json.dumps(asdict(self), indent=1))
        print(f"written: {file}")


def peers_of(
    place: Place, hidden: list[int], tokens: list[int], only: list[str] | None, notes: dict[str, str]
) -> list[Ours | Unfused]:
    """Those of which a column is wanted and which can be made here; collective. Why one can't goes to `notes`."""
    unfused = _names_of_unfused(place)
    if unknown := set(only or ()) - {*OURS, *unfused}:
        known = ", ".join([*OURS, *unfused])
        raise SystemExit(f"--only: unknown here: {', '.join(sorted(unknown))}; known: {known}")
    peers: list[Ours | Unfused] = []
    if not only or set(only) & set(OURS):
        peers.append(Ours(place, max(hidden), max(tokens)))
    if not only or set(only) & set(unfused):
        try:
            if not place.peer_possible:
                raise RuntimeError("NCCL refuses several ranks on one GPU")
            peers.append(Unfused(place, BACKENDS[place.device.type]))
        except Exception as error:
            notes.update({name: f"not here: {error}" for name in unfused if not only or name in only})
    return peers


def bench_columns(
    place: Place, results: Results, columns: dict[str, Column], hidden: list[int], tokens: list[int], replays: int
) -> None:
    """All columns at all shapes, into `results`; one that fails is left out from there on."""
    remaining = dict(columns)
    for h, t in ((h, t) for h in hidden for t in tokens):
        problem = Problem(place, h, t)
        for name, column in list(remaining.items()):
            try:
                prepared = column(problem)
                verify(place, name, problem, prepared)
                times = times_of(place, prepared.call, problem.fill_to_time(), problem.size, replays)
            except Exception as error:  # noted, and the others go on; who fails alone ends in the timeout
                results.notes[name] = f"stopped at hidden {h}, tokens {t}: {error}"
                del remaining[name]
                continue
            results.points.append(Point(name, h, t, *times))
            if place.rank == 0:
                print(f"hidden {h:>6} tokens {t:>6}  {name:<18} {times[0]:10.1f} µs", flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Of cli.parser(), with --fused."""
    for name in ("operation", "min_bytes", "max_bytes", "compare", "limit", "smoke"):
        if getattr(arguments, name):
            raise SystemExit(f"--{name.replace('_', '-')}: not with --fused")
    if not arguments.multicast:
        os.environ.update(NO_MULTICAST)
    only = arguments.only.split(",") if arguments.only else None
    with start(arguments.device) as place:
        dist.init_process_group("gloo")  # control: timing must not depend on what is timed
        on_gpu = place.device.type == "cuda"
        hidden = arguments.hidden or ([4096, 7168] if on_gpu else [4096])
        tokens = arguments.tokens or [1 << i for i in range(12 if on_gpu else 9)]
        results = Results(describe(place, NO_MULTICAST))
        results.machine["dtype"] = str(DTYPE).removeprefix("torch.")
        results.machine["operation"] = f"SUM + residual + RMS norm; unfused: {BACKENDS[place.device.type]}"
        peers = peers_of(place, hidden, tokens, only, results.notes)
        every = {name: column for peer in peers for name, column in peer.columns().items()}
        columns = {name: column for name, column in every.items() if not only or name in only}
        with torch.inference_mode() if on_gpu else nullcontext():
            bench_columns(place, results, columns, hidden, tokens, arguments.replays)
        if place.rank == 0:
            print("\n" + results.markdown())
            if arguments.output:
                results.write(Path(arguments.output), place)
        for peer in peers:
            peer.close()
    return 0
