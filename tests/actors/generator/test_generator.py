"""The generator with a real engine: what it samples, what it refuses, and how it changes weights in flight.

One engine, which other files share (tests/actors/conftest.py), without Ray. Trainer and generator are compared in
float32 with plain transformers.
"""

from __future__ import annotations

import asyncio
import copy
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig, WeightsConfig
from actors.generator.generator import Generator, sequence_seed
from actors.generator.spec import GeneratorSpec
from actors.generator.vllm_engine import engine_environment
from actors.weights.offer import WeightsOffer
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.source import PolicyPartSource, module_tensors
from rollout.config import SamplingConfig
from rollout.encoding import PromptEncoder
from rollout.failures import Failure, FailureError, FailureKind
from rollout.media import MediaRef, MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from rollout.samples import Completion, FinishReason, Generation
from tests.forks import ForkContext, forked_cores
from tests.tiny_model import VOCABULARY, VOCABULARY_SIZE, build_tiny_vlm

MAX_LENGTH = 256
LOOSE = SamplingConfig(max_tokens=16)
engine_test = pytest.mark.asyncio(loop_scope="session")


@dataclass
class Policy:
    """A trainer in miniature: the module under training and what publishes it."""

    module: torch.nn.Module
    source: PolicyPartSource
    publisher: WeightPublisher
    version: int = 0

    def __post_init__(self) -> None:
        self._initial = copy.deepcopy(self.module.state_dict())

    def begin_anew(self) -> WeightsOffer:
        """Publish the weights of the beginning as the next version: many changes in a row make rounding errors grow."""
        self.module.load_state_dict(self._initial)
        self.version += 1
        return self.publish()

    def perturb(self) -> WeightsOffer:
        """Change every weight and publish the next version."""
        generator = torch.Generator().manual_seed(100 + self.version)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.version += 1
        return self.publish()

    def publish(self) -> WeightsOffer:
        return self.publisher.publish(self.version, self.source)


@dataclass
class Setup:
    generator: Generator
    policy: Policy
    encoder: PromptEncoder
    media: MediaStore

    def prompt(self, text: str, images: int = 0) -> Prompt:
        rng = np.random.default_rng(len(text) + 31 * images)
        pictures = [Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(images)]
        parts = [MediaPart(self.media.put_image(picture)) for picture in pictures]
        return Prompt((Message("user", (*parts, TextPart(text))),))

    async def sample(self, prompt: Prompt, n: int = 4, sampling: SamplingConfig = LOOSE, seed: int = 0) -> Generation:
        answer = await self.generator.generate(prompt, n, sampling, seed, f"{prompt.prompt_id}-{os.urandom(4).hex()}")
        assert isinstance(answer, Generation), answer
        return answer

    def trainer_log_probs(self, prompt: Prompt, generation: Generation, completion: Completion) -> torch.Tensor:
        """[tokens] under the policy as the trainer computes them: placeholders masked out of the log-softmax."""
        expanded = self.encoder.expand(prompt)
        assert np.array_equal(expanded.token_ids, generation.prompt_token_ids)
        ids = torch.from_numpy(np.concatenate([expanded.token_ids, completion.token_ids]).astype(np.int64))[None]
        features = dict(expanded.features)
        if "mm_token_type_ids" in features:
            features["mm_token_type_ids"] = torch.nn.functional.pad(features["mm_token_type_ids"], (0, len(completion)))
        with torch.no_grad():
            logits = self.policy.module(input_ids=ids, **features).logits[0, -len(completion) - 1 : -1]
        return chosen(logits, completion, self.encoder.banned_token_ids)


def chosen(logits: torch.Tensor, completion: Completion, banned: tuple[int, ...]) -> torch.Tensor:
    logits[:, list(banned)] = float("-inf")
    token_ids = torch.from_numpy(completion.token_ids.astype(np.int64))
    return torch.log_softmax(logits.float(), -1).gather(1, token_ids[:, None])[:, 0]


async def assert_agreement(setup: Setup) -> None:
    for prompt in (setup.prompt("which digit?"), setup.prompt("what sum?", 1), setup.prompt("both?", 2)):
        generation = await setup.sample(prompt)
        for completion in generation.completions:
            expected = setup.trainer_log_probs(prompt, generation, completion)
            assert torch.from_numpy(completion.log_probs).sub(expected).abs().max() < 1e-5


