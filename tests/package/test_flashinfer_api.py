"""What is pure in FlashInfer's API: sizes, strategies, mappings, and the checks of arguments."""

from __future__ import annotations

import pytest
import torch

from mnnvl_backend import Mapping
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace


def test_select_strategy_at_the_threshold():
    limit = 64 * 1024 * 8 * 2
    assert Strategy.select_strategy(2, 1, limit // 4, torch.bfloat16) is Strategy.ONESHOT
    assert Strategy.select_strategy(2, 1, limit // 4 + 1, torch.bfloat16) is Strategy.TWOSHOT
    assert [s.value for s in Strategy] == [0, 1, 99]


@pytest.mark.parametrize(
    ("tp", "tokens", "hidden", "dtype", "strategy", "expected"),
    [(4, 3, 8, torch.float32, Strategy.ONESHOT, 3 * 8 * 4 * 4),
     (4, 3, 8, torch.float16, Strategy.TWOSHOT, 2 * 4 * 8 * 2),
     (3, 7, 5, torch.bfloat16, Strategy.TWOSHOT, 2 * 9 * 5 * 2),
     (2, 1, 8, torch.float32, Strategy.AUTO, 64),
     (2, 1 << 20, 8, torch.float32, Strategy.AUTO, 2 * (1 << 20) * 8 * 4),
     (2, 0, 8, torch.float32, Strategy.AUTO, 0)],
)  # fmt: skip
def test_required_buffer_size(tp, tokens, hidden, dtype, strategy, expected):
    assert Workspace.get_required_buffer_size_bytes(tp, tokens, hidden, dtype, strategy) == expected


def test_workspace_arguments():
    with pytest.raises(ValueError, match="max_num_tokens, hidden_dim and dtype must all be given"):
        Workspace(Mapping(), max_num_tokens=4)
    with pytest.raises(ValueError, match="buffer_size_in_bytes: expected 0 to 4294967295"):
        Workspace(Mapping(), buffer_size_in_bytes=1 << 32)
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'meta'"):
        Workspace(Mapping(), buffer_size_in_bytes=1024, device="meta")
    with pytest.raises(RuntimeError, match=r"comm_backend: none given.*init_process_group"):
        Workspace(Mapping(2, 0, tp_size=2), buffer_size_in_bytes=1024, device="cpu")


def test_mapping_places_every_rank_in_its_groups():
    for rank in range(24):
        m = Mapping(24, rank, 8, tp_size=4, cp_size=2, pp_size=3)
        assert (m.pp_rank * 2 + m.cp_rank) * 4 + m.tp_rank == rank
        for group, place in ((m.tp_group, m.tp_rank), (m.cp_group, m.cp_rank), (m.pp_group, m.pp_rank)):
            assert group[place] == rank
        assert (m.node_rank, m.local_rank) == divmod(rank, 8)
        assert Mapping.from_dict(m.to_dict()) == m
        assert hash(Mapping.from_dict(m.to_dict())) == hash(m)
    m = Mapping(16, 13, tp_size=8, pp_size=2, moe_tp_size=2, moe_ep_size=4)
    assert (m.moe_tp_group, m.moe_ep_group, m.pp_group) == ([9, 13], [12, 13, 14, 15], [5, 13])
    assert m.ep_experts(16) == [4, 5, 6, 7]
    assert Mapping(3, 1, pp_size=3).pp_layers(7) == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"world_size": 4, "tp_size": 2}, ValueError, "world_size: must be tp_size"),
        ({"world_size": 2, "rank": 2, "tp_size": 2}, ValueError, "rank: expected an int from 0 to 1, got 2"),
        ({"world_size": 4, "tp_size": 4, "moe_ep_size": 3}, ValueError, "tp_size: must be moe_tp_size"),
        ({"world_size": 2, "tp_size": 2, "attn_cp_size": 2}, ValueError, "attn_cp_size: must be 1"),
        ({"world_size": 8, "tp_size": 4, "cp_size": 2, "moe_ep_size": 4}, NotImplementedError, "expert parallelism"),
    ],
)
def test_mapping_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        Mapping(**arguments)
