"""What the policy's ranks publish and vouch for, with DeepSpeed, however the trainer is sharded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.config import DeadlineConfig, FreezeConfig, ModelConfig, TrainerConfig, WeightsConfig
from actors.trainer.policy import PolicyGroup
from actors.trainer.spec import PolicySpec
from actors.weights.canary import TEXT_CANARY, TOLERANCE_NATS, Canaries, compare_canaries
from actors.weights.manifest import WeightsPart
from actors.weights.offer import WeightsOffer
from actors.weights.pull.receiver import WeightReceiver
from actors.weights.source import PolicyPartSource, is_frozen, is_trained, module_tensors
from algorithms.config import AlgorithmConfig
from rollout.prompts import Prompt
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.training_samples import make_samples
from tests.actors.weights.versions import bytes_of
from tests.forks import ray_of_forks
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine

DEADLINE_S = 60.0
CHANGED = "model.language_model.layers.1.mlp.up_proj.weight"
FROZEN = "model.visual.blocks.0.attn.qkv.weight"
CASES = {"one rank": (1, 0), "two ranks, sharded": (2, 3)}


@dataclass(frozen=True)
class Published:
    """What one group of ranks did: publish, publish again, change two weights, publish once more.

    Attributes:
        offers: of the versions 3, 4 and 5.
        content: of the frozen and of the trained part of version 3.
        names: of the tensors in them.
        parts: that had to be loaded for the versions 3 and 4.
        canaries: of the model as it was loaded.
        unpublished: before the first version, after it, with two weights changed, and once they are published.
    """

    offers: list[WeightsOffer]
    content: dict[WeightsPart, bytes]
    names: dict[WeightsPart, list[str]]
    parts: list[list[WeightsPart]]
    canaries: Canaries
    unpublished: list[list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy")


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    path = build_tiny_vlm(folder / "model")
    return ModelConfig(path=path, precision="float32", max_length=256, freeze=FreezeConfig(vision_tower=True))


@pytest.fixture(scope="module")
def prompts(model: ModelConfig, folder: Path) -> list[Prompt]:
    """Without an image, with one, and with two."""
    samples = make_samples(model.path, folder / "media", 3)
    return [TEXT_CANARY, samples[1].prompt, samples[2].prompt]


@pytest.fixture(scope="module", params=CASES)
def published(request: pytest.FixtureRequest, model: ModelConfig, folder: Path, prompts: list[Prompt]) -> Published:
    ranks, zero_stage = CASES[request.param]
    spec = PolicySpec(
        model=model,
        trainer=TrainerConfig(ranks=ranks, zero_stage=zero_stage),
        algorithm=AlgorithmConfig(),
        deadlines=DeadlineConfig(start_s=150.0),
        temperature=1.0,
        media_folder=folder / "media",
        seed=0,
        total_updates=10,
        weights=WeightsConfig(bucket_mib=1),
    )
    with ray_of_forks():
        return asyncio.run(_published(spec, prompts))


async def _published(spec: PolicySpec, prompts: list[Prompt]) -> Published:
    async with _started(spec) as (group, receiver):
        unpublished = [await group.unpublished()]
        offers = [await group.publish(3)]
        unpublished.append(await group.unpublished())
        first = receiver.receive(offers[0], DEADLINE_S)
        receiver.loaded(first)
        content = {part.manifest.part: bytes(part.held.memory.view) for part in first.parts}
        canaries = await group.canaries(prompts, 3)
        offers.append(await group.publish(4))
        second = receiver.receive(offers[1], DEADLINE_S)
        receiver.loaded(second)
        await _on_all_ranks(group, CHANGED, FROZEN)
        unpublished.append(await group.unpublished())
        offers.append(await group.publish(5))
        unpublished.append(await group.unpublished())
    return Published(
        offers,
        content,
        {part.manifest.part: [tensor.name for tensor in part.manifest.tensors] for part in first.parts},
        [[part.manifest.part for part in received.parts] for received in (first, second)],
        canaries,
        unpublished,
    )


@asynccontextmanager
async def _started(spec: PolicySpec) -> AsyncIterator[tuple[PolicyGroup, WeightReceiver]]:
    group = await PolicyGroup.start(spec)
    receiver = WeightReceiver()
    try:
        yield group, receiver
    finally:
        receiver.close()
        await group.stop()


async def _on_all_ranks(group: PolicyGroup, *names: str) -> None:
    """Change one element of each of these parameters, wherever it lies."""

    def change(rank: Any, names: tuple[str, ...]) -> None:
        import deepspeed

        for name in names:
            parameter = dict(rank.module.named_parameters())[name]
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.view(-1)[7] += 1

    calls = [actor.__ray_call__.remote(change, names) for actor in group.actors]
    await asyncio.to_thread(ray.get, calls, timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def plain(model: ModelConfig, folder: Path) -> PlainTrainer:
    """The same model without any engine."""
    made = PlainTrainer(model.path, folder / "media", 1e-3, 1.0)
    made.model.model.visual.requires_grad_(False)
    made.model.model.visual.merger.requires_grad_(True)
    return made


def test_a_version_has_the_bytes_of_the_plain_model_whatever_the_ranks_and_the_zero_stage(published, plain):
    for part, wanted in ((WeightsPart.TRAINED, is_trained), (WeightsPart.FROZEN, is_frozen)):
        source = PolicyPartSource(module_tensors(plain.model, "float32", wanted), gather_bytes=1 << 20, part=part)
        assert published.names[part] == [tensor.name for tensor in source.tensors]
        assert published.content[part] == bytes_of(source)


def test_every_weight_travels_in_one_part_and_tied_ones_once(published, plain):
    names = published.names[WeightsPart.TRAINED] + published.names[WeightsPart.FROZEN]
    assert sorted(names) == sorted(name for name, _ in plain.model.named_parameters())
    assert "lm_head.weight" not in names
    assert published.names[WeightsPart.FROZEN]
    assert all(name.startswith("model.visual.") for name in published.names[WeightsPart.FROZEN])


def test_frozen_weights_are_sent_once(published):
    frozen = [offer.parts[0] for offer in published.offers]
    assert [part.part for part in frozen] == [WeightsPart.FROZEN] * 3
    assert len({part.digest for part in frozen}) == 1
    assert published.parts == [[WeightsPart.FROZEN, WeightsPart.TRAINED], [WeightsPart.TRAINED]]
    assert len({offer.trained.digest for offer in published.offers}) == 3


def test_canaries_are_the_plain_models_log_probabilities(published, plain, prompts):
    canaries = published.canaries
    assert (canaries.version, canaries.tolerance_nats) == (3, TOLERANCE_NATS["float32"])
    assert [sequence.prompt for sequence in canaries.sequences] == prompts
    measured = []
    for sequence in canaries.sequences:
        assert 1 <= len(sequence.token_ids) <= 16
        assert not set(sequence.token_ids.tolist()) & set(plain.encoder.banned_token_ids)
        measured.append(_plain_log_probs(plain, sequence.prompt, sequence.token_ids))
    report = compare_canaries(canaries, measured)
    assert report.max_gap < 1e-5
    assert plain.encoder.decode(canaries.sequences[0].token_ids) == "The five boxing "


def _plain_log_probs(plain: PlainTrainer, prompt: Prompt, token_ids: np.ndarray) -> np.ndarray:
    """[tokens] under the whole distribution."""
    expanded = plain.encoder.expand(prompt)
    ids = torch.tensor([[*expanded.token_ids.tolist(), *token_ids.tolist()]])
    features = dict(expanded.features)
    if features:
        types = torch.zeros_like(ids)
        types[:, : len(expanded.token_ids)] = features["mm_token_type_ids"]
        features["mm_token_type_ids"] = types
    with torch.no_grad():
        logits = plain.model(input_ids=ids, **features).logits[0].float()
    tokens = torch.from_numpy(token_ids.astype("int64"))
    found: np.ndarray = (
        logits[len(expanded.token_ids) - 1 : -1].log_softmax(-1).gather(-1, tokens[:, None])[:, 0].numpy()
    )
    return found


def test_what_isnt_published_is_named_until_it_is_and_frozen_weights_that_changed_never_are(published):
    before, after, with_changes, once_published = published.unpublished
    assert before == []
    assert after == []
    assert sorted(with_changes) == sorted([CHANGED, FROZEN])
    assert once_published == [FROZEN]
