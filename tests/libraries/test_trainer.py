"""The Trainer of Hugging Face transformers on two CPU ranks, with a tiny model made on the spot: the bits that it gives
over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from under_torchrun import join

pytest.importorskip("transformers", reason="transformers is not installed; scripts/libraries_test.sh installs it")
pytest.importorskip("accelerate", reason="accelerate is not installed; scripts/libraries_test.sh installs it")

TOKENS, LENGTH, EXAMPLES, STEPS = 32, 8, 32, 4


def train_body(rank: Rank, folder: str) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    join(rank)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )
    tokens = (torch.arange(LENGTH) + torch.arange(EXAMPLES)[:, None]) % TOKENS  # each follows from the one before
    examples = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.01,
        logging_steps=1, save_steps=STEPS, eval_strategy="steps", eval_steps=STEPS, report_to=[], disable_tqdm=True,
        seed=3,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:6])
    trainer.train()
    assert arguments.world_size == rank.world_size
    history = [{k: v for k, v in entry.items() if k.endswith("loss")} for entry in trainer.state.log_history]
    return {
        "losses": history,
        "parameters": [parameter.tolist() for parameter in model.parameters()],
        "predicted": trainer.predict(examples[:3]).predictions.tolist(),
        "backend": dist.get_backend(),
    }


def test_trains_as_with_gloo(ranks, tmp_path):
    gloo, mnnvl = (
        ranks(train_body, 2, timeout=100, args=(str(tmp_path / backend),), backend=backend)
        for backend in ("gloo", "mnnvl")
    )
    assert [result.pop("backend") for result in gloo + mnnvl] == ["gloo"] * 2 + ["mnnvl"] * 2
    assert mnnvl == gloo
    assert mnnvl[0]["parameters"] == mnnvl[1]["parameters"]
    losses = [entry["loss"] for entry in mnnvl[0]["losses"] if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert list((tmp_path / "mnnvl").glob(f"checkpoint-{STEPS}/model.safetensors"))
