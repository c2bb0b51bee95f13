"""`mnnvl doctor`: what is built, what this machine allows, which plan a group would take here and why not a better one.

Never fails: every probe is guarded, and what went wrong stands where its value would. Without side effects: attributes
are read, nothing is allocated, no multicast object is made.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from typing import Any

IMEX_CHANNELS = "/dev/nvidia-caps-imex-channels"


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"problem": f"{type(error).__name__}: {error}"}


def _problem(value: Any) -> str:
    return str(value.get("problem") or "") if isinstance(value, dict) else ""


def _versions() -> dict[str, Any]:
    import torch

    import mnnvl_backend

    return {
        "mnnvl_backend": mnnvl_backend.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none (CPU build)",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
    }


def _registered() -> dict[str, Any]:
    import torch.distributed as dist

    if not dist.is_available():
        return {"problem": "this torch has no torch.distributed"}
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"
    from importlib.metadata import entry_points

    installed = any(e.name == "mnnvl" for e in entry_points(group="torch.backends"))
    return {
        "backend": "mnnvl" if hasattr(dist.Backend, "MNNVL") else "not registered",
        "after a plain `import torch`": "yes" if installed and autoload else
        "no: TORCH_DEVICE_BACKEND_AUTOLOAD is off" if installed else "no: not installed; import mnnvl_backend",
    }  # fmt: skip


def _build() -> dict[str, Any]:
    from mnnvl_backend.registration import load_compiled

    info = dict(load_compiled().build_info())
    if info.get("cuda"):
        return {"compiled module": "loads", "kernels": f"sm_{', sm_'.join(str(info.get('archs')).split(';'))} + PTX",
                "nvcc": info.get("nvcc")}  # fmt: skip
    return {"compiled module": "loads", "kernels": "none: built without nvcc, CPU tensors only"}


def _probe() -> dict[str, Any]:
    """Fields as in csrc/memory/probe.h."""
    from mnnvl_backend.registration import load_compiled, nccl_path

    return dict(load_compiled().probe(nccl_path()))


def _nccl() -> str:
    from mnnvl_backend.registration import nccl_path

    return nccl_path() or "no nvidia-nccl wheel; libnccl.so.2 is looked for by name"


def _switches() -> dict[str, Any]:
    from mnnvl_backend import config

    values: dict[str, Any] = {v.name: os.environ[v.name] for v in config.VARIABLES if os.environ.get(v.name)}
    values["multicast"] = (
        f"forbidden by {', '.join(forbidding)}" if (forbidding := config.multicast_switches(os.environ)) else "allowed"
    )
    values["malformed"] = _problem(_guarded(config.read_environment)) or "none"
    return values


def _cpu_plan(build: Any) -> dict[str, str]:
    if problem := _problem(build):
        return {"plan": "none", "why": problem}
    return {"plan": "shared memory (memfd), one host"}


def _obstacle(devices: list[dict[str, Any]], why: Callable[[dict[str, Any]], str]) -> str:
    """The first device's reason, empty if no device has one."""
    return next((f"device {d.get('ordinal')}: {reason}" for d in devices if (reason := why(d))), "")


def _why_not_fabric(device: dict[str, Any]) -> str:
    if not device.get("fabric_handles"):
        return "the driver says that it exports no fabric handles"
    if not device.get("cluster_uuid"):
        return str(device.get("fabric_problem") or "in no NVLink fabric cluster")
    return ""


def _cuda_plan(build: Any, probe: Any, switches: Any) -> dict[str, str]:
    """Of a group over all GPUs of this machine, as far as attributes tell."""
    for part in (build, probe):
        if problem := _problem(part):
            return {"plan": "none", "why": problem}
    if str(build["kernels"]).startswith("none"):
        return {"plan": "none", "why": "built without kernels: install nvcc and build again"}
    devices = probe.get("devices") or []
    if not devices:
        return {"plan": "none", "why": probe.get("driver_problem") or "no CUDA device"}
    if broken := _obstacle(devices, lambda d: str(d.get("problem") or "")):
        return {"plan": "none", "why": broken}

    fabric = "" if probe.get("imex_channels") else f"no IMEX channel in {IMEX_CHANNELS}"
    fabric = _obstacle(devices, _why_not_fabric) or fabric
    fd = _obstacle(devices, lambda d: "" if d.get("fd_handles") else "the driver says that it exports no descriptors")
    if not fabric:
        plan = {"plan": "fabric handles (also over several hosts of one NVLink clique)"}
    elif not fd:
        plan = {"plan": "POSIX file descriptors (this host only)", "why not fabric handles": fabric}
    else:
        return {"plan": "none", "why": f"fabric handles: {fabric}; file descriptors: {fd}"}
    multicast = "" if switches.get("multicast") == "allowed" else str(switches.get("multicast"))
    multicast = multicast or _obstacle(devices, lambda d: "" if d.get("multicast") else "no multicast support")
    plan["stores"] = "unicast" if multicast else "multicast"
    if multicast:
        plan["why not multicast"] = multicast
    if probe.get("nccl_problem"):
        plan["bootstrap"] = f"through the c10d store, NCCL can't be loaded: {probe['nccl_problem']}"
    return plan


def examine() -> dict[str, Any]:
    """The whole report, as JSON's types."""
    build, switches = _guarded(_build), _guarded(_switches)
    probe = {"problem": "not looked at without the compiled module"} if _problem(build) else _guarded(_probe)
    return {
        "versions": _guarded(_versions),
        "registration": _guarded(_registered),
        "build": build,
        "machine": probe,
        "NCCL wheel": _guarded(_nccl),
        "switches": switches,
        "CPU tensors": _guarded(lambda: _cpu_plan(build)),
        "CUDA tensors": _guarded(lambda: _cuda_plan(build, probe, switches)),
    }


def _lines(value: Any, indent: int = 2) -> list[str]:
    pad = " " * indent
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{pad}{key}", *_lines(item, indent + 2)]
        elif isinstance(item, list) and all(isinstance(i, dict) for i in item):
            for index, entry in enumerate(item):
                lines += [f"{pad}{key}[{index}]", *_lines(entry, indent + 2)]
            if not item:
                lines.append(f"{pad}{key}: none")
        else:
            lines.append(f"{pad}{key}: {item if item not in ('', None) else '-'}")
    return lines


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for section, value in report.items():
        lines += [section, *_lines(value)] if isinstance(value, dict) else [f"{section}: {value}"]
    return "\n".join(lines)


def run(as_json: bool) -> int:
    report = examine()
    print(json.dumps(report, indent=2, default=str) if as_json else render(report))
    return 0
