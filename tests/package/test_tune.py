"""`mnnvl tune`, its file, and MNNVL_TUNING: what AUTO follows on every rank."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from torchrun import torchrun

import mnnvl_backend
from mnnvl_backend import config, tuning
from mnnvl_backend.tools import cli, tune


def file_of(folder: Path, limit: int, world_size: int = 2) -> str:
    path = folder / f"tuning-{limit}-{world_size}.json"
    tuning.write(path, tuning.Tuning({"cpu": {world_size: limit}}))
    return str(path)


def test_runs_add_to_one_file(tmp_path):
    path = tmp_path / "tuning.json"
    tuning.write(path, tuning.Tuning({"cuda": {2: 12345}, "cpu": {2: 1}}, {"cuda": {2: "kept"}}))
    done = torchrun(
        2, "-m", "mnnvl_backend", "tune", "--device", "cpu", "--replays", "5", "--min-bytes", "1K", "--max-bytes", "3K",
        "--output", str(path), MNNVL_STRATEGY="", MNNVL_TUNING="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = tuning.read(path)
    assert written.oneshot_bytes["cuda"] == {2: 12345}
    assert written.measured["cuda"] == {2: "kept"}
    limit = written.oneshot_bytes["cpu"][2]
    assert limit in (0, 1024, 1536, 2048, 3072)
    assert f"one shot: up to {limit} bytes with 2 ranks on cpu" in done.stdout
    times = written.measured["cpu"][2]["microseconds"]
    assert list(times) == ["oneshot", "twoshot", "auto"]
    assert all(list(by_size) == ["1024", "1536", "2048", "3072"] for by_size in times.values())
    assert list(tmp_path.iterdir()) == [path]
    assert config.read_environment({"MNNVL_TUNING": str(path)}).tuning == written


def test_a_forced_strategy_leaves_nothing_to_compare(monkeypatch):
    monkeypatch.setenv("MNNVL_STRATEGY", "oneshot")
    with pytest.raises(SystemExit, match="MNNVL_STRATEGY forces one strategy"):
        cli.main(["tune", "--device", "cpu"])


@pytest.mark.parametrize(
    ("times", "limit"),
    [
        ([(1, 5.0, 9.0), (2, 6.0, 9.0), (4, 20.0, 10.0)], 2),
        ([(1, 5.0, 9.0), (2, 6.0, 9.0)], 2),
        ([(1, 9.0, 5.0), (2, 9.0, 6.0)], 0),
        ([(1, 5.0, 9.0), (2, 9.1, 9.0), (4, 8.0, 10.0), (8, 30.0, 10.0)], 4),  # one noisy point
        ([(1, 5.0, 9.0), (2, 18.0, 9.0), (4, 8.0, 9.0), (8, 30.0, 10.0)], 1),
    ],
)
def test_the_limit_costs_least_over_all_sizes(times, limit):
    assert tune.best_limit(times) == limit


def test_sizes_are_powers_of_two_and_the_middles():
    assert tune.sizes_between(1024, 4096) == [1024, 1536, 2048, 3072, 4096]
    assert tune.sizes_between(1025, 1500) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format'"),
        ('{"format": "mnnvl tuning 9"}', "of the format 'mnnvl tuning 9', not 'mnnvl tuning 1'"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {}}', "KeyError: 'measured'"),
        (
            '{"format": "mnnvl tuning 1", "oneshot_bytes": {"tpu": {}}, "measured": {}}',
            "device type: expected cpu or cuda, got 'tpu'",
        ),
        (
            '{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"73": 1}}, "measured": {}}',
            "world size: expected an integer from 2 to 72, got '73'",
        ),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"02": 1}}, "measured": {}}', "got '02'"),
        (
            '{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"2": -1}}, "measured": {}}',
            "expected an integer from 0 to 1099511627775, got -1",
        ),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"2": true}}, "measured": {}}', "got True"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": 7}, "measured": {}}', "AttributeError"),
    ],
)
def test_bad_files_are_errors(content, why, tmp_path):
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="MNNVL_TUNING: expected a file that `mnnvl tune` wrote, got ") as raised:
        config.read_environment({"MNNVL_TUNING": str(path)})
    assert why in str(raised.value)
    assert str(path) in str(raised.value)


def algorithms_body(rank: Rank, path: str) -> dict[str, int]:
    os.environ["MNNVL_TUNING"] = path
    rank.init()
    for numel in (256, 1 << 20):  # 1 KiB and 4 MiB
        x = torch.full((numel,), float(rank.rank))
        dist.all_reduce(x)
        assert bool((x == sum(range(rank.world_size))).all())
    taken: dict[str, int] = mnnvl_backend.stats()["algorithms"]
    return taken


@pytest.mark.parametrize(
    ("limit", "measured_with", "taken"),
    [
        (0, 2, {"cpu_twoshot": 2}),
        (4 << 20, 2, {"cpu_oneshot": 2}),
        (0, 3, {"cpu_oneshot": 1, "cpu_twoshot": 1}),  # the table's
    ],
)
def test_auto_follows_what_was_measured_with_so_many_ranks(limit, measured_with, taken, ranks, tmp_path):
    path = file_of(tmp_path, limit, measured_with)
    assert ranks(algorithms_body, 2, args=(path,), backend=None) == [taken] * 2


def differing_body(rank: Rank, paths: list[str]) -> str:
    os.environ["MNNVL_TUNING"] = paths[rank.rank]  # empty: as if unset
    with pytest.raises(ValueError, match="options differ") as raised:
        rank.init()
        dist.all_reduce(torch.ones(1))
    return str(raised.value)


@pytest.mark.parametrize("other", [2048, None])
def test_ranks_with_different_files_hear_of_it(other, ranks, tmp_path):
    paths = [file_of(tmp_path, 1024), file_of(tmp_path, other) if other else ""]
    for text in ranks(differing_body, 2, args=(paths,), backend=None):
        zeroth, first = text.split("rank 0 has ")[1].split("; rank 1 has ")
        assert zeroth.endswith("MNNVL_TUNING with oneshot_bytes 1024")
        assert first.endswith("MNNVL_TUNING with oneshot_bytes 2048") if other else "MNNVL_TUNING" not in first


def workspace_body(rank: Rank, paths: list[str]) -> None:
    os.environ["MNNVL_TUNING"] = paths[rank.rank]
    rank.init("gloo")
    workspace = mnnvl_backend.MNNVLAllReduceFusionWorkspace(
        mnnvl_backend.Mapping(world_size=2, rank=rank.rank, tp_size=2), 8, 1024, torch.float32, device=rank.device
    )
    x = torch.full((4, 1024), float(rank.rank + 1))
    assert bool((mnnvl_backend.trtllm_mnnvl_allreduce(x, workspace, False) == 3).all())
    workspace.destroy()


def test_a_workspace_goes_by_its_own_rule_and_no_file(ranks, tmp_path):
    ranks(workspace_body, 2, args=([file_of(tmp_path, 0), ""],), backend=None)


def test_no_limit_below_what_was_measured():
    tune.check_range(0, [1024, 1536])
    tune.check_range(65536, [65536, 98304])
    with pytest.raises(SystemExit, match="two shots win from 65536 bytes on: measure smaller tensors too"):
        tune.check_range(0, [65536, 98304])


@pytest.mark.parametrize("where", ["no/such/folder/file", "other.json"])
def test_output_is_looked_at_before_anything_is_measured(where, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    tune.check_output(None)
    tune.check_output(str(tmp_path / "new.json"))
    with pytest.raises(SystemExit, match="--output: expected a file .*, got ") as raised:
        tune.check_output(str(tmp_path / where))
    assert str(tmp_path / where) in str(raised.value)


def test_the_file_is_for_people_too(tmp_path):
    assert json.loads(Path(file_of(tmp_path, 5)).read_text()) == {
        "format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"2": 5}}, "measured": {},
    }  # fmt: skip
