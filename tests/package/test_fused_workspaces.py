"""What is pure around the fused family's workspaces: the factory, sizes, communicators, questions about a device, and
FlashInfer's older functions."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stand_in import Stand

import mnnvl_backend.flashinfer.comm as comm
from mnnvl_backend import Mapping
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.flashinfer.comm import mnnvl, trtllm_mnnvl_ar


@pytest.mark.parametrize("backend", ["trtllm", "mnnvl-cutedsl", "", None])
def test_backends_of_the_factory(backend):
    with pytest.raises(RuntimeError, match="backend: expected 'auto' or 'mnnvl', got") as caught:
        comm.create_allreduce_fusion_workspace(backend, 1, 0, 4, 8, torch.float32)
    assert "multicast" not in str(caught.value)  # by that word callers sort errors


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"world_size": None}, TypeError, "world_size: expected an integer of at least 1, got None"),
        ({"rank": None}, TypeError, "rank: expected an integer from 0 to 0, got None"),
        ({"max_token_num": None}, ValueError, "max_num_tokens, hidden_dim and dtype must all be given"),
        ({"max_token_num": None, "force_oneshot_support": True}, TypeError, "max_token_num: expected an integer"),
        ({"dtype": None, "force_oneshot_support": True}, TypeError, "dtype: expected a torch.dtype, got None"),
        ({"force_oneshot_support": 1}, TypeError, "force_oneshot_support: expected a bool"),
        ({"options": {}, "group": "group"}, TypeError, "options: expected mnnvl_backend.Options or None"),
        ({"device": "meta"}, ValueError, "device: expected 'cpu' or 'cuda', got 'meta'"),
    ],
)
def test_arguments_of_the_factory(given, error, text):
    good = {"world_size": 1, "rank": 0, "max_token_num": 4, "hidden_dim": 8, "dtype": torch.float32}
    with pytest.raises(error, match=text):
        comm.create_allreduce_fusion_workspace(**good | given)


@pytest.mark.parametrize(
    ("ranks", "oneshot", "expected"), [(2, False, None), (2, True, 2 * 8 * 600_000 * 4), (3, True, 3 * 7 * 600_000 * 4)]
)
def test_room_of_the_factory(monkeypatch, ranks, oneshot, expected):
    """For an odd count of tokens over two ranks, two-shot needs more than one-shot, which is what is asked for."""
    made = []
    monkeypatch.setattr(
        "mnnvl_backend.flashinfer.unified.MNNVLAllReduceFusionWorkspace", lambda *a, **_: made.append(a)
    )
    comm.create_allreduce_fusion_workspace("mnnvl", ranks, 1, 7, 600_000, torch.float32, None, "comm", oneshot)
    ((mapping, *rest),) = made
    assert (mapping.tp_size, mapping.tp_rank) == (ranks, 1)
    assert rest == [7, 600_000, torch.float32, expected, "comm"]


@pytest.mark.parametrize(
    ("given", "fits"),
    [({}, True), ({"strategy": Strategy.ONESHOT}, False), ({"strategy": Strategy.TWOSHOT}, True),
     ({"use_oneshot": True}, False), ({"use_oneshot": False}, True), ({"use_oneshot": None}, True),
     ({"strategy": True}, False), ({"strategy": None}, True)],
)  # fmt: skip
def test_sizes_are_asked_for_by_either_name(given, fits):
    workspace = Stand(size := Workspace.get_required_buffer_size_bytes(8, 64, 4096, torch.bfloat16))
    assert size == 2 * 64 * 4096 * 2
    assert workspace.is_buffer_size_sufficient(8, 64, 4096, torch.bfloat16, **given) is fits
    workspace.destroy()


def test_sizes_are_asked_for_by_one_name():
    stand = Stand()
    with pytest.raises(ValueError, match="use_oneshot: expected None beside strategy"):
        stand.is_buffer_size_sufficient(8, 1, 8, torch.float16, Strategy.AUTO, use_oneshot=True)
    with pytest.raises(TypeError, match="strategy: expected a member"):
        stand.is_buffer_size_sufficient(8, 1, 8, torch.float16, "auto")
    with pytest.raises(TypeError, match="use_oneshot: expected a bool"):
        stand.is_buffer_size_sufficient(8, 1, 8, torch.float16, use_oneshot=0)
    stand.destroy()


def test_a_workspace_that_nobody_destroyed():
    workspace = Stand()
    workspace.destroy()
    del workspace
    with pytest.warns(ResourceWarning, match="Stand of 2 ranks was never destroyed"):
        Stand()


def test_a_workspace_that_was_never_made_is_silent(recwarn):
    with pytest.raises(TypeError):
        Workspace(None)
    assert not [w for w in recwarn if w.category is ResourceWarning]
    assert issubclass(Workspace, comm.AllReduceFusionWorkspace)
    with pytest.raises(TypeError, match="abstract"):
        comm.AllReduceFusionWorkspace(1, 0)


# Communicators and questions.


def test_comm_backend_is_a_protocol_that_can_be_asked_and_inherited():
    class Comm(mnnvl.CommBackend):
        def Get_rank(self) -> int:
            return 0

    methods = ("Get_rank", "Get_size", "allgather", "bcast", "barrier", "Split")
    assert isinstance(types.SimpleNamespace(**dict.fromkeys(methods, len)), mnnvl.CommBackend)
    assert not isinstance(types.SimpleNamespace(Get_rank=len), mnnvl.CommBackend)
    assert Comm().Get_rank() == 0


def test_backends_without_what_they_need(monkeypatch):
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialized; call .*init_process_group"):
        mnnvl.TorchDistBackend()
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for function in (mnnvl.MPIBackend, trtllm_mnnvl_ar.mpi_barrier):
        with pytest.raises(RuntimeError, match=r"mpi4py could not be imported: .*TorchDistBackend"):
            function()


class Communicator:
    """As mpi4py's COMM_WORLD of one rank."""

    def __init__(self) -> None:
        self.barriers = 0

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def allgather(self, data: Any) -> list[Any]:
        return [data]

    def bcast(self, data: Any, root: int) -> Any:
        return data

    def Barrier(self) -> None:
        self.barriers += 1

    def Split(self, color: int, key: int) -> Communicator:
        return Communicator()


