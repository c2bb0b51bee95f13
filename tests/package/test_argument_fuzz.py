"""Every public function given anything at all: a TypeError or ValueError that names the argument, or what is documented
of it; never a crash or a wait, and afterwards a right call gives the right sum. Longer with MNNVL_TEST_CASES."""

from __future__ import annotations

import inspect
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import all_reduce_works

import mnnvl_backend as m
from mnnvl_backend import config
from mnnvl_backend.flashinfer.control import StoreComm

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

CASES = int(os.environ.get("MNNVL_TEST_CASES", "300"))
SETTINGS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "derandomize": "MNNVL_TEST_CASES" not in os.environ,  # CI runs the same ones each time
}
Given = dict[str, Any]

# Odd values, by name, so that a failure shows which and other processes can make them.


class Broken:
    """Of somebody else's: whatever is asked of it raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __index__(self) -> int:
        raise OverflowError("no index")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


def without_storage(device: str) -> torch.Tensor:
    tensor = torch.ones(3, 32, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


ODD: dict[str, Callable[[str], Any]] = {
    "None": lambda _: None,
    "True": lambda _: True,
    "list": lambda _: [],
    "dict": lambda _: {"a": 1},
    "a set": lambda _: {1},
    "bytes": lambda _: b"\xff\0",
    "object": lambda _: object(),
    "class": lambda _: int,
    "function": lambda _: len,
    "complex": lambda _: 1j,
    "huge": lambda _: 10**400,
    "surrogate": lambda _: "\ud800",
    "broken": lambda _: Broken(),
    "dtype": lambda _: torch.bfloat16,
    "integer dtype": lambda _: torch.int4 if hasattr(torch, "int4") else torch.int8,
    "timedelta": lambda _: timedelta.max,
    "strategy": lambda _: m.MNNVLAllreduceFusionStrategy.TWOSHOT,
    "x": lambda d: torch.ones(3, 32, device=d),
    "half": lambda d: torch.ones(3, 32, dtype=torch.half, device=d),
    "NaN": lambda d: torch.full((3, 32), float("nan"), device=d),
    "double": lambda d: torch.ones(3, 32, dtype=torch.float64, device=d),
    "bool tensor": lambda d: torch.ones(3, 32, dtype=torch.bool, device=d),
    "complex tensor": lambda d: torch.ones(3, 32, dtype=torch.complex64, device=d),
    "fp8": lambda d: torch.ones(3, 32, device=d).to(torch.float8_e4m3fn),
    "scalar": lambda d: torch.tensor(1.0, device=d),
    "integer scalar": lambda d: torch.tensor(1, device=d),
    "vector": lambda d: torch.ones(32, device=d),
    "empty": lambda d: torch.ones(0, 32, device=d),
    "no columns": lambda d: torch.ones(3, 0, device=d),
    "cube": lambda d: torch.ones(2, 3, 4, device=d),
    "transposed": lambda d: torch.ones(32, 3, device=d).t(),
    "expanded": lambda d: torch.ones(1, 32, device=d).expand(3, 32),
    "offset": lambda d: torch.ones(97, device=d)[1:].view(3, 32),
    "meta": lambda _: torch.ones(3, 32, device="meta"),
    "sparse": lambda d: torch.eye(32, device=d).to_sparse(),
    "csr": lambda d: torch.eye(32, device=d).to_sparse_csr(),
    "quantized": lambda _: torch.quantize_per_tensor(torch.ones(3, 32), 1.0, 0, torch.quint8),
    "conjugate": lambda d: torch.ones(3, 32, dtype=torch.complex64, device=d).conj(),
    "negative": lambda d: torch._neg_view(torch.ones(3, 32, device=d)),
    "nested": lambda d: torch.nested.nested_tensor([torch.ones(2, device=d), torch.ones(3, device=d)]),
    "no storage": without_storage,
    "gradient": lambda d: torch.ones(3, 32, device=d, requires_grad=True),
    "parameter": lambda d: torch.nn.Parameter(torch.ones(3, 32, device=d)),
}
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 40), st.sampled_from([2**31, 2**31 - 1, 2**63, 2**63 - 1, -(2**63)]), st.floats()
)  # fmt: skip
ANYTHING = st.one_of(st.sampled_from(sorted(ODD)).map(lambda name: ("odd", name)), NUMBERS, st.text(max_size=4))


def made(value: Any, device: str) -> Any:
    return ODD[value[1]](device) if isinstance(value, tuple) else value


def changes(names: list[str]) -> Any:
    """One to three of the arguments, and what is given in their place."""
    return st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=3)


# What is called: its good arguments, and what may be raised beside TypeError and ValueError.


def good_calls(workspace: Any, device: str) -> dict[str, tuple[Callable[..., Any], Given, str]]:
    """The last: a pattern of documented RuntimeErrors."""
    x = torch.ones(3, 32, device=device)
    fused = {"input": x, "residual_in": x.clone(), "gamma": x[0].clone(), "workspace": workspace}
    token = workspace.handle
    shape = {"max_num_tokens": 4, "hidden_dim": 32, "dtype": torch.float32}
    problem = {"tp_size": 1, "num_tokens": 3, "hidden_dim": 32, "dtype": torch.float32}
    old = {
        "multicast_buffer_ptr": token,
        "buffer_ptrs_dev": token,
        "buffer_M": 8,
        "buffer_flags_mnnvl": None,
        "nranks": 1,
        "rank": 0,
    }
    mapping, strategy = m.Mapping(1, 0, 1, tp_size=1), m.MNNVLAllreduceFusionStrategy.AUTO
    kinds = {p: v for p, v in vars(m.AllReduceFusionPattern).items() if p.startswith("k")}
    calls: dict[str, tuple[Callable[..., Any], Given, str]] = {
        "allreduce": (m.trtllm_mnnvl_allreduce, {"input": x, "workspace": workspace, "launch_with_pdl": False, "output": x.clone(), "strategy": strategy}, ""),
        "fused": (m.trtllm_mnnvl_fused_allreduce_add_rmsnorm, {**fused, "epsilon": 1e-5, "output": None, "residual_out": None, "launch_with_pdl": False, "strategy": strategy, "weight_bias": 0.0}, ""),
        "fp8": (m.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant, {**fused, "quant_type": 1, "output_scale": 1.0, "layout_code": 0, "epsilon": None, "quant_out": None, "scale_out": None, "weight_bias": 0.0}, ""),
        "dynamic": (m.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant, {**fused, "quant_type": 3, "output_scale": None, "quant_out": None, "scale_out": None, "strategy": strategy}, ""),
        "old": (m.trtllm_mnnvl_all_reduce, {"inp": x, **old, "wait_for_results": True, "launch_with_pdl": False, "out": x.clone()}, ""),
        "old fused": (m.trtllm_mnnvl_fused_allreduce_rmsnorm, {"prenorm_output": x.clone(), "normed_output": x.clone(), "shard_input": x, "unicast_ptr": token, **old, "gamma": x[0].clone(), "epsilon": 1e-5, "residual": x.clone(), "launch_with_pdl": False}, ""),
        "old workspace": (m.get_allreduce_mnnvl_workspace, {"mapping": mapping, "dtype": torch.float32, "buffer_size_in_bytes": 4096}, "comm_backend: none given"),
        "workspace": (m.MNNVLAllReduceFusionWorkspace, {"mapping": mapping, **shape, "buffer_size_in_bytes": 4096, "comm_backend": None, "device": device, "options": None}, "comm_backend: none given"),
        "create": (m.create_allreduce_fusion_workspace, {"backend": "auto", "world_size": 1, "rank": 0, "max_token_num": 4, "hidden_dim": 32, "dtype": torch.float32, "gpus_per_node": 1, "comm_backend": None, "force_oneshot_support": False, "group": None, "device": device, "options": None}, "backend: expected|comm_backend: none given"),
        "mapping": (m.Mapping, {"world_size": 4, "rank": 1, "gpus_per_node": 4, "tp_size": 4, "pp_size": 1, "cp_size": 1}, ""),
        "size": (m.MNNVLAllReduceFusionWorkspace.get_required_buffer_size_bytes, {**problem, "strategy": strategy}, ""),
        "sufficient": (workspace.is_buffer_size_sufficient, {**problem, "strategy": None, "use_oneshot": None}, ""),
        "select": (m.MNNVLAllreduceFusionStrategy.select_strategy, problem, ""),
        "swizzled": (m.compute_fp4_swizzled_layout_sf_size, {"total_row": 3, "total_column": 2}, ""),
        "restore": (workspace.checkpoint_restore, {"comm_backend": None}, ""),
        "options": (m.Options, {"timeout": None, "workspace_bytes": None, "strategy": "auto", "multicast": "auto", "bootstrap": "auto"}, ""),
        "stats": (m.stats, {"group": None}, ""),
        "last operations": (m.last_operations, {"group": None}, ""),
        "release": (m.release_memory, {"group": None}, ""),
        "give back": (m.restore_memory, {"group": None}, ""),
        "dump": (m.dump_operations, {"file": io.StringIO()}, ""),
        "multicast": (m.is_multicast_supported, {"device_idx": 0}, ""),
        "fabric": (m.is_mnnvl_fabric_supported, {"device_idx": 0}, ""),
    }  # fmt: skip
    for name, pattern in kinds.items():
        calls[name] = (m.allreduce_fusion, {"input": x, "workspace": workspace, "pattern": pattern, "residual_in": x.clone(), "rms_gamma": x[0].clone(), "rms_eps": 1e-6, "scale_factor": None, "layout_code": 0, "use_oneshot": None, "residual_out": x.clone(), "norm_out": x.clone(), "quant_out": None, "scale_out": None, "block_quant_group_size": 8, "weight_bias": 0.0, "launch_with_pdl": False}, "")  # fmt: skip
    return calls


# Functions that stand on others name arguments as these do.
ALIASES = {
    "gpus_per_node", "mapping", "tp_size", "tp_rank", "input", "output", "residual_in", "residual_out", "gamma", "epsilon", "max_num_tokens",
    "comm_backend", "nranks, rank", "buffer_size_in_bytes", "output_scale",
}  # fmt: skip


def refused(function: Callable[..., Any], given: Given, documented: str, what: str) -> Any:
    """The call's result, or None if it was refused as it should be."""
    names = {*inspect.signature(function).parameters, *ALIASES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(**given)
        except (TypeError, ValueError, RuntimeError) as raised:
            error, text = raised, str(raised)
    if isinstance(error, RuntimeError):
        named = bool(documented and re.search(documented, text))
    else:
        named = any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)
    assert named, f"{what}: no argument is named: {error!r}"
    assert len(text) < 1500, what
    return None


