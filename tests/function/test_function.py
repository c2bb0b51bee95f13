"""trtllm_mnnvl_allreduce over ranks: numbers, refusals, torch.compile, graphs, calls of every kind on one workspace."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
import torch
from launcher import Rank
from reference import DTYPES, assert_bits, every_16_bit_pattern, random_input, rank_order_sum
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from workspaces import workspace_of

from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import trtllm_mnnvl_allreduce


def sums_body(rank: Rank) -> None:
    with workspace_of(rank, max_num_tokens=64, hidden_dim=1024, dtype=torch.float32) as workspace:
        assert (workspace.backend, workspace.rank, workspace.tp_size) == ("mnnvl", rank.rank, rank.world_size)
        assert workspace.workspace_size_bytes == 3 * workspace.buffer_size_bytes
        for seed, (shape, dtype, strategy) in enumerate(
            (shape, dtype, strategy)
            for shape in ((1, 8), (3, 1000), (5, 7), (64, 1024), (1, 1), (0, 16))
            for dtype in DTYPES
            for strategy in Strategy
        ):
            if not workspace.is_buffer_size_sufficient(rank.world_size, *shape, dtype, strategy):
                continue
            n, what = rank.world_size, f"{shape} {dtype} {strategy.name}"
            inputs = [random_input(r, shape[0] * shape[1], dtype, seed).view(shape) for r in range(n)]
            x = inputs[rank.rank].to(rank.device)
            before = x.clone()
            expected = rank_order_sum(inputs)
            assert_bits(trtllm_mnnvl_allreduce(x, workspace, False, strategy=strategy), expected, what)
            assert_bits(x, before.cpu(), f"input of {what}")
            output = torch.empty_like(x)
            assert trtllm_mnnvl_allreduce(x, workspace, True, output, strategy) is output
            assert_bits(output, expected, what)
            assert trtllm_mnnvl_allreduce(x, workspace, False, x, strategy) is x
            assert_bits(x, expected, f"{what}, in place")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums(ranks, device, world_size):
    ranks(sums_body, world_size, device)


class Subclass(torch.Tensor):
    pass


def usual_body(rank: Rank) -> None:
    with workspace_of(rank, buffer_size_in_bytes=4096) as workspace:

        def usual(x: torch.Tensor, out: torch.Tensor, strategy: Strategy = Strategy.AUTO) -> bool:
            return workspace.all_reduce_if_usual(x, out, strategy, False)

        x = torch.ones(4, 16, device=rank.device)
        out = torch.empty_like(x)
        for dtype in DTYPES:
            y = x.to(dtype, copy=True)
            assert usual(y, torch.empty_like(y))
            assert usual(y, y)
        assert usual(x, out, Strategy.TWOSHOT)
        assert (out == rank.world_size).all()
        with torch.inference_mode():
            assert usual(x, torch.empty_like(x))
        marked = x.clone().requires_grad_()
        wide = torch.zeros(8, 16, device=rank.device)
        unusual = [
            (x.flatten(), out.flatten()), (x, out.view(16, 4)), (x.int(), out.int()), (x, out.half()), (x.t(), out.t()),
            (x.cfloat().conj(), out.cfloat()), (marked, out), (x, marked), (wide[:4], wide[2:6]), (x.to_sparse(), out),
            (x.to("meta"), out.to("meta")), (torch.ones(4096, 16, device=rank.device),) * 2,
        ]  # fmt: skip
        for a, b in unusual:
            assert not usual(a, b), (a, b)
        with FakeTensorMode() as mode:
            assert not usual(mode.from_tensor(x), mode.from_tensor(out))
            assert not usual(x, out)
        with torch.profiler.profile():
            assert not usual(x, out)
        with torch.utils._device.DeviceContext(rank.device):  # a mode that sees functions
            assert not usual(x, out)
        traced: list[bool] = []
        torch.jit.trace(lambda x: traced.append(usual(x, out)) or x + 1, x, check_trace=False)
        make_fx(lambda x: traced.append(usual(x, out)) or x + 1, pre_dispatch=True)(x)
        assert traced == [False, False]
        workspace.checkpoint_prepare()
        assert not usual(x, out)
        workspace.checkpoint_restore()
        assert usual(x, out)
        # A subclass may want to see the operator.
        assert trtllm_mnnvl_allreduce(x.as_subclass(Subclass), workspace, False).sum() == rank.world_size * x.numel()
    assert not usual(x, out)


def test_only_usual_calls_take_the_short_way(ranks, device):
    ranks(usual_body, 2, device)


def errors_body(rank: Rank) -> None:
    workspace = workspace_of(rank, buffer_size_in_bytes=4096)
    x = torch.ones(2, 16, device=rank.device)
    bad: list[tuple[str, dict[str, Any]]] = [
        (r"input: expected 2-D .*got 1-D \(32,\)", {"input": x.flatten()}),
        (r"output: expected 2-D .*got 3-D \(1, 2, 16\)", {"output": torch.empty(1, 2, 16, device=rank.device)}),
        (
            r"output: expected input's shape \(2, 16\), got \(16, 2\)",
            {"output": torch.empty(16, 2, device=rank.device)},
        ),
        (r"output: expected input's dtype torch.float32, got torch.float16", {"output": x.half()}),
        (r"input: expected dtype float32, float16 or bfloat16, got torch.int32", {"input": x.int()}),
        (
            r"input: expected a contiguous tensor, got strides \(1, 2\)",
            {"input": torch.ones(16, 2, device=x.device).t()},
        ),
        (r"output: expected a contiguous tensor", {"output": torch.ones(16, 2, device=x.device).t()}),
        (r"input: expected a tensor on the workspace's device .*, got meta", {"input": x.to("meta")}),
    ]
    for text, arguments in bad:
        with pytest.raises(ValueError, match=text):
            trtllm_mnnvl_allreduce(**{"input": x, "workspace": workspace, "launch_with_pdl": False, **arguments})
    big = torch.ones(1024, 1024, device=rank.device)
    needed = workspace.get_required_buffer_size_bytes(rank.world_size, 1024, 1024, big.dtype, Strategy.TWOSHOT)
    with pytest.raises(ValueError, match=rf"buffer of {workspace.buffer_size_bytes} bytes .* requires {needed} bytes"):
        trtllm_mnnvl_allreduce(big, workspace, False, strategy=Strategy.TWOSHOT)
    # Nothing was enqueued: the workspace still works.
    assert (trtllm_mnnvl_allreduce(x, workspace, False) == rank.world_size).all()
    workspace.destroy()
    workspace.destroy()
    assert workspace.destroyed
    with pytest.raises(RuntimeError, match="workspace: it was destroyed"):
        trtllm_mnnvl_allreduce(x, workspace, False)


def test_errors(ranks, device):
    ranks(errors_body, 2, device)


class AlmostAWorkspace:
    """Has what the function reads of a workspace, and isn't one."""

    device, tp_size, buffer_size_bytes, handle = torch.device("cpu"), 1, 1 << 20, 1


