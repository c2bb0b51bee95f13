"""The package around the core: registration, import, options, environment, doctor, and what is pure in the API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank

import mnnvl_backend
from mnnvl_backend import Mapping, Options, config, registration
from mnnvl_backend.tools import cli, doctor
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **env: str) -> str:
    """Standard output of a fresh interpreter that finds this package, installed or not."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# Import and registration.


@pytest.fixture
def entry_point(tmp_path):
    """A folder for the path that makes the package look installed."""
    info = tmp_path / "mnnvl_backend-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mnnvl-backend\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nmnnvl = mnnvl_backend:_autoload\n")
    return str(tmp_path)


@pytest.mark.parametrize("autoload", ["0", "1"])
@pytest.mark.parametrize("first", ["torch", "mnnvl_backend", "mnnvl_backend.registration", "mnnvl_backend.flashinfer.allreduce"])
def test_import_registers_and_loads_nothing(first, autoload, entry_point):
    out = python(
        f"""
import warnings
warnings.simplefilter("error")
import {first}
import sys, torch
if {autoload} == 0:
    import mnnvl_backend
assert torch.distributed.Backend.MNNVL == "mnnvl"
assert torch.distributed.Backend.backend_capability["mnnvl"] == ["cpu", "cuda"]
assert torch.distributed.Backend.default_device_backend_map["cuda"] == "nccl"
assert "mnnvl_backend._C" not in sys.modules
assert "mnnvl_backend.flashinfer.workspace" not in sys.modules or {first!r} == "mnnvl_backend.flashinfer.allreduce"
assert not torch.cuda.is_initialized()
print("fine")
""",
        PYTHONPATH=os.pathsep.join([str(ROOT), entry_point]),
        TORCH_DEVICE_BACKEND_AUTOLOAD=autoload,
    )
    assert "fine" in out


def test_import_costs_under_50_ms_beyond_torch():
    """The best of three, so that a busy machine doesn't matter."""

    def cost() -> float:
        out = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import torch, mnnvl_backend"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
        ).stderr
        (microseconds,) = re.findall(r"\|\s*(\d+) \| mnnvl_backend$", out, re.M)
        return int(microseconds) / 1000

    assert min(cost() for _ in range(3)) < 50


def test_registration_is_idempotent():
    helper = dist.distributed_c10d._new_process_group_helper
    registration.register()
    mnnvl_backend._autoload()
    assert dist.distributed_c10d._new_process_group_helper is helper
    assert dist.Backend.backend_list.count("mnnvl") == 1


def test_a_broken_package_does_not_break_import_torch(monkeypatch):
    monkeypatch.setattr(registration, "register", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="could not register.*ZeroDivisionError"):
        mnnvl_backend._autoload()


def test_missing_compiled_module_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnnvl_backend._C", None)
    with pytest.raises(RuntimeError, match=r"could not be loaded: .*pip install --no-build-isolation"):
        registration.load_compiled()


