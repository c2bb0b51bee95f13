"""`mnnvl doctor`: what it finds out, what it advises, how it shows it, and that it never fails."""

from __future__ import annotations

import builtins
import io
import json
import re
import sys
from typing import Any

import pytest
import torch

from mnnvl_backend.tools import cli, doctor, examine

BUILD = {"torch": "2.13.0", "kernels": True, "archs": ["90", "100"], "nvcc": "13.0"}
DEVICE = {
    "ordinal": 0, "name": "NVIDIA H200", "compute_capability": 90, "multiprocessors": 132, "fd_handles": True,
    "fabric_handles": True, "multicast": True, "fabric_problem": "no clique",
}  # fmt: skip
IN_FABRIC = DEVICE | {"cluster_uuid": "5", "clique": 7, "fabric_problem": ""}
ALLOWED = {"set": {}, "malformed": "", "unknown": [], "multicast forbidden": ""}


def report(build: Any = BUILD, machine: Any = None, variables: Any = ALLOWED, **others: Any) -> dict[str, Any]:
    """A report of a machine with one GPU, advice and plan made by the code under test."""
    machine = {"driver_loaded": True, "driver_version": 13000, "devices": [DEVICE]} if machine is None else machine
    facts: dict[str, Any] = {
        "versions": {"mnnvl_backend": "1", "python": "3", "torch": "2.13.0", "torch's CUDA": "13.0", "system": "Linux",
                     "cores": 2},
        "registration": {"registered": True, "installed": True, "autoload": True},
        "build": build, "machine": machine, "NCCL wheel": "", "variables": variables,
        "CPU tensors": {"plan": "shared memory"}, "CUDA tensors": examine.cuda_plan(build, machine, variables),
        **others,
    }  # fmt: skip
    return {"advice": examine.advice_for(facts), **facts}


def text_of(facts: dict[str, Any]) -> str:
    return "\n".join(f"{line.mark}: {line.text}" for line in doctor.describe(facts))


# On this machine.


