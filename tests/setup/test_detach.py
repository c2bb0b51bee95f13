"""A symmetric buffer giving its memory back, over simulated drivers: what errors say, and the switches. That every call
may fail, on every plan, is tested natively (tests/native/test_setup.cpp)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from double import run_fake_setup


def sleep(**config: Any) -> dict[str, Any]:
    """One sleep of three ranks, which ends well, at the second try if need be; nothing is left."""
    defaults = {"world_size": 3, "sleeps": 1, "timeout_ms": 20000, "fabric_handles": ["not_permitted"]}
    result: dict[str, Any] = run_fake_setup(**{**defaults, **config})
    assert result["errors"] == [""] * len(result["ok"])
    assert all(result["verified"])
    assert all(result["addresses_kept"])
    assert set(result["asleep"]) == {"reservations"}  # addresses, and nothing else
    assert len(set(result["sleep_errors"])) == 1
    for what in ("leaks", "descriptors_leaked", "mappings_leaked"):
        assert not result[what]
    return result


# The nth call of a function on rank 2, the first of a sleep, and what all ranks say.
FAILURES = {
    "unmap": ("cuMemUnmap", 1, "giving the buffer's memory back failed on rank 2 .*cuMemUnmap of"),
    "allocate": ("cuMemCreate", 4, "allocating and exporting the buffer failed on rank 2 .*cuMemCreate of"),
    "map": ("cuMemMap", 5, "mapping the ranks' memory failed on rank 2 .*memory of rank 0 .*cuMemMap of"),
    "bind": ("cuMulticastBindMem", 2, "binding memory to the multicast object failed on rank 2 .*cuMulticastBindMem"),
}


@pytest.mark.parametrize("stage", FAILURES)
def test_a_failure_is_told_to_all(stage: str) -> None:
    function, nth, text = FAILURES[stage]
    result = sleep(faults=[(2, function, nth, 2)])
    assert re.match(text, result["sleep_errors"][0], re.S), result["sleep_errors"][0]
    assert all(result["multicast"])


def test_multicast_comes_back_or_nothing_does() -> None:
    """Launches that were captured hold its address, so there is no way back to unicast."""
    result = sleep(faults=[(0, "cuMulticastCreate", 2, 801)])
    assert "cuMulticastCreate" in result["sleep_errors"][0]
    assert all(result["multicast"])
    assert result["calls"]["cuMulticastCreate"] == 3  # at set-up, the one that failed, and the second try


@pytest.mark.parametrize("off", [{"multicast_forbidden": ["", "NCCL_NVLS_ENABLE=0", ""]}, {"multicast_off_ranks": [1]}])
def test_without_multicast_none_is_made(off: dict[str, Any]) -> None:
    result = sleep(sleeps=3, **off)
    assert not any(result["multicast"])
    assert result["sleep_errors"][0] == ""
    assert not any("cuMulticast" in function for function in result["calls"])


def test_a_set_up_that_fell_back_to_unicast_stays_so() -> None:
    result = sleep(faults=[(1, "cuMulticastBindMem", 1, 999)], sleeps=2)
    assert not any(result["multicast"])
    assert result["calls"]["cuMulticastCreate"] == 1
