"""From nothing to peer pointers, over simulated drivers: the real set-up code runs on every path that a machine without
a fabric, multicast or several hosts can't take. Ranks are threads; where it says processes, they are processes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from double import run_descriptor_exchange, run_fake_setup, run_host_setup

GRANULARITY, MULTICAST_GRANULARITY = 65536, 131072  # of the simulated driver

# What makes the plan; every rank gets the same.
PLANS: dict[str, dict[str, Any]] = {
    "fabric": {"clusters": ["rack"]},
    "fd": {"fabric_handles": ["not_permitted"]},
    "fabric over nccl": {"clusters": ["rack"], "bootstrap": "nccl"},
    "fabric by auto, nccl": {"clusters": ["rack"], "bootstrap": "auto"},
    "fd over nccl": {"bootstrap": "nccl"},
    "fd by auto": {"bootstrap": "auto"},
}


def run(**config: Any) -> dict[str, Any]:
    """A set-up and tear-down that, whatever its outcome, leaves nothing behind and does not dawdle."""
    result: dict[str, Any] = run_fake_setup(**config)
    assert result["leaks"] == {}
    assert result["descriptors_leaked"] == 0
    assert result["mappings_leaked"] == 0
    assert max(result["seconds"]) < 5
    return result


def succeed(**config: Any) -> dict[str, Any]:
    result = run(**config)
    assert result["errors"] == [""] * len(result["ok"])
    assert all(result["ok"])
    assert all(result["verified"])
    assert len(set(result["multicast"])) == 1
    return result


def fail_alike(**config: Any) -> str:
    """All ranks raise the same error; gives its text."""
    result = run(**config)
    assert not any(result["ok"])
    assert len(set(result["errors"])) == 1, result["errors"]
    assert len(set(result["error_kinds"])) == 1
    text: str = result["errors"][0]
    return text


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("plan", PLANS)
def test_sets_up(plan: str, world_size: int) -> None:
    result = succeed(world_size=world_size, **PLANS[plan])
    assert set(result["handle_types"]) == {plan.split()[0]}
    assert set(result["multicast"]) == {world_size > 1}
    assert set(result["bytes"]) == {MULTICAST_GRANULARITY}  # of the 100,000 asked for
    assert result["calls"].get("cuMulticastCreate", 0) == (world_size > 1)
    initialised = result["calls"].get("ncclCommInitRankConfig", 0)
    assert initialised == (world_size if "nccl" in plan and world_size > 1 else 0)
    assert result["calls"].get("ncclCommDestroy", 0) == initialised


def test_a_rack() -> None:
    hosts = [f"tray{rank // 4}" for rank in range(72)]
    succeed(world_size=72, host_ids=hosts, clusters=["rack"])


def test_without_multicast_sizes_follow_the_allocation_granularity() -> None:
    result = succeed(world_size=3, multicast_support=[1, 1, 0], bytes=GRANULARITY + 1)
    assert set(result["bytes"]) == {2 * GRANULARITY}
    assert not any(result["multicast"])
    assert all("rank 2" in problem for problem in result["multicast_problems"])


def test_the_slowest_device_counts() -> None:
    names = ["NVIDIA GB200", "NVIDIA GH200", "NVIDIA GB200"]  # of two kinds
    result = succeed(
        world_size=3, multiprocessors=[132, 78, 148], compute_capabilities=[100, 90, 103], device_names=names
    )
    assert set(result["min_multiprocessors"]) == {78}


# --- Who can share what with whom.


def test_hosts_in_one_clique_use_fabric_handles() -> None:
    result = succeed(world_size=4, host_ids=["a", "a", "b", "b"], clusters=["rack"], cliques=[7])
    assert set(result["handle_types"]) == {"fabric"}


@pytest.mark.parametrize(
    ("fabric", "missing"),
    [
        ({}, "rank 0's device is in no NVLink fabric cluster: the fabric cluster uuid is zero"),
        ({"clusters": ["rack", "rack", ""]}, "rank 2's device is in no NVLink fabric cluster"),
        ({"clusters": ["rack", "other", "rack"]}, "the devices are in 2 different NVLink cliques"),
        ({"clusters": ["rack"], "cliques": [1, 1, 2]}, "the devices are in 2 different NVLink cliques"),
        (
            {"clusters": ["rack"], "fabric_handles": ["yes", "not_permitted", "yes"]},
            "rank 1 can't export fabric handles",
        ),
        ({"clusters": ["rack"], "fabric_handles": ["yes", "no", "yes"]}, "rank 1 can't export fabric handles"),
    ],
)
@pytest.mark.parametrize("bootstrap", ["store", "nccl"])
def test_hosts_without_a_shared_fabric(fabric: dict[str, Any], missing: str, bootstrap: str) -> None:
    text = fail_alike(world_size=3, host_ids=["node-a", "node-a", "node-b"], bootstrap=bootstrap, **fabric)
    assert "spans hosts without a shared NVLink fabric" in text
    assert missing in text
    assert "2 hosts" in text
    rows = re.findall(r"^  rank (\d): .*\[host id (.*?)\]; fabric: .*; fabric handles: .*; fd handles: ", text, re.M)
    assert rows == [("0", "node-a"), ("1", "node-a"), ("2", "node-b")]


def test_a_permission_that_only_the_driver_denies_is_found_by_trying() -> None:
    result = succeed(world_size=2, clusters=["rack"], fabric_handles=["yes", "not_permitted"])
    assert set(result["handle_types"]) == {"fd"}
    text = fail_alike(world_size=2, clusters=["rack"], fabric_handles=["yes", "not_permitted"], host_ids=["a", "b"])
    assert re.search(r"rank 1 can't export fabric handles: cuMemCreate .* failed: .*\(800", text)
    assert "IMEX channel" in text


def test_a_zero_cluster_uuid_is_no_cluster() -> None:
    # All ranks report the same uuid, of zeros, and a working fabric export: on one host that means descriptors.
    result = succeed(world_size=2, clusters=[""])
    assert set(result["handle_types"]) == {"fd"}


def test_no_handle_type_at_all() -> None:
    text = fail_alike(world_size=2, fd_handles=[1, 0])
    assert "rank 1 can't export descriptors: the device does not support it" in text


def test_one_device_for_two_ranks() -> None:
    text = fail_alike(world_size=3, devices=[4, 5, 4], bootstrap="nccl")
    assert "ranks 0 and 2 share one device" in text
    assert 'bootstrap="store"' in text
    result = succeed(world_size=3, devices=[4, 5, 4], bootstrap="store")
    assert not any(result["multicast"])  # which wants distinct devices
    assert "cuMulticastCreate" not in result["calls"]


def test_an_older_gpu_is_named_and_refused_before_anything_is_allocated() -> None:
    text = fail_alike(world_size=3, compute_capabilities=[90, 90, 89], device_names=["NVIDIA H200", "", "NVIDIA L40S"])
    assert re.match(r"finding out what the device can do failed on rank 2 \(host .*, device 2\): ", text)
    assert "device 2 (NVIDIA L40S) has compute capability 8.9, and mnnvl needs 9.0 or newer on every rank" in text
    assert "cuMemCreate" not in run(world_size=1, compute_capabilities=[80])["calls"]


def test_without_nvml_ranks_stay_on_their_host() -> None:
    missing = {"world_size": 2, "clusters": ["rack"], "nvml_problems": ["", "NVML can't be loaded: no such file"]}
    assert set(succeed(**missing)["handle_types"]) == {"fd"}
    text = fail_alike(**missing, host_ids=["a", "b"])
    assert "rank 1's device is in no NVLink fabric cluster: NVML can't be loaded: no such file" in text


def test_mig_instances_serve_ranks_that_share_one() -> None:
    name = "NVIDIA H200 MIG 1g.18gb"
    text = fail_alike(world_size=3, device_names=["NVIDIA H200", name, "NVIDIA H200"])
    assert text.startswith("mapping the ranks' memory failed on rank 0 (")
    assert "rank 1's device is a MIG instance, which shares memory with no other device" in text
    assert not any(succeed(world_size=3, device_names=[name], devices=[4])["multicast"])
    assert "MIG" not in fail_alike(world_size=2, faults=[(1, "cuMemMap", 1, 2)])


def test_an_error_is_of_its_kind() -> None:
    assert set(run(world_size=2, host_ids=["a", "b"])["error_kinds"]) == {"unsupported"}
    assert set(run(world_size=2, faults=[(0, "cuMemMap", 1, 2)])["error_kinds"]) == {"system"}
    assert set(run(world_size=2, bytes=0)["error_kinds"]) == {"invalid_argument"}


# --- Any call may fail, on any rank.


def faults_of(plan: str, world_size: int, rank: int) -> list[tuple[int, str, int, int]]:
    """Every call that `rank` makes in a clean run, as one that fails."""
    calls = succeed(world_size=world_size, **PLANS[plan])["calls_by_rank"][rank]
    return [(rank, function, nth + 1, 999) for function, count in calls.items() for nth in range(count)]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_a_failing_call_fails_or_spares_all_ranks_alike(plan: str, rank: int) -> None:
    spared: set[str] = set()
    for fault in faults_of(plan, 3, rank):
        result = run(world_size=3, faults=[fault], **PLANS[plan])
        if all(result["ok"]):
            assert all(result["verified"]), fault
            spared.add(fault[1])
            continue
        assert not any(result["ok"]), fault
        assert len(set(result["errors"])) == 1, (fault, result["errors"])
        text = result["errors"][0]
        assert f"rank {rank}" in text, fault
        # What is asked for is the outcome of the call before.
        assert fault[1].replace("ncclCommGetAsyncError", "nccl") in text, fault
        assert "999" in text, fault
    # What may go wrong without harm: probes of one of two handle types, everything of multicast, every release.
    harmless = re.compile(
        r"cuMulticast|cuMemCreate|cuMemExport|cuMemImport|cuMemAddressReserve|cuMemMap|cuMemSetAccess|"
        r"cuMemRelease|cuMemUnmap|cuMemAddressFree|cuMemFree|cuStreamDestroy|ncclComm(Destroy|Abort|Finalize)|"
        r"cuDeviceGet$|cuMemGetAllocationGranularity"
    )
    assert all(harmless.match(function) for function in spared), spared


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("finding out what the device can do", "cuDeviceGetUuid"),
        ("finding out what the device can do", "cuMemGetAllocationGranularity"),
        ("mapping the ranks' memory", "cuMemImportFromShareableHandle"),
        ("mapping the ranks' memory", "cuMemAddressReserve"),
        ("mapping the ranks' memory", "cuMemMap"),
        ("mapping the ranks' memory", "cuMemSetAccess"),
        ("preparing the NCCL exchange", "cuMemAlloc"),
        ("preparing the NCCL exchange", "cuStreamCreate"),
        ("creating the NCCL communicator", "ncclCommInitRankConfig"),
        ("creating the NCCL communicator", "ncclCommGetAsyncError"),
        ("exchanging memory handles over NCCL", "ncclAllGather"),
        ("exchanging memory handles over NCCL", "cuMemcpyHtoD"),
        ("exchanging memory handles over NCCL", "cuStreamQuery"),
        ("exchanging memory handles over NCCL", "cuMemcpyDtoH"),
    ],
)
def test_the_root_cause_is_told_on_every_rank(stage: str, fault: str) -> None:
    text = fail_alike(world_size=4, bootstrap="nccl", clusters=["rack"], faults=[(3, fault, 1, 2)])
    assert text.startswith(f"{stage} failed on rank 3 (host ")
    assert ", device 3" in text
    assert fault.replace("ncclCommGetAsyncError", "ncclCommInitRankConfig") in text


def test_out_of_memory_on_one_rank() -> None:
    # The first two creations are the probes.
    text = fail_alike(world_size=4, clusters=["rack"], faults=[(1, "cuMemCreate", 3, 2)])
    assert text.startswith("allocating and exporting the buffer failed on rank 1 (")
    assert f"cuMemCreate of {MULTICAST_GRANULARITY} bytes" in text


def test_the_lowest_of_several_failing_ranks_is_named() -> None:
    assert "failed on rank 1 (" in fail_alike(world_size=4, faults=[(3, "cuMemMap", 1, 2), (1, "cuMemMap", 2, 2)])


def test_a_reservation_that_gives_null() -> None:
    assert "null address" in fail_alike(world_size=2, faults=[(1, "cuMemAddressReserve", 1, 0)])


# --- Multicast is an optimisation.


@pytest.mark.parametrize("plan", ["fabric", "fd"])
@pytest.mark.parametrize(
    "fault",
    [
        (1, "cuMulticastGetGranularity", 1, 999),
        (0, "cuMulticastCreate", 1, 801),
        (0, "cuMulticastCreate", 1, 0),  # "succeeds", with a null object
        (2, "cuMulticastAddDevice", 1, 999),
        (1, "cuMulticastBindMem", 1, 2),
        (1, "cuMemImportFromShareableHandle", 3, 999),  # the first two are the peers' memory
        (1, "cuMemImportFromShareableHandle", 3, 0),
        (2, "cuMemAddressReserve", 4, 2),  # the first three are the ranks' memory
        (2, "cuMemAddressReserve", 4, 0),
        (2, "cuMemMap", 4, 2),
        (0, "cuMemSetAccess", 4, 2),
    ],
)
def test_multicast_that_fails_falls_back_to_unicast(fault: tuple[int, str, int, int], plan: str) -> None:
    result = succeed(world_size=3, faults=[fault], **PLANS[plan])
    assert not any(result["multicast"])
    assert len(set(result["multicast_problems"])) == 1
    assert f"failed on rank {fault[0]} (" in result["multicast_problems"][0]


def test_multicast_that_does_not_reach_a_rank_falls_back_to_unicast() -> None:
    result = succeed(world_size=4, multicast_lost_rank=2)
    assert not any(result["multicast"])
    assert "multicast self-test failed on rank 2" in result["multicast_problems"][0]


def test_one_rank_with_multicast_off_is_enough() -> None:
    result = succeed(world_size=4, multicast_off_ranks=[2])
    assert not any(result["multicast"])
    assert not [function for function in result["calls"] if function.startswith("cuMulticast")]
    assert all("rank 2: switched off" in problem for problem in result["multicast_problems"])


# --- The self-test.


@pytest.mark.parametrize("world_size", [2, 5])
@pytest.mark.parametrize("plan", ["fabric", "fd"])
def test_a_mapping_that_leads_nowhere_names_the_pair(plan: str, world_size: int) -> None:
    text = fail_alike(world_size=world_size, corruptions=[(1, 0, "lost")], **PLANS[plan])
    assert text.startswith("self-test failed on rank 0 (")
    assert re.search(r"what rank 1 \(.*\) stored through its mapping of rank 0 is not there", text)
    assert "nothing arrived" in text


@pytest.mark.parametrize("plan", ["fabric", "fd"])
def test_a_mapping_that_leads_elsewhere_names_the_pair(plan: str) -> None:
    text = fail_alike(world_size=4, corruptions=[(3, 1, "misrouted")], **PLANS[plan])
    assert text.startswith("self-test failed on rank ")
    assert "what rank 3 wrote for rank 1" in text


# --- Nothing stays behind.


@pytest.mark.parametrize("plan", PLANS)
def test_a_hundred_set_ups_leave_nothing(plan: str) -> None:
    succeed(world_size=3, repeats=100, **PLANS[plan])


def test_a_hundred_failures_leave_nothing() -> None:
    faults = [(0, "cuMemMap", 2, 2), (1, "cuMulticastBindMem", 1, 2), (2, "cuMemImportFromShareableHandle", 2, 2)]
    for turn in range(100):
        run(world_size=3, faults=[faults[turn % 3]], **PLANS["fd" if turn % 2 else "fabric"])
    for _ in range(100):
        run(world_size=2, corruptions=[(0, 1, "lost")])


# --- Passing descriptors.


@pytest.mark.parametrize("scenario", ["well", "none", "strangers"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_descriptors_arrive(world_size: int, scenario: str) -> None:
    result = run_descriptor_exchange(world_size, scenario, 2000)
    assert result["errors"] == [""] * world_size
    assert all(result["verified"])
    assert result["descriptors_leaked"] == 0


def test_descriptors_among_a_whole_rack() -> None:
    result = run_descriptor_exchange(72, "well", 20000)
    assert result["errors"] == [""] * 72
    assert all(result["verified"])
    assert result["descriptors_leaked"] == 0


def test_a_peer_whose_socket_is_gone_is_noticed_at_once() -> None:
    result = run_descriptor_exchange(4, "absent", 10000)
    others = [rank for rank in range(4) if rank != 1]
    assert {result["error_kinds"][rank] for rank in others} == {"peer_failed"}
    assert any("rank 1" in result["errors"][rank] for rank in others)
    assert max(result["seconds"]) < 5
    assert result["descriptors_leaked"] == 0


def test_a_silent_peer_is_named_at_the_deadline() -> None:
    result = run_descriptor_exchange(3, "silent", 500)
    for rank in (0, 2):
        assert result["error_kinds"][rank] == "timeout"
        assert "rank(s) 1 within 500 ms" in result["errors"][rank]
        assert 0.4 < result["seconds"][rank] < 3
    assert result["descriptors_leaked"] == 0


# --- Host segments, ranks as threads.


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_host_segments(world_size: int) -> None:
    result = run_host_setup(world_size=world_size, bytes=123457, repeats=3)
    assert result["errors"] == [""] * world_size
    assert all(result["verified"])
    assert result["bytes"] == [123457] * world_size
    assert result["descriptors_leaked"] == 0
    assert result["mappings_leaked"] == 0


def test_host_segments_on_two_hosts() -> None:
    result = run_host_setup(world_size=3, host_ids=["node-a", "node-b", "node-a"])
    assert len(set(result["errors"])) == 1
    text = result["errors"][0]
    assert "CPU tensors are served within one host" in text
    assert re.findall(r"rank (\d): .*\[host id (.*?)\]", text) == [("0", "node-a"), ("1", "node-b"), ("2", "node-a")]
    assert set(result["error_kinds"]) == {"unsupported"}
