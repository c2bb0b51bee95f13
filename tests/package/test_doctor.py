"""`mnnvl doctor`: what it finds out, what it advises, and that it never fails."""

from __future__ import annotations

import json
import sys

import torch

from mnnvl_backend.tools import cli, doctor


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert cli.main(["doctor"]) == 0
    assert "CPU tensors" in capsys.readouterr().out


def test_doctor_never_fails(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mnnvl_backend._C", None)
    monkeypatch.setattr(torch.version, "cuda", property(lambda self: 1 / 0))
    monkeypatch.delattr(torch, "__version__")
    monkeypatch.setenv("MNNVL_STRATEGY", "ring")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "AttributeError" in out
    assert "MNNVL_STRATEGY: expected" in out


def test_doctor_explains_the_plan():
    build, allowed = {"kernels": "sm_90 + PTX"}, {"multicast": "allowed"}
    device = {
        "ordinal": 0,
        "fd_handles": True,
        "fabric_handles": True,
        "multicast": True,
        "fabric_problem": "no clique",
    }
    plan = doctor._cuda_plan(build, {"devices": [device]}, allowed)
    assert plan == {"plan": "POSIX file descriptors (this host only)",
                    "why not fabric handles": "device 0: no clique", "stores": "multicast"}  # fmt: skip
    plan = doctor._cuda_plan(build, {"devices": [device | {"multicast": False}]}, allowed)
    assert plan["why not multicast"] == "device 0: no multicast support"
    plan = doctor._cuda_plan(build, {"devices": [device]}, {"multicast": "forbidden by X=0"})
    assert plan["why not multicast"] == "forbidden by X=0"
    device |= {"cluster_uuid": "5", "fabric_problem": ""}
    assert "no IMEX channel" in doctor._cuda_plan(build, {"devices": [device]}, allowed)["why not fabric handles"]
    probe = {"devices": [device], "imex_channels": ["/dev/x"], "nccl_problem": "missing"}
    plan = doctor._cuda_plan(build, probe, allowed)
    assert plan["plan"].startswith("fabric handles")
    assert "missing" in plan["bootstrap"]
    assert doctor._cuda_plan(build, {"devices": [{"problem": "x"}]}, allowed)["why"] == "device None: x"
    assert doctor._cuda_plan({"kernels": "none: built without"}, {}, allowed)["why"].startswith("built without")
