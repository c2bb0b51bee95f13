"""`mnnvl doctor`: what tools/examine.py found, for people, as a text that can be pasted into an issue: what to do
first, then a few lines a section. With colours where rich is and the terminal wants them; the words are the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from mnnvl_backend.tools.examine import examine, guarded, is_mig, problem_of

GOOD, BAD, WARN, NOTE = "good", "bad", "warn", "note"
MARKS = {GOOD: "✓", BAD: "✗", WARN: "!", NOTE: "-"}
ASCII_MARKS = {GOOD: "ok", BAD: "NO", WARN: "! ", NOTE: "- "}
STYLES = {GOOD: "green", BAD: "bold red", WARN: "yellow", NOTE: "dim"}


class Line(NamedTuple):
    mark: str  # GOOD, BAD, WARN or NOTE; empty: a heading
    text: str


def _package(report: dict[str, Any]) -> Iterator[Line]:
    build, registration = report["build"], report["registration"]
    if problem := problem_of(build):
        yield Line(BAD, problem)
    else:
        yield Line(GOOD, f"the compiled module loads, built with torch {build.get('torch') or '(unknown)'}")
        if build.get("kernels"):
            archs = ", ".join(f"sm_{a}" for a in build["archs"])
            yield Line(GOOD, f"kernels for {archs} and newer, by nvcc {build.get('nvcc')}")
        else:
            yield Line(NOTE, "no kernels: built without nvcc, for CPU tensors only")
    if problem := problem_of(registration):
        yield Line(BAD, problem)
    elif registration["registered"] and registration["installed"] and registration["autoload"]:
        yield Line(GOOD, '"mnnvl" is registered by a plain `import torch`')
    elif registration["registered"]:
        why = "TORCH_DEVICE_BACKEND_AUTOLOAD is off" if registration["installed"] else "not installed"
        yield Line(WARN, f'"mnnvl" is registered only after `import mnnvl_backend` ({why})')
    else:
        yield Line(BAD, '"mnnvl" is not registered')


def _torch(report: dict[str, Any]) -> Iterator[Line]:
    versions = report["versions"]
    if problem := problem_of(versions):
        yield Line(BAD, problem)
        return
    cuda = versions["torch's CUDA"]
    yield Line(GOOD, f"torch {versions['torch']}, {f'CUDA {cuda}' if cuda else 'a CPU build'}")
    yield Line(GOOD, f"Python {versions['python']}, {versions['system']}")


def _gpus(report: dict[str, Any]) -> Iterator[Line]:
    machine, plan = report["machine"], report["CUDA tensors"]
    if problem := problem_of(machine):
        yield Line(BAD, problem)
        return
    driver = machine.get("driver_version") or 0
    if machine.get("driver_loaded"):
        yield Line(GOOD, f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}")
    devices = machine.get("devices") or []
    if not devices:
        yield Line(NOTE, f"none: {machine.get('driver_problem') or 'no CUDA device'}")
        return
    alike: dict[str, list[str]] = {}
    for d in devices:
        capability = d.get("compute_capability")
        kind = d.get("problem") or f"{d.get('name')}, sm_{capability}, {d.get('multiprocessors')} multiprocessors"
        alike.setdefault(kind, []).append(str(d.get("ordinal")))
    for kind, ordinals in alike.items():
        yield Line(GOOD, f"{len(ordinals)} x {kind} (device {', '.join(ordinals)})")
    yield from _gpus_of_note(devices, report["variables"])
    if plan.get("plan") == "none":
        yield Line(BAD, f"CUDA tensors can't be served: {plan.get('why')}")
    else:
        yield Line(GOOD, f"a group would take {plan.get('plan')}")


def _gpus_of_note(devices: list[dict[str, Any]], variables: dict[str, Any]) -> Iterator[Line]:
    """What is no error, and still explains what a group does here."""
    if visible := variables.get("visible"):
        yield Line(NOTE, f"numbered as CUDA_VISIBLE_DEVICES={visible} orders them; ranks are told apart by uuid")
    if mig := ", ".join(str(d.get("ordinal")) for d in devices if is_mig(d)):
        yield Line(WARN, f"device {mig}: a MIG instance, whose memory only ranks on the same instance can share")
    if len({(d.get("name"), d.get("multiprocessors")) for d in devices}) > 1:
        least = min(d.get("multiprocessors") or 0 for d in devices)
        yield Line(NOTE, f"of several kinds: a group of them all launches for {least} multiprocessors, the fewest")
    if len(devices) == 1:
        yield Line(NOTE, "one GPU: ranks that share it take bootstrap='store' and plain stores, no multicast")


def _fabric(report: dict[str, Any]) -> Iterator[Line]:
    machine, plan = report["machine"], report["CUDA tensors"]
    devices = machine.get("devices") or []
    cliques = sorted({f"{d['cluster_uuid']}, clique {d.get('clique')}" for d in devices if d.get("cluster_uuid")})
    for clique in cliques:
        yield Line(GOOD if len(cliques) == 1 else WARN, f"cluster {clique}")
    if channels := machine.get("imex_channels"):
        yield Line(GOOD, f"IMEX channels: {', '.join(channels)}")
    if why := plan.get("why not fabric handles"):
        yield Line(WARN if cliques else NOTE, f"groups stay on this host: {why}")
    elif not devices:
        yield Line(NOTE, "none: no GPU")
    if machine.get("nvml_problem") and devices:
        yield Line(WARN, f"NVML can't be asked: {machine['nvml_problem']}")


def _multicast(report: dict[str, Any]) -> Iterator[Line]:
    forbidden = report["variables"].get("multicast forbidden")
    plan = report["CUDA tensors"]
    if forbidden:
        yield Line(NOTE, f"forbidden by {forbidden}: plain stores to each peer")
    elif why := plan.get("why not multicast"):
        yield Line(NOTE, f"plain stores to each peer: {why}")
    elif plan.get("stores") == "multicast":
        yield Line(GOOD, "supported by every GPU and allowed; tried when a group is set up")
    else:
        yield Line(NOTE, "not used")


def _nccl(report: dict[str, Any]) -> Iterator[Line]:
    machine = report["machine"]
    wheel = report["NCCL wheel"]
    where = f" ({wheel})" if isinstance(wheel, str) and wheel else ""
    if version := machine.get("nccl_version"):
        yield Line(GOOD, f"{version // 10000}.{version // 100 % 100}.{version % 100}{where}")
    else:
        yield Line(NOTE, str(machine.get("nccl_problem") or problem_of(machine)))
        yield Line(NOTE, "only fabric handles and bootstrap='nccl' need it")


def _cpu(report: dict[str, Any]) -> Iterator[Line]:
    plan = report["CPU tensors"]
    if plan.get("plan") == "none" or problem_of(plan):
        yield Line(BAD, f"can't be served: {plan.get('why') or problem_of(plan)}")
    else:
        yield Line(GOOD, f"{plan['plan']}; {report['versions'].get('cores', '?')} cores for this process")


def _variables(report: dict[str, Any]) -> Iterator[Line]:
    variables = report["variables"]
    if problem := problem_of(variables):
        yield Line(BAD, problem)
        return
    for name, value in variables["set"].items():
        bad = name in variables["malformed"] or any(text.startswith(f"{name} ") for text in variables["unknown"])
        yield Line(BAD if bad else NOTE, f"{name}={value}")
    if not variables["set"]:
        yield Line(NOTE, "no MNNVL_* variable is set")


SECTIONS = {
    "This package": _package,
    "torch": _torch,
    "GPUs": _gpus,
    "NVLink fabric": _fabric,
    "Multicast": _multicast,
    "NCCL": _nccl,
    "CPU tensors": _cpu,
    "Variables": _variables,
}


def _raw(value: dict[str, Any], indent: int = 2) -> list[str]:
    """Every key as it is, for --verbose."""
    pad = " " * indent
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{pad}{key}", *_raw(item, indent + 2)]
        elif isinstance(item, list) and item and all(isinstance(i, dict) for i in item):
            for index, entry in enumerate(item):
                lines += [f"{pad}{key}[{index}]", *_raw(entry, indent + 2)]
        else:
            lines.append(f"{pad}{key}: {item if item not in ('', None, [], {}) else '-'}")
    return lines


def _served(report: dict[str, Any]) -> str:
    kinds = [name.split()[0] for name in ("CPU tensors", "CUDA tensors") if report[name].get("plan", "none") != "none"]
    return f"{' and '.join(kinds) or 'no'} tensors can be served here"


def describe(report: dict[str, Any], verbose: bool = False) -> list[Line]:
    """The report for people; a section that can't be told says so in its place."""
    versions = report["versions"]
    lines = [Line("", f"mnnvl doctor: mnnvl_backend {versions.get('mnnvl_backend', '(unknown version)')}")]
    lines += [Line("", ""), Line("", "What to do")]
    lines += [Line(WARN, text) for text in report["advice"]] or [Line(GOOD, f"nothing: {_served(report)}")]
    for title, section in SECTIONS.items():
        found = guarded(lambda section=section: list(section(report)))  # type: ignore[misc]
        lines += [Line("", ""), Line("", title)]
        lines += [Line(BAD, f"can't be told: {found['problem']}")] if isinstance(found, dict) else found
    if verbose:
        lines += [Line("", ""), Line("", "Everything, as --json has it")]
        lines += [Line("", text) for text in _raw({k: v for k, v in report.items() if k != "advice"})]
    return lines


def _can_show(text: str) -> bool:
    """Can standard output take these characters? In the C locale it can't."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _rich_console() -> Any:
    """None where rich is missing or broken. It leaves colours out itself for NO_COLOR and where no terminal listens."""
    try:
        from rich.console import Console

        return Console(highlight=False, soft_wrap=True)  # long lines stay whole, for whoever copies them
    except Exception:
        return None


def show(lines: list[Line]) -> None:
    marks = MARKS if _can_show("".join(MARKS.values())) else ASCII_MARKS
    texts = [f"  {marks[line.mark]} {line.text}" if line.mark else line.text for line in lines]
    console = _rich_console()
    if console is None or not _can_show("".join(texts)):
        encoding = sys.stdout.encoding or "ascii"
        print("\n".join(texts).encode(encoding, "backslashreplace").decode(encoding))
        return
    from rich.text import Text

    for line, plain in zip(lines, texts, strict=True):
        text = Text(plain, style="" if line.mark or plain.startswith(" ") else "bold")
        if line.mark:
            text.stylize(STYLES[line.mark], 2, 2 + len(marks[line.mark]))
        console.print(text)


def run(as_json: bool, verbose: bool = False) -> int:
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2, default=str))
    else:
        show(describe(report, verbose))
    return 0