def types_body(rank: Rank) -> None:
    workspace = workspace_of(rank, buffer_size_in_bytes=4096)
    x = torch.ones(2, 16, device=rank.device)
    bad: list[tuple[str, dict[str, Any]]] = [
        (r"input: expected a torch.Tensor, got \[\[1.0\]\] \(list\)", {"input": [[1.0]]}),
        (r"input: expected a torch.Tensor, got None", {"input": None}),
        (r"workspace: expected an MNNVLAllReduceFusionWorkspace, got None", {"workspace": None}),
        (r"workspace: expected an MNNVLAllReduceFusionWorkspace, got \d+ \(int\)", {"workspace": workspace.handle}),
        (r"workspace: .*AlmostAWorkspace", {"workspace": AlmostAWorkspace()}),
        (r"launch_with_pdl: expected a bool, got 1 \(int\)", {"launch_with_pdl": 1}),
        (r"launch_with_pdl: expected a bool, got None", {"launch_with_pdl": None}),
        (r"output: expected a torch.Tensor or None, got False", {"output": False}),
        (r"strategy: expected a member of .*Strategy, got 0 \(int\)", {"strategy": 0}),
        (r"strategy: expected a member of .*Strategy, got 'auto' \(str\)", {"strategy": "auto"}),
        (r"strategy: expected a member of .*Strategy, got None", {"strategy": None}),
    ]
    for text, arguments in bad:
        with pytest.raises(TypeError, match=text):
            trtllm_mnnvl_allreduce(**{"input": x, "workspace": workspace, "launch_with_pdl": False, **arguments})
    # Nothing was enqueued on any rank: the workspace still works.
    assert (trtllm_mnnvl_allreduce(x, workspace, False) == rank.world_size).all()
    workspace.destroy()


