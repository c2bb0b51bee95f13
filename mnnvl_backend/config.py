"""The one reader of the environment, and the merge of environment and Options into what the compiled module takes."""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from mnnvl_backend import tuning as tuning_files
from mnnvl_backend.compiled import nccl_path
from mnnvl_backend.flashinfer.strategy import STRATEGY_NAMES, MNNVLAllreduceFusionStrategy
from mnnvl_backend.options import ASYNC_MAX_CTAS, MAX_CTAS, MAX_WORKSPACE_BYTES, MIN_WORKSPACE_BYTES, Options

BOOTSTRAP_CODES = {"nccl": 0, "store": 1, "auto": 2}  # mnnvl::Bootstrap
DEFAULT_TIMEOUT_MS = 30 * 60 * 1000  # c10d's default, for workspaces, which have no group to take one from
NO_TUNING = tuning_files.Tuning()
# A hundred years, for whoever means "for ever": as nanoseconds still an int64, also when added to a clock.
MAX_TIMEOUT_MS = 100 * 365 * 24 * 60 * 60 * 1000


def milliseconds(duration: timedelta) -> int:
    """Whole milliseconds from 1 to MAX_TIMEOUT_MS; what lies beyond saturates."""
    return max(1, min(duration // timedelta(milliseconds=1), MAX_TIMEOUT_MS))


def parse_size(text: str) -> int:
    """Bytes, with an optional suffix K, M or G (also KB, KiB).

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"([0-9]+)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ValueError(text)
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]]


def _choice(**values: Any) -> Callable[[str], Any]:
    return lambda text: values[text.lower()]


def _workspace_size(text: str) -> int:
    size = parse_size(text)
    if not MIN_WORKSPACE_BYTES <= size <= MAX_WORKSPACE_BYTES:
        raise ValueError(text)
    return size


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= MAX_CTAS:
        raise ValueError(text)
    return count


@dataclass(frozen=True)
class Variable:
    """One variable of the environment; `parse` raises KeyError or ValueError on a malformed value."""

    name: str
    expected: str
    default: str
    meaning: str
    parse: Callable[[str], Any] | None = None  # None: read by setup.py only


# README and doctor print this list; nothing else of this package reads the environment at run time.
VARIABLES = [
    Variable("MNNVL_STRATEGY", "oneshot, twoshot or auto", "auto",
             "forces the all-reduce algorithm of process groups", _choice(**STRATEGY_NAMES)),
    Variable("MNNVL_TUNING", "a file that `mnnvl tune` wrote", "shipped tables",
             "up to which sizes process groups choose one shot", tuning_files.read),
    Variable("MNNVL_PDL", "0 or 1", "1",
             "0: process groups don't launch kernels as programmatic dependents of those before",
             _choice(**{"0": False, "1": True})),
    Variable("MNNVL_MAX_CTAS", f"1 to {MAX_CTAS}", "as many as are useful",
             "most thread blocks of a launch, the same on every rank", _count),
    Variable("MNNVL_ASYNC_MAX_CTAS", f"1 to {MAX_CTAS}", str(ASYNC_MAX_CTAS),
             "most thread blocks of an asynchronous all_reduce or reduce_scatter of floats", _count),
    Variable("MNNVL_MULTICAST", "0, 1 or auto", "auto",
             "0 forbids multicast objects; otherwise used where supported and no other switch forbids them",
             _choice(**{"0": False, "1": True, "auto": "auto"})),
    Variable("MNNVL_BOOTSTRAP", "nccl, store or auto", "auto",
             "how memory handles are exchanged: NCCL, or the c10d store; auto: NCCL for fabric handles",
             _choice(nccl="nccl", store="store", auto="auto")),
    Variable("MNNVL_WORKSPACE_BYTES", "bytes from 1M to 1024G, with an optional suffix K, M or G", "64M, CPU 1M",
             "peer-mapped memory per rank and device type", _workspace_size),
    Variable("MNNVL_HOST_ID", "any text", "found out", "what this rank says its host is (for tests)", str),
    Variable("MNNVL_BLOCKING_WAIT", "0 or 1", "0",
             "1: wait() on CUDA work blocks the host until the work has ended", _choice(**{"0": False, "1": True})),
    Variable("MNNVL_DUMP_SIGNAL", "USR1 or USR2", "none",
             "this signal writes the last operations of all groups to standard error",
             _choice(usr1=signal.SIGUSR1, usr2=signal.SIGUSR2)),
    Variable("MNNVL_CUDA_ARCHS", "architectures like 90;100", "the GPUs present, else 90;100",
             "build: what kernels are compiled for"),
    Variable("MNNVL_WITH_CUDA", "0 or 1", "1 if nvcc is found", "build: 0 skips the kernels, 1 fails without nvcc"),
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The environment's say; None: it has none."""

    strategy: MNNVLAllreduceFusionStrategy | None = None
    multicast: bool | str | None = None
    bootstrap: str | None = None
    workspace_bytes: int | None = None
    host_id: str | None = None
    blocking_wait: bool | None = None
    dump_signal: signal.Signals | None = None
    pdl: bool | None = None
    max_ctas: int | None = None
    async_max_ctas: int | None = None
    multicast_forbidden_by: tuple[str, ...] = ()
    tuning: tuning_files.Tuning = NO_TUNING


def multicast_switches(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Settings in force that forbid creating multicast objects, as NAME=value. Foreign variables are never an error:
    any value of torch's switch that isn't a plain no counts, since a wrong guess could take a host's GPUs out of
    service. The only place that knows this rule: the compiled module is told the outcome."""

    def says_no(name: str, unset: bool) -> bool:
        text = environ.get(name, "").strip().lower()
        return text in ("0", "off", "false", "no", "n") if text else unset

    forbidding = [name for name in ("MNNVL_MULTICAST", "NCCL_NVLS_ENABLE") if says_no(name, unset=False)]
    if not says_no("TORCH_SYMM_MEM_DISABLE_MULTICAST", unset=True):
        forbidding.append("TORCH_SYMM_MEM_DISABLE_MULTICAST")
    return tuple(f"{name}={environ[name]}" for name in forbidding)


def read_environment(environ: Mapping[str, str] | None = None) -> Config:
    """Reads every variable; empty counts as unset.

    Raises:
        ValueError: a malformed value, naming variable, what was expected and what was found.
    """
    environ = os.environ if environ is None else environ
    known = {v.name: v for v in VARIABLES}
    # Those of the tests steer which cases they try, and reach the groups that these make.
    for name in sorted(n for n in environ if re.match("MNNVL_(?!TEST_)", n) and n not in known):
        warnings.warn(f"{name} is not a variable of mnnvl_backend and has no effect; known: {', '.join(known)}",
                      stacklevel=2)  # fmt: skip
    values = {}
    for variable in VARIABLES:
        text = environ.get(variable.name, "")
        if not text or variable.parse is None:
            continue
        try:
            values[variable.name.removeprefix("MNNVL_").lower()] = variable.parse(text)
        except tuning_files.BadFile as error:
            raise ValueError(f"{variable.name}: expected {variable.expected}, got {text!r}: {error}") from None
        except (KeyError, ValueError):
            raise ValueError(f"{variable.name}: expected {variable.expected}, got {text!r}") from None
    return Config(**values, multicast_forbidden_by=multicast_switches(environ))


@dataclass(frozen=True)
class Settings:
    """Environment and Options merged: the environment, where it speaks, wins; for multicast every "no" counts."""

    workspace_bytes: int  # 0: the compiled module's default
    strategy: MNNVLAllreduceFusionStrategy
    multicast: bool  # allowed, not required
    bootstrap: str
    host_id: str  # empty: found out
    blocking_wait: bool
    timeout_ms: int
    multicast_forbidden: str = ""  # the variables that forbid it, as "NCCL_NVLS_ENABLE=0"; empty: none does
    tuning: tuning_files.Tuning = NO_TUNING
    pdl: bool = True
    max_ctas: int = 0  # 0: as many as are useful
    async_max_ctas: int = ASYNC_MAX_CTAS

    def fields(self) -> dict[str, Any]:
        """The keyword arguments that every group of the compiled module takes."""
        return {
            "timeout_ms": self.timeout_ms,
            "workspace_bytes": self.workspace_bytes,
            "strategy": self.strategy.value,
            "cpu_oneshot_bytes": self.tuning.oneshot_bytes.get("cpu", {}),
            "cuda_oneshot_bytes": self.tuning.oneshot_bytes.get("cuda", {}),
            "pdl": self.pdl,
            "max_ctas": self.max_ctas,
            "async_max_ctas": self.async_max_ctas,
            "multicast": self.multicast,
            "multicast_forbidden": self.multicast_forbidden,
            "bootstrap": BOOTSTRAP_CODES[self.bootstrap],
            "host_id": self.host_id,
            "nccl_path": nccl_path(),
            "blocking_wait": self.blocking_wait,
        }


def merge(options: Options, config: Config, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> Settings:
    """`timeout_ms` is the group's; Options.timeout goes before it."""
    options.validate()
    strategy = options.strategy
    if not isinstance(strategy, MNNVLAllreduceFusionStrategy):
        strategy = STRATEGY_NAMES[strategy]
    return Settings(
        workspace_bytes=config.workspace_bytes or options.workspace_bytes or 0,
        strategy=strategy if config.strategy is None else config.strategy,
        pdl=options.pdl if config.pdl is None else config.pdl,
        max_ctas=config.max_ctas or options.max_ctas or 0,
        async_max_ctas=config.async_max_ctas or options.async_max_ctas,
        multicast=options.multicast is not False and not config.multicast_forbidden_by,
        bootstrap=config.bootstrap or options.bootstrap,
        host_id=config.host_id or "",
        blocking_wait=bool(config.blocking_wait),
        timeout_ms=timeout_ms if options.timeout is None else milliseconds(options.timeout),
        multicast_forbidden=", ".join(config.multicast_forbidden_by),
        tuning=config.tuning,
    )
