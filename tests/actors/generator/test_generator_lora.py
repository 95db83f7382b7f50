"""A policy that is an adapter, or has one merged in, on a real engine: what arrives, in flight too, and what sleeps."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from actors.config import DeadlineConfig, GeneratorConfig, LoraConfig, ModelConfig, WeightsConfig
from actors.generator.generator import Generator
from actors.generator.spec import GeneratorSpec
from actors.generator.vllm_engine import engine_environment
from actors.model.lora import adapters, add_adapters
from actors.trainer.policy_weights import policy_sources
from actors.weights.canary import TEXT_CANARY
from actors.weights.manifest import WeightsPart
from actors.weights.offer import WeightsOffer
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.source import PolicyPartSource
from rollout.config import SamplingConfig
from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from tests.actors.generator.test_generator import MAX_LENGTH, Policy, Setup, assert_agreement, chosen, engine_test
from tests.actors.generator.test_generator_updates import begin, canaries_of
from tests.forks import forked_cores
from tests.tiny_model import build_tiny_vlm

pytestmark = pytest.mark.engine


@dataclass
class LoraPolicy(Policy):
    """A policy of which only adapters are trained."""

    frozen: PolicyPartSource | None = None

    def perturb(self) -> WeightsOffer:
        generator = torch.Generator().manual_seed(100 + self.version)
        with torch.no_grad():
            for adapter in adapters(self.module):
                for matrix in (adapter.a, adapter.b):
                    matrix.add_(torch.randn(matrix.shape, generator=generator) * 0.03)
        self.version += 1
        return self.publish()

    def publish(self) -> WeightsOffer:
        return self.publisher.publish(self.version, self.source, self.frozen)


async def start(root: Path, sync: str, **options: Any) -> Setup:
    """The generator's folder has other weights than the trainer's: only what is sent can make them agree."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = build_tiny_vlm(root / "model", seed=1)
    lora = LoraConfig(rank=4, sync=sync, **options)
    model = ModelConfig(
        path=build_tiny_vlm(root / "other", seed=2), precision="float32", max_length=MAX_LENGTH, lora=lora
    )
    media, config = MediaStore(root / "media"), GeneratorConfig(enforce_eager=True, kv_cache_gib=0.25)
    os.environ.update(engine_environment(config))
    deadlines = DeadlineConfig(sync_s=60.0, stop_s=10.0)
    weights = WeightsConfig(canaries=0, stage_from_mib=0)  # but an engine with adapters loads in place all the same
    generator = Generator(GeneratorSpec(model, config, deadlines, media.folder, weights=weights))
    with forked_cores():
        await generator.ready()
    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    add_adapters(module, lora)
    source, frozen = policy_sources(module, model, 1 << 20)
    policy = LoraPolicy(module, source, WeightPublisher(bucket_bytes=64 << 10), frozen=frozen)
    return Setup(generator, policy, PromptEncoder.from_pretrained(folder, media), media)


WAYS: dict[str, dict[str, Any]] = {
    "adapter": {"sync": "adapter"},
    "merged": {"sync": "merged"},
    # layers that vLLM makes one with others, which have no adapter
    "merged, some": {"sync": "merged", "targets": ("q_proj", "up_proj")},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=WAYS)
async def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    made = await start(tmp_path_factory.mktemp("lora"), **WAYS[request.param])
    yield made
    await made.generator.stop()
    made.policy.publisher.stop()


@engine_test
async def test_trainer_and_generator_agree_after_each_update_and_the_base_comes_once(setup: Setup):
    offers = []
    for _ in range(2):
        offers.append(setup.policy.perturb())
        await setup.generator.load_weights(offers[-1])
        await assert_agreement(setup)
    first, second = ({part.part: part.digest for part in offer.parts} for offer in offers)
    assert first[WeightsPart.FROZEN] == second[WeightsPart.FROZEN]
    assert first != second


@engine_test
async def test_a_running_request_goes_on_with_the_new_adapter_right_at_the_seam(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    old, old_module = setup.policy.version, copy.deepcopy(setup.policy.module)
    running = await begin(setup, "a long story")
    await setup.generator.load_weights(setup.policy.perturb())
    generation = await running
    for completion in generation.completions:
        seam = int((completion.policy_versions == old).sum())
        assert 0 < seam < 200
        assert np.array_equal(completion.policy_versions, np.repeat([old, old + 1], [seam, 200 - seam]))
        ids = torch.from_numpy(np.concatenate([generation.prompt_token_ids, completion.token_ids])).long()[None]
        with torch.no_grad():
            logits = old_module(input_ids=ids).logits[0, len(generation.prompt_token_ids) - 1 : -1]
        expected = chosen(logits, completion, setup.encoder.banned_token_ids)[:seam]
        assert torch.from_numpy(completion.log_probs[:seam]).sub(expected).abs().max() < 1e-5


@engine_test
async def test_canaries_prove_adapters_too(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    report = await setup.generator.verify(canaries_of(setup, [TEXT_CANARY, setup.prompt("an image", 1)]))
    assert report.agrees, report


@engine_test
async def test_a_sleeping_generator_answers_nothing_until_the_next_version_wakes_it(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    await setup.generator.sleep(2)
    assert setup.generator._weights.is_asleep
    waiting = asyncio.create_task(setup.sample(setup.prompt("awake?"), 1, SamplingConfig(max_tokens=4)))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    receipt = await setup.generator.load_weights(setup.policy.perturb())
    generation = await waiting
    assert receipt.version == setup.policy.version
    assert (generation.completions[0].policy_versions == setup.policy.version).all()
    await assert_agreement(setup)
