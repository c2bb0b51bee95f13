"""What `mnnvl doctor` finds out: what is built, what this machine allows, which plan a group would take here, why not a
better one, and what its user could do about it.

Never fails: every probe is guarded, and what went wrong stands where its value would, as {"problem": text}. Without
side effects: attributes are read, nothing is allocated, no context and no multicast object is made.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

IMEX_CHANNELS = "/dev/nvidia-caps-imex-channels"
OLDEST_GPU = 90  # compute capability that the kernels need


def guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"problem": f"{type(error).__name__}: {error}"}


def problem_of(value: Any) -> str:
    return str(value.get("problem") or "") if isinstance(value, dict) else ""


def _versions() -> dict[str, Any]:
    import torch

    import mnnvl_backend

    return {
        "mnnvl_backend": mnnvl_backend.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
    }


def _registered() -> dict[str, Any]:
    import torch.distributed as dist

    if not dist.is_available():
        return {"problem": "this torch has no torch.distributed"}
    from importlib.metadata import entry_points

    return {
        "registered": hasattr(dist.Backend, "MNNVL"),
        "installed": any(e.name == "mnnvl" for e in entry_points(group="torch.backends")),
        "autoload": os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1",
    }


def _build() -> dict[str, Any]:
    from mnnvl_backend.compiled import load_compiled

    info = dict(load_compiled().build_info())
    archs = str(info.get("archs") or "")
    return {
        "torch": str(info.get("torch") or ""),
        "kernels": bool(info.get("cuda")),
        "archs": [a for a in archs.split(";") if a],
        "nvcc": str(info.get("nvcc") or ""),
    }


def _machine() -> dict[str, Any]:
    """Fields as in csrc/memory/probe.h."""
    from mnnvl_backend.compiled import load_compiled, nccl_path

    return dict(load_compiled().probe(nccl_path()))


def _nccl_wheel() -> str:
    from mnnvl_backend.compiled import nccl_path

    return nccl_path()


def _variables() -> dict[str, Any]:
    from mnnvl_backend import config

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        malformed = problem_of(guarded(config.read_environment))
    return {
        "set": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MNNVL_") and value},
        "malformed": malformed.removeprefix("ValueError: "),
        "unknown": [str(w.message) for w in caught if "is not a variable" in str(w.message)],
        "multicast forbidden": ", ".join(config.multicast_switches(os.environ)),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def _cpu_plan(build: Any) -> dict[str, str]:
    if problem := problem_of(build):
        return {"plan": "none", "why": problem}
    return {"plan": "shared memory (memfd), one host"}


def _obstacle(devices: list[dict[str, Any]], why: Callable[[dict[str, Any]], str]) -> str:
    """The first device's reason, empty if no device has one."""
    return next((f"device {d.get('ordinal')}: {reason}" for d in devices if (reason := why(d))), "")


def _why_not_at_all(device: dict[str, Any]) -> str:
    if device.get("problem"):
        return str(device["problem"])
    capability = device.get("compute_capability") or OLDEST_GPU
    return f"sm_{capability}, and the kernels need sm_{OLDEST_GPU} or newer" if capability < OLDEST_GPU else ""


def _why_not_this_build(build: dict[str, Any], device: dict[str, Any]) -> str:
    oldest = min((int(a.rstrip("af")) for a in build.get("archs") or []), default=0)
    capability = device.get("compute_capability") or oldest
    return f"sm_{capability}, and the kernels were built for sm_{oldest} and newer" if capability < oldest else ""


def is_mig(device: dict[str, Any]) -> bool:
    """CUDA names an instance "NVIDIA H200 MIG 1g.18gb"."""
    return " MIG " in str(device.get("name"))


def _why_not_fabric(device: dict[str, Any]) -> str:
    if not device.get("fabric_handles"):
        return "the driver says that it exports no fabric handles"
    if not device.get("cluster_uuid"):
        return str(device.get("fabric_problem") or "in no NVLink fabric cluster")
    return ""


def cuda_plan(build: Any, machine: Any, variables: Any) -> dict[str, str]:
    """Of a group over all GPUs of this machine, as far as attributes tell."""
    for part in (build, machine):
        if problem := problem_of(part):
            return {"plan": "none", "why": problem}
    devices = machine.get("devices") or []
    if not devices:
        return {"plan": "none", "why": machine.get("driver_problem") or "no CUDA device"}
    if not build.get("kernels"):
        return {"plan": "none", "why": "built without kernels"}
    broken = _obstacle(devices, _why_not_at_all) or _obstacle(devices, lambda d: _why_not_this_build(build, d))
    if broken:
        return {"plan": "none", "why": broken}

    fabric = "" if machine.get("imex_channels") else f"no IMEX channel in {IMEX_CHANNELS}"
    fabric = _obstacle(devices, _why_not_fabric) or fabric
    fd = _obstacle(devices, lambda d: "" if d.get("fd_handles") else "the driver says that it exports no descriptors")
    if not fabric:
        plan = {"plan": "fabric handles (also over several hosts of one NVLink clique)"}
    elif not fd:
        plan = {"plan": "POSIX file descriptors (this host only)", "why not fabric handles": fabric}
    else:
        return {"plan": "none", "why": f"fabric handles: {fabric}; file descriptors: {fd}"}
    forbidden = str(variables.get("multicast forbidden") or "")
    multicast = f"forbidden by {forbidden}" if forbidden else ""
    multicast = multicast or _obstacle(devices, lambda d: "" if d.get("multicast") else "no multicast support")
    plan["stores"] = "unicast" if multicast else "multicast"
    if multicast:
        plan["why not multicast"] = multicast
    if machine.get("nccl_problem"):
        plan["bootstrap"] = f"through the c10d store, NCCL can't be loaded: {machine['nccl_problem']}"
    return plan


