"""Tensor-parallel decoding with the fused all-reduce, on CPU or GPUs:

    torchrun --nproc-per-node 2 examples/tensor_parallel_decode.py                    # on GPUs inside a CUDA graph
    torchrun --nproc-per-node 2 examples/tensor_parallel_decode.py --unfused          # with trtllm_mnnvl_allreduce
    torchrun --nproc-per-node 2 examples/tensor_parallel_decode.py --backend nccl     # with dist.all_reduce, or gloo

A small transformer with random weights continues some prompts. Each rank has its share of the attention heads, with
their cache, and of the hidden features; after each of both an all-reduce of [sequences, features] adds the shares up,
the residual is added, and what comes is normalised for the next layer: one call of
trtllm_mnnvl_fused_allreduce_add_rmsnorm. All ranks must choose the same tokens, and the whole model on one rank
these too.
"""

from collections.abc import Callable

import common
import torch
import torch.distributed as dist
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention

from mnnvl_backend import (
    Mapping,
    MNNVLAllReduceFusionWorkspace,
    trtllm_mnnvl_allreduce,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm,
)

LAYERS, HEADS, HEAD, FEATURES, HIDDEN, WORDS, SEQUENCES = 3, 8, 16, 128, 256, 500, 4
EPSILON = 1e-6
AddUp = Callable[[torch.Tensor], torch.Tensor]
# Of a share, the residual and a norm's weight: the sum of the shares and the residual, normalised, and as it is.
AddNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Decoder:
    """Share `part` of `parts` of the model. One step takes a token of each sequence to the next one.

    All it reads and writes lies at fixed addresses, the position too, so that a CUDA graph of a step can be replayed.
    """

    def __init__(self, part: int, parts: int, add_norm: AddNorm, steps: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int, split: int | None = None) -> torch.Tensor:
            whole = torch.randn(rows, columns, generator=generator) / columns**0.5
            return (whole if split is None else whole.chunk(parts, split)[part]).contiguous().to(device)

        self.add_norm, self.words, self.head = add_norm, weight(WORDS, FEATURES), weight(WORDS, FEATURES)
        self.norms = 1 + weight(2 * LAYERS + 1, FEATURES)  # before each half of a layer, and the head
        self.positions = weight(steps, FEATURES)
        self.layers = [
            {
                "queries": weight(FEATURES, FEATURES, 0), "keys": weight(FEATURES, FEATURES, 0),
                "values": weight(FEATURES, FEATURES, 0), "out": weight(FEATURES, FEATURES, 1),
                "up": weight(HIDDEN, FEATURES, 0), "down": weight(FEATURES, HIDDEN, 1),
            }
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.cache = torch.zeros(LAYERS, 2, SEQUENCES, HEADS // parts, steps, HEAD, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.arange(SEQUENCES, device=device)  # the prompts

    def attention(self, x: torch.Tensor, layer: dict[str, torch.Tensor], cache: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x, layer[name]).view(SEQUENCES, -1, 1, HEAD) for name in ("queries", "keys", "values"))
        cache[0].index_copy_(2, self.position, k)
        cache[1].index_copy_(2, self.position, v)
        past = torch.arange(cache.shape[3], device=x.device) <= self.position
        attended = scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=past.view(1, 1, 1, -1))
        return linear(attended.flatten(1), layer["out"])

    def step(self) -> None:
        x = embedding(self.tokens, self.words) + embedding(self.position, self.positions)
        normed, norms = rms_norm(x, [FEATURES], self.norms[0], EPSILON), iter(self.norms[1:])
        for layer, cache in zip(self.layers, self.cache, strict=True):
            normed, x = self.add_norm(self.attention(normed, layer, cache), x, next(norms))
            hidden = torch.relu(linear(normed, layer["up"]))
            normed, x = self.add_norm(linear(hidden, layer["down"]), x, next(norms))
        self.tokens.copy_(linear(normed, self.head).argmax(-1))
        self.position += 1


def decode(decoder: Decoder, steps: int, graph: bool) -> torch.Tensor:
    """[sequences, steps], the tokens chosen. With `graph` the first step warms up, and the others replay the second."""
    chosen, replay = [], None
    for step in range(steps):
        if graph and step == 1:
            replay = torch.cuda.CUDAGraph()
            with torch.cuda.graph(replay):  # runs nothing yet
                decoder.step()
        if replay is None:
            decoder.step()
        else:
            replay.replay()
        chosen.append(decoder.tokens.clone())
    return torch.stack(chosen, 1)


def unfused(add_up: AddUp) -> AddNorm:
    def add_norm(share: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + add_up(share)
        return rms_norm(x, [FEATURES], weight, EPSILON), x

    return add_norm


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


def main() -> None:
    parser = common.parser(__doc__, steps=32)
    parser.add_argument("--unfused", action="store_true", help="add the residual and normalise behind the all-reduce")
    arguments = parser.parse_args()
    device = common.start(arguments)
    rank, world_size, steps = dist.get_rank(), dist.get_world_size(), arguments.steps
    workspace, add_norm = None, unfused(all_reduce)
    if arguments.backend == "mnnvl":
        workspace = MNNVLAllReduceFusionWorkspace(
            Mapping(world_size=world_size, rank=rank, tp_size=world_size),
            max_num_tokens=SEQUENCES, hidden_dim=FEATURES, dtype=torch.float32, device=device,
        )  # fmt: skip

        def add_norm(share: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return trtllm_mnnvl_fused_allreduce_add_rmsnorm(share, x, weight, workspace, EPSILON)

        if arguments.unfused:
            add_norm = unfused(lambda x: trtllm_mnnvl_allreduce(x, workspace, launch_with_pdl=False))

    graph = device.type == "cuda"
    with torch.inference_mode():
        tokens = decode(Decoder(rank, world_size, add_norm, steps, device), steps, graph)
        alone = decode(Decoder(0, 1, unfused(lambda x: x), steps, device), steps, False)
    everybodys = [torch.empty_like(tokens) for _ in range(world_size)]
    dist.all_gather(everybodys, tokens)
    if not all(torch.equal(tokens, other) for other in everybodys):
        raise SystemExit("the ranks chose different tokens")
    if not torch.equal(tokens, alone):
        raise SystemExit(f"not the tokens of the whole model:\n{tokens.tolist()}\n{alone.tolist()}")
    if rank == 0:
        print(f"first sequence: {' '.join(map(str, tokens[0].tolist()))}")
        how = "CUDA graph" if graph else "eager"
        print(f"{world_size} ranks on {device.type}, {how}: {steps} tokens of {SEQUENCES} sequences, as on one rank")
    if workspace is not None:
        workspace.destroy()  # the graph is not replayed any more
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
