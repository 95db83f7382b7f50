"""An objective that no part of the house knows, over pairs, trained by the learner and held against plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from actors.config import DeadlineConfig, ModelConfig, TrainerConfig
from actors.trainer.spec import LearnerSpec
from rollout.samples import TokenSequence
from tests.actors.trainer.pair_ranks import Task, run_ranks
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.trainer.sequences import plain
from tests.actors.training_samples import make_samples
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0


def plain_update(trainer: PlainTrainer, sequences: list[TokenSequence]) -> tuple[float, float]:
    """One step on all pairs at once: the loss, and the gradient's norm before clipping."""
    totals = [(trainer.log_probs(each) * torch.from_numpy(each.loss_mask)).sum() for each in sequences]
    gaps = torch.stack([first - second for first, second in zip(totals[::2], totals[1::2], strict=True)])
    loss = -logsigmoid(gaps).mean()
    trainer.optimiser.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
    trainer.optimiser.step()
    return float(loss.detach()), float(norm)


def test_pairs_stay_together_on_two_ranks_and_the_result_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    model = build_tiny_vlm(tmp_path / "model")
    sequences = [plain(sample) for sample in make_samples(model, tmp_path / "media", 10)]
    spec = LearnerSpec(
        model=ModelConfig(path=model, precision="float32"),
        trainer=TrainerConfig(
            learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, ranks=2, zero_stage=2, micro_batch_tokens=150
        ),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        media_folder=tmp_path / "media",
        seed=0,
        total_updates=10,
    )
    outcomes = run_ranks(Task(spec, sequences, tmp_path / "run"))
    pairs = [(index, index + 1) for index in range(0, 10, 2)]
    assert sorted(pair for outcome in outcomes for pair in outcome.seen) == pairs
    assert all(outcome.seen for outcome in outcomes)
    trainer = PlainTrainer(model, tmp_path / "media", LEARNING_RATE, MAX_GRAD_NORM)
    for turn in range(2):
        loss, norm = plain_update(trainer, sequences)
        for outcome in outcomes:
            metrics = outcome.metrics[turn]
            assert metrics["pairs/loss"] == pytest.approx(loss, rel=1e-4)
            assert metrics["pairs/grad_norm"] == pytest.approx(norm, rel=1e-3)
            assert metrics["pairs/skipped_updates"] == 0
    assert set(outcomes[0].metrics[0]) == {
        f"pairs/{name}" for name in ("loss", "accuracy", "grad_norm", "learning_rate", "skipped_updates", "seconds")
    }
    found = {index: values for outcome in outcomes for index, values in outcome.log_probs.items()}
    again = {index: values for outcome in outcomes for index, values in outcome.again.items()}
    with torch.no_grad():
        for index, each in enumerate(sequences):
            assert found[index] == pytest.approx(trainer.log_probs(each).numpy(), abs=2e-4)
            np.testing.assert_array_equal(found[index], again[index])
    assert [outcome.steps for outcome in outcomes] == [[1, 2, 1]] * 2
