"""The policy trainer against an update written out by hand, over ranks, micro-batches and ZeRO stages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText

from actors.config import DeadlineConfig, FreezeConfig, ModelConfig, TrainerConfig
from actors.trainer.policy import PolicyGroup
from actors.trainer.spec import PolicySpec
from algorithms.config import AlgorithmConfig, KLConfig
from rollout.failures import FailureError, FailureKind
from rollout.samples import TrainingSample
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.training_samples import make_samples
from tests.forks import ray_of_forks
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 0.05  # below the gradients' norm, so that clipping takes part
KL_COEFFICIENT = 0.1
GRADIENT_FLOOR = 1e-5
"""Entries of smaller gradient are rounding noise (a key's bias has none in theory), which Adam divides by itself."""

# ranks, ZeRO stage, micro_batch_tokens: 75 holds one or two samples, 16384 all.
CASES = {
    "one rank, ZeRO 0": (1, 0, 16384),
    "one rank, ZeRO 2, small micro-batches": (1, 2, 75),
    "two ranks, ZeRO 0, small micro-batches": (2, 0, 75),
    "two ranks, ZeRO 2, small micro-batches": (2, 2, 75),
    "two ranks, ZeRO 3, small micro-batches": (2, 3, 75),
}


@dataclass
class Trained:
    """What a case left behind: first update; second update; the second once more from the checkpoint between."""

    first_metrics: dict[str, float]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    second_resumed: dict[str, torch.Tensor]
    log_probs: list[NDArray[np.float32]]
    export: Path
    overflow_metrics: dict[str, float]
    after_overflow: dict[str, torch.Tensor]
    mismatch: BaseException | None
    nan: BaseException | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_tiny_vlm(folder / "model")


@pytest.fixture(scope="module")
def samples(model: Path, folder: Path) -> list[TrainingSample]:
    return make_samples(model, folder / "media")


def spec_of(model: Path, folder: Path, trainer: dict[str, Any], **model_settings: Any) -> PolicySpec:
    return PolicySpec(
        model=ModelConfig(path=model, **{"precision": "float32", **model_settings}),
        trainer=TrainerConfig(learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, **trainer),
        algorithm=AlgorithmConfig(kl=KLConfig(coefficient=KL_COEFFICIENT)),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        temperature=1.0,
        media_folder=folder / "media",
        seed=0,
        total_updates=10,
    )


def parameters_of(export: Path) -> dict[str, torch.Tensor]:
    loaded = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in loaded.named_parameters()}


async def exported(group: PolicyGroup, folder: Path) -> dict[str, torch.Tensor]:
    await group.export(folder)
    return parameters_of(folder)


async def refusal(group: PolicyGroup, samples: list[TrainingSample]) -> BaseException | None:
    try:
        await group.update(samples, KL_COEFFICIENT)
    except FailureError as error:
        return error
    return None


async def train(spec: PolicySpec, samples: list[TrainingSample], folder: Path) -> Trained:
    group = await PolicyGroup.start(spec)
    try:
        broken = replace(samples[5], prompt_token_ids=samples[5].prompt_token_ids[:-1])
        mismatch = await refusal(group, [*samples[:5], broken, *samples[6:]])
        poisoned = replace(samples[3], advantages=np.full(len(samples[3].token_ids), np.nan, np.float32))
        nan = await refusal(group, [*samples[:3], poisoned, *samples[4:]])
        first_metrics = await group.update(samples, KL_COEFFICIENT)
        first = await exported(group, folder / "first")
        await group.save(folder / "state")
        await group.update(samples, KL_COEFFICIENT)
        second = await exported(group, folder / "second")
        log_probs = await group.log_probs(samples)
        await group.load(folder / "state")
        await group.update(samples, KL_COEFFICIENT)
        second_resumed = await exported(group, folder / "resumed")
        huge = [replace(s, advantages=np.full(len(s.token_ids), 3e38, np.float32)) for s in samples]
        overflow_metrics = await group.update(huge, KL_COEFFICIENT)
        after_overflow = await exported(group, folder / "overflow")
    finally:
        await group.stop()
    return Trained(
        first_metrics,
        first,
        second,
        second_resumed,
        log_probs,
        folder / "second",
        overflow_metrics,
        after_overflow,
        mismatch,
        nan,
    )


@pytest.fixture(scope="module")
def trained(model: Path, folder: Path, samples: list[TrainingSample]) -> Callable[[str], Trained]:
    """Trains each case once, when first asked for it."""
    results: dict[str, Trained] = {}

    def run(case: str) -> Trained:
        if case not in results:
            ranks, stage, micro_batch_tokens = CASES[case]
            settings = {"ranks": ranks, "zero_stage": stage, "micro_batch_tokens": micro_batch_tokens}
            spec = spec_of(model, folder, settings)
            with ray_of_forks():
                results[case] = asyncio.run(train(spec, samples, folder / case.replace(" ", "-")))
        return results[case]

    return run