def test_mpi_backend(monkeypatch):
    world = Communicator()
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=world)))
    backend = mnnvl.MPIBackend()
    assert (backend.Get_rank(), backend.Get_size(), backend.allgather(3), backend.bcast(4, 0)) == (0, 1, (3,), 4)
    part = backend.Split(0, 0)
    part.barrier()
    assert world.barriers == 0
    backend.barrier()
    trtllm_mnnvl_ar.mpi_barrier()
    assert world.barriers == 2


@pytest.mark.parametrize("function", [mnnvl.is_multicast_supported, mnnvl.is_mnnvl_fabric_supported])
def test_questions_about_a_device(monkeypatch, function):
    devices = [{"ordinal": 0, "multicast": True, "fabric_handles": True, "cluster_uuid": "ab"},
               {"ordinal": 1, "multicast": False, "fabric_handles": True, "cluster_uuid": ""}]  # fmt: skip
    monkeypatch.setattr("mnnvl_backend.flashinfer.hardware._devices", lambda: devices)
    assert [function(i) for i in range(3)] == [True, False, False]
    with pytest.raises(TypeError, match="device_idx: expected an integer"):
        function(torch.device("cpu"))


# Older names.


def test_older_names_warn_and_look_for_the_workspace(monkeypatch):
    x = torch.ones(4, 8)
    name = "trtllm_mnnvl_all_reduce is deprecated: use trtllm_mnnvl_allreduce"
    text = "multicast_buffer_ptr: expected the mc_ptr, .* that was not destroyed, got 1234567"
    with pytest.warns(DeprecationWarning, match=name) as seen, pytest.raises(ValueError, match=text):
        trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce(x, 1234567, 1, 4, None, 1, 0, True, False, x)
    assert seen[0].filename == __file__
    old = trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce
    for given, text in (
        ((x[0], 1, 1, 4, None, 1, 0, True, False, x), "inp: expected 2-D"),
        ((x, 1, 1, 3, None, 1, 0, True, False, x), "inp: expected at most buffer_M = 3 tokens, got 4"),
        ((x, 1, 1, 4, None, 1, 0, False, False, x), "wait_for_results: expected True, got False"),
        ((x, 1, 1, 4, None, 1, 0, True, False), "out: expected a torch.Tensor, got None"),
    ):
        with pytest.warns(DeprecationWarning, match=name), pytest.raises(ValueError, match=text):
            old(*given)
    fused = trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_rmsnorm
    with (
        pytest.warns(DeprecationWarning, match="fused_allreduce_rmsnorm is deprecated"),
        pytest.raises(ValueError, match="shard_input: expected at most buffer_M = 3"),
    ):
        fused(x, x, x, 1, 1, 1, 3, None, 1, 0, x[0], 1e-5, x, False)


@pytest.mark.parametrize(
    ("asked", "dtype", "units"), [(None, torch.bfloat16, 4), (1, torch.float32, 1), (3_440_641, torch.float16, 2)]
)
def test_room_of_the_older_workspace(monkeypatch, asked, dtype, units):
    """Whole rows of every common hidden_dim, six tensors a buffer."""
    unit = 286_720 * 6 * dtype.itemsize

    def made(mapping: Any, buffer_size_in_bytes: int, comm_backend: Any) -> Any:
        assert (buffer_size_in_bytes, comm_backend) == (units * unit, "comm")
        return types.SimpleNamespace(buffer_flags="flags", buffer_size_bytes=buffer_size_in_bytes + 5)

    monkeypatch.setattr("mnnvl_backend.flashinfer.legacy.MNNVLAllReduceFusionWorkspace", made)
    with pytest.warns(DeprecationWarning, match="get_allreduce_mnnvl_workspace is deprecated"):
        _, flags, elements = trtllm_mnnvl_ar.get_allreduce_mnnvl_workspace(Mapping(), dtype, "comm", asked)
    assert (flags, elements) == ("flags", units * 286_720)
