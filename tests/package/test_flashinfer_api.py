"""What is pure in FlashInfer's API: sizes, strategies, mappings, and the checks of arguments."""

from __future__ import annotations

import types

import pytest
import torch

from mnnvl_backend import Mapping, arguments
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.flashinfer.control import StoreComm


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
        ({"world_size": 2, "rank": 2, "tp_size": 2}, ValueError, "rank: expected an integer from 0 to 1, got 2"),
        ({"world_size": 4, "tp_size": 4, "moe_ep_size": 3}, ValueError, "tp_size: must be moe_tp_size"),
        ({"world_size": 2, "tp_size": 2, "attn_cp_size": 2}, ValueError, "attn_cp_size: must be 1"),
        ({"world_size": 8, "tp_size": 4, "cp_size": 2, "moe_ep_size": 4}, NotImplementedError, "expert parallelism"),
    ],
)
def test_mapping_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        Mapping(**arguments)


# Types and values of every argument, by name, before anything is set up.

NOT_INTEGERS = [4.0, float("nan"), True, "4", None, [4], torch.tensor(4), torch.float32, 4 + 0j, object()]


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=lambda v: type(v).__name__)
def test_whatever_is_not_an_integer_is_refused(value):
    with pytest.raises(TypeError, match=r"^name: expected an integer from 1 to 9 bytes, got .+"):
        arguments.integer("name", value, 1, 9, "bytes")


def test_integers_of_every_kind_are_taken():
    np = pytest.importorskip("numpy")
    for kind in (int, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64):
        assert arguments.integer("name", kind(5), 1) == 5
        assert type(arguments.integer("name", kind(5), 1)) is int
    for value in (np.float32(5), np.bool_(True), np.ones(1, dtype=np.int64) * 1.0):
        with pytest.raises(TypeError, match="name: expected an integer of at least 1, got"):
            arguments.integer("name", value, 1)


def test_bounds_of_integers():
    hypothesis = pytest.importorskip("hypothesis")
    numbers = hypothesis.strategies.integers(-(2**70), 2**70)

    @hypothesis.given(numbers, numbers, numbers)
    def holds(value: int, least: int, most: int) -> None:
        if least <= value <= most:
            assert arguments.integer("name", value, least, most) == value
        else:
            with pytest.raises(ValueError, match=f"^name: expected an integer from {least} to {most}, got {value}$"):
                arguments.integer("name", value, least, most)

    holds()


def test_errors_show_any_value_at_all_shortly():
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.given(hypothesis.strategies.from_type(type).flatmap(hypothesis.strategies.from_type))
    @hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck), max_examples=50, deadline=None)
    def short(value: object) -> None:
        assert len(arguments.shown(value)) < arguments.MAX_SHOWN + 100

    short()

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("half built")

    assert arguments.shown(Broken()) == "<no repr: half built> (Broken)"
    assert arguments.shown(torch.zeros(2, 3)) == "a tensor of shape (2, 3) and torch.float32"


class NoComm:
    """Has some of the methods; none may be called."""

    def Get_rank(self, *args: object) -> int:
        raise AssertionError("called before the arguments were checked")

    Get_size = allgather = Get_rank


class SilentComm(NoComm):
    """Has all of them; none may be called either."""

    bcast = barrier = Split = NoComm.Get_rank


