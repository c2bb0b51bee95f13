"""How ranks are laid out over tensor, context, pipeline and expert parallelism, under FlashInfer's names."""

from __future__ import annotations

from typing import Any

from mnnvl_backend import arguments

MOST = 1 << 20  # ranks, layers, experts: more than any job has, and lists of them are still made at once


class Mapping:
    """The place of one rank in a world of pp_size * cp_size * tp_size ranks, tensor parallelism innermost:

        rank = (pp_rank * cp_size + cp_rank) * tp_size + tp_rank

    Within a tensor-parallel group, experts are laid out as tp_rank = (moe_tp_rank * moe_cluster_size +
    moe_cluster_rank) * moe_ep_size + moe_ep_rank. Groups (`tp_groups`, ...) are lists of global ranks; `tp_group` is
    the one that holds this rank. A size of -1 is derived from the others.

    Args:
        world_size, rank: of the whole job.
        gpus_per_node: for node_rank and local_rank.
        cp_size, tp_size, pp_size: their product must be world_size (unless auto_parallel).
        moe_cluster_size, moe_tp_size, moe_ep_size: their product must be tp_size.
        attn_tp_size, attn_cp_size: their product must be tp_size * cp_size; attn_cp_size must be 1.
        auto_parallel: the layout is decided elsewhere; every parallel rank is 0.
        enable_attention_dp: `rank` isn't checked against world_size.

    Raises:
        TypeError: an argument of a wrong type, by name.
        ValueError: sizes that don't multiply up, or a rank out of range. NotImplementedError: experts with cp_size > 1.
    """

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        *,
        cp_size: int = 1,
        cp_config: dict[str, Any] | None = None,
        tp_size: int = 1,
        pp_size: int = 1,
        moe_cluster_size: int = -1,
        moe_tp_size: int = -1,
        moe_ep_size: int = -1,
        attn_tp_size: int = -1,
        attn_cp_size: int = -1,
        auto_parallel: bool = False,
        enable_attention_dp: bool = False,
    ) -> None:
        self.world_size = arguments.integer("world_size", world_size, 1)
        self.gpus_per_node = arguments.integer("gpus_per_node", gpus_per_node, 1)
        self.cp_size = arguments.integer("cp_size", cp_size, 1)
        self.tp_size = arguments.integer("tp_size", tp_size, 1)
        self.pp_size = arguments.integer("pp_size", pp_size, 1)
        self.moe_cluster_size = _derivable("moe_cluster_size", moe_cluster_size)
        self.moe_tp_size = _derivable("moe_tp_size", moe_tp_size)
        self.moe_ep_size = _derivable("moe_ep_size", moe_ep_size)
        self.attn_tp_size = _derivable("attn_tp_size", attn_tp_size)
        self.attn_cp_size = _derivable("attn_cp_size", attn_cp_size)
        if cp_config is not None:
            arguments.instance("cp_config", cp_config, dict, "a dict or None")
        arguments.instance("auto_parallel", auto_parallel, bool, "a bool")
        arguments.instance("enable_attention_dp", enable_attention_dp, bool, "a bool")
        self.cp_config = cp_config or {}
        self.auto_parallel = auto_parallel
        self.enable_attention_dp = enable_attention_dp
        self._derive_sizes()
        self._check_sizes()
        self.rank = rank
        self._lay_out_groups()

    def _derive_sizes(self) -> None:
        """Replaces each -1 by what the other sizes leave for it."""
        attention = self.tp_size * self.cp_size
        if self.moe_cluster_size == -1:
            self.moe_cluster_size = 1
        if self.moe_ep_size == -1:
            one = self.moe_tp_size == -1
            self.moe_ep_size = 1 if one else self.tp_size // (self.moe_tp_size * self.moe_cluster_size)
        if self.moe_tp_size == -1:
            self.moe_tp_size = self.tp_size // (self.moe_ep_size * self.moe_cluster_size)
        if self.attn_cp_size == -1:
            self.attn_cp_size = 1 if self.attn_tp_size == -1 else attention // self.attn_tp_size
        if self.attn_tp_size == -1:
            self.attn_tp_size = attention // self.attn_cp_size

    def _check_sizes(self) -> None:
        tp_size, pp_size, cp_size, clusters = self.tp_size, self.pp_size, self.cp_size, self.moe_cluster_size
        arguments.at_most("world_size", self.world_size, MOST)
        if self.attn_cp_size != 1:
            raise ValueError(f"attn_cp_size: must be 1, got {self.attn_cp_size} (attn_tp_size {self.attn_tp_size})")
        if self.auto_parallel and (tp_size, pp_size, cp_size) != (1, 1, 1):
            raise ValueError(
                f"auto_parallel: tp_size, pp_size and cp_size must be 1, got {tp_size}, {pp_size}, {cp_size}"
            )
        if not self.auto_parallel and tp_size * pp_size * cp_size != self.world_size:
            raise ValueError(
                f"world_size: must be tp_size * pp_size * cp_size, got {self.world_size} != "
                f"{tp_size} * {pp_size} * {cp_size}"
            )
        if self.moe_tp_size * self.moe_ep_size * clusters != tp_size:
            raise ValueError(
                f"tp_size: must be moe_tp_size * moe_ep_size * moe_cluster_size, got {tp_size} != "
                f"{self.moe_tp_size} * {self.moe_ep_size} * {clusters}"
            )
        if self.attn_tp_size * self.attn_cp_size != tp_size * cp_size:
            raise ValueError(
                f"attn_tp_size: attn_tp_size * attn_cp_size must be tp_size * cp_size, got "
                f"{self.attn_tp_size} * {self.attn_cp_size} != {tp_size} * {cp_size}"
            )
        if self.moe_ep_size != 1 and cp_size > 1:
            raise NotImplementedError(f"expert parallelism (moe_ep_size {self.moe_ep_size}) with cp_size {cp_size} > 1")
        if clusters > 1 and self.moe_ep_size != 1:
            raise ValueError(f"moe_ep_size: must be 1 with moe_cluster_size {clusters} > 1, got {self.moe_ep_size}")

    def _lay_out_groups(self) -> None:
        # A stage is the ranks of one pipeline step; with `inner` ranks to a group and `stride` between them.
        stage = self.tp_size * self.cp_size
        self.pp_groups = _groups(self.world_size, self.world_size, stage)
        self.cp_groups = _groups(self.world_size, stage, self.tp_size)
        self.tp_groups = _groups(self.world_size, self.tp_size, 1)
        # Experts exist with cp_size 1 only (or trivially), so they tile the first pp_size * tp_size ranks.
        experts, inner = self.pp_size * self.tp_size, self.moe_cluster_size * self.moe_ep_size
        self.moe_tp_groups = _groups(experts, self.tp_size, inner)
        self.moe_cluster_groups = _groups(experts, inner, 1)
        self.moe_ep_groups = _groups(experts, self.moe_ep_size, 1)

    @property
    def rank(self) -> int:
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = arguments.integer("rank", rank, 0, None if self.enable_attention_dp else self.world_size - 1)

    # Where this rank stands.

    @property
    def tp_rank(self) -> int:
        return 0 if self.auto_parallel else self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        return 0 if self.auto_parallel else self.rank // self.tp_size % self.cp_size

    @property
    def pp_rank(self) -> int:
        return 0 if self.auto_parallel else self.rank // (self.tp_size * self.cp_size)

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // (self.moe_ep_size * self.moe_cluster_size)

    @property
    def moe_cluster_rank(self) -> int:
        return self.tp_rank % self.moe_cluster_size

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.moe_ep_size

    @property
    def node_rank(self) -> int:
        return self.rank // self.gpus_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.gpus_per_node

    # The groups that hold this rank.

    @property
    def tp_group(self) -> list[int]:
        return self.tp_groups[self.pp_rank * self.cp_size + self.cp_rank]

    @property
    def cp_group(self) -> list[int]:
        return self.cp_groups[self.pp_rank * self.tp_size + self.tp_rank]

    @property
    def pp_group(self) -> list[int]:
        return self.pp_groups[self.cp_rank * self.tp_size + self.tp_rank]

    @property
    def moe_tp_group(self) -> list[int]:
        inner = self.moe_cluster_size * self.moe_ep_size
        return self.moe_tp_groups[self.pp_rank * inner + self.moe_cluster_rank * self.moe_ep_size + self.moe_ep_rank]

    @property
    def moe_cluster_group(self) -> list[int]:
        return self.moe_cluster_groups[self.pp_rank * self.moe_tp_size + self.moe_tp_rank]

    @property
    def moe_ep_group(self) -> list[int]:
        outer = self.pp_rank * self.moe_tp_size + self.moe_tp_rank
        return self.moe_ep_groups[outer * self.moe_cluster_size + self.moe_cluster_rank]

    # Questions.

    def has_tp(self) -> bool:
        return self.tp_size > 1

    def has_cp(self) -> bool:
        return self.cp_size > 1

    def has_pp(self) -> bool:
        return self.pp_size > 1

    def has_moe_cluster(self) -> bool:
        return self.moe_cluster_size > 1

    def has_moe_tp(self) -> bool:
        return self.moe_tp_size > 1

    def has_moe_ep(self) -> bool:
        return self.moe_ep_size > 1

    def is_multi_node(self) -> bool:
        return self.world_size > self.gpus_per_node

    def get_node_rank(self, rank: int) -> int:
        return rank // self.gpus_per_node

    def get_local_rank(self, rank: int) -> int:
        return rank % self.gpus_per_node

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def is_second_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 2

    def prev_pp_rank(self) -> int:
        return (self.rank - self.tp_size * self.cp_size) % self.world_size

    def next_pp_rank(self) -> int:
        return (self.rank + self.tp_size * self.cp_size) % self.world_size

    def pp_layers(self, num_layers: int) -> list[int]:
        """This pipeline rank's layers; the first num_layers % pp_size ranks hold one more than the others."""
        num_layers = arguments.at_most("num_layers", arguments.integer("num_layers", num_layers, 0), MOST)
        least, extra = divmod(num_layers, self.pp_size)
        start = self.pp_rank * least + min(self.pp_rank, extra)
        return list(range(start, start + least + (self.pp_rank < extra)))

    def ep_experts(self, num_experts: int) -> list[int]:
        """This expert-parallel rank's experts: num_experts // moe_ep_size of them, in order."""
        num_experts = arguments.at_most("num_experts", arguments.integer("num_experts", num_experts, 0), MOST)
        if self.cp_size != 1:
            raise NotImplementedError(f"ep_experts with cp_size {self.cp_size} > 1")
        count = num_experts // self.moe_ep_size
        return list(range(self.moe_ep_rank * count, (self.moe_ep_rank + 1) * count))

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Mapping:
        return cls(**mapping)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().values()))

    def __repr__(self) -> str:
        return f"Mapping({', '.join(f'{k}={v}' for k, v in self.to_dict().items())})"


_FIELDS = (
    "world_size", "rank", "gpus_per_node", "cp_size", "tp_size", "pp_size", "moe_tp_size", "moe_cluster_size",
    "moe_ep_size", "attn_tp_size", "attn_cp_size", "auto_parallel",
)  # fmt: skip


def _derivable(name: str, size: object) -> int:
    """A size that may be -1: derived from the others."""
    size = arguments.integer(name, size, -1)
    if size == 0:
        raise arguments.wrong_value(name, "an integer of at least 1, or -1 (derived from the others)", size)
    return size


def _groups(world_size: int, block: int, stride: int) -> list[list[int]]:
    """Splits ranks into blocks of `block`, and each block into groups of ranks `stride` apart."""
    return [
        list(range(start + offset, start + block, stride))
        for start in range(0, world_size, block)
        for offset in range(stride)
    ]
