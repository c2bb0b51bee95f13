"""`mnnvl bench --fused`: every column verified before it is timed; one table, and JSON that others read."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from test_bench import run_bench

from mnnvl_backend.tools import bench_fused, cli
from mnnvl_backend.tools.bench_fused import OURS, Ours, Point, Prepared, Problem, Results, Unfused
from mnnvl_backend.tools.launch import Place

CPU_COLUMNS = [*OURS, "unfused", "unfused+fp8"]


def bench(tmp_path, device: str, columns: list[str]) -> None:
    done = run_bench(2, "--fused", "--device", device, "--hidden", "64,4096", "--tokens", "1,5", "--replays", "5",
                     "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())
    assert file.name == f"{results['machine']['date']}-{device}-2-fused.json"
    assert results["notes"] == {}
    assert [(p["hidden"], p["tokens"], p["column"]) for p in results["points"]] == [
        (hidden, tokens, column) for hidden in (64, 4096) for tokens in (1, 5) for column in columns
    ]
    assert all(0 < p["least"] <= p["median"] <= p["most"] and p["samples"] == 5 for p in results["points"])
    assert "# fused, µs: median, slowest rank" in done.stdout
    assert f"| hidden | tokens | {' | '.join(columns)} | fused / best unfused |" in done.stdout
    assert "| 4096 | 5 | " in done.stdout


def test_fused_beside_gloo(tmp_path):
    bench(tmp_path, "cpu", CPU_COLUMNS)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_fused_beside_nccl_on_cuda(tmp_path):
    bench(tmp_path, "cuda", [*OURS, "unfused", "unfused compiled", "unfused+fp8"])


def test_some_columns_and_what_fails_of_them():
    """NVFP4 has blocks of 16: left out from there on, with a note; the others go on."""
    done = run_bench(2, "--fused", "--device", "cpu", "--hidden", "32,40", "--tokens", "2", "--replays", "5",
                     "--only", "fused,fused+nvfp4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| hidden | tokens | fused | fused+nvfp4 | fused / best unfused |" in done.stdout
    assert "- fused+nvfp4: stopped at hidden 40, tokens 2: input: expected hidden_dim" in done.stdout
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| 32", "| 40"))]
    assert [row[3:] for row in rows] == [[rows[0][3], "- |"], ["-", "- |"]]
    assert rows[0][3] != "-"


def test_what_does_not_go_together():
    for arguments, message in (
        (["--hidden", "64"], "--hidden, --tokens: only with --fused"),
        (["--fused", "--smoke"], "--smoke: not with --fused"),
        (["--fused", "--min-bytes", "1K"], "--min-bytes: not with --fused"),
        (["--fused", "--operation", "reduce"], "--operation: not with --fused"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["bench", *arguments])


@pytest.mark.parametrize("numbers", ["0", "8,", "8K", "-1"])
def test_numbers(numbers, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--fused", f"--tokens={numbers}"])
    assert f"expected numbers from 1 on such as 1,8,64, got '{numbers}'" in capsys.readouterr().err


def test_table():
    points = [
        Point("fused", 64, 1, 2.0, 1.0, 3.0, 5),
        Point("unfused", 64, 1, 8.0, 7.0, 9.0, 5),
        Point("unfused compiled", 64, 1, 5.0, 4.0, 9.0, 5),
        Point("unfused", 64, 8, 9.0, 9.0, 9.0, 5),
    ]
    rows = Results({}, points=points).table().splitlines()
    assert rows[2:] == ["| 64 | 1 | 2.0 | 8.0 | 5.0 | 0.40 |", "| 64 | 8 | - | 9.0 | - | - |"]


def place_of(rank: Rank, shared: bool = False) -> Place:
    return Place(rank.rank, rank.world_size, rank.device, shared)


def spoilt(right: Prepared, on_this_rank: bool, what: str) -> Prepared:
    """One element comes out wrong: by a third of the greatest, more than any rounding."""

    def results(done):
        got = {name: tensor.float().clone() for name, tensor in right.results(done).items()}
        if on_this_rank:
            got[what][-1, -1] += got[what].abs().max() / 3
        return got

    return Prepared(right.call, results)


def verify_body(rank: Rank) -> list[str]:
    place = place_of(rank)
    problem = Problem(place, 256, 7)
    ours, unfused = Ours(place, 256, 7), Unfused(place, "gloo")
    columns = {**ours.columns(), **unfused.columns()}
    for name, column in columns.items():
        right = column(problem)
        bench_fused.verify(place, name, problem, right)
        for what in right.results(right.call()):
            with pytest.raises(RuntimeError) as raised:
                bench_fused.verify(place, name, problem, spoilt(right, rank.rank == 1, what))
            assert str(raised.value) == f"{name}: rank 1: {what} has 1 of {256 * 7} elements wrong"
    for name, column in ours.columns().items():  # what was never written is wrong too
        nothing = Prepared(lambda: None, column(problem).results)
        with pytest.raises(RuntimeError, match=rf"{256 * 7} of {256 * 7} elements wrong"):
            bench_fused.verify(place, name, problem, nothing)
    dist.barrier()
    ours.close()
    unfused.close()
    return list(columns)


def test_a_wrong_result_is_not_timed(ranks):
    """On no rank, wherever it is wrong."""
    assert ranks(verify_body, 3, backend="gloo") == [CPU_COLUMNS] * 3


def shared_body(rank: Rank) -> tuple[int, dict[str, str]]:
    notes: dict[str, str] = {}
    peers = bench_fused.peers_of(place_of(rank, shared=True), [64], [1], None, notes)
    dist.barrier()
    for peer in peers:
        peer.close()
    return len(peers), notes


def test_ranks_on_one_gpu_go_without_nccl(ranks):
    note = "not here: NCCL refuses several ranks on one GPU"
    assert ranks(shared_body, 2, backend="gloo") == [(1, {"unfused": note, "unfused+fp8": note})] * 2
