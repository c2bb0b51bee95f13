"""Fixtures of the multi-rank tests: `device` runs a test on CPU and, where there are GPUs, on CUDA; `ranks` runs a
body on several ranks in processes shared by the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from launcher import RankPool


@pytest.fixture(scope="session")
def _pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.fixture
def ranks(_pool: RankPool) -> Callable[..., list[Any]]:
    """ranks(fn, world_size, device, ...): launcher.RankPool.run."""
    return _pool.run


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