@pytest.fixture
def workspace(device: str) -> Iterator[Any]:
    with m.MNNVLAllReduceFusionWorkspace(
        m.Mapping(1, 0, 1, tp_size=1), 8, 32, torch.float32, comm_backend=StoreComm(dist.HashStore(), 0, 1, timedelta(seconds=20)), device=device
    ) as one:  # fmt: skip
        yield one


@pytest.mark.parametrize("part", range(4))
def test_functions(workspace: Any, device: str, part: int) -> None:
    names = sorted(good_calls(workspace, device))[part::4]
    calls = {name: list(good_calls(workspace, device)[name][1]) for name in names}
    cases = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), changes(calls[name])))

    @hypothesis.settings(max_examples=max(CASES // 4, 1), **SETTINGS)
    @hypothesis.given(cases)
    def holds(case: tuple[str, Given]) -> None:
        name, odd = case
        function, given, documented = good_calls(workspace, device)[name]
        result = refused(function, {**given, **{k: made(v, device) for k, v in odd.items()}}, documented, str(case))
        for made_one in result if isinstance(result, tuple) else [result]:
            if isinstance(made_one, m.MNNVLAllReduceFusionWorkspace):
                made_one.destroy()
        x = torch.full((3, 32), 5.0, device=device)
        assert m.trtllm_mnnvl_allreduce(x, workspace, False).eq(5).all()

    holds()


@hypothesis.settings(max_examples=CASES, **SETTINGS)
@hypothesis.given(st.dictionaries(st.sampled_from([v.name for v in config.VARIABLES]), st.text(max_size=12)))
def test_environment(environ: dict[str, str]) -> None:
    try:
        settings = config.merge(m.Options(), config.read_environment(environ))
    except ValueError as raised:
        text = str(raised)
    else:
        assert settings.workspace_bytes == 0 or 1 << 20 <= settings.workspace_bytes <= 1 << 40
        assert all(type(value) in (int, bool, str, dict) for value in settings.fields().values())
        return
    assert re.match(r"MNNVL_\w+: expected .+, got ", text), environ


# Collectives of torch, on two ranks that make the same mistakes: no gather or scatter, where the root sees others.


def collectives(device: str) -> dict[str, tuple[Callable[..., Any], Given]]:
    x, whole = torch.ones(4, 32, device=device), torch.ones(8, 32, device=device)
    two = {"output_split_sizes": [2, 2], "input_split_sizes": [2, 2]}
    return {
        "all_reduce": (dist.all_reduce, {"tensor": x, "op": dist.ReduceOp.SUM}),
        "broadcast": (dist.broadcast, {"tensor": x, "src": 0}),
        "reduce": (dist.reduce, {"tensor": x, "dst": 1, "op": dist.ReduceOp.SUM}),
        "all_gather": (dist.all_gather, {"tensor_list": [x.clone(), x.clone()], "tensor": x}),
        "into_tensor": (dist.all_gather_into_tensor, {"output_tensor": whole, "input_tensor": x}),
        "reduce_scatter": (dist.reduce_scatter, {"output": x, "input_list": [x.clone(), x.clone()], "op": dist.ReduceOp.SUM}),
        "reduce_scatter_tensor": (dist.reduce_scatter_tensor, {"output": x, "input": whole, "op": dist.ReduceOp.SUM}),
        "all_to_all": (dist.all_to_all, {"output_tensor_list": [x, x.clone()], "input_tensor_list": [x.clone(), x.clone()]}),
        "single": (dist.all_to_all_single, {"output": x, "input": x.clone(), **two}),
        "barrier": (dist.barrier, {"device_ids": None}),
        "raw all_reduce": (lambda tensors: dist.group.WORLD._get_backend(torch.device(device)).allreduce(tensors).wait(), {"tensors": [x]}),
    }  # fmt: skip


def odd_value(value: Any, good: Any, device: str) -> Any:
    """In the place of a list, a list of the odd value: what stands in one place of it is the mistake of one rank."""
    odd = made(value, device)
    return [odd] * len(good) if isinstance(good, list) and value not in (("odd", "None"), ("odd", "list")) else odd


def two_ranks_body(rank: Rank, cases: list[tuple[str, Given]]) -> None:
    device = str(rank.device)
    for name, odd in cases:
        function, good = collectives(device)[name]
        given = {**good, **{k: odd_value(v, good[k], device) for k, v in odd.items()}}
        error: Exception = ValueError()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(**given)
            except Exception as raised:  # torch's own checks, which come first, have every type
                error = raised
        ours = str(error).startswith("mnnvl") or isinstance(error, dist.DistError)
        assert not ours or isinstance(error, (TypeError, ValueError)), f"{name} {odd}: {error!r}"
        all_reduce_works(rank)


def test_collectives(ranks: Callable[..., Any], device: str) -> None:
    names = {name: list(good) for name, (_, good) in collectives("cpu").items()}
    cases = st.sampled_from(sorted(names)).flatmap(lambda name: st.tuples(st.just(name), changes(names[name])))

    @hypothesis.settings(max_examples=max(CASES // 150, 1), phases=[hypothesis.Phase.generate], **SETTINGS)
    @hypothesis.given(st.lists(cases, min_size=80, max_size=80))
    def holds(drawn: list[tuple[str, Given]]) -> None:
        ranks(two_ranks_body, 2, device, args=(drawn,))

    holds()