PROBLEM = {"max_num_tokens": 4, "hidden_dim": 8, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({}, ValueError, "max_num_tokens, hidden_dim and dtype must all be given"),
        ({"max_num_tokens": 4.0}, TypeError, r"max_num_tokens: expected an integer of at least 1, got 4.0 \(float\)"),
        ({"max_num_tokens": True}, TypeError, r"max_num_tokens: .*got True \(bool\)"),
        ({"max_num_tokens": 0}, ValueError, "max_num_tokens: .*at least 1, got 0"),
        ({"hidden_dim": "8"}, TypeError, "hidden_dim: expected an integer of at least 1, got '8'"),
        ({"hidden_dim": -8}, ValueError, "hidden_dim: .*, got -8"),
        ({"dtype": "float32"}, TypeError, r"dtype: expected a torch.dtype or None, got 'float32' \(str\)"),
        ({"dtype": float}, TypeError, "dtype: expected a torch.dtype or None, got <class 'float'>"),
        ({"buffer_size_in_bytes": 1024.0}, TypeError, r"buffer_size_in_bytes: .* bytes.*got 1024.0 \(float\)"),
        ({"buffer_size_in_bytes": "1M"}, TypeError, "buffer_size_in_bytes: expected an integer from 1 to .*, got '1M'"),
        ({"buffer_size_in_bytes": 0}, ValueError, "buffer_size_in_bytes: .* from 1 to 4294967295 bytes"),
        ({"buffer_size_in_bytes": 1 << 32}, ValueError, "buffer_size_in_bytes: .*, got 4294967296"),
        ({"buffer_size_in_bytes": 1024, "dtype": "bf16"}, TypeError, "dtype: expected"),
        ({**PROBLEM, "max_num_tokens": 1 << 40}, ValueError, r"\[1099511627776, 8\] of torch.float32 .* \d+ bytes"),
        ({**PROBLEM, "mapping": None}, TypeError, "mapping: expected a Mapping.*, got None.*, without tp_size"),
        ({**PROBLEM, "mapping": 2}, TypeError, "mapping: expected a Mapping.*, got 2 .*without tp_size"),
        ({**PROBLEM, "comm_backend": NoComm()}, TypeError, "comm_backend: .*without bcast, barrier, Split"),
        ({**PROBLEM, "comm_backend": StoreComm}, TypeError, "comm_backend: expected an object .*got a class"),
        ({**PROBLEM, "device": 0}, TypeError, r"device: expected a torch.device, .*got 0 \(int\)"),
        ({**PROBLEM, "device": "nonsense"}, ValueError, "device: expected 'cpu' or 'cuda', got 'nonsense'"),
        ({**PROBLEM, "device": "meta"}, ValueError, "device: expected 'cpu' or 'cuda', got 'meta'"),
        ({**PROBLEM, "device": "cuda:99"}, ValueError, r"device: expected one of the \d+ CUDA devices.*got 'cuda:99'"),
        ({**PROBLEM, "options": {}}, TypeError, r"options: expected mnnvl_backend.Options or None, got \{\} \(dict\)"),
    ],
)  # fmt: skip
def test_workspace_arguments(monkeypatch, given, error, text):
    """Nothing is loaded, read or sent before: not even the environment is looked at."""

    def fail() -> None:
        raise AssertionError("loaded the compiled module before the arguments were checked")

    monkeypatch.setattr("mnnvl_backend.flashinfer.workspace.load_compiled", fail)
    monkeypatch.setenv("MNNVL_STRATEGY", "a value that nobody may read yet")
    with pytest.raises(error, match=text):
        Workspace(**{"mapping": Mapping(), "device": "cpu", "comm_backend": SilentComm(), **given})


