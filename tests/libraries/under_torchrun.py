"""For bodies whose libraries make the default group themselves: what torchrun sets for a rank."""

from __future__ import annotations

import os

import torch.distributed as dist
from launcher import Rank

_agent: dist.TCPStore | None = None  # of this rank 0; lives until the next body, since the others may use it longest


def join(rank: Rank) -> None:
    """The variables of `torchrun --nproc-per-node`, and a store as the agent's, which env:// then uses: a new one, for
    its keys carry no name of the body. The launcher puts the variables back afterwards."""
    global _agent
    if rank.rank == 0:
        _agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        rank.store.set("agent's port", str(_agent.port))
    port = rank.store.get("agent's port").decode()
    os.environ.update(
        RANK=str(rank.rank), LOCAL_RANK=str(rank.rank), WORLD_SIZE=str(rank.world_size),
        LOCAL_WORLD_SIZE=str(rank.world_size), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
