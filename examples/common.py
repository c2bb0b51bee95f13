"""What the examples share: their arguments, a rank's device, and the report of a training."""

import argparse
import os

import torch
import torch.distributed as dist


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--backend", default="mnnvl", help="of torch.distributed: mnnvl, nccl or gloo")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--steps", type=int, default=steps)
    return made


def start(arguments: argparse.Namespace) -> torch.device:
    """Makes the default group, of the ranks that torchrun started, and returns this rank's device."""
    device = torch.device("cpu")
    if arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(arguments.backend)  # installed, the package needs no import
    return device


def report(what: str, losses: list[float]) -> None:
    """Prints every tenth loss, to be compared with another backend's, and how far it fell; which it must by half.

    Args:
        losses: of each step, the same on every rank.
    """
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    if not last < first / 2:
        raise SystemExit(f"the loss did not fall: {first:.4f}, then {last:.4f}")
    if dist.get_rank() == 0:
        for step in range(0, len(losses), 10):
            print(f"step {step}: loss {losses[step]:.9g}")
        print(f"{what}: loss {first:.4f}, then {last:.4f}")


def mean_of_ranks(loss: torch.Tensor) -> float:
    """What report() wants, of losses that are each of a rank's own share."""
    mean = loss.detach().clone()
    dist.all_reduce(mean, op=dist.ReduceOp.SUM)
    return mean.item() / dist.get_world_size()