def test_json_is_complete(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["CPU tensors"]["plan"] == "shared memory (memfd), one host"
    assert set(found) == set(report())
    assert set(found) == {"advice", "versions", "registration", "build", "machine", "NCCL wheel", "variables",
                          "CPU tensors", "CUDA tensors"}  # fmt: skip
    assert {"driver_loaded", "devices", "imex_channels", "host_id"} <= set(found["machine"])


def test_sections_are_all_there_and_advice_comes_first(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    titles = ["What to do", *doctor.SECTIONS]
    places = [out.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert f"torch {torch.__version__}" in out
    assert "driver_problem" not in out
    assert cli.main(["doctor", "--verbose"]) == 0
    verbose = capsys.readouterr().out
    assert verbose.startswith(out)
    assert "    driver_problem: " in verbose


def test_doctor_never_fails(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mnnvl_backend._C", None)
    monkeypatch.setattr(torch.version, "cuda", property(lambda self: 1 / 0))
    monkeypatch.delattr(torch, "__version__")
    monkeypatch.setenv("MNNVL_STRATEGY", "ring")
    for arguments in ([], ["--verbose"], ["--json"]):
        assert cli.main(["doctor", *arguments]) == 0
        out = capsys.readouterr().out
        assert "AttributeError" in out
        assert "MNNVL_STRATEGY: expected" in out


@pytest.mark.parametrize("broken", ["_versions", "_registered", "_build", "_machine", "_nccl_wheel", "_variables"])
def test_any_probe_may_fail_alone(monkeypatch, capsys, broken):
    def fail() -> None:
        raise OSError("the moon is in the way")

    monkeypatch.setattr(examine, broken, fail)
    assert cli.main(["doctor"]) == 0
    found = capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert "OSError: the moon is in the way" in capsys.readouterr().out
    if broken != "_nccl_wheel":  # only where NCCL was found is its wheel worth a word
        assert "the moon is in the way" in found


@pytest.mark.parametrize("key", [k for k in report() if k != "advice"])
@pytest.mark.parametrize("value", [{}, {"problem": "p"}])
def test_any_part_of_a_report_may_be_missing(key, value):
    """A section that can't be told says so in its place, and the others stand."""
    facts = report(**{key: value}) if key not in ("build", "machine", "variables") else report() | {key: value}
    facts["advice"] = examine.advice_for(facts)
    text = text_of(facts)
    assert all(f": {title}\n" in text for title in doctor.SECTIONS)


# What it shows, and how.


def shown(monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    doctor.show(doctor.describe(report(variables=ALLOWED | {"multicast forbidden": "X=0"})))
    out.flush()
    monkeypatch.undo()
    return raw.getvalue().decode(encoding)


def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_plain_text_and_rich_have_the_same_words(monkeypatch):
    """With rich and no colours the same bytes as without rich; with colours the same words."""
    pytest.importorskip("rich")
    monkeypatch.setenv("NO_COLOR", "1")
    with_rich = shown(monkeypatch)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = shown(monkeypatch)
    without_rich(monkeypatch)
    plain = shown(monkeypatch)
    assert plain == with_rich
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_plain_text_where_the_terminal_has_no_ticks(monkeypatch):
    without_rich(monkeypatch)
    assert "  ✓ 1 x NVIDIA H200, sm_90" in shown(monkeypatch)
    without_rich(monkeypatch)
    ascii_text = shown(monkeypatch, "ascii")
    assert "  ok 1 x NVIDIA H200, sm_90" in ascii_text
    assert "  -  forbidden by X=0: plain stores" in ascii_text


def test_gpus_that_are_alike_share_a_line():
    devices = [DEVICE, DEVICE | {"ordinal": 1}, DEVICE | {"ordinal": 2, "name": "NVIDIA H100"}]
    text = text_of(report(machine={"devices": devices, "nccl_version": 22809}))
    assert "good: 2 x NVIDIA H200, sm_90, 132 multiprocessors (device 0, 1)" in text
    assert "good: 1 x NVIDIA H100, sm_90, 132 multiprocessors (device 2)" in text
    assert "good: a group would take POSIX file descriptors (this host only)" in text
    assert "good: 2.28.9" in text
    assert "note: groups stay on this host: device 0: no clique" in text
    assert "good: nothing: CPU and CUDA tensors can be served here" in text


OLDER = DEVICE | {"name": "NVIDIA A100", "compute_capability": 80, "multiprocessors": 108}
MIG = DEVICE | {"name": "NVIDIA H200 MIG 1g.18gb", "multiprocessors": 16, "multicast": False,
                "fabric_problem": "NVML does not know the device: Not Found (6)"}  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "variables", "lines"),
    [
        ({"devices": [DEVICE, DEVICE | {"ordinal": 1, "name": "NVIDIA GH200", "multiprocessors": 78}]}, {},
         ["note: of several kinds: a group of them all launches for 78 multiprocessors, the fewest"]),
        ({"devices": [DEVICE, OLDER | {"ordinal": 1}]}, {},
         ["bad: CUDA tensors can't be served: device 1: sm_80, and the kernels need sm_90 or newer",
          "warn: Leave this GPU out with CUDA_VISIBLE_DEVICES, or use CPU tensors: device 1: sm_80"]),
        ({"devices": [DEVICE | {"fabric_problem": "NVML can't be loaded: gone"}], "nvml_problem": "gone"}, {},
         ["warn: NVML can't be asked: gone",
          "note: groups stay on this host: device 0: NVML can't be loaded: gone"]),
        ({"devices": [IN_FABRIC]}, {},
         ["warn: groups stay on this host: no IMEX channel in /dev/nvidia-caps-imex-channels",
          "warn: For groups over several hosts, have an IMEX channel made for this process"]),
        ({"devices": [MIG]}, {},
         ["warn: device 0: a MIG instance, whose memory only ranks on the same instance can share",
          "warn: Switch MIG off for groups of several GPUs: device 0: NVIDIA H200 MIG 1g.18gb is an instance",
          "note: plain stores to each peer: device 0: no multicast support"]),
        ({"devices": [DEVICE, DEVICE | {"ordinal": 1}]}, {"visible": "3,1"},
         ["note: numbered as CUDA_VISIBLE_DEVICES=3,1 orders them; ranks are told apart by uuid"]),
        ({"devices": [DEVICE]}, {},
         ["note: one GPU: ranks that share it take bootstrap='store' and plain stores, no multicast"]),
    ],
    ids=["two kinds", "older than 9.0", "no NVML", "no IMEX channel", "MIG", "permuted", "one GPU"],
)  # fmt: skip
def test_odd_hardware_has_its_line(machine, variables, lines):
    text = text_of(report(machine=machine, variables=ALLOWED | variables))
    for line in lines:
        assert line in text, text


def test_ordinary_hardware_has_none_of_these_lines():
    text = text_of(report(machine={"devices": [DEVICE, DEVICE | {"ordinal": 1}]}))
    for words in ("of several kinds", "MIG", "CUDA_VISIBLE_DEVICES", "one GPU", "NVML", "IMEX"):
        assert words not in text


def test_the_order_of_devices_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert examine.examine()["variables"]["visible"] == "1,0"


# What it advises.


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        (report(), ""),
        (report(build={"problem": "RuntimeError: built with torch 1"}), "Build the compiled module: built with"),
        (report(registration={"problem": "no torch.distributed"}), "Install a torch with torch.distributed"),
        (report(registration={"registered": False, "installed": True, "autoload": True}), "Import mnnvl_backend"),
        (report(registration={"registered": True, "installed": False, "autoload": True}), "Install the package"),
        (report(registration={"registered": True, "installed": True, "autoload": False}), "AUTOLOAD is off"),
        (report(variables=ALLOWED | {"malformed": "MNNVL_X: expected 1, got 2"}), "Correct or unset MNNVL_X: expe"),
        (report(variables=ALLOWED | {"unknown": ["MNNVL_Y is not a variable"]}), "unset it: MNNVL_Y is not a variable"),
        (report(build=BUILD | {"kernels": False}), "Install nvcc"),
        (report(versions={"torch's CUDA": ""}), "Install a torch built with CUDA"),
        (report(machine={"devices": [], "driver_problem": "no libcuda"}), "mend the driver: no libcuda"),
        (report(machine={"devices": [DEVICE | {"compute_capability": 80}]}), "sm_80, and the kernels need sm_90"),
        (report(machine={"devices": [DEVICE | {"problem": "lost"}]}), "device 0: lost"),
        (report(build=BUILD | {"archs": ["100a", "103"]}), "MNNVL_CUDA_ARCHS naming this GPU's architecture too: dev"),
        (report(machine={"devices": [MIG]}), "Switch MIG off"),
        (report(machine={"devices": [IN_FABRIC]}), "have an IMEX channel made"),
        (report(machine={"devices": [IN_FABRIC], "imex_channels": ["/c"], "nccl_problem": "gone"}), "Install NCCL"),
    ],
)  # fmt: skip
def test_advice(facts, advice):
    if not advice:
        assert facts["advice"] == []
    else:
        assert len(facts["advice"]) == 1
        assert advice in facts["advice"][0]
        assert f"warn: {facts['advice'][0]}" in text_of(facts).split("This package")[0]


def test_no_advice_to_mend_a_driver_where_torch_is_a_cpu_build():
    assert report(machine={"devices": []}, versions={"torch's CUDA": ""})["advice"] == []


def test_the_plan_and_why_not_a_better_one():
    plan = examine.cuda_plan(BUILD, {"devices": [DEVICE]}, ALLOWED)
    assert plan == {"plan": "POSIX file descriptors (this host only)",
                    "why not fabric handles": "device 0: no clique", "stores": "multicast"}  # fmt: skip
    plan = examine.cuda_plan(BUILD, {"devices": [DEVICE | {"multicast": False}]}, ALLOWED)
    assert plan["why not multicast"] == "device 0: no multicast support"
    plan = examine.cuda_plan(BUILD, {"devices": [DEVICE]}, {"multicast forbidden": "X=0"})
    assert plan["why not multicast"] == "forbidden by X=0"
    no_channel = examine.cuda_plan(BUILD, {"devices": [IN_FABRIC]}, ALLOWED)
    assert "no IMEX channel" in no_channel["why not fabric handles"]
    machine = {"devices": [IN_FABRIC], "imex_channels": ["/dev/x"], "nccl_problem": "missing"}
    plan = examine.cuda_plan(BUILD, machine, ALLOWED)
    assert plan["plan"].startswith("fabric handles")
    assert "missing" in plan["bootstrap"]
    assert examine.cuda_plan(BUILD, {"devices": [{"problem": "x"}]}, ALLOWED)["why"] == "device None: x"
    assert examine.cuda_plan(BUILD | {"kernels": False}, {"devices": [DEVICE]}, ALLOWED)["why"].startswith(
        "built without"
    )
    assert examine.cuda_plan({"problem": "p"}, {}, ALLOWED) == {"plan": "none", "why": "p"}


def test_multicast_is_read_from_the_environment_here(monkeypatch, capsys):
    """Whatever the compiled module's probe would say."""
    for name in ("MNNVL_MULTICAST", "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        monkeypatch.delenv(name, raising=False)
    assert examine.examine()["variables"]["multicast forbidden"] == ""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert examine.examine()["variables"]["multicast forbidden"] == "NCCL_NVLS_ENABLE=0"
    assert cli.main(["doctor"]) == 0
    assert "forbidden by NCCL_NVLS_ENABLE=0: plain stores" in capsys.readouterr().out
