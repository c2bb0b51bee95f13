"""`mnnvl tune`, its file, and MNNVL_TUNING: what AUTO follows on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank

import mnnvl_backend
from mnnvl_backend import config, tuning
from mnnvl_backend.tools import tune

ROOT = Path(__file__).resolve().parents[2]


def file_of(folder: Path, limit: int, world_size: int = 2) -> str:
    path = folder / f"tuning-{limit}-{world_size}.json"
    tuning.write(path, tuning.Tuning({"cpu": {world_size: limit}}))
    return str(path)


def run_tune(ranks: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         "-m", "mnnvl_backend", "tune", "--device", "cpu", "--replays", "5", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip


def test_runs_add_to_one_file(tmp_path):
    path = tmp_path / "tuning.json"
    tuning.write(path, tuning.Tuning({"cuda": {2: 12345}, "cpu": {2: 1}}, {"cuda": {2: "kept"}}))
    done = run_tune(2, "--min-bytes", "1K", "--max-bytes", "3K", "--output", str(path))
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


def test_a_forced_strategy_leaves_nothing_to_compare():
    done = run_tune(2, MNNVL_STRATEGY="oneshot")
    assert done.returncode != 0
    assert "MNNVL_STRATEGY forces one strategy" in done.stderr


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
        ('{"format": "mnnvl tuning 9"}', "expected the format 'mnnvl tuning 1', got 'mnnvl tuning 9'"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {}}', "KeyError: 'measured'"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"tpu": {}}, "measured": {}}', "device type 'tpu'"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"73": 1}}, "measured": {}}', "world size 73"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"2": -1}}, "measured": {}}', "oneshot_bytes -1"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"2": true}}, "measured": {}}', "oneshot_bytes True"),
        ('{"format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": 7}, "measured": {}}', "AttributeError"),
    ],
)
def test_bad_files_are_errors(content, why, tmp_path):
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="MNNVL_TUNING: expected a file that `mnnvl tune` wrote: ") as raised:
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
    os.environ["MNNVL_TUNING"] = paths[rank.rank]
    with pytest.raises(ValueError, match="options differ") as raised:
        rank.init()
        dist.all_reduce(torch.ones(1))
    return str(raised.value)


def test_ranks_with_different_files_hear_of_it(ranks, tmp_path):
    paths = [file_of(tmp_path, limit) for limit in (1024, 2048)]
    for text in ranks(differing_body, 2, args=(paths,), backend=None):
        assert "rank 0 has" in text
        assert "MNNVL_TUNING with oneshot_bytes 1024; rank 1 has" in text
        assert text.rstrip(".").endswith("MNNVL_TUNING with oneshot_bytes 2048")


def test_the_file_is_for_people_too(tmp_path):
    assert json.loads(Path(file_of(tmp_path, 5)).read_text()) == {
        "format": "mnnvl tuning 1", "oneshot_bytes": {"cpu": {"2": 5}}, "measured": {},
    }  # fmt: skip
