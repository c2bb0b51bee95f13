"""The command line: mnnvl doctor | demo | bench | tune | soak, also as python -m mnnvl_backend."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def _size(text: str) -> int:
    from mnnvl_backend.config import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected bytes such as 4096, 64K or 1G, got {text!r}") from None


def _operations(text: str) -> list[str]:
    from mnnvl_backend.tools.bench_operations import OPERATIONS

    names = text.split(",")
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(OPERATIONS)}")
    return names


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on such as 1,8,64, got {text!r}")
    return counts


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        raise argparse.ArgumentTypeError(f"expected minutes such as 0.5 or 60, got {text!r}")
    return minutes


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mnnvl", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what is built, what this machine allows, and why not more")
    doctor.add_argument("--json", action="store_true", help="for programs: everything that was found out")
    doctor.add_argument("--verbose", action="store_true", help="everything that was found out, after the report")

    demo = commands.add_parser("demo", help="all-reduces checked and timed, then DDP training; run under torchrun")
    demo.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    demo.add_argument("--epochs", type=int, default=12)

    bench = commands.add_parser("bench", help="operations beside their peers, in one run; run under torchrun")
    bench.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    bench.add_argument(
        "--operation",
        type=_operations,
        default=None,
        help="comma-separated: all_reduce (the default), reduce_scatter, reduce, all_gather, gather, broadcast, "
        "scatter, all_to_all, barrier, send_recv, ping_pong",
    )
    bench.add_argument(
        "--fused",
        action="store_true",
        help="instead: the fused all-reduce + residual + RMS norm, also quantized, beside NCCL or gloo and torch's own",
    )
    bench.add_argument(
        "--beside-gemm",
        action="store_true",
        help="instead: asynchronous all-reduces beside matrix products on another stream, of mnnvl and NCCL",
    )
    bench.add_argument("--hidden", type=_counts, help="of --fused, comma-separated; default 4096, on CUDA also 7168")
    bench.add_argument(
        "--tokens", type=_counts, help="of --fused, comma-separated; default powers of two up to 256, on CUDA 2048"
    )
    bench.add_argument("--min-bytes", type=_size, help="of what a rank puts in; default 1K, of all_reduce on CUDA 2K")
    bench.add_argument("--max-bytes", type=_size, help="default 64M; on CUDA 256M, but of all_reduce")
    bench.add_argument("--replays", type=int, default=31, help="samples per size and peer")
    bench.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16", "float64"], help="default float32, on CUDA bfloat16"
    )
    bench.add_argument("--eager", action="store_true", help="on CUDA: without graphs, so host time counts")
    bench.add_argument("--only", help="comma-separated peers, e.g. mnnvl,nccl; of --fused columns")
    bench.add_argument("--multicast", action="store_true", help="let mnnvl and its peers make multicast objects")
    bench.add_argument("--output", help="folder for the dated results: markdown, JSON and, with matplotlib, pictures")
    bench.add_argument("--limit", type=float, metavar="GB/S", help="of the link in one direction, for the pictures")
    bench.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="JSON",
        help="results of an earlier run: prints what changed, and exits with 1 if anything of mnnvl got slower",
    )
    bench.add_argument(
        "--smoke", action="store_true", help="whether everything runs: every operation, 1K and 2K, 5 samples"
    )

    tune = commands.add_parser(
        "tune", help="at which size two shots begin to win over one, for MNNVL_TUNING; run under torchrun"
    )
    tune.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    tune.add_argument("--min-bytes", type=_size, help="default 1K")
    tune.add_argument("--max-bytes", type=_size, help="default 4M; on CUDA 16M")
    tune.add_argument("--replays", type=int, default=31, help="samples per size and strategy")
    tune.add_argument("--output", metavar="FILE", help="where the result goes, beside those that stand there")

    soak = commands.add_parser(
        "soak", help="random programs of everything, every byte and all growth watched; run under torchrun"
    )
    soak.add_argument("--minutes", type=_minutes, required=True, help="after the warm-up")
    soak.add_argument("--seed", type=int, default=1, help="of all that is drawn; default 1")
    soak.add_argument("--first-round", type=int, default=1, help="to begin where an earlier run failed")
    soak.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    soak.add_argument("--json", metavar="FILE", help="where rank 0 writes the summary")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # Imported when asked for: doctor must run where the others' needs are missing.
    if arguments.command == "doctor":
        from mnnvl_backend.tools import doctor

        return doctor.run(as_json=arguments.json, verbose=arguments.verbose)
    if arguments.command == "demo":
        from mnnvl_backend.tools import demo

        return demo.run(arguments.device, arguments.epochs)
    if arguments.command == "soak":
        from mnnvl_backend.tools import soak

        return soak.run(arguments)
    if arguments.command == "tune":
        from mnnvl_backend.tools import tune

        return tune.run(arguments)
    if arguments.fused:
        from mnnvl_backend.tools import bench_fused

        return bench_fused.run(arguments)
    if arguments.beside_gemm:
        from mnnvl_backend.tools import bench_beside

        return bench_beside.run(arguments)
    from mnnvl_backend.tools import bench

    return bench.run(arguments)
