"""Which of the two Lamport algorithms an all-reduce takes."""

from __future__ import annotations

from enum import Enum

import torch

from mnnvl_backend import arguments

# FlashInfer's name and value, on num_tokens * hidden_dim * tp_size * element size: callers size their buffers by it.
MNNVL_ONE_SHOT_THRESHOLD = 64 * 1024 * 8 * 2


class MNNVLAllreduceFusionStrategy(Enum):
    """FlashInfer's names and values; the compiled module knows the values.

    ONESHOT: every rank sends its whole tensor to every peer; lowest latency. TWOSHOT: each rank reduces its share and
    sends the result to all; less traffic. AUTO: by size. All give the same bits.
    """

    ONESHOT = 0
    TWOSHOT = 1
    AUTO = 99

    @staticmethod
    def select_strategy(
        tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype
    ) -> MNNVLAllreduceFusionStrategy:
        """The strategy that AUTO stands for: ONESHOT up to 1 MiB of num_tokens * hidden_dim * tp_size elements.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        tp_size, num_tokens, hidden_dim = check_problem(tp_size, num_tokens, hidden_dim, dtype)
        return strategy_for(tp_size * num_tokens * hidden_dim * dtype.itemsize)


STRATEGY_NAMES = {s.name.lower(): s for s in MNNVLAllreduceFusionStrategy}


def strategy_of(use_oneshot: object) -> MNNVLAllreduceFusionStrategy:
    """The strategy that the unified API's three-valued switch names.

    Raises:
        TypeError: neither a bool nor None.
    """
    if use_oneshot is None:
        return MNNVLAllreduceFusionStrategy.AUTO
    arguments.instance("use_oneshot", use_oneshot, bool, "a bool, or None (by size)")
    return MNNVLAllreduceFusionStrategy.ONESHOT if use_oneshot else MNNVLAllreduceFusionStrategy.TWOSHOT


def strategy_for(oneshot_bytes: int) -> MNNVLAllreduceFusionStrategy:
    """AUTO's choice, unchecked, for every call: by the bytes that one-shot would need."""
    if oneshot_bytes <= MNNVL_ONE_SHOT_THRESHOLD:
        return MNNVLAllreduceFusionStrategy.ONESHOT
    return MNNVLAllreduceFusionStrategy.TWOSHOT


def required_bytes(
    tp_size: int, num_tokens: int, hidden_dim: int, itemsize: int, strategy: MNNVLAllreduceFusionStrategy
) -> int:
    """Bytes of one Lamport buffer, unchecked, for every call; `strategy` isn't AUTO. ONESHOT: a slot per rank.
    TWOSHOT: two stages, tokens rounded up to a multiple of tp_size."""
    if strategy is MNNVLAllreduceFusionStrategy.ONESHOT:
        return num_tokens * hidden_dim * tp_size * itemsize
    return 2 * ((num_tokens + tp_size - 1) // tp_size) * tp_size * hidden_dim * itemsize


def check_problem(tp_size: object, num_tokens: object, hidden_dim: object, dtype: object) -> tuple[int, int, int]:
    """(tp_size, num_tokens, hidden_dim) as integers.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    arguments.instance("dtype", dtype, torch.dtype, "a torch.dtype")
    return (
        arguments.integer("tp_size", tp_size, 1),
        arguments.integer("num_tokens", num_tokens, 0),
        arguments.integer("hidden_dim", hidden_dim, 0),
    )


def check_strategy(strategy: object) -> None:
    """
    Raises:
        TypeError: not a member of MNNVLAllreduceFusionStrategy.
    """
    arguments.instance(
        "strategy", strategy, MNNVLAllreduceFusionStrategy, "a member of mnnvl_backend.MNNVLAllreduceFusionStrategy"
    )
