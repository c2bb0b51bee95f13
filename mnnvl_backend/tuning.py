"""Up to which size AUTO takes one shot, as measured on some machine: the file that `mnnvl tune` writes and MNNVL_TUNING
names. It goes before the tables of the compiled module, for the device types and world sizes that it has."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnnvl_backend.options import MAX_WORLD_SIZE

FORMAT = "mnnvl tuning 1"
DEVICE_TYPES = ("cpu", "cuda")


class BadFile(ValueError):
    """What is wrong with a file."""


@dataclass(frozen=True)
class Tuning:
    """
    Attributes:
        oneshot_bytes: by device type and world size: the largest tensor, in bytes, that AUTO sums by one shot.
        measured: by the same two: the machine, and microseconds by size. For people.
    """

    oneshot_bytes: dict[str, dict[int, int]] = field(default_factory=dict)
    measured: dict[str, dict[int, Any]] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Tuning:
    """
    Raises:
        BadFile: it can't be read, or isn't one that `mnnvl tune` wrote.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise BadFile(f"of the format {content['format']!r}, not {FORMAT!r}")
        return Tuning(
            {device: {_world_size(n): _bytes(b) for n, b in rows.items()}
             for device, rows in content["oneshot_bytes"].items() if _is_device(device)},
            {device: {_world_size(n): rest for n, rest in rows.items()}
             for device, rows in content["measured"].items() if _is_device(device)},
        )  # fmt: skip
    except BadFile:
        raise
    except OSError as error:
        raise BadFile(str(error.strerror)) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadFile(f"{type(error).__name__}: {error}") from None


def add(path: str | os.PathLike[str], device: str, world_size: int, oneshot_bytes: int, measured: Any) -> None:
    """A row beside those that stand there by now, also of runs at the same time.

    Raises:
        BadFile: what stands there isn't one. OSError: as open() and replace() do.
    """
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        tuning = read(path) if Path(path).exists() else Tuning()
        tuning.oneshot_bytes.setdefault(device, {})[world_size] = oneshot_bytes
        tuning.measured.setdefault(device, {})[world_size] = measured
        write(path, tuning)
    finally:
        os.close(folder)


def write(path: str | os.PathLike[str], tuning: Tuning) -> None:
    """All at once, so that nobody reads half of it.

    Raises:
        OSError: as open() and replace() do.
    """
    text = json.dumps({"format": FORMAT, "oneshot_bytes": tuning.oneshot_bytes, "measured": tuning.measured}, indent=1)
    beside = Path(f"{path}.{os.getpid()}")
    beside.write_text(text + "\n")
    beside.replace(path)


def _is_device(name: str) -> bool:
    if name not in DEVICE_TYPES:
        raise ValueError(f"device type: expected {' or '.join(DEVICE_TYPES)}, got {name!r}")
    return True


def _world_size(text: str) -> int:
    if text not in map(str, range(2, MAX_WORLD_SIZE + 1)):
        raise ValueError(f"world size: expected an integer from 2 to {MAX_WORLD_SIZE}, got {text!r}")
    return int(text)


def _bytes(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise ValueError(f"oneshot_bytes: expected an integer from 0 to {(1 << 40) - 1}, got {value!r}")
    return value