def test_wrong_types_are_named_and_leave_the_workspace_as_it_was(ranks, device):
    ranks(types_body, 2, device)


def compiled_body(rank: Rank) -> None:
    with workspace_of(rank, buffer_size_in_bytes=1 << 18) as workspace:

        def model(x: torch.Tensor) -> torch.Tensor:
            y = trtllm_mnnvl_allreduce(x * 2, workspace, False)
            return trtllm_mnnvl_allreduce(y + 1, workspace, False, strategy=Strategy.TWOSHOT) - 1

        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for tokens in (4, 7, 9):  # the second shape makes the sizes symbolic
            x = random_input(rank.rank, tokens * 32, torch.float32, tokens).view(tokens, 32).to(rank.device)
            assert torch.equal(compiled(x), model(x))


def test_compile(ranks, device):
    ranks(compiled_body, 2, device, timeout=110)


def opcheck_body(rank: Rank) -> None:
    import mnnvl_backend.flashinfer.allreduce  # noqa: F401  # defines the op

    with workspace_of(rank, buffer_size_in_bytes=1 << 16) as workspace:
        x = torch.ones(2, 8, device=rank.device)
        op = torch.ops.mnnvl.trtllm_allreduce.default
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, (x, torch.empty_like(x), workspace.handle, 0, False), test_utils=tests)


def test_custom_op_is_well_formed(ranks, device):
    ranks(opcheck_body, 1, device)


# One workspace, calls of every kind.


