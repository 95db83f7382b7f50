"""Several objectives in one step against plain PyTorch, over ranks, micro-batches and ZeRO stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import DeadlineConfig, ModelConfig, TrainerConfig
from actors.trainer.policy import PolicyGroup
from actors.trainer.spec import PolicySpec
from algorithms.config import AlgorithmConfig, KLConfig
from rollout.samples import TrainingSample
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.training_samples import make_samples
from tests.forks import ray_of_forks
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine

KL_COEFFICIENT = 0.1
MODULE = """
import torch
from algorithms.registry import GRADIENT_COMBINATIONS, method

@method(GRADIENT_COMBINATIONS, "two_to_one")
def two_to_one(inputs, options):
    return torch.tensor([2.0, 1.0], dtype=torch.float64)
"""
# ranks, ZeRO stage, micro_batch_tokens, precision
CASES = {
    "one rank, ZeRO 0": (1, 0, 16384, "float32"),
    "two ranks, ZeRO 0, in parts": (2, 0, 75, "float32"),
    "two ranks, ZeRO 2, in parts": (2, 2, 75, "float32"),
    "two ranks, ZeRO 3, in parts": (2, 3, 75, "float32"),
    "two ranks, ZeRO 2, bfloat16": (2, 2, 200, "bfloat16"),
}


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_of_forks():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("objectives")
    build_tiny_vlm(path / "model")
    (path / "mine.py").write_text(MODULE)
    return path


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[TrainingSample]:
    """The advantages are twice the first objective's and once the second's."""
    random, made = np.random.default_rng(2), []
    for sample in make_samples(folder / "model", folder / "media", 8):
        parts = np.repeat(random.normal(size=(2, 1)), len(sample.token_ids), axis=1).astype(np.float32)
        rewards = np.float32([0.5, 0.25])
        made.append(
            replace(sample, advantages=2 * parts[0] + parts[1], objective_advantages=parts, objective_rewards=rewards)
        )
    return made


def spec_of(folder: Path, case: str, name: str | None, **options: object) -> PolicySpec:
    ranks, stage, tokens, precision = CASES[case]
    settings = {"learning_rate": 1e-3, "ranks": ranks, "zero_stage": stage, "micro_batch_tokens": tokens}
    return PolicySpec(
        model=ModelConfig(path=folder / "model", precision=precision),
        trainer=TrainerConfig.model_validate(settings),
        algorithm=AlgorithmConfig(
            modules=(folder / "mine.py",),
            kl=KLConfig(coefficient=KL_COEFFICIENT),
            gradient_combination=name,
            gradient_options=options,
        ),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        temperature=1.0,
        media_folder=folder / "media",
        seed=0,
        total_updates=10,
    )


async def updated(
    spec: PolicySpec, samples: list[TrainingSample]
) -> tuple[list[dict[str, float]], list[np.ndarray], list[np.ndarray]]:
    """Metrics of two updates, log-probabilities after them, and after the second is done again from a checkpoint."""
    group = await PolicyGroup.start(spec)
    state = spec.media_folder.parent / f"state-{spec.trainer.ranks}-{spec.trainer.zero_stage}"
    try:
        metrics = [await group.update(samples, KL_COEFFICIENT)]
        await group.save(state)
        metrics.append(await group.update(samples, KL_COEFFICIENT))
        after = await group.log_probs(samples)
        await group.load(state)
        await group.update(samples, KL_COEFFICIENT)
        return metrics, after, await group.log_probs(samples)
    finally:
        await group.stop()


@pytest.mark.parametrize("case", [case for case in CASES if "bfloat16" not in case])
def test_gradients_combined_two_to_one_are_the_gradient_of_the_sum(
    case: str, session: None, folder: Path, samples: list[TrainingSample]
) -> None:
    metrics, after, again = asyncio.run(updated(spec_of(folder, case, "two_to_one"), samples))
    plain = PlainTrainer(folder / "model", folder / "media", 1e-3, 1.0)
    norms, cosine = norms_of(plain, samples)
    assert metrics[0]["train/objective_0/grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert metrics[0]["train/objective_1/grad_norm"] == pytest.approx(norms[1], rel=1e-4)
    assert metrics[0]["train/objective_0/cosine_1"] == pytest.approx(cosine, abs=1e-4)
    for turn in range(2):
        _, norm = plain.update(samples, KL_COEFFICIENT)
        assert metrics[turn]["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert metrics[turn]["train/skipped_updates"] == 0
    with torch.no_grad():
        for sample, row, second in zip(samples, after, again, strict=True):
            assert row == pytest.approx(plain.log_probs(sample).numpy(), abs=2e-4)
            np.testing.assert_array_equal(row, second)


def norms_of(plain: PlainTrainer, samples: list[TrainingSample]) -> tuple[list[float], float]:
    """Norms of the two objectives' own gradients, and the cosine between them, before any update."""
    gradients = []
    for index in range(2):
        assert all(sample.objective_advantages is not None for sample in samples)
        alone = [replace(s, advantages=s.objective_advantages[index]) for s in samples]  # type: ignore[index]
        before = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
        plain.max_grad_norm = float("inf")
        plain.update(alone, 0.0)
        grads = [p.grad for p in plain.model.parameters() if p.grad is not None]
        gradients.append(torch.cat([grad.flatten() for grad in grads]).double())
        plain.model.load_state_dict(before, strict=False)
    plain.max_grad_norm = 1.0
    plain.optimiser.state.clear()
    norms = [float(gradient.norm()) for gradient in gradients]
    return norms, float(gradients[0] @ gradients[1]) / norms[0] / norms[1]


def test_famo_runs_in_bfloat16_and_its_memory_is_kept_in_the_checkpoint(
    session: None, folder: Path, samples: list[TrainingSample]
) -> None:
    case = "two ranks, ZeRO 2, bfloat16"
    metrics, after, again = asyncio.run(updated(spec_of(folder, case, "famo", lower_bound=-1.0), samples))
    # Losses -0.5 and -0.25 are 0.5 and 0.75 above the bound of -1: weights 2 and 4/3, that is 0.6 and 0.4 of both.
    assert metrics[0]["train/objective_0/weight"] == pytest.approx(0.6)
    assert metrics[0]["train/skipped_updates"] == 0
    for row, second in zip(after, again, strict=True):
        np.testing.assert_array_equal(row, second)