def _advice_on_installation(report: dict[str, Any]) -> list[str]:
    build, registration = report["build"], report["registration"]
    advice = []
    if problem := problem_of(build):
        advice.append(f"Build the compiled module: {problem.removeprefix('RuntimeError: ')}.")
    if problem := problem_of(registration):
        advice.append(f"Install a torch with torch.distributed: {problem}.")
    elif not registration["registered"]:
        advice.append('Import mnnvl_backend before init_process_group: the backend "mnnvl" is not registered.')
    elif not registration["installed"]:
        advice.append(
            "Install the package (`pip install --no-build-isolation .`), or import mnnvl_backend in each program: from "
            'a source tree, a plain `import torch` does not register "mnnvl".'
        )
    elif not registration["autoload"]:
        advice.append(
            "Import mnnvl_backend in each program: TORCH_DEVICE_BACKEND_AUTOLOAD is off, so a plain `import torch` "
            'does not register "mnnvl".'
        )
    return advice


def _advice_on_gpus(report: dict[str, Any]) -> list[str]:
    build, machine, versions = report["build"], report["machine"], report["versions"]
    if problem_of(build) or problem_of(machine):
        return []
    advice, devices = [], machine.get("devices") or []
    if devices and not versions.get("torch's CUDA"):
        advice.append("Install a torch built with CUDA: this one sees no GPU, and there are some here.")
    if devices and not build.get("kernels"):
        advice.append(
            "Install nvcc (a CUDA toolkit, or the wheels that the README names) and build again: there are GPUs here, "
            "and the package was built without kernels."
        )
    if not devices and versions.get("torch's CUDA"):
        advice.append(
            f"If this machine has GPUs, mend the driver: {machine.get('driver_problem') or 'it shows no CUDA device'}. "
            "CPU tensors work without."
        )
    if old := _obstacle(devices, _why_not_at_all):
        advice.append(f"Leave this GPU out with CUDA_VISIBLE_DEVICES, or use CPU tensors: {old}.")
    elif new := _obstacle(devices, lambda d: _why_not_this_build(build, d)):
        advice.append(f"Build again with MNNVL_CUDA_ARCHS naming this GPU's architecture too: {new}.")
    if mig := _obstacle(devices, lambda d: str(d["name"]) if is_mig(d) else ""):
        advice.append(
            f"Switch MIG off for groups of several GPUs: {mig} is an instance, which shares memory with no other "
            "device; only ranks on the same instance can be a group."
        )
    if any(d.get("cluster_uuid") for d in devices) and not machine.get("imex_channels"):
        advice.append(
            f"For groups over several hosts, have an IMEX channel made for this process (a file in {IMEX_CHANNELS}, "
            "also inside its container): the GPUs are in an NVLink fabric, but without a channel the driver exports no "
            "fabric handles."
        )
    if machine.get("nccl_problem") and str(report["CUDA tensors"].get("plan", "")).startswith("fabric"):
        advice.append(f"Install NCCL (the extra cu13 or cu12), or keep bootstrap='store': {machine['nccl_problem']}.")
    return advice


def _advice_on_variables(report: dict[str, Any]) -> list[str]:
    variables = report["variables"]
    if problem := problem_of(variables):
        return [f"Report this, the variables could not be read: {problem}."]
    advice = [f"Correct or unset {variables['malformed']}; no group can be made."] if variables["malformed"] else []
    return advice + [f"Correct the name, or unset it: {text}." for text in variables["unknown"]]


def advice_for(report: dict[str, Any]) -> list[str]:
    """What to do, most pressing first; empty: nothing."""
    advice: list[str] = []
    for part in (_advice_on_installation, _advice_on_variables, _advice_on_gpus):
        found = guarded(lambda part=part: part(report))  # type: ignore[misc]
        advice += [f"Report this, {part.__name__} failed: {problem_of(found)}."] if problem_of(found) else found
    return advice


def examine() -> dict[str, Any]:
    """The whole report, as JSON's types; see csrc/memory/probe.h for the keys of "machine"."""
    build, variables = guarded(_build), guarded(_variables)
    machine = {"problem": "not looked at without the compiled module"} if problem_of(build) else guarded(_machine)
    report = {
        "versions": guarded(_versions),
        "registration": guarded(_registered),
        "build": build,
        "machine": machine,
        "NCCL wheel": guarded(_nccl_wheel),
        "variables": variables,
        "CPU tensors": guarded(lambda: _cpu_plan(build)),
        "CUDA tensors": guarded(lambda: cuda_plan(build, machine, variables)),
    }
    return {"advice": advice_for(report), **report}