def test_lazy_names():
    assert set(mnnvl_backend.__all__) <= set(dir(mnnvl_backend))
    for name in mnnvl_backend.__all__:
        assert getattr(mnnvl_backend, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mnnvl_backend.nonsense


def default_backend_body(rank: Rank, backend: str) -> tuple[str, list[str]]:
    """The default backend's name after everything that needs one, and the warnings meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank.init(backend)
        name = dist.group.WORLD.name()
        assert not dist.group.WORLD._has_hooks()
        x = torch.ones(3)
        dist.all_reduce(x)
        assert x.tolist() == [rank.world_size] * 3
        objects = [None] * rank.world_size
        dist.all_gather_object(objects, {"rank": rank.rank})
        assert objects == [{"rank": r} for r in range(rank.world_size)]
        dist.barrier()
        subgroup = dist.new_group([0])
        if rank.rank == 0:
            assert subgroup.name() == name
        dist.destroy_process_group()
    return name, [str(w.message) for w in caught if "mnnvl" in str(w.message) or "hooks" in str(w.message)]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("mnnvl", "custom"), ("cpu:mnnvl", "custom"), ("cpu:mnnvl,cuda:mnnvl", "custom"),
     ("cpu:gloo,cuda:mnnvl", "custom"), ("gloo", "gloo"), ("cpu:gloo", "gloo"), ("cpu:gloo,cuda:gloo", "gloo")],
)  # fmt: skip
def test_default_backend_is_set_in_every_form(ranks, backend, expected, capfd):
    assert ranks(default_backend_body, 2, args=(backend,), backend=None) == [(expected, [])] * 2
    assert "Could not find" not in (text := capfd.readouterr().out)
    assert "No backend of type" not in text


def wrong_options_body(rank: Rank) -> None:
    with pytest.raises(TypeError, match=r"pg_options of backend 'mnnvl': expected mnnvl_backend.Options, got dict"):
        dist.init_process_group("mnnvl", store=rank.store, rank=rank.rank, world_size=1, pg_options={})


def malformed_variable_body(rank: Rank) -> None:
    with pytest.raises(ValueError, match="MNNVL_STRATEGY: expected oneshot, twoshot or auto, got 'threeshot'"):
        rank.init()


def test_bad_options_are_the_groups_error(ranks):
    ranks(wrong_options_body, 1, backend=None)
    ranks(malformed_variable_body, 1, backend=None, env={"MNNVL_STRATEGY": "threeshot"})


# Options and environment.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"timeout": 5}, TypeError, r"Options.timeout: expected datetime.timedelta or None, got 5"),
        ({"timeout": timedelta(0)}, ValueError, "Options.timeout: expected a positive duration"),
        ({"workspace_bytes": "1M"}, TypeError, "Options.workspace_bytes: expected int or None, got '1M'"),
        ({"workspace_bytes": 10}, ValueError, "Options.workspace_bytes: expected at least 1048576 bytes, got 10"),
        ({"strategy": "ring"}, ValueError, "Options.strategy: expected one of 'oneshot', 'twoshot', 'auto'"),
        ({"multicast": "maybe"}, ValueError, "Options.multicast: expected True, False or 'auto', got 'maybe'"),
        ({"bootstrap": "mpi"}, ValueError, "Options.bootstrap: expected 'auto', 'nccl' or 'store', got 'mpi'"),
    ],
)
def test_options_name_the_argument(options, error, text):
    with pytest.raises(error, match=text):
        Options(**options)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MNNVL_STRATEGY", "ring", "oneshot, twoshot or auto"),
        ("MNNVL_MULTICAST", "yes", "0, 1 or auto"),
        ("MNNVL_BOOTSTRAP", "mpi", "nccl, store or auto"),
        ("MNNVL_WORKSPACE_BYTES", "12X", "bytes, at least 1M"),
        ("MNNVL_WORKSPACE_BYTES", "1K", "bytes, at least 1M"),
        ("MNNVL_BLOCKING_WAIT", "2", "0 or 1"),
    ],
)
def test_malformed_variables_are_errors(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}.*, got '{value}'"):
        config.read_environment({name: value})


def test_variables_are_read():
    assert config.read_environment({}) == config.Config()
    assert config.read_environment({"MNNVL_STRATEGY": "", "OTHER": "x"}) == config.Config()
    read = config.read_environment(
        {"MNNVL_STRATEGY": "TwoShot", "MNNVL_MULTICAST": "auto", "MNNVL_BOOTSTRAP": "store",
         "MNNVL_WORKSPACE_BYTES": "64M", "MNNVL_HOST_ID": "h", "MNNVL_BLOCKING_WAIT": "1"}
    )  # fmt: skip
    assert read == config.Config(Strategy.TWOSHOT, "auto", "store", 64 << 20, "h", True)


def test_unknown_variable_warns():
    with pytest.warns(UserWarning, match="MNNVL_STRATEGEY is not a variable of mnnvl_backend.*known: MNNVL_STRATEGY"):
        config.read_environment({"MNNVL_STRATEGEY": "oneshot"})


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [({}, True), ({"MNNVL_MULTICAST": "0"}, False), ({"MNNVL_MULTICAST": "1"}, True),
     ({"NCCL_NVLS_ENABLE": "0"}, False), ({"NCCL_NVLS_ENABLE": "2"}, True),
     ({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}, False), ({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "0"}, True),
     ({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "anything"}, False),
     ({"MNNVL_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}, False)],
)  # fmt: skip
def test_every_no_forbids_multicast(environ, allowed):
    assert config.merge(Options(), config.read_environment(environ)).multicast is allowed
    assert config.merge(Options(multicast=False), config.read_environment(environ)).multicast is False


def test_environment_goes_before_options():
    options = Options(timeout=timedelta(seconds=2), workspace_bytes=2 << 20, strategy="oneshot", bootstrap="nccl")
    merged = config.merge(options, config.Config(), timeout_ms=99)
    assert merged == config.Settings(2 << 20, Strategy.ONESHOT, True, "nccl", "", False, 2000)
    environ = {"MNNVL_STRATEGY": "auto", "MNNVL_WORKSPACE_BYTES": "3M", "MNNVL_BOOTSTRAP": "store"}
    merged = config.merge(options, config.read_environment(environ))
    assert (merged.strategy, merged.workspace_bytes, merged.bootstrap_code) == (Strategy.AUTO, 3 << 20, 1)
    assert config.merge(Options(), config.Config(), timeout_ms=99).timeout_ms == 99


def test_readme_has_the_table_of_variables():
    readme = (ROOT / "README.md").read_text()
    for variable in config.VARIABLES:
        assert f"| `{variable.name}` | {variable.expected} | {variable.default} | {variable.meaning} |" in readme


# Doctor and command line.


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


# What is pure in FlashInfer's API.


def test_select_strategy_at_the_threshold():
    limit = 64 * 1024 * 8 * 2
    assert Strategy.select_strategy(2, 1, limit // 4, torch.bfloat16) is Strategy.ONESHOT
    assert Strategy.select_strategy(2, 1, limit // 4 + 1, torch.bfloat16) is Strategy.TWOSHOT
    assert [s.value for s in Strategy] == [0, 1, 99]


@pytest.mark.parametrize(
    ("tp", "tokens", "hidden", "dtype", "strategy", "expected"),
    [(4, 3, 8, torch.float32, Strategy.ONESHOT, 3 * 8 * 4 * 4),
     (4, 3, 8, torch.float16, Strategy.TWOSHOT, 2 * 4 * 8 * 2),
     (3, 7, 5, torch.bfloat16, Strategy.TWOSHOT, 2 * 9 * 5 * 2),
     (2, 1, 8, torch.float32, Strategy.AUTO, 64),
     (2, 1 << 20, 8, torch.float32, Strategy.AUTO, 2 * (1 << 20) * 8 * 4),
     (2, 0, 8, torch.float32, Strategy.AUTO, 0)],
)  # fmt: skip
def test_required_buffer_size(tp, tokens, hidden, dtype, strategy, expected):
    assert Workspace.get_required_buffer_size_bytes(tp, tokens, hidden, dtype, strategy) == expected


def test_workspace_arguments():
    with pytest.raises(ValueError, match="max_num_tokens, hidden_dim and dtype must all be given"):
        Workspace(Mapping(), max_num_tokens=4)
    with pytest.raises(ValueError, match="buffer_size_in_bytes: expected 0 to 4294967295"):
        Workspace(Mapping(), buffer_size_in_bytes=1 << 32)
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'meta'"):
        Workspace(Mapping(), buffer_size_in_bytes=1024, device="meta")
    with pytest.raises(RuntimeError, match=r"comm_backend: none given.*init_process_group"):
        Workspace(Mapping(2, 0, tp_size=2), buffer_size_in_bytes=1024, device="cpu")


def test_mapping_places_every_rank_in_its_groups():
    for rank in range(24):
        m = Mapping(24, rank, 8, tp_size=4, cp_size=2, pp_size=3)
        assert (m.pp_rank * 2 + m.cp_rank) * 4 + m.tp_rank == rank
        for group, place in ((m.tp_group, m.tp_rank), (m.cp_group, m.cp_rank), (m.pp_group, m.pp_rank)):
            assert group[place] == rank
        assert (m.node_rank, m.local_rank) == divmod(rank, 8)
        assert Mapping.from_dict(m.to_dict()) == m
        assert hash(Mapping.from_dict(m.to_dict())) == hash(m)
    m = Mapping(16, 13, tp_size=8, pp_size=2, moe_tp_size=2, moe_ep_size=4)
    assert (m.moe_tp_group, m.moe_ep_group, m.pp_group) == ([9, 13], [12, 13, 14, 15], [5, 13])
    assert m.ep_experts(16) == [4, 5, 6, 7]
    assert Mapping(3, 1, pp_size=3).pp_layers(7) == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"world_size": 4, "tp_size": 2}, ValueError, "world_size: must be tp_size"),
        ({"world_size": 2, "rank": 2, "tp_size": 2}, ValueError, "rank: expected an int from 0 to 1, got 2"),
        ({"world_size": 4, "tp_size": 4, "moe_ep_size": 3}, ValueError, "tp_size: must be moe_tp_size"),
        ({"world_size": 2, "tp_size": 2, "attn_cp_size": 2}, ValueError, "attn_cp_size: must be 1"),
        ({"world_size": 8, "tp_size": 4, "cp_size": 2, "moe_ep_size": 4}, NotImplementedError, "expert parallelism"),
    ],
)
def test_mapping_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        Mapping(**arguments)
