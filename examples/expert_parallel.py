"""Expert-parallel training of a mixture-of-experts layer over the backend "mnnvl", on CPU or GPUs:

    torchrun --nproc-per-node 2 examples/expert_parallel.py

A router sends each token to one expert, which may live on another rank, and its result comes back: two
all_to_all_single with as many rows for each rank as the router chose. At the end the loss must have fallen.
"""

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_to_all_single

FEATURES, HIDDEN, TOKENS, EXPERTS_PER_RANK = 8, 32, 96, 2  # TOKENS: of each rank


def exchange(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """sent[r] rows go to rank r, received[r] come from it. Gradients go the other way."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    return all_to_all_single(out, rows, received, sent, group=dist.group.WORLD)


class MixtureOfExperts(nn.Module):
    """The router is the same on every rank; the experts are this rank's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(FEATURES, EXPERTS_PER_RANK * dist.get_world_size())
        torch.manual_seed(1 + dist.get_rank())
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)) for _ in range(EXPERTS_PER_RANK)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight, expert = self.router(tokens).softmax(-1).max(-1)
        order = expert.argsort(stable=True)  # by expert, and so by the rank that has it
        counts = expert.bincount(minlength=self.router.out_features).view(-1, EXPERTS_PER_RANK)
        counts_received = torch.empty_like(counts)  # [rank, expert]: how many tokens come from there for my expert
        dist.all_to_all_single(counts_received, counts)
        sent, received = counts.sum(1).tolist(), counts_received.sum(1).tolist()

        arrived = exchange(tokens[order], sent, received)  # dispatch
        mine = torch.arange(EXPERTS_PER_RANK, device=tokens.device).repeat(len(sent))
        mine = mine.repeat_interleave(counts_received.flatten())  # which of my experts each row is for
        done = arrived.new_zeros(len(arrived), 1)
        for i, run in enumerate(self.experts):
            at = (mine == i).nonzero()[:, 0]
            done = done.index_copy(0, at, run(arrived[at]))
        returned = exchange(done, received, sent)  # combine
        return torch.zeros_like(returned).index_copy(0, order, returned) * weight.unsqueeze(1)


def train(device: torch.device, steps: int) -> list[float]:
    """Learns y = |x|² / FEATURES from random tokens; the loss of each step, averaged over the ranks."""
    model = MixtureOfExperts().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    points = torch.Generator().manual_seed(dist.get_rank())  # another share of the data on each rank
    losses = []
    for _ in range(steps):
        x = torch.randn(TOKENS, FEATURES, generator=points).to(device)
        loss = nn.functional.mse_loss(model(x), x.square().mean(1, keepdim=True))
        (loss / dist.get_world_size()).backward()
        for parameter in model.router.parameters():  # an expert's gradient is whole: it saw everybody's tokens
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # an expert that got no token has a gradient of zeros
        losses.append(common.mean_of_ranks(loss))
    return losses


def main() -> None:
    arguments = common.parser(__doc__, steps=300).parse_args()
    device = common.start(arguments)
    losses = train(device, arguments.steps)
    experts = EXPERTS_PER_RANK * dist.get_world_size()
    common.report(f"{experts} experts on {dist.get_world_size()} ranks, {device.type}", losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