@dataclass
class ByHand:
    loss: float
    norm: float
    has_gradient: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def by_hand(model: Path, folder: Path, samples: list[TrainingSample]) -> ByHand:
    trainer = PlainTrainer(model, folder / "media", LEARNING_RATE, MAX_GRAD_NORM)

    def copies(values: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values(parameter).detach().clone() for name, parameter in trainer.model.named_parameters()}

    loss, norm = trainer.update(samples, KL_COEFFICIENT)
    has_gradient = copies(lambda parameter: parameter.grad.abs() > GRADIENT_FLOOR)
    first = copies(lambda parameter: parameter)
    trainer.update(samples, KL_COEFFICIENT)
    return ByHand(loss, norm, has_gradient, first, copies(lambda parameter: parameter))


def greatest_difference(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], where: dict[str, torch.Tensor]
) -> float:
    assert left.keys() == right.keys()
    return max(float(((left[name] - right[name]) * where[name]).abs().max()) for name in left)


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_what_plain_pytorch_makes_of_it(
    case: str, trained: Callable[[str], Trained], by_hand: ByHand
) -> None:
    result = trained(case)
    assert result.first_metrics["train/loss"] == pytest.approx(by_hand.loss, rel=1e-5)
    assert result.first_metrics["train/grad_norm"] == pytest.approx(by_hand.norm, rel=1e-4)
    assert result.first_metrics["train/skipped_updates"] == 0
    assert sum(int(mask.sum()) for mask in by_hand.has_gradient.values()) > 100_000
    # An update moves an entry by 1e-3; agreement to 1% of it after the first, where Adam divides by one gradient.
    assert greatest_difference(result.first, by_hand.first, by_hand.has_gradient) < 1e-5
    assert greatest_difference(result.second, by_hand.second, by_hand.has_gradient) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_resuming_from_a_checkpoint_equals_going_on(case: str, trained: Callable[[str], Trained]) -> None:
    result = trained(case)
    assert all(torch.equal(result.second[name], result.second_resumed[name]) for name in result.second)
    assert any(not torch.equal(result.first[name], result.second[name]) for name in result.second)


@pytest.mark.parametrize("case", CASES)
def test_an_export_loads_and_gives_the_trainers_log_probabilities(
    case: str, trained: Callable[[str], Trained], samples: list[TrainingSample], folder: Path
) -> None:
    result = trained(case)
    loaded = PlainTrainer(result.export, folder / "media", LEARNING_RATE, MAX_GRAD_NORM)
    with torch.no_grad():
        for sample, log_probs in zip(samples, result.log_probs, strict=True):
            assert log_probs == pytest.approx(loaded.log_probs(sample).numpy(), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted(
    case: str, trained: Callable[[str], Trained]
) -> None:
    result = trained(case)
    assert result.overflow_metrics["train/skipped_updates"] == 1
    assert all(torch.equal(result.second_resumed[name], result.after_overflow[name]) for name in result.second)


def test_samples_expanded_otherwise_than_by_the_trainer_are_refused(trained: Callable[[str], Trained]) -> None:
    for case in ("one rank, ZeRO 0", "two ranks, ZeRO 3, small micro-batches"):
        error = trained(case).mismatch
        assert isinstance(error, FailureError)
        assert error.failure.kind is FailureKind.DATA
        assert error.failure.reason == "prompt_expansion_mismatch"


def test_a_nan_advantage_is_refused(trained: Callable[[str], Trained]) -> None:
    error = trained("two ranks, ZeRO 2, small micro-batches").nan
    assert isinstance(error, FailureError)
    assert error.failure.reason == "sample_not_finite"


async def test_frozen_parts_stay_bit_identical_and_a_dead_rank_is_named(
    ray_session: None, model: Path, folder: Path, samples: list[TrainingSample]
) -> None:
    settings = {"updates_per_step": 2, "gradient_checkpointing": True, "ranks": 2}
    frozen = FreezeConfig(vision_tower=True, projector=True)
    group = await PolicyGroup.start(spec_of(model, folder, settings, precision="bfloat16", freeze=frozen))
    try:
        before = await exported(group, folder / "frozen-before")
        metrics = await group.update(samples, KL_COEFFICIENT)
        after = await exported(group, folder / "frozen-after")
        ray.kill(group.actors[1])
        with pytest.raises(FailureError, match="rank 1") as caught:
            await group.update(samples, KL_COEFFICIENT)
    finally:
        await group.stop()
    assert metrics["train/skipped_updates"] == 0
    visual = [name for name in before if ".visual." in name]
    assert visual
    assert all(torch.equal(before[name], after[name]) for name in visual)
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in visual)
    assert caught.value.failure.kind is FailureKind.INFRASTRUCTURE


async def test_a_model_folder_that_is_not_there_is_reported_and_leaves_no_actor(
    ray_session: None, folder: Path
) -> None:
    with pytest.raises(FailureError):
        await PolicyGroup.start(spec_of(folder / "nowhere", folder, {}))
