"""The policy learns by maximum likelihood from token sequences that have none of the columns of RL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import DeadlineConfig, ModelConfig, TrainerConfig
from actors.trainer.policy import PolicyGroup
from actors.trainer.spec import PolicySpec
from algorithms.config import AlgorithmConfig
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.trainer.sequences import plain
from tests.actors.training_samples import make_samples
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine

LEARNING_RATE = 1e-3


async def test_maximum_likelihood_learns_from_sequences_without_columns(ray_session: None, tmp_path: Path) -> None:
    model = build_tiny_vlm(tmp_path / "model")
    samples = make_samples(model, tmp_path / "media", 8)
    sequences = [plain(sample) for sample in samples]
    spec = PolicySpec(
        model=ModelConfig(path=model, precision="float32"),
        trainer=TrainerConfig(learning_rate=LEARNING_RATE, ranks=2, micro_batch_tokens=75, updates_per_step=2),
        algorithm=AlgorithmConfig(loss="nll"),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        temperature=1.0,
        media_folder=tmp_path / "media",
        seed=0,
        total_updates=10,
    )
    group = await PolicyGroup.start(spec)
    try:
        before = await group.log_probs(sequences)
        of_samples = await group.log_probs(samples)
        metrics = await group.update(sequences, kl_coefficient=0.0)
        after = await group.log_probs(sequences)
        both = await group.log_probs_and_collision(sequences)
    finally:
        await group.stop()
    trainer = PlainTrainer(model, tmp_path / "media", LEARNING_RATE, 1.0)
    losses = []
    for part in (sequences[:4], sequences[4:]):
        total = sum(int(each.loss_mask.sum()) for each in part)
        trainer.optimiser.zero_grad()
        loss = -sum((trainer.log_probs(each) * torch.from_numpy(each.loss_mask)).sum() for each in part) / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimiser.step()
        losses.append(float(loss.detach()))
    assert metrics["train/loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert metrics["train/skipped_updates"] == 0
    with torch.no_grad():
        for index, each in enumerate(sequences):
            assert after[index] == pytest.approx(trainer.log_probs(each).numpy(), abs=2e-4)
            np.testing.assert_array_equal(before[index], of_samples[index])
            np.testing.assert_array_equal(both[index][0], after[index])
