"""The critic against an update written out by hand, over ranks, micro-batches and ZeRO stages."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from actors.config import DeadlineConfig, ModelConfig, TrainerConfig
from actors.trainer.critic import CriticGroup
from actors.trainer.spec import CriticSpec
from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from rollout.samples import TrainingSample
from tests.actors.training_samples import make_samples
from tests.forks import ray_of_forks
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine

LEARNING_RATE = 1e-3
CLIP = 0.2
# ranks, ZeRO stage, micro_batch_tokens: 75 holds one or two samples, 16384 all.
CASES = {"one rank, whole": (1, 0, 16384), "two ranks, ZeRO 3, in parts": (2, 3, 75)}


class PlainCritic:
    """The same model in plain PyTorch, one sequence at a time."""

    def __init__(self, model: Path, media_folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        width = self.model.get_output_embeddings().weight.shape[1]
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.encoder = PromptEncoder.from_pretrained(model, MediaStore(media_folder))
        body = [parameter for name, parameter in self.model.named_parameters() if not name.startswith("lm_head")]
        self.optimiser = torch.optim.AdamW([*body, *self.head.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.95))
        self.parameters = [*body, *self.head.parameters()]

    def values(self, sample: TrainingSample) -> Tensor:
        prompt = self.encoder.expand(sample.prompt)
        ids = torch.tensor([[*sample.prompt_token_ids.tolist(), *sample.token_ids.tolist()]])
        features = dict(prompt.features)
        if features:
            types = torch.zeros_like(ids)
            types[:, : len(prompt.token_ids)] = features["mm_token_type_ids"]
            features["mm_token_type_ids"] = types
        hidden = self.model(input_ids=ids, output_hidden_states=True, **features).hidden_states[-1][0]
        return self.head(hidden)[len(prompt.token_ids) - 1 : -1, 0]

    def update(self, samples: list[TrainingSample]) -> float:
        self.optimiser.zero_grad()
        loss = torch.zeros(())
        total = sum(int(sample.loss_mask.sum()) for sample in samples)
        for sample in samples:
            values = self.values(sample)
            returns, old = torch.from_numpy(sample.returns), torch.from_numpy(sample.values)
            bounded = old + (values - old).clamp(-CLIP, CLIP)
            worse = torch.maximum((values - returns).square(), (bounded - returns).square())
            loss = loss + (0.5 * worse * torch.from_numpy(sample.loss_mask)).sum() / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        return float(loss.detach())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vlm(tmp_path_factory.mktemp("critic") / "model")


@pytest.fixture(scope="module")
def samples(model: Path) -> list[TrainingSample]:
    random = np.random.default_rng(1)
    made = make_samples(model, model.parent / "media", 8)
    return [replace(s, returns=random.normal(1.0, 0.5, len(s.token_ids)).astype(np.float32)) for s in made]


def with_values(samples: list[TrainingSample], values: list[NDArray[np.float32]]) -> list[TrainingSample]:
    return [replace(sample, values=value) for sample, value in zip(samples, values, strict=True)]


async def train(
    model: Path, samples: list[TrainingSample], ranks: int, stage: int, tokens: int
) -> tuple[list[list[NDArray[np.float32]]], list[dict[str, Any]], list[NDArray[np.float32]]]:
    """Values before each of three updates and after them; metrics; values of a critic restored after the first."""
    spec = CriticSpec(
        model=ModelConfig(path=model, precision="float32"),
        trainer=TrainerConfig(learning_rate=LEARNING_RATE, ranks=ranks, zero_stage=stage, micro_batch_tokens=tokens),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        media_folder=model.parent / "media",
        seed=0,
        total_updates=10,
        clip=CLIP,
    )
    group = await CriticGroup.start(spec)
    state = model.parent / f"state-{ranks}"
    try:
        values, metrics = [await group.values(samples)], []
        for turn in range(3):
            metrics.append(await group.update(with_values(samples, values[-1])))
            values.append(await group.values(samples))
            if turn == 0:
                await group.save(state)
        await group.load(state)
        return values, metrics, await group.values(samples)
    finally:
        await group.stop()


@pytest.mark.parametrize("case", CASES)
def test_a_critic_starts_at_zero_learns_as_by_hand_and_comes_back_from_its_checkpoint(
    case: str, ray_session: None, model: Path, samples: list[TrainingSample]
) -> None:
    with nullcontext() if CASES[case][0] == 1 else ray_of_forks():
        values, metrics, restored = asyncio.run(train(model, samples, *CASES[case]))
    assert all((row == 0).all() for row in values[0])
    plain = PlainCritic(model, model.parent / "media")
    for turn in range(3):
        assert metrics[turn]["critic/loss"] == pytest.approx(plain.update(with_values(samples, values[turn])), rel=2e-4)
        with torch.no_grad():
            for sample, row in zip(samples, values[turn + 1], strict=True):
                assert row == pytest.approx(plain.values(sample).numpy(), abs=2e-4)
    assert metrics[2]["critic/loss"] < metrics[0]["critic/loss"]
    for row, again in zip(values[1], restored, strict=True):
        np.testing.assert_array_equal(row, again)
