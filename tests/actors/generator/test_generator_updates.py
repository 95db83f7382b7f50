"""Weight updates of a real engine: what happens to running requests, what proves a version, what cures a wrong one."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from actors.config import WeightsConfig
from actors.weights.canary import TEXT_CANARY, Canaries, CanarySequence
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError
from rollout.prompts import Prompt
from rollout.samples import Generation
from tests.actors.generator.test_generator import Setup, assert_agreement, chosen, engine_test

LONG = SamplingConfig(max_tokens=200, ignore_eos=True)
pytestmark = pytest.mark.engine


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[None, 0], ids=["in place", "staged"])
async def setup(request: pytest.FixtureRequest, shared_generator: Setup) -> AsyncIterator[Setup]:
    await shared_generator.generator.load_weights(shared_generator.policy.begin_anew())
    with weights(shared_generator, stage_from_mib=request.param):
        yield shared_generator


@contextmanager
def weights(setup: Setup, **changes: Any):  # type: ignore[no-untyped-def]
    """Another configuration of updates for a while."""
    held = setup.generator._weights
    before, held.config = held.config, held.config.model_copy(update=changes)
    try:
        yield
    finally:
        held.config = before


def canaries_of(setup: Setup, prompts: list[Prompt], tolerance_nats: float = 1e-4) -> Canaries:
    """As the trainer computes them: plain log-probabilities, nothing banned."""
    sequences = []
    for prompt in prompts:
        expanded = setup.encoder.expand(prompt)
        token_ids = np.asarray(setup.encoder.tokenizer.encode("seven?", add_special_tokens=False), dtype=np.int32)
        ids = torch.from_numpy(np.concatenate([expanded.token_ids, token_ids]).astype(np.int64))[None]
        features = dict(expanded.features)
        if "mm_token_type_ids" in features:
            features["mm_token_type_ids"] = torch.nn.functional.pad(features["mm_token_type_ids"], (0, len(token_ids)))
        with torch.no_grad():
            logits = setup.policy.module(input_ids=ids, **features).logits[0, -len(token_ids) - 1 : -1]
        own = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(token_ids).long()[:, None])[:, 0]
        sequences.append(CanarySequence(prompt, token_ids, own.numpy()))
    return Canaries(setup.policy.version, tuple(sequences), tolerance_nats)


async def begin(setup: Setup, text: str) -> asyncio.Task[Any]:
    """A long request that is being sampled."""
    prompt = setup.prompt(text)
    request = setup.generator.generate(prompt, 4, LONG, 0, f"{prompt.prompt_id}-{os.urandom(4).hex()}")
    running = asyncio.create_task(request)
    async with asyncio.timeout(20):
        while setup.generator._engine.output_processor.get_num_unfinished_requests() == 0:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    return running


@engine_test
async def test_with_recomputed_caches_everything_after_the_seam_is_the_new_weights_alone(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    old, old_module = setup.policy.version, copy.deepcopy(setup.policy.module)
    with weights(setup, recompute_cache=True):
        running = await begin(setup, "a long story")
        await setup.generator.load_weights(setup.policy.perturb())
        generation = await running
    assert isinstance(generation, Generation), generation
    for completion in generation.completions:
        seam = int((completion.policy_versions == old).sum())
        assert 0 < seam < 200
        assert np.array_equal(completion.policy_versions, np.repeat([old, old + 1], [seam, 200 - seam]))
        ids = torch.from_numpy(np.concatenate([generation.prompt_token_ids, completion.token_ids])).long()[None]
        start_of_answer = len(generation.prompt_token_ids) - 1
        for module, part in ((old_module, slice(0, seam)), (setup.policy.module, slice(seam, 200))):
            with torch.no_grad():
                logits = module(input_ids=ids).logits[0, start_of_answer:-1]
            expected = chosen(logits, completion, setup.encoder.banned_token_ids)[part]
            assert torch.from_numpy(completion.log_probs[part]).sub(expected).abs().max() < 1e-5


@engine_test
async def test_a_request_that_waits_while_weights_are_loaded_finds_nothing_that_the_old_ones_computed(setup: Setup):
    """Its prompt is cached, as the old weights computed it; all its tokens are sampled with the new ones."""
    await setup.generator.load_weights(setup.policy.perturb())
    held, prompt = setup.generator._weights, setup.prompt("a long story " * 12)
    await setup.sample(prompt, 1, SamplingConfig(max_tokens=8))
    load, waiting = held._load, []

    async def load_late(*arguments: Any) -> None:
        waiting.append(asyncio.create_task(setup.sample(prompt, 2, SamplingConfig(max_tokens=8))))
        async with asyncio.timeout(20):
            while setup.generator._engine.output_processor.get_num_unfinished_requests() < 2:
                await asyncio.sleep(0.005)
        await load(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "_load", load_late)
        await setup.generator.load_weights(setup.policy.perturb())
    generation = await waiting[0]
    assert len(generation.prompt_token_ids) > setup.generator._engine.vllm_config.cache_config.block_size
    for completion in generation.completions:
        assert set(completion.policy_versions) == {setup.policy.version}
        expected = setup.trainer_log_probs(prompt, generation, completion)
        assert torch.from_numpy(completion.log_probs).sub(expected).abs().max() < 1e-5


@engine_test
async def test_waiting_for_running_requests_finishes_them_with_the_old_weights(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    old = setup.policy.version
    with weights(setup, in_flight="wait"):
        running = await begin(setup, "to the end")
        receipt = await setup.generator.load_weights(setup.policy.perturb())
    generation = await running
    assert receipt.version == old + 1
    assert all((c.policy_versions == old).all() for c in generation.completions)


@engine_test
async def test_aborted_requests_end_as_a_failure_that_another_attempt_cures(setup: Setup):
    with weights(setup, in_flight="abort"):
        running = await begin(setup, "cut short")
        await setup.generator.load_weights(setup.policy.perturb())
    answer = await running
    assert isinstance(answer, Failure)
    assert answer.reason == "generation_aborted"
    again = await setup.sample(setup.prompt("cut short"))
    assert all((c.policy_versions == setup.policy.version).all() for c in again.completions)


@engine_test
async def test_what_an_unproven_version_sampled_is_handed_out_only_once_it_is_proven(setup: Setup):
    with weights(setup, canaries=2):
        await setup.generator.load_weights(setup.policy.perturb())
        running = asyncio.create_task(setup.sample(setup.prompt("too early?")))
        await asyncio.sleep(0.5)
        assert not running.done()
        report = await setup.generator.verify(canaries_of(setup, [TEXT_CANARY, setup.prompt("an image", 1)]))
        assert report.agrees, report
        assert report.max_gap < 1e-5
        generation = await running
    assert generation.completions[0].policy_versions[0] == setup.policy.version
    assert setup.generator._weights.verified == setup.policy.version


@engine_test
async def test_an_engine_that_computes_something_else_is_found_out_and_its_answers_are_kept_back(setup: Setup):
    with weights(setup, canaries=2):
        await setup.generator.load_weights(setup.policy.perturb())
        await setup.generator._engine.collective_rpc(_spoil, args=("layers.1.mlp.down_proj",))
        running = asyncio.create_task(setup.generator.generate(setup.prompt("x"), 1, LONG, 0, "kept-back"))
        await asyncio.sleep(0.2)
        canaries = canaries_of(setup, [TEXT_CANARY, setup.prompt("an image", 1)])
        report = await setup.generator.verify(canaries)
        assert not report.agrees
        answer = await running
        assert isinstance(answer, Failure)
        refused = await setup.generator.generate(setup.prompt("x"), 1, LONG, 0, "refused")
        assert isinstance(refused, Failure)
        assert refused.reason == "weights_disagree"

        receipt = await setup.generator.load_weights(setup.policy.publish(), anew=True)
        assert any("layers.1.mlp.down_proj" in name for name in receipt.corrected), receipt.corrected
        assert all("layers.1.mlp.down_proj" in name for name in receipt.corrected), receipt.corrected
        assert (await setup.generator.verify(canaries)).agrees
    await assert_agreement(setup)


@engine_test
async def test_loading_the_same_version_in_full_again_changes_no_tensor(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    receipt = await setup.generator.load_weights(setup.policy.publish(), anew=True)
    assert receipt.corrected == ()


@engine_test
async def test_canaries_of_another_version_prove_nothing(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    canaries = canaries_of(setup, [TEXT_CANARY])
    await setup.generator.load_weights(setup.policy.perturb())
    with pytest.raises(FailureError) as caught:
        await setup.generator.verify(canaries)
    assert caught.value.failure.reason == "canary_version"


@engine_test
async def test_an_old_version_arriving_late_changes_nothing(setup: Setup):
    late = setup.policy.perturb()
    await setup.generator.load_weights(setup.policy.perturb())
    with pytest.raises(FailureError) as caught:
        await setup.generator.load_weights(late)
    assert caught.value.failure.reason == "weights_superseded"
    await assert_agreement(setup)


def test_tolerances_by_dtype_are_what_a_recipe_may_override():
    assert WeightsConfig().canary_tolerance is None
    assert WeightsConfig(canary_tolerance=0.01).canary_tolerance == 0.01


def _spoil(worker: Any, name: str) -> None:
    """Change one layer of the engine's model, as a defect of its loading would."""
    module = next(m for path, m in worker.model_runner.model.named_modules() if path.endswith(name))
    compute = module.cpu_linear
    module.cpu_linear = lambda x, weight, bias: compute(x, weight, bias) * 1.5