def engine_processes() -> set[int]:
    """Children of this process, without Python's own resource tracker."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())}


async def start(folder: Path, root: Path) -> Setup:
    from transformers import Qwen2_5_VLForConditionalGeneration

    media = MediaStore(root / "media")
    config = GeneratorConfig(enforce_eager=True, kv_cache_gib=0.25)
    os.environ.update(engine_environment(config))
    model = ModelConfig(path=folder, precision="float32", max_length=MAX_LENGTH)
    deadlines = DeadlineConfig(sync_s=60.0, stop_s=10.0)
    weights = WeightsConfig(canaries=0, patience_s=1.0)
    generator = Generator(GeneratorSpec(model, config, deadlines, media.folder, weights=weights))
    with forked_cores():
        await generator.ready()
    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    source = PolicyPartSource(module_tensors(module, "float32"), gather_bytes=300_000)
    encoder = PromptEncoder.from_pretrained(folder, media)
    return Setup(generator, Policy(module, source, WeightPublisher(bucket_bytes=64 << 10)), encoder, media)


@pytest.fixture(scope="module")
def setup(shared_generator: Setup) -> Setup:
    return shared_generator


@pytest.mark.engine
@engine_test
async def test_trainer_and_generator_agree_before_and_after_updates(setup: Setup):
    await assert_agreement(setup)
    for _ in range(2):
        offer = setup.policy.perturb()
        receipt = await setup.generator.load_weights(offer)
        assert (receipt.version, receipt.digest) == (offer.version, offer.trained.digest)
        await assert_agreement(setup)


@pytest.mark.engine
@engine_test
async def test_tokens_sampled_across_an_update_carry_their_version_right_at_the_seam(setup: Setup):
    """The engine's own arithmetic, redone: old weights up to the seam, new ones after it on the old cache."""
    prompt, banned = setup.prompt("a long story"), setup.encoder.banned_token_ids
    setup.policy.version += 1
    await setup.generator.load_weights(setup.policy.publish())
    old = setup.policy.version
    old_module = copy.deepcopy(setup.policy.module)
    long = SamplingConfig(max_tokens=200, ignore_eos=True)
    generating = asyncio.create_task(setup.sample(prompt, 4, long))
    while setup.generator._engine.output_processor.get_num_unfinished_requests() == 0:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    await setup.generator.load_weights(setup.policy.perturb())
    generation = await generating
    for completion in generation.completions:
        versions = completion.policy_versions
        seam = int((versions == old).sum())
        assert 0 < seam < 200
        assert np.array_equal(versions, np.repeat([old, old + 1], [seam, 200 - seam]))
        ids = torch.from_numpy(np.concatenate([generation.prompt_token_ids, completion.token_ids])).long()[None]
        split = len(generation.prompt_token_ids) + seam - 1  # the first new token read its predecessor with new weights
        with torch.no_grad():
            before = old_module(input_ids=ids[:, :split], use_cache=True)
            position_ids = torch.arange(split, ids.shape[1]).expand(3, 1, -1)
            after = setup.policy.module(
                input_ids=ids[:, split:], past_key_values=before.past_key_values, position_ids=position_ids
            )
        logits = torch.cat([before.logits[0], after.logits[0]])[len(generation.prompt_token_ids) - 1 : -1]
        expected = chosen(logits, completion, banned)
        assert torch.from_numpy(completion.log_probs).sub(expected).abs().max() < 1e-5


@pytest.mark.engine
@engine_test
async def test_a_publisher_that_vanishes_leaves_the_generator_on_its_old_version_and_right(setup: Setup):
    old, weights = setup.generator._weights.version, copy.deepcopy(setup.policy.module.state_dict())
    offer, held = setup.policy.perturb(), setup.generator._weights
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "spec", replace(held.spec, deadlines=DeadlineConfig(sync_s=5.0)))
        with pytest.raises(FailureError) as caught:
            await setup.generator.load_weights(replace(offer, endpoint=f"tcp://127.0.0.1:{silent.getsockname()[1]}"))
    assert caught.value.failure.reason == "weights_timeout"
    assert setup.generator._weights.version == old
    setup.policy.module.load_state_dict(weights)
    await assert_agreement(setup)


@pytest.mark.engine
@engine_test
async def test_a_half_loaded_generator_serves_nothing_until_a_version_is_loaded(setup: Setup):
    module = setup.policy.module
    module.register_parameter("stranger", torch.nn.Parameter(torch.ones(3)))
    odd = PolicyPartSource(module_tensors(module, "float32"), gather_bytes=300_000)
    setup.policy.version += 1
    with pytest.raises(FailureError) as caught:
        await setup.generator.load_weights(setup.policy.publisher.publish(setup.policy.version, odd))
    del module.stranger
    assert caught.value.failure.reason == "weights_not_loaded"
    refused = await setup.generator.generate(setup.prompt("still there?"), 1, LOOSE, 0, "stale")
    assert isinstance(refused, Failure)
    assert refused.kind is FailureKind.INFRASTRUCTURE
    await setup.generator.load_weights(setup.policy.perturb())
    await assert_agreement(setup)


