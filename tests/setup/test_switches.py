"""Where the options say that multicast objects are forbidden, no rank makes one, and NCCL isn't let to either. The
set-up reads no environment and writes none."""

from __future__ import annotations

import ctypes
import fcntl
from typing import Any

import pytest
from double import exported_descriptor_flags, run_fake_setup

SWITCHES = ["MNNVL_MULTICAST=0", "TORCH_SYMM_MEM_DISABLE_MULTICAST=1", "NCCL_NVLS_ENABLE=0"]
NVLS_OFF = "NCCL_NVLS_ENABLE=0"
RACK: dict[str, Any] = {"world_size": 3, "clusters": ["rack"]}  # by auto: fabric handles over NCCL


def set_up(**config: Any) -> dict[str, Any]:
    result: dict[str, Any] = run_fake_setup(**config)
    assert result["leaks"] == {}
    assert result["descriptors_leaked"] == 0
    return result


def succeed(**config: Any) -> dict[str, Any]:
    result = set_up(**config)
    assert result["errors"] == [""] * config["world_size"]
    assert all(result["verified"])
    return result


def calls_of(result: dict[str, Any], prefix: str) -> list[str]:
    return [function for function in result["calls"] if function.startswith(prefix)]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("switch", SWITCHES)
def test_one_ranks_switch_forbids_all(switch: str, rank: int) -> None:
    result = succeed(**RACK, bootstrap="store", multicast_forbidden=[switch if r == rank else "" for r in range(3)])
    assert calls_of(result, "cuMulticast") == []
    assert not any(result["multicast"])
    assert set(result["multicast_problems"]) == {f"rank {rank}: switched off by {switch}"}


def test_without_a_switch_there_is_multicast_and_nccl() -> None:
    result = succeed(**RACK, bootstrap="auto")
    assert all(result["multicast"])
    assert calls_of(result, "ncclCommInitRankConfig")


@pytest.mark.parametrize("by", ["all", "one"])
@pytest.mark.parametrize("switch", SWITCHES[:2])
def test_nccl_that_may_make_multicast_objects_is_left_alone(switch: str, by: str) -> None:
    forbidden = [switch] * 3 if by == "all" else ["", switch, ""]
    result = succeed(**RACK, bootstrap="auto", multicast_forbidden=forbidden)
    assert calls_of(result, "nccl") == []
    assert calls_of(result, "cuMulticast") == []

    result = set_up(**RACK, bootstrap="nccl", multicast_forbidden=forbidden)
    assert not any(result["ok"])
    assert set(result["error_kinds"]) == {"unsupported"}
    assert len(set(result["errors"])) == 1
    text = result["errors"][0]
    assert f"multicast objects are forbidden (rank {0 if by == 'all' else 1}: {switch})" in text
    assert "unless NCCL_NVLS_ENABLE=0, which rank 0 has not set" in text
    assert "set it on every rank" in text
    assert calls_of(result, "nccl") == []


@pytest.mark.parametrize("bootstrap", ["nccl", "auto"])
@pytest.mark.parametrize("first", ["", *SWITCHES[:2]])
def test_nccl_that_was_told_is_used(first: str, bootstrap: str) -> None:
    forbidden = ", ".join(filter(None, [first, NVLS_OFF]))
    result = succeed(**RACK, bootstrap=bootstrap, multicast_forbidden=[forbidden])
    assert calls_of(result, "ncclCommInitRankConfig")
    assert calls_of(result, "cuMulticast") == []


def test_nccl_that_was_told_on_some_ranks_only_is_not() -> None:
    result = set_up(**RACK, bootstrap="nccl", multicast_forbidden=[NVLS_OFF, "", NVLS_OFF])
    assert set(result["error_kinds"]) == {"unsupported"}
    assert "which rank 1 has not set" in result["errors"][0]


@pytest.mark.parametrize("bootstrap", ["store", "nccl", "auto"])
def test_the_environment_is_neither_read_nor_written(bootstrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    for switch in SWITCHES:
        monkeypatch.setenv(*switch.split("="))
    assert all(succeed(**RACK, bootstrap=bootstrap)["multicast"])
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    set_up(**RACK, bootstrap=bootstrap, multicast_forbidden=["MNNVL_MULTICAST=0"])
    assert getenv(b"NCCL_NVLS_ENABLE") == b"1"


def test_exported_descriptors_are_closed_on_exec() -> None:
    """The simulated driver gives them, like the real one, without the flag."""
    assert exported_descriptor_flags() & fcntl.FD_CLOEXEC
