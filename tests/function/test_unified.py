"""The fused family over ranks as its callers use it: vLLM's and SGLang's shapes of call, FlashInfer's older functions,
torch.compile, communicators. test_fused.py has the numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import assert_bits, canonical, random_input, rank_order_sum
from workspaces import workspace_of

import mnnvl_backend.flashinfer.comm as comm
from mnnvl_backend import Mapping
from mnnvl_backend.flashinfer.comm import trtllm_mnnvl_ar
from mnnvl_backend.flashinfer.comm.mnnvl import TorchDistBackend
from mnnvl_backend.flashinfer.unified import _QUANTIZED

Pattern = comm.AllReduceFusionPattern
EPSILON = 1e-5


class Problem:
    """Inputs of all ranks and what must come of them."""

    def __init__(
        self, rank: Rank, tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        n = rank.world_size
        inputs = [random_input(r, tokens * hidden, dtype, seed).view(tokens, hidden) for r in range(n)]
        self.input = inputs[rank.rank].clone().to(rank.device)
        self.residual_in = random_input(n, tokens * hidden, dtype, seed).view(tokens, hidden).to(rank.device)
        self.gamma = random_input(n + 1, hidden, dtype, seed).to(rank.device)
        self.sum = rank_order_sum(inputs)
        self.residual = self.sum + self.residual_in.cpu()

    def norm(self, residual: torch.Tensor | None = None, bias: float = 0.0, epsilon: float = EPSILON) -> torch.Tensor:
        x = (self.residual if residual is None else residual).double()
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
        return (x * scale * (bias + self.gamma.cpu().double())).to(self.input.dtype)


def same(got: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Bits, but for the sign of zero, which test_fused.py has."""
    assert_bits(canonical(got.cpu()), canonical(expected), what)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected, rtol=0.02, atol=0.02)


