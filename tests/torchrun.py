"""Programs under torchrun, as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(ranks: int, *arguments: str, timeout: float = 110, **variables: str) -> subprocess.CompletedProcess[str]:
    """Ends all ranks at the timeout, which is an error. The package is on the path, installed or not.

    Args:
        arguments: of torchrun, from where its own options end or go on.
        variables: of the environment, beside this process's.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *arguments,
    ]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()  # it then ends its ranks, which have sessions of their own
            try:
                process.communicate(timeout=40)  # it waits 30 s for them
            finally:
                process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
