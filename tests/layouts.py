"""Where the tensors of a program lie: for tests of what operations take and write. What they compute, of every dtype and size,
is tests/collectives/test_every_operation.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

SHAPE = (3, 4)


def strided(x: torch.Tensor) -> torch.Tensor:
    """Every other column of something larger."""
    wide = torch.full((x.shape[0], 2 * x.shape[1]), -77.0, dtype=x.dtype, device=x.device)
    wide[:, ::2] = x
    return wide[:, ::2]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda x: x.t().clone().t(),
    "strided": strided,
    "leaf": lambda x: x.clone().requires_grad_(),
}


def values(rank: int, destination: int = 0) -> torch.Tensor:
    """Rank's part for another, exact in any order of additions."""
    return torch.arange(12.0).view(SHAPE) + 100 * rank + 1000 * destination


def layouts() -> Iterator[tuple[str, str, bool]]:
    """(of inputs, of outputs, asynchronous)"""
    for given in LAYOUTS:
        for wanted in LAYOUTS:
            for asynchronous in (False, True):
                yield given, wanted, asynchronous


def lay(x: torch.Tensor, layout: str, device: torch.device) -> torch.Tensor:
    return LAYOUTS[layout](x.to(device))


def empty(layout: str, device: torch.device) -> torch.Tensor:
    return lay(torch.full(SHAPE, -5.0), layout, device)


def finish(work: object) -> None:
    if work is not None:
        work.wait()  # type: ignore[attr-defined]


def check(outs: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    """The values, and that nothing was written between them; operations leave no graph behind."""
    for out, wanted in zip(outs, expected, strict=True):
        assert out.tolist() == wanted.tolist(), what
        assert out.grad_fn is None or "WarnNotImplemented" in repr(out), what
        if out.stride() == (8, 2):
            assert bool((out._base[:, 1::2] == -77.0).all()), f"{what}: wrote between the columns"
