"""Import, registration, the compiled module, the default backend of groups."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank

import mnnvl_backend
from mnnvl_backend import Mapping, compiled, registration, version
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
@pytest.mark.parametrize(
    "first",
    [
        "torch",
        "mnnvl_backend",
        "mnnvl_backend.registration",
        "mnnvl_backend.flashinfer.allreduce",
        "mnnvl_backend.flashinfer.comm",
    ],
)
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
assert "mnnvl_backend.flashinfer.workspace" not in sys.modules or "flashinfer" in {first!r}
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
        compiled.load_compiled()


def stand_in(monkeypatch, built_with: str | None) -> types.ModuleType:
    """A compiled module that says it was built with some torch, or doesn't say; nothing else of it may be touched."""
    module = types.ModuleType("mnnvl_backend._C")
    module.build_info = lambda: {"cuda": False} | ({} if built_with is None else {"torch": built_with})
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n, *a: module if n == module.__name__ else real(n, *a))
    return module


@pytest.mark.parametrize("running", ["2.13.0+cpu", "2.13.2", "2.13.0a0+git1234", "2.13.0.dev20260101+cu130"])
@pytest.mark.parametrize("built", ["2.13.0", "2.13.1+cu130", "2.13.0a0", "", None])
def test_compiled_module_of_this_torch_or_unknown_is_taken(monkeypatch, running, built):
    monkeypatch.setattr(torch, "__version__", running)
    module = stand_in(monkeypatch, built)
    assert compiled.load_compiled() is module


@pytest.mark.parametrize(
    ("built", "running"), [("2.12.1", "2.13.0"), ("2.14.0", "2.13.0+cu130"), ("3.13.0", "2.13.0"), ("2.1.0", "2.13.0")]
)
def test_compiled_module_of_another_torch_is_refused_by_whoever_wants_it(monkeypatch, built, running):
    monkeypatch.setattr(torch, "__version__", running)
    stand_in(monkeypatch, built)
    text = rf"built with torch {re.escape(built)} .*this is torch {re.escape(running)}.*pip install"
    with pytest.raises(RuntimeError, match=text):
        compiled.load_compiled()
    options = types.SimpleNamespace(store=None, group_rank=0, group_size=1, timeout=dist.default_pg_timeout)
    with pytest.raises(RuntimeError, match=text):
        registration.create(options, None)
    with pytest.raises(RuntimeError, match=text):
        Workspace(Mapping(), buffer_size_in_bytes=1 << 16, device="cpu")


def test_the_compiled_module_here_was_built_with_this_torch():
    """The real one, loaded afresh; a key that is missing would make the check above idle."""
    assert compiled.built_for_torch(compiled.load_compiled()).split(".")[:2] == torch.__version__.split(".")[:2]


def test_version_is_the_trees_else_the_installed_ones(monkeypatch, tmp_path):
    tree = tmp_path / "tree"
    (tree / "mnnvl_backend").mkdir(parents=True)
    monkeypatch.setattr(version, "__file__", str(tree / "mnnvl_backend" / "version.py"))
    monkeypatch.setattr(version.metadata, "version", lambda name: f"installed {name}")
    assert version.version() == "installed mnnvl-backend"
    (tree / "VERSION").write_text("7.8.9\n")
    assert version.version() == "installed mnnvl-backend"  # somebody else's file beside an installed package
    (tree / "pyproject.toml").touch()
    assert version.version() == "7.8.9"


def test_version_costs_nothing_at_import():
    code = "import sys, torch, mnnvl_backend as m; print('mnnvl_backend.version' in sys.modules, m.__version__)"
    before, value = python(code).split()
    assert (before, value) == ("False", version.version())


def test_lazy_names():
    assert set(mnnvl_backend.__all__) <= set(dir(mnnvl_backend))
    assert set(mnnvl_backend.__all__) == set(mnnvl_backend._LAZY)
    for name in mnnvl_backend.__all__:
        assert getattr(getattr(mnnvl_backend, name), "__name__", name) == name  # a constant has none
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


def device_default_body(rank: Rank) -> None:
    """A default group whose backend torch is to choose, which DDP asks for its default."""
    defaults = dist.Backend.default_device_backend_map
    before = dict(defaults)
    defaults.update(cpu="mnnvl", cuda="mnnvl")
    try:
        rank.init("undefined")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2).to(rank.device))
        model(torch.ones(1, 3, device=rank.device)).sum().backward()
        assert dist.group.WORLD.name() == dist.new_group().name() == "custom"
        assert type(dist.group.WORLD._get_backend(rank.device)).__name__ == "ProcessGroupMNNVL"
    finally:
        defaults.clear()
        defaults.update(before)


def test_can_be_the_default_of_a_device(ranks):
    """As docs/libraries.md says of libraries that name no backend, or torch's default for the device."""
    ranks(device_default_body, 2, "cuda" if torch.cuda.is_available() else "cpu", backend=None)


def wrong_options_body(rank: Rank) -> None:
    with pytest.raises(TypeError, match=r"pg_options of backend 'mnnvl': expected mnnvl_backend.Options, got dict"):
        dist.init_process_group("mnnvl", store=rank.store, rank=rank.rank, world_size=1, pg_options={})


def malformed_variable_body(rank: Rank) -> None:
    with pytest.raises(ValueError, match="MNNVL_STRATEGY: expected oneshot, twoshot or auto, got 'threeshot'"):
        rank.init()


def test_bad_options_are_the_groups_error(ranks):
    ranks(wrong_options_body, 1, backend=None)
    ranks(malformed_variable_body, 1, backend=None, env={"MNNVL_STRATEGY": "threeshot"})
