"""`mnnvl bench`: every operation beside a peer, verified before it is timed; tables and JSON that others read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from torchrun import torchrun

from mnnvl_backend.tools import bench, bench_picture, cli, launch
from mnnvl_backend.tools.bench_operations import OPERATIONS
from mnnvl_backend.tools.bench_peers import Group, Prepared
from mnnvl_backend.tools.bench_results import Point, Results
from mnnvl_backend.tools.launch import Place

PICTURES = importlib.util.find_spec("matplotlib") is not None


def run_bench(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return torchrun(ranks, "-m", "mnnvl_backend", "bench", *arguments)


def bench_every(tmp_path: Path, device: str, ranks: int, names: list[str], only: str) -> None:
    done = run_bench(ranks, "--device", device, "--operation", ",".join(names), "--only", only, "--replays", "5",
                     "--max-bytes", "4K", "--min-bytes", "2K", "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in names:
        suffix = "" if name == "all_reduce" else f"-{name}"
        (file,) = (f for f in tmp_path.glob("*.json") if re.search(rf"-{device}-{ranks}{suffix}\.json$", f.name))
        results = json.loads(file.read_text())
        assert results["operation"] == name
        sizes = [2048, 4096] if OPERATIONS[name].sized else [0]
        assert [(p["size"], p["peer"]) for p in results["points"]] == [
            (s, peer) for s in sizes for peer in only.split(",")
        ], results["notes"]
        assert all(0 < p["least"] <= p["median"] <= p["most"] and p["samples"] == 5 for p in results["points"])
        drawn = PICTURES and OPERATIONS[name].sized
        assert file.with_suffix(".svg").exists() == file.with_suffix(".png").exists() == drawn
        table = file.with_suffix(".md").read_text()
        assert f"# {name}, µs" in table
        assert f"| bytes | {' | '.join(only.split(','))} | mnnvl / best peer |" in table
        assert table in done.stdout


@pytest.mark.parametrize("world_size", [2])
def test_every_operation_beside_gloo(tmp_path, world_size):
    bench_every(tmp_path, "cpu", world_size, list(OPERATIONS), "mnnvl,gloo")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_every_operation_beside_nccl_on_cuda(tmp_path):
    bench_every(tmp_path, "cuda", 2, list(OPERATIONS), "mnnvl,nccl")


def test_all_reduce_is_what_it_times_unless_told_otherwise(tmp_path):
    """And under the name that its files have always had."""
    done = run_bench(2, "--device", "cpu", "--max-bytes", "1K", "--replays", "5", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*-cpu-2.json")
    assert json.loads(file.read_text())["operation"] == "all_reduce"
    pictures = [".png", ".svg"] if PICTURES else []
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", ".md", *pictures]


@pytest.mark.parametrize("theirs", launch.MPI_NAMES)
def test_a_place_under_mpirun(theirs, monkeypatch):
    for name in (*launch.NAMES, *(name for names in launch.MPI_NAMES for name in names)):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(theirs, "5816", strict=True):
        monkeypatch.setenv(name, value)
    for name in (*launch.NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they go at the end
        monkeypatch.delenv(name)
    with launch.start("cpu") as place:
        assert (place.rank, place.world_size) == (5, 8)
        assert [os.environ[name] for name in launch.NAMES] == ["5", "8", "1", "6"]
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_unknown_operations_and_peers_are_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--operation", "all_reduce,all_to_none"])
    assert f"unknown: all_to_none; known: {', '.join(OPERATIONS)}" in capsys.readouterr().err
    done = run_bench(1, "--device", "cpu", "--only", "smoke")
    assert done.returncode != 0
    assert "--only: unknown here: smoke; known: mnnvl" in done.stderr


def test_the_help_names_every_operation(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(OPERATIONS).replace("all_reduce,", "all_reduce (the default),") in help_text


def test_messages_want_two_ranks():
    done = run_bench(1, "--device", "cpu", "--operation", "send_recv")
    assert done.returncode != 0
    assert "messages want two ranks" in done.stderr


def test_table():
    points = [
        Point("mnnvl", 2048, 2.0, 1.0, 3.0, 5),
        Point("gloo", 2048, 8.0, 7.0, 9.0, 5),
        Point("gloo", 4096, 9.0, 9.0, 9.0, 5),
    ]
    rows = Results({}, "broadcast", points).table().splitlines()
    assert rows[2:] == ["| 2 KiB | 2.0 (1.0-3.0) | 8.0 (7.0-9.0) | 0.25 |", "| 4 KiB | - | 9.0 (9.0-9.0) | - |"]


def results_of(*medians: float) -> Results:
    """Of 2 KiB, 4 KiB, ..., with 10 % to both sides; gloo ten times as slow."""
    points = [
        Point(peer, 2048 << i, median * factor, median * factor * 0.9, median * factor * 1.1, 5)
        for i, median in enumerate(medians)
        for peer, factor in (("mnnvl", 1), ("gloo", 10))
    ]
    return Results({"date": "2026-11-30", "ranks": "2 x CPU", "dtype": "float32"}, "broadcast", points)


def test_what_got_slower():
    old = asdict(results_of(10.0, 20.0, 40.0))
    text, slower = results_of(10.0, 20.9, 44.1).compare(old)
    rows = text.splitlines()
    assert rows[0] == "# broadcast, beside 2026-11-30, 2 x CPU"
    assert rows[4:] == [
        "| 2 KiB | mnnvl | 10.0 | 10.0 | 1.00 |  |",
        "| 4 KiB | mnnvl | 20.0 | 20.9 | 1.04 |  |",
        "| 8 KiB | mnnvl | 40.0 | 44.1 | 1.10 | slower |",
    ]
    assert slower
    for faster in (results_of(9.0, 15.0, 43.9), results_of(10.4), results_of(1.0, 1.0, 1.0, 1.0)):
        assert not faster.compare(old)[1]


def test_a_run_beside_an_earlier_one(tmp_path):
    """The exit status tells."""
    file = tmp_path / "old.json"
    arguments = ("--device", "cpu", "--smoke", "--operation", "broadcast", "--only", "mnnvl", "--compare", str(file))
    for median, status in ((1e-3, 1), (1e9, 0)):
        old = Results({"date": "2026-11-30", "ranks": "2 x CPU"}, "broadcast", [Point("mnnvl", 1024, *[median] * 3, 5)])
        file.write_text(json.dumps(asdict(old)))
        done = run_bench(2, *arguments)
        assert ("| slower |" in done.stdout) == (done.returncode != 0) == bool(status), done.stdout + done.stderr
        assert "# broadcast, beside 2026-11-30, 2 x CPU" in done.stdout


def test_an_earlier_run_of_something_else(tmp_path):
    file = tmp_path / "old.json"
    file.write_text("[]")
    with pytest.raises(SystemExit, match="--compare: expected files that mnnvl bench wrote with --output"):
        cli.main(["bench", "--compare", str(file)])
    file.write_text(json.dumps(asdict(results_of(1.0))))
    with pytest.raises(SystemExit, match="--compare: expected one file of .*, got two: .*old.json, .*old.json"):
        cli.main(["bench", "--compare", str(file), str(file)])
    with pytest.raises(SystemExit, match="--compare: no results of all_reduce in .*old.json"):
        cli.main(["bench", "--compare", str(file)])


@pytest.mark.parametrize(("key", "value"), [("dtype", "float16"), ("calls", "captured")])
def test_an_earlier_run_of_other_calls(key, value):
    now = {"dtype": "float32", "calls": "eager"}
    bench.check_alike(now, {"dtype": "float32"})  # of a time when nobody wrote how calls were made
    with pytest.raises(SystemExit, match=f"--compare: expected results of {key} {now[key]}, got {value}"):
        bench.check_alike(now, {**now, key: value})


def test_another_dtype_has_a_file_of_its_own(tmp_path):
    done = run_bench(2, "--device", "cpu", "--dtype", "float16", "--only", "mnnvl", "--operation", "all_reduce,reduce",
                     "--max-bytes", "1K", "--replays", "5", "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("*.json"))
    assert [re.sub(r"^[\d-]+", "", file.stem) for file in files] == ["cpu-2-float16", "cpu-2-reduce-float16"]
    for file in files:
        machine = json.loads(file.read_text())["machine"]
        assert (machine["dtype"], machine["calls"]) == ("float16", "eager")
    assert "all_reduce 1/1     1 KiB  mnnvl" in done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_smoke(ranks):
    done = run_bench(ranks, "--device", "cpu", "--smoke", "--only", "mnnvl")
    assert done.returncode == 0, done.stderr
    run = {name for name in OPERATIONS if f"# {name}, µs" in done.stdout}
    assert run == set(OPERATIONS) - (bench.MESSAGES if ranks == 1 else set())


def test_products_beside_want_gpus():
    done = run_bench(2, "--device", "cpu", "--beside-gemm")
    assert done.returncode != 0
    assert "--beside-gemm: expected GPUs, and two ranks or more" in done.stderr


def test_products_beside_have_two_peers():
    """Those whose calls are asynchronous."""
    with pytest.raises(SystemExit, match="--only: expected of mnnvl, nccl with --beside-gemm, got mnnvl function"):
        cli.main(["bench", "--beside-gemm", "--only", "mnnvl function"])


@cuda_only
def test_products_beside(tmp_path):
    done = run_bench(2, "--device", "cuda", "--beside-gemm", "--smoke", "--only", "mnnvl", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*-cuda-2-beside-gemm.md")
    rows = [line for line in file.read_text().splitlines() if "| mnnvl |" in line]
    assert len(rows) == 9
    for row in rows:
        assert all(float(cell) > 0 for cell in row.split("|")[4:8])


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")

    def drawn() -> list[bytes]:
        files = bench_picture.draw(results_of(3.0, 4.0, 7.0), 2, tmp_path / "picture", 367)
        return [file.read_bytes() for file in files]

    svg, png = drawn()
    assert drawn() == [svg, png]  # of the same results the same files
    assert png.startswith(b"\x89PNG")
    for text in ("mnnvl", "gloo", "2 KiB", "the link: 367 GB/s", "broadcast, 2 x CPU, float32, 2026-11-30"):
        assert f"<!-- {text} -->".encode() in svg, text


class Spoilt(Group):
    """On rank 0, which every operation leaves a result, the last element comes out wrong."""

    def prepare(self, operation, like):
        right = super().prepare(operation, like)

        def call() -> None:
            right.call()
            if self._place.rank == 0:
                right.result.view(-1)[-1:].add_(1)

        return Prepared(call, right.source, right.result)


def verify_body(rank: Rank, name: str) -> None:
    place = Place(rank.rank, rank.world_size, rank.device, shared=False)
    operation, like = OPERATIONS[name], torch.zeros(999)
    right = Group("right", "gloo", place)
    bench.verify(place, right, operation, right.prepare(operation, like))
    spoilt = Spoilt("spoilt", "gloo", place)
    with pytest.raises(
        RuntimeError, match=f"spoilt: {name} gave {int(rank.rank == 0)} of .* elements wrong on rank {rank.rank}"
    ):
        bench.verify(place, spoilt, operation, spoilt.prepare(operation, like))
    dist.barrier()


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.sized])
def test_a_wrong_result_is_not_timed(ranks, name):
    """On no rank, wherever it is wrong."""
    ranks(verify_body, 3, args=(name,), backend="gloo")
