"""Lightning's DDPStrategy on two CPU ranks: told by its argument, training gives the bits that it gives over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from torch.utils.data import DataLoader, TensorDataset
from under_torchrun import join

pytest.importorskip("lightning", reason="lightning is not installed; scripts/libraries_test.sh installs it")

BATCH, EPOCHS = 4, 3


def module() -> Any:
    import lightning

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
            self.losses: list[float] = []

        def training_step(self, batch: Any) -> torch.Tensor:
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any) -> None:
            self.log("validated", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Regression()


def fit_body(rank: Rank, backend: str, folder: str) -> dict[str, Any]:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy

    join(rank)
    torch.manual_seed(rank.rank)  # DDP takes the weights of rank 0
    data = torch.randn(6 * BATCH, 5, generator=torch.Generator().manual_seed(7))
    loader = DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), batch_size=BATCH)
    model = module()
    checkpoint = ModelCheckpoint(folder, monitor="validated")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=rank.world_size, strategy=DDPStrategy(process_group_backend=backend),
        max_epochs=EPOCHS, callbacks=[checkpoint], logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    return {
        "losses": model.losses,
        "validated": trainer.callback_metrics["validated"].item(),
        "parameters": [parameter.tolist() for parameter in model.parameters()],
        "gathered": trainer.strategy.all_gather(torch.tensor([1.0 + rank.rank])).tolist(),
        "object": trainer.strategy.broadcast({"from": rank.rank}, src=1),
        "best": checkpoint.best_model_score.item(),
        "backend": dist.get_backend(),
    }


def test_fits_as_with_gloo(ranks, tmp_path):
    gloo, mnnvl = (
        ranks(fit_body, 2, args=(backend, str(tmp_path / backend)), backend=None) for backend in ("gloo", "mnnvl")
    )
    assert [result.pop("backend") for result in gloo + mnnvl] == ["gloo"] * 2 + ["mnnvl"] * 2
    assert mnnvl == gloo
    assert mnnvl[0]["parameters"] == mnnvl[1]["parameters"]
    steps = len(mnnvl[0]["losses"]) // EPOCHS
    assert sum(mnnvl[0]["losses"][-steps:]) < sum(mnnvl[0]["losses"][:steps])
    assert mnnvl[0]["object"] == {"from": 1}
    assert list((tmp_path / "mnnvl").glob("*.ckpt"))