def test_workspace_without_anybody_to_meet():
    with pytest.raises(RuntimeError, match=r"comm_backend: none given.*init_process_group"):
        Workspace(Mapping(2, 0, tp_size=2), buffer_size_in_bytes=1024, device="cpu")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tp_size", 2.0, r"mapping.tp_size: expected an integer of at least 1, got 2.0 \(float\)"),
        ("tp_size", 0, "mapping.tp_size: .*at least 1, got 0"),
        ("tp_size", 73, "mapping.tp_size: expected an integer from 1 to 72 ranks, got 73"),
        ("tp_rank", 2, "mapping.tp_rank: expected an integer from 0 to 1, got 2"),
        ("cp_rank", None, "mapping.cp_rank: expected an integer of at least 0, got None"),
    ],
)
def test_mappings_of_other_libraries(name, value, text):
    """Anything with the names will do, FlashInfer's own for one; what it says is checked."""
    place = {"tp_size": 2, "tp_rank": 1, "cp_size": 1, "cp_rank": 0, "pp_rank": 0}
    good = types.SimpleNamespace(**place)
    with pytest.raises(RuntimeError, match="comm_backend: none given"):  # past all checks
        Workspace(good, buffer_size_in_bytes=1024, device="cpu")
    with pytest.raises((TypeError, ValueError), match=text):
        Workspace(types.SimpleNamespace(**place | {name: value}), buffer_size_in_bytes=1024, device="cpu")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"tp_size": 2.0}, TypeError, "tp_size: expected an integer of at least 1, got 2.0"),
        ({"tp_size": 0}, ValueError, "tp_size: .*at least 1, got 0"),
        ({"num_tokens": 1.5}, TypeError, "num_tokens: expected an integer of at least 0, got 1.5"),
        ({"num_tokens": -1}, ValueError, "num_tokens: .*, got -1"),
        ({"hidden_dim": None}, TypeError, "hidden_dim: .*, got None"),
        ({"dtype": 2}, TypeError, r"dtype: expected a torch.dtype, got 2 \(int\)"),
        ({"strategy": 0}, TypeError, r"strategy: expected a member of .*FusionStrategy, got 0 \(int\)"),
        ({"strategy": "oneshot"}, TypeError, "strategy: expected a member of .*, got 'oneshot'"),
    ],
)
def test_arguments_of_sizes_and_selection(given, error, text):
    good = {"tp_size": 2, "num_tokens": 4, "hidden_dim": 8, "dtype": torch.float32}
    with pytest.raises(error, match=text):
        Workspace.get_required_buffer_size_bytes(**good | given)
    if "strategy" not in given:
        with pytest.raises(error, match=text):
            Strategy.select_strategy(**good | given)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"world_size": 2.0}, TypeError, "world_size: expected an integer of at least 1, got 2.0"),
        ({"tp_size": "2"}, TypeError, "tp_size: .*got '2'"),
        ({"tp_size": 0}, ValueError, "tp_size: .*at least 1, got 0"),
        ({"pp_size": -1}, ValueError, "pp_size: .*, got -1"),
        ({"rank": 0.0}, TypeError, "rank: expected an integer from 0 to 0, got 0.0"),
        ({"rank": False}, TypeError, "rank: expected an integer from 0 to 0, got False"),
        ({"gpus_per_node": 0}, ValueError, "gpus_per_node: .*, got 0"),
        ({"moe_tp_size": 0}, ValueError, "moe_tp_size: .*of at least 1, or -1.*, got 0"),
        ({"moe_ep_size": -2}, ValueError, "moe_ep_size: expected an integer of at least -1, got -2"),
        ({"attn_tp_size": 1.0}, TypeError, "attn_tp_size: .*got 1.0"),
        ({"cp_config": []}, TypeError, r"cp_config: expected a dict or None, got \[\] \(list\)"),
        ({"auto_parallel": 1}, TypeError, r"auto_parallel: expected a bool, got 1 \(int\)"),
        ({"enable_attention_dp": None}, TypeError, "enable_attention_dp: expected a bool, got None"),
    ],
)
def test_types_of_mappings(given, error, text):
    with pytest.raises(error, match=text):
        Mapping(**given)


def test_layers_and_experts_are_counted_in_integers():
    with pytest.raises(TypeError, match=r"num_layers: expected an integer of at least 0, got 4.0"):
        Mapping().pp_layers(4.0)
    with pytest.raises(ValueError, match=r"num_experts: .*, got -1"):
        Mapping().ep_experts(-1)


def test_numbers_of_numpy_make_a_mapping():
    np = pytest.importorskip("numpy")
    mapping = Mapping(np.int64(4), np.int32(3), tp_size=np.int64(2), pp_size=2)
    assert mapping == Mapping(4, 3, tp_size=2, pp_size=2)
    assert type(mapping.tp_rank) is int
