"""Gradients of completions' log-probabilities under ZeRO-3 on two ranks, with and without tiles of the logits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, distributed

from actors.config import ModelConfig, TrainerConfig
from actors.model.batches import ModelBatch, model_batch
from actors.model.forward import completion_log_probs
from actors.model.loading import load_model
from actors.trainer.deepspeed_engine import DeepSpeedEngine, Place, join
from rollout.encoding import ExpandedPrompt

RANKS = 2
TILED_BYTES = 4096
"""8 tokens x 128 logits in float32: rank 0, with 10 tokens, needs tiles, rank 1, with 6, doesn't."""
WHOLE_BYTES = 1 << 30


def batch_of(rank: int) -> ModelBatch:
    prompts = [ExpandedPrompt(np.array([9, 10, 11], np.int32), {})] * 2
    length = 5 if rank == 0 else 3
    completions = [np.arange(20, 20 + length, dtype=np.int32), np.arange(40, 40 + length, dtype=np.int32)]
    return model_batch(prompts, completions, pad_token_id=0)


def gradients(folder: Path, place: Place, budget_bytes: int) -> dict[str, Tensor]:
    """Every parameter's gradient of a forward pass alone, two forward passes and their backward passes."""
    trainer = TrainerConfig(zero_stage=3, steps=1)
    engine = DeepSpeedEngine(load_model(ModelConfig(path=folder, precision="float32")), trainer, "float32", place)
    batch = batch_of(place.rank)
    with torch.no_grad():
        completion_log_probs(engine.model, batch, temperature=0.9, budget_bytes=budget_bytes)
    result: dict[str, Tensor] = {}
    for is_last in (False, True):
        engine.begin_micro_batch(is_last=is_last)
        found = completion_log_probs(
            engine.model, batch, temperature=0.9, banned_token_ids=(5,), with_entropy=True, budget_bytes=budget_bytes
        )
        weights = torch.linspace(-1, 2, found.log_probs.shape[1])
        engine.backward((found.log_probs * weights).sum())
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, name
        result[name] = gradient.clone()
    return result


def main(tied: Path, untied: Path, port: int, rank: int, out: Path) -> None:
    """One rank: a tied and an untied model's folder, the store's port, the rank, a file for the result."""
    torch.set_num_threads(1)
    place = Place(rank, RANKS, "cpu", "127.0.0.1", port)
    deadline = timedelta(seconds=120)
    store = distributed.TCPStore("127.0.0.1", port, RANKS, is_master=False, timeout=deadline)
    join(place, store, 120.0)
    found = {
        (kind, budget): gradients(folder, place, budget)
        for kind, folder in (("tied", tied), ("untied", untied))
        for budget in (TILED_BYTES, WHOLE_BYTES)
    }
    torch.save(found, out)