def vllm_body(rank: Rank) -> None:
    """In place, as vLLM's pass emits it: without a residual it gives zeros, and the input's memory for the result."""
    n = rank.world_size
    for oneshot in (None, False):
        workspace = comm.create_allreduce_fusion_workspace(
            backend="auto", world_size=n, rank=rank.rank, max_token_num=16, hidden_dim=128, dtype=torch.bfloat16,
            comm_backend=TorchDistBackend(group=dist.group.WORLD), device=rank.device,
        )  # fmt: skip
        assert workspace.backend == "mnnvl"
        assert workspace.mc_ptr
        assert workspace.is_buffer_size_sufficient(n, 16, 128, torch.bfloat16)
        common = {"workspace": workspace, "launch_with_pdl": True, "fp32_acc": True, "use_oneshot": oneshot,
                  "rms_eps": EPSILON, "trigger_completion_at_end": False}  # fmt: skip
        p = Problem(rank, 7, 128, seed=1)
        norm = comm.allreduce_fusion(
            input=p.input, residual_in=p.residual_in, norm_out=p.input, residual_out=p.residual_in, rms_gamma=p.gamma,
            pattern=Pattern.kARResidualRMSNorm, **common,
        )  # fmt: skip
        assert norm is p.input
        same(p.residual_in, p.residual, "residual in place")
        near(norm, p.norm())

        p, norm = Problem(rank, 16, 128, seed=2), torch.empty(16, 128, dtype=torch.bfloat16, device=rank.device)
        scale = torch.full((1,), 0.25, device=rank.device)
        quant = torch.empty(16, 128, dtype=torch.float8_e4m3fn, device=rank.device)
        result = comm.allreduce_fusion(
            input=p.input, residual_in=torch.zeros_like(p.input), residual_out=p.input, norm_out=norm, quant_out=quant,
            scale_out=None, scale_factor=scale, rms_gamma=p.gamma, pattern=Pattern.kARResidualRMSNormFP8Quant,
            layout_code=comm.QuantizationSFLayout.SWIZZLED_128x4, weight_bias=1.0, **common,
        )  # fmt: skip
        assert result is quant
        same(p.input, p.sum, "residual without one before")
        near_fp8(quant, scale, p.norm(p.sum, bias=1.0))

        p = Problem(rank, 5, 128, seed=3)
        rows, columns = 128, 8
        words = torch.zeros(rows, columns // 4, dtype=torch.int32, device=rank.device)
        quant = torch.empty(5, 64, dtype=torch.uint8, device=rank.device)
        comm.allreduce_fusion(
            input=p.input, residual_in=p.residual_in, residual_out=p.residual_in, norm_out=p.input, quant_out=quant,
            scale_out=words.view(torch.float8_e4m3fn), scale_factor=torch.ones(1, device=rank.device),
            rms_gamma=p.gamma, pattern=Pattern.kARResidualRMSNormFP4Quant, **common,
        )  # fmt: skip
        same(p.residual_in, p.residual, "residual of NVFP4")
        near_fp4(quant, words.view(torch.uint8).view(torch.float8_e4m3fn), p.norm())
        workspace.destroy()


def near_fp8(quant: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor) -> None:
    """Within half a step, of 3 bits or of the smallest value, of what the scale can hold."""
    norm, scale = norm.float(), scale.cpu()
    held = torch.minimum(norm.abs(), 448 * scale) * norm.sign()
    wrong = (quant.cpu().float() * scale - held).abs()
    assert (wrong <= (held.abs() / 16 + scale / 1024) * 1.1).all()


def near_fp4(quant: torch.Tensor, swizzled: torch.Tensor, norm: torch.Tensor) -> None:
    """Each value within half of its block's coarsest step of what the scale can hold, which is read from its place in the
    tiles of 128 by 4."""
    tokens, hidden = norm.shape
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack((quant.cpu() & 15, quant.cpu() >> 4), dim=-1).reshape(tokens, hidden).long()
    decoded = values[codes % 8] * torch.where(codes < 8, 1, -1)
    m, k = torch.meshgrid(torch.arange(tokens), torch.arange(hidden // 16), indexing="ij")
    at = m // 128 * 512 * -(-hidden // 64) + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    scales = swizzled.cpu().flatten().float()[at].repeat_interleave(16, dim=1)
    held = torch.minimum(norm.float().abs(), 6 * scales) * norm.float().sign()
    assert ((decoded * scales - held).abs() <= scales * 1.1).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_called_as_vllm_calls(ranks, device, world_size):
    ranks(vllm_body, world_size, device, backend="gloo")


class OldComm:
    """As SGLang's older communicator: allgather gives a list."""

    def __init__(self, backend: TorchDistBackend) -> None:
        for name in ("Get_rank", "Get_size", "barrier", "bcast", "Split"):
            setattr(self, name, getattr(backend, name))
        self.allgather = lambda data: list(backend.allgather(data))


def sglang_body(rank: Rank) -> None:
    """Two workspaces beside each other, new outputs, everything by keyword."""
    n, hidden = rank.world_size, 256
    workspaces = [
        comm.create_allreduce_fusion_workspace(
            backend="mnnvl", world_size=n, rank=rank.rank, max_token_num=32, hidden_dim=hidden, dtype=torch.bfloat16,
            gpus_per_node=n, comm_backend=backend, group=group, force_oneshot_support=True, device=rank.device,
        )
        for backend, group in ((OldComm(TorchDistBackend()), None), (None, dist.group.WORLD))
    ]  # fmt: skip
    for i in range(4):
        workspace, p = workspaces[i % 2], Problem(rank, 1 + 10 * i, hidden, seed=i)
        assert workspace.is_buffer_size_sufficient(
            tp_size=n, num_tokens=1 + 10 * i, hidden_dim=hidden, dtype=torch.bfloat16, use_oneshot=True
        )
        residual_out, norm_out = torch.empty_like(p.residual_in), torch.empty_like(p.input)
        before = p.input.clone()
        result = comm.allreduce_fusion(
            input=p.input, workspace=workspace, pattern=Pattern.kARResidualRMSNorm, launch_with_pdl=True,
            residual_out=residual_out, norm_out=norm_out, residual_in=p.residual_in, rms_gamma=p.gamma,
            rms_eps=EPSILON, use_oneshot=True, fp32_acc=True,
        )  # fmt: skip
        assert result is norm_out
        same(residual_out, p.residual, f"call {i}")
        same(p.input, before.cpu(), f"input of call {i}")
        near(norm_out, p.norm())
        same(comm.allreduce_fusion(p.input, workspace, Pattern.kAllReduce), p.sum, f"sum of call {i}")
    for workspace in workspaces:
        workspace.destroy()


@pytest.mark.parametrize("world_size", [2, 3])
def test_called_as_sglang_calls(ranks, device, world_size):
    ranks(sglang_body, world_size, device, backend="gloo")


def patterns_body(rank: Rank) -> None:
    """Every quantizing pattern: the residual, and the norm where it is asked for, are those of the plain function."""
    with workspace_of(rank, max_num_tokens=64, hidden_dim=128, dtype=torch.bfloat16) as workspace:
        p = Problem(rank, 9, 128)
        new = {"dtype": torch.bfloat16, "device": rank.device}
        expected, residual = trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_add_rmsnorm(
            p.input, p.residual_in, p.gamma, workspace, EPSILON
        )
        same(residual, p.residual)
        for pattern, (_, writes_norm) in _QUANTIZED.items():
            norm_out, residual_out = torch.zeros(9, 128, **new), torch.zeros(9, 128, **new)
            fp8 = {"quant_out": torch.zeros(9, 128, dtype=torch.float8_e4m3fn, device=rank.device)}
            given: dict[str, Any] = {}
            if pattern in (8, 9):
                scales = torch.empty_strided((9, 1), (1, 12), dtype=torch.int32, device=rank.device)
                given = {"block_quant_group_size": 32, "scale_out": scales, **fp8}
            if pattern in (10, 11):
                given = {"scale_out": torch.zeros(9, 1, device=rank.device), **fp8}
            result = comm.allreduce_fusion(
                p.input, workspace, pattern, norm_out=norm_out, residual_out=residual_out, residual_in=p.residual_in,
                rms_gamma=p.gamma, rms_eps=EPSILON, scale_factor=0.5, **given,
            )  # fmt: skip
            same(residual_out, p.residual, f"pattern {pattern}")
            same(norm_out, expected.cpu() if writes_norm else torch.zeros(9, 128, dtype=torch.bfloat16))
            assert "quant_out" not in given or result is given["quant_out"]
            if pattern in (10, 11):
                near_fp8(result, given["scale_out"], expected.cpu())
            if pattern in (8, 9):
                exponents = given["scale_out"].cpu().flatten().view(torch.uint8).view(9, 4)
                steps = torch.exp2(exponents.float() - 127).repeat_interleave(32, dim=1)
                near_fp8(result, steps, expected.cpu())


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_quantizing_pattern(ranks, device, world_size):
    ranks(patterns_body, world_size, device)


def optional_body(rank: Rank) -> None:
    """No residual, no tokens, a scale by number or by tensor, gamma in float32, odd rows, FlashInfer's epsilon."""
    fused, quantized = (trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_add_rmsnorm,
                        trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant)  # fmt: skip
    with workspace_of(rank, buffer_size_in_bytes=1 << 17) as workspace:
        for hidden in (1, 7, 96):
            p = Problem(rank, 3, hidden, torch.float16)
            output, residual = fused(p.input, None, p.gamma, workspace)
            same(residual, p.sum, f"hidden_dim {hidden}")
            near(output, p.norm(p.sum, epsilon=torch.finfo(torch.float16).eps))
            wide, _ = fused(p.input, None, p.gamma.float(), workspace)
            same(wide, output.cpu(), "gamma in float32")
        empty = p.input[:0]
        assert fused(empty, empty, p.gamma, workspace)[0].shape == (0, 96)
        by = [
            quantized(p.input, None, p.gamma, workspace, output_scale=scale, quant_type=1)[0].view(torch.uint8)
            for scale in (0.25, torch.tensor([0.25, 9.0], device=rank.device), torch.tensor(0.25, dtype=torch.float64))
        ]
        assert torch.equal(by[0], by[1])
        assert torch.equal(by[0], by[2])
        linear = quantized(p.input, None, p.gamma, workspace, quant_type=2, layout_code=2)
        assert [tuple(t.shape) for t in linear[:3]] == [(3, 48), (3, 6), (3, 96)]
        assert linear[3] is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_may_be_left_out(ranks, device, world_size):
    ranks(optional_body, world_size, device)


def legacy_body(rank: Rank) -> None:
    mapping = Mapping(rank.world_size, rank.rank, tp_size=rank.world_size)
    with pytest.warns(DeprecationWarning, match="get_allreduce_mnnvl_workspace"):
        workspace, flags, elements = trtllm_mnnvl_ar.get_allreduce_mnnvl_workspace(
            mapping, torch.bfloat16, TorchDistBackend(), 3 * 2 * 2 * 2048 * 15
        )
    other = workspace_of(rank, buffer_size_in_bytes=4096)
    p, place = Problem(rank, 15, 2048), (rank.world_size, rank.rank)
    assert elements // 2048 >= 15
    assert flags.device.type == rank.device.type
    pointers = (workspace.mc_ptr, workspace.uc_ptrs_dev, workspace.uc_ptr_local)
    assert all(isinstance(token, int) and token for token in (*pointers, *workspace.ptrs))
    out, norm, residual = (torch.empty_like(p.input) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce(p.input, *pointers[:2], 15, flags, *place, True, False, out)
        trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_rmsnorm(
            residual, norm, p.input, *pointers, 15, flags, *place, p.gamma, EPSILON, p.residual_in, True
        )
        with pytest.raises(ValueError, match=r"buffer_ptrs_dev: expected the workspace of multicast_buffer_ptr"):
            trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce(
                p.input, workspace.mc_ptr, other.uc_ptrs_dev, 15, flags, *place, True, False, out
            )
        with pytest.raises(ValueError, match=r"nranks, rank: expected the workspace's"):
            trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce(p.input, *pointers[:2], 15, flags, 9, 0, True, False, out)
        same(out, p.sum)
        same(residual, p.residual)
        near(norm, p.norm())
        rank.meet()
        workspace.destroy()
        with pytest.raises(ValueError, match="multicast_buffer_ptr: .*not destroyed"):
            trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce(p.input, *pointers[:2], 15, flags, *place, True, False, out)
    other.destroy()


def test_older_functions(ranks):
    """They take no device, and go to CUDA if they can."""
    ranks(legacy_body, 2, "cuda" if torch.cuda.is_available() else "cpu", backend="gloo")


def compiled_body(rank: Rank) -> None:
    """As vLLM's pass, in one graph: the second count of tokens makes the sizes symbolic."""
    with workspace_of(rank, buffer_size_in_bytes=1 << 18) as workspace:
        scale = torch.ones(1, device=rank.device)

        def model(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, ...]:
            norm = comm.allreduce_fusion(
                x * 1, workspace, Pattern.kARResidualRMSNorm, residual_in=residual, rms_gamma=gamma, rms_eps=EPSILON
            )
            quant = comm.allreduce_fusion(
                norm, workspace, Pattern.kARResidualRMSNormOutFP8Quant, residual_in=residual, rms_gamma=gamma,
                scale_factor=scale, use_oneshot=False,
            )  # fmt: skip
            fp4, scales, *_ = trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
                norm, None, gamma, workspace, quant_type=2, output_scale=2.0
            )
            same, kept = norm * 2, residual * 1  # what follows is in place
            comm.allreduce_fusion(same, workspace, Pattern.kARResidualRMSNorm, norm_out=same, residual_in=kept,
                                  residual_out=kept, rms_gamma=gamma)  # fmt: skip
            return norm + 1, quant.float(), fp4, scales.view(torch.uint8)[:1], same, kept

        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for tokens in (4, 7, 9):
            p = Problem(rank, tokens, 64, seed=tokens)
            for got, expected in zip(
                compiled(p.input, p.residual_in, p.gamma), model(p.input, p.residual_in, p.gamma), strict=True
            ):
                assert torch.equal(got, expected)


def test_compiled_in_one_graph(ranks, device):
    ranks(compiled_body, 2, device, timeout=110)


def opcheck_body(rank: Rank) -> None:
    with workspace_of(rank, buffer_size_in_bytes=1 << 16) as workspace:
        p = Problem(rank, 2, 32)
        new = torch.empty_like(p.input)
        fp8, scales = torch.empty(2, 32, dtype=torch.uint8), torch.empty(2, 1)  # opcheck can't compare float8
        op = torch.ops.mnnvl.trtllm_fused_allreduce.default
        numbers = (1.0, EPSILON, 0.0)
        end = (workspace.handle, 0, False)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        for arguments in (
            (p.input, p.residual_in, p.gamma, new, new.clone(), None, None, None, *numbers, 0, 0, 0, *end),
            (p.input, None, p.gamma, None, new, fp8.to(rank.device), scales.to(rank.device), None, *numbers, 3, 0, 0, *end),
        ):  # fmt: skip
            torch.library.opcheck(op, arguments, test_utils=tests)


def test_fused_op_is_well_formed(ranks, device):
    ranks(opcheck_body, 1, device)


def torch_dist_backend_body(rank: Rank) -> None:
    """Of the world and of its parts: every root and key is a rank in the group, and parts may be split again."""
    world = TorchDistBackend()
    assert world.allgather(rank.rank) == tuple(range(rank.world_size))
    half = world.Split(color=rank.rank % 2, key=-rank.rank)
    members = sorted((r for r in range(rank.world_size) if r % 2 == rank.rank % 2), reverse=True)
    assert (half.Get_rank(), half.Get_size()) == (members.index(rank.rank), len(members))
    assert half.allgather(rank.rank) == tuple(members)
    assert half.bcast(rank.rank, 1) == members[1]
    half.barrier()
    alone = half.Split(color=rank.rank, key=0)
    assert (alone.Get_size(), alone.allgather("x")) == (1, ("x",))


@pytest.mark.parametrize("backend", ["gloo", "mnnvl"])
def test_torch_dist_backend(ranks, backend):
    ranks(torch_dist_backend_body, 4, backend=backend)
