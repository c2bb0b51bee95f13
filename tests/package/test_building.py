"""How the package is built, and the scripts that guard the source tree: what needs no compiler."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC_KNOWS = "80 86 89 90 100 103 120"


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of setup.py, which builds nothing meanwhile."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("MNNVL_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", "")  # setup.py puts a folder in front of it
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def choose(building: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """choose_archs on a machine with these GPUs and a toolkit that knows NVCC_KNOWS."""

    def run(*capabilities: str, known: str = NVCC_KNOWS) -> tuple[list[str], str]:
        answer = "\n".join(f"echo {capability}" for capability in capabilities)
        executable(tmp_path / "nvidia-smi", answer or "echo no devices were found >&2; exit 9")
        nvcc = executable(tmp_path / "nvcc", f"for arch in {known}; do echo compute_$arch; done")
        monkeypatch.setenv("PATH", str(tmp_path))
        chosen: tuple[list[str], str] = building.choose_archs(str(nvcc))
        return chosen

    return run


@pytest.mark.parametrize(
    ("capabilities", "archs", "left_out"),
    [
        ((), ["90", "100"], []),
        (("9.0",), ["90"], []),
        (("10.3", "9.0", "9.0"), ["90", "103"], []),
        (("8.6",), ["90", "100"], ["sm_86"]),
        (("8.6", "9.0"), ["90"], ["sm_86"]),
        (("7.5", "12.0", "8.9"), ["120"], ["sm_75", "sm_89"]),
        (("12.1",), ["120"], []),  # newer than the toolkit: by way of PTX
    ],
)
def test_kernels_are_built_for_the_gpus_present_that_can_run_them(choose, capabilities, archs, left_out):
    chosen, note = choose(*capabilities)
    assert chosen == archs
    assert all(arch in note for arch in left_out)
    assert ("CPU tensors" in note) == bool(left_out)


def test_a_toolkit_older_than_the_kernels_gives_none(choose):
    assert choose("9.0", known="75 80 86") == ([], "")


def test_the_notice_says_what_was_left_out(building):
    toolkit = building.Toolkit("/usr/bin/nvcc", "13.0", [], "", ["90"], "GPUs older than sm_90 are left out (sm_86)")
    assert "sm_90 (+ PTX)" in building.notice(toolkit)
    assert "left out (sm_86)" in building.notice(toolkit)


@pytest.mark.parametrize(("asked", "text"), [("86", "sm_90 or newer"), ("90;8.6", "expected"), (";", "expected")])
def test_architectures_that_were_asked_for(building, monkeypatch, asked, text):
    monkeypatch.setenv("MNNVL_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=text):
        building.choose_archs("nvcc")
    monkeypatch.setenv("MNNVL_CUDA_ARCHS", "90a, 100f")
    assert building.choose_archs("nvcc") == (["90a", "100f"], "")


def test_a_tree_without_kernels_is_named(building, tmp_path, monkeypatch):
    """nvcc is there and the .cu files are not: without this check the module would link and fail when loaded."""
    assert building.kernel_sources()
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").mkdir()
    incomplete = SimpleNamespace(**runpy.run_path(str(tmp_path / "setup.py")))
    with pytest.raises(SystemExit, match="incomplete"):
        incomplete.kernel_sources()


# The house rules' checker finds what it is for.


@pytest.fixture
def house(tmp_path, monkeypatch):
    """The problems of one file in an otherwise empty tree."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "check_house", raising=False)
    import check_house

    monkeypatch.setattr(check_house, "ROOT", tmp_path)
    for header in ("common/error.h", "driver/nccl.h", "kernels/kernels.h", "kernels/device/wait.cuh", "backend/work.h"):
        (tmp_path / "csrc" / header).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / header).touch()

    def problems(name: str, text: str) -> list[str]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return [f"{line}: {what}" for line, what in check_house.problems(path)]

    return problems


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("csrc/memory/a.cpp", '#include "driver/nccl.h"\n#include <vector>\n', None),
        ("csrc/driver/a.cpp", '\n#include "backend/work.h"\n', "2: driver may not include backend/work.h"),
        ("csrc/transport/a.cpp", '#include "kernels/kernels.h"\n', None),
        ("csrc/transport/a.cpp", '#include "kernels/device/wait.cuh"\n', "1: only kernels/kernels.h is visible"),
        ("csrc/cpu/a.cpp", '#include "kernels/kernels.h"\n', "1: cpu may not include"),
        ("csrc/cpu/a.cpp", "#include <torch/torch.h>\n", "1: torch header"),
        ("csrc/cpu/a.cpp", "// #include <torch/torch.h>\n", None),
        ("csrc/driver/a.h", "#include <cuda.h>\n", "1: CUDA header"),
        ("csrc/common/a.h", '#include "common/nowhere.h"\n', "1: .* is not a path"),
        ("csrc/backend/a.cpp", "void f() { g<<<1, 2>>>(); }\n", "1: kernel launch"),
        ("csrc/attic/a.cpp", "", "1: layer 'attic' is not known"),
        ("tests/native/a.cpp", "#include <ATen/ATen.h>\n", "1: torch header"),
        ("tests/native/a.cpp", '#include "backend/work.h"\n', "1: native may not include"),
        ("tests/native/bindings.cpp", "#include <pybind11/pybind11.h>\n", None),
    ],
)
def test_house_rules_of_includes(house, name, text, expected):
    found = house(name, text)
    assert len(found) == (expected is not None), found
    assert expected is None or re.search(expected, found[0]), found


def test_house_rules_of_lengths(house):
    def body(lines: int) -> str:
        return "  if (x) { y(); }\n" * lines

    inside = "namespace a {{\nclass B final : public C {{\n  int f(int x = {{}}) const override {{\n{}  }}\n}};\n}}\n"
    assert house("csrc/common/a.cpp", inside.format(body(78))) == []
    assert house("csrc/common/a.cpp", inside.format(body(79))) == ["3: function f has 81 lines; at most 80"]
    table = "const int kTable[] = {\n" + "  1,\n" * 100 + "};\n"  # data may be long
    assert house("csrc/common/a.cpp", table) == []
    assert house("csrc/common/a.cpp", "\n" * 401)[0].startswith("1: 401 lines")
    assert house("csrc/common/a.cpp", "// " + "x" * 118) == ["1: 121 columns; at most 120"]
    assert house("mnnvl_backend/a.py", "def f():\n" + "    pass\n" * 80) == ["1: function f has 81 lines; at most 80"]