@pytest.mark.engine
@engine_test
async def test_a_seed_makes_each_sample_reproducible_and_all_of_them_different(setup: Setup):
    prompt = setup.prompt("which digit?", 1)
    first, again, other = [await setup.sample(prompt, 4, seed=seed) for seed in (7, 7, 8)]
    texts = [[tuple(c.token_ids) for c in generation.completions] for generation in (first, again, other)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 8


@pytest.mark.engine
@engine_test
async def test_an_untrained_policy_never_samples_a_placeholder(setup: Setup):
    free = SamplingConfig(max_tokens=100, ignore_eos=True)
    prompts = [setup.prompt(f"number {index}?") for index in range(8)]
    generations = await asyncio.gather(*(setup.sample(prompt, 8, free, seed) for seed, prompt in enumerate(prompts)))
    sampled = np.concatenate([c.token_ids for generation in generations for c in generation.completions])
    assert len(sampled) == 6400
    assert len(np.unique(sampled)) > VOCABULARY_SIZE // 2
    assert setup.encoder.banned_token_ids
    assert not np.isin(sampled, setup.encoder.banned_token_ids).any()


@pytest.mark.engine
@engine_test
async def test_a_completion_says_why_it_ended_and_keeps_the_token_that_ended_it(setup: Setup):
    end, prompt = VOCABULARY["<|im_end|>"], setup.prompt("stop?")
    generation = await setup.sample(prompt, 32, SamplingConfig(max_tokens=120))
    ended = [c for c in generation.completions if c.finish_reason is FinishReason.STOP]
    cut = [c for c in generation.completions if c.finish_reason is FinishReason.LENGTH]
    assert ended
    assert all(c.token_ids[-1] == end and end not in c.token_ids[:-1] for c in ended)
    assert all(len(c) == 120 for c in cut)
    assert all("<|im_end|>" not in c.text for c in ended)


@pytest.mark.engine
@engine_test
async def test_a_stop_string_and_a_stop_token_end_a_completion(setup: Setup):
    space = VOCABULARY[" "]
    by_string = await setup.sample(setup.prompt("s"), 16, SamplingConfig(max_tokens=150, stop=(" ",)))
    by_token = await setup.sample(setup.prompt("t"), 16, SamplingConfig(max_tokens=150, stop_token_ids=(space,)))
    for generation in (by_string, by_token):
        stopped = [c for c in generation.completions if c.token_ids[-1] == space]
        assert stopped
        assert all(c.finish_reason is FinishReason.STOP and space not in c.token_ids[:-1] for c in stopped)


@pytest.mark.engine
@engine_test
async def test_greedy_decoding_gives_the_most_likely_tokens_every_time(setup: Setup):
    greedy = SamplingConfig(temperature=0.0, max_tokens=12)
    generation = await setup.sample(setup.prompt("best?"), 2, greedy)
    assert len({tuple(c.token_ids) for c in generation.completions}) == 1


@pytest.mark.engine
@engine_test
async def test_a_prompt_without_room_for_an_answer_is_a_failure_of_the_data_with_numbers(setup: Setup):
    answer = await setup.generator.generate(setup.prompt("x" * 300), 1, LOOSE, 0, "long")
    assert isinstance(answer, Failure)
    assert (answer.kind, answer.reason) == (FailureKind.DATA, "prompt_too_long")
    assert str(MAX_LENGTH) in answer.message


@pytest.mark.engine
@engine_test
async def test_a_prompt_whose_image_is_missing_is_a_failure_of_the_data(setup: Setup):
    prompt = Prompt((Message("user", (MediaPart(MediaRef("image", "0" * 64, "image/png")), TextPart("?"))),))
    answer = await setup.generator.generate(prompt, 1, LOOSE, 0, "missing")
    assert isinstance(answer, Failure)
    assert answer.kind is FailureKind.DATA


@pytest.mark.engine
@engine_test
async def test_untied_embeddings_agree_before_and_after_an_update_too_and_stopping_leaves_no_process(
    tmp_path_factory: pytest.TempPathFactory,
):
    root = tmp_path_factory.mktemp("untied")
    ForkContext()  # starts the fork server, which stays
    before = engine_processes()
    setup = await start(build_tiny_vlm(root / "model", tied=False, seed=1), root)
    started = engine_processes() - before
    try:
        assert started
        await assert_agreement(setup)
        await setup.generator.load_weights(setup.policy.perturb())
        await assert_agreement(setup)
    finally:
        await setup.generator.stop()
        setup.policy.publisher.stop()
    assert not started & engine_processes()


def test_neighbouring_seeds_share_no_sample():
    seeds = {sequence_seed(seed) + index for seed in range(-50, 2000) for index in range(64)}
    assert len(seeds) == 2050 * 64
    assert max(seeds) < 2**63