def random_calls_body(rank: Rank, calls: int, seed: int) -> None:
    """What a call must clear depends on what the one before it left, whatever its size, dtype and strategy."""
    plan = random.Random(seed)
    hidden_dims = [1, 7, 8, 64, 1000, 2048]
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        for i in range(calls):
            hidden = plan.choice(hidden_dims)
            dtype = plan.choice(DTYPES)
            strategy = plan.choice(list(Strategy))
            tokens = max(1, int(2 ** plan.uniform(0, 16)) // hidden)
            while not workspace.is_buffer_size_sufficient(rank.world_size, tokens, hidden, dtype, strategy):
                tokens //= 2
            inputs = [random_input(r, tokens * hidden, dtype, i).view(tokens, hidden) for r in range(rank.world_size)]
            x = inputs[rank.rank].clone().to(rank.device)
            where = plan.choice(["new", "given", "in place"])
            output = {"new": None, "given": torch.full_like(x, 3.0), "in place": x}[where]
            result = trtllm_mnnvl_allreduce(x, workspace, plan.random() < 0.5, output, strategy)
            assert output is None or result is output
            what = f"call {i}: {strategy.name} of [{tokens}, {hidden}] {dtype}, output {where}"
            assert_bits(result, rank_order_sum(inputs), what)
            if where != "in place":
                assert_bits(x, inputs[rank.rank], f"input of {what}")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_random_calls_on_one_workspace(ranks, device, world_size):
    ranks(random_calls_body, world_size, device, timeout=115, args=(500, world_size))


def back_to_back_body(rank: Rank) -> None:
    """Calls of alternating sizes and strategies, nobody looking at a result until the end."""
    shapes = [(1, 8), (64, 1024), (3, 5), (2, 64), (128, 512)]
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        inputs = {s: [random_input(r, s[0] * s[1], torch.bfloat16, 1).view(s) for r in range(rank.world_size)]
                  for s in shapes}  # fmt: skip
        xs = {s: inputs[s][rank.rank].clone().to(rank.device) for s in shapes}
        plan = random.Random(7)
        results = []
        for _ in range(100):
            shape, strategy = plan.choice(shapes), plan.choice([Strategy.ONESHOT, Strategy.TWOSHOT])
            results.append((shape, trtllm_mnnvl_allreduce(xs[shape], workspace, True, strategy=strategy)))
        for i, (shape, result) in enumerate(results):
            assert_bits(result, rank_order_sum(inputs[shape]), f"call {i}, {shape}")


def test_calls_back_to_back(ranks, device):
    ranks(back_to_back_body, 3, device)


def patterns_body(rank: Rank) -> None:
    with workspace_of(rank, buffer_size_in_bytes=1 << 20) as workspace:
        for dtype in (torch.float16, torch.bfloat16):
            inputs = [every_16_bit_pattern(r, dtype).view(256, 256) for r in range(rank.world_size)]
            for strategy in Strategy:
                result = trtllm_mnnvl_allreduce(inputs[rank.rank].to(rank.device), workspace, False, strategy=strategy)
                assert_bits(result, rank_order_sum(inputs), f"{dtype}, {strategy.name}")


def test_every_bit_pattern(ranks, device):
    ranks(patterns_body, 3, device)


def captured_body(rank: Rank) -> None:
    """An odd number of calls of both strategies in one graph, replayed with fresh inputs between eager calls."""
    shapes = [(1, 16), (64, 512), (7, 100), (128, 1024), (2, 8)]
    n, plan = rank.world_size, random.Random(11)

    def draw(shape: tuple[int, int], seed: int) -> list[torch.Tensor]:
        return [random_input(r, shape[0] * shape[1], torch.bfloat16, seed).view(shape) for r in range(n)]

    with workspace_of(rank, buffer_size_in_bytes=1 << 21) as workspace:
        pools = {shape: [draw(shape, seed) for seed in range(4)] for shape in shapes}
        expected = {shape: [rank_order_sum(inputs).to(rank.device) for inputs in pools[shape]] for shape in shapes}
        statics = [torch.zeros(shape, dtype=torch.bfloat16, device=rank.device) for shape in shapes]
        strategies = [Strategy.ONESHOT, Strategy.TWOSHOT, Strategy.TWOSHOT, Strategy.AUTO, Strategy.ONESHOT]
        outputs = [torch.empty_like(x) for x in statics]
        for x, out in zip(statics, outputs, strict=True):
            trtllm_mnnvl_allreduce(x, workspace, False, out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i, (x, out, strategy) in enumerate(zip(statics, outputs, strategies, strict=True)):
                trtllm_mnnvl_allreduce(x, workspace, i % 2 == 1, out, strategy)
        for replay in range(100):
            chosen = [plan.randrange(4) for _ in shapes]
            for x, shape, pick in zip(statics, shapes, chosen, strict=True):
                x.copy_(pools[shape][pick][rank.rank])
            graph.replay()
            eager = plan.choice(shapes)
            strategy = plan.choice([Strategy.ONESHOT, Strategy.TWOSHOT])
            mine = pools[eager][0][rank.rank].to(rank.device)
            result = trtllm_mnnvl_allreduce(mine, workspace, False, strategy=strategy)
            assert_bits(result, expected[eager][0], f"eager call after replay {replay}")
            for out, shape, pick in zip(outputs, shapes, chosen, strict=True):
                assert_bits(out, expected[shape][pick], f"replay {replay}, {shape}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("world_size", [2, 4])
def test_cuda_graph(ranks, world_size):
    if world_size > max(2, torch.cuda.device_count()):
        pytest.skip(f"fewer than {world_size} CUDA devices")
    ranks(captured_body, world_size, "cuda", timeout=115)


def test_strategies_can_be_pickled():
    assert pickle.loads(pickle.dumps(Strategy.TWOSHOT)) is Strategy.TWOSHOT
