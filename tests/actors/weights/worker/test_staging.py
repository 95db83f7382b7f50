"""Versions made ready beside generation: nothing changes before the swap, everything after it, and no half."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from actors.config import DeadlineConfig
from actors.weights.source import PolicyPartSource, module_tensors
from rollout.failures import FailureError
from rollout.samples import Generation
from tests.actors.generator.test_generator import Setup, assert_agreement, engine_test, start
from tests.actors.generator.test_generator_updates import begin, weights
from tests.tiny_model import build_tiny_vlm

HEADS = [pytest.param(True, id="tied head"), pytest.param(False, id="own head", marks=pytest.mark.slow)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own_head(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    root = tmp_path_factory.mktemp("staging")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # so that a test may reach into the engine's worker
        made = await start(build_tiny_vlm(root / "model", tied=False), root)
        yield made
        await made.generator.stop()
        made.policy.publisher.stop()


@pytest.fixture(scope="module", params=HEADS)
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    made: Setup = request.getfixturevalue("shared_generator" if request.param else "own_head")
    with weights(made, stage_from_mib=0):
        yield made


@pytest.mark.engine
@engine_test
async def test_generation_goes_on_with_the_old_weights_until_the_swap(setup: Setup, tmp_path: Path):
    await setup.generator.load_weights(setup.policy.perturb())
    old, engine = setup.policy.version, setup.generator._engine
    await engine.collective_rpc(_hold_back, args=(str(tmp_path / "go on"),))
    running = await begin(setup, "a long story")
    loading = asyncio.create_task(setup.generator.load_weights(setup.policy.perturb()))
    meanwhile = await setup.sample(setup.prompt("and a short one"), 2)  # from beginning to end while it is staged
    assert not loading.done()
    assert all((completion.policy_versions == old).all() for completion in meanwhile.completions)
    (tmp_path / "go on").touch()
    await loading
    await engine.collective_rpc(_let_go)
    generation = await running
    assert isinstance(generation, Generation)
    assert {int(v) for completion in generation.completions for v in completion.policy_versions} <= {old, old + 1}
    await assert_agreement(setup)


@pytest.mark.engine
@engine_test
async def test_a_staged_version_changes_no_weight_until_it_is_swapped_in_and_then_is_as_if_loaded_in_place(
    setup: Setup,
):
    held, seen = setup.generator._weights, []
    pause_for = held.pause_for

    async def look_first(version: int) -> None:
        seen.append(await held._held_digests())
        await pause_for(version)

    await setup.generator.load_weights(setup.policy.perturb())
    before = await held._held_digests()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "pause_for", look_first)
        await setup.generator.load_weights(setup.policy.perturb())
    staged = await held._held_digests()
    assert seen == [before]
    assert all(staged[name] != digest for name, digest in before.items())
    with weights(setup, stage_from_mib=None):
        await setup.generator.load_weights(setup.policy.publish(), anew=True)
    assert await held._held_digests() == staged


@pytest.mark.engine
@engine_test
async def test_a_version_that_does_not_fit_leaves_the_old_one_being_served_whole(setup: Setup):
    await setup.generator.load_weights(setup.policy.perturb())
    old, module = setup.policy.version, setup.policy.module
    module.register_parameter("stranger", torch.nn.Parameter(torch.ones(3)))
    odd = PolicyPartSource(module_tensors(module, "float32"), gather_bytes=300_000)
    with pytest.raises(FailureError) as caught:
        await setup.generator.load_weights(setup.policy.publisher.publish(old + 1, odd))
    del module.stranger
    assert caught.value.failure.reason == "weights_not_staged"
    assert "stranger" in caught.value.failure.message
    assert setup.generator._weights.version == old
    await assert_agreement(setup)
    setup.policy.version += 1
    await setup.generator.load_weights(setup.policy.perturb())
    await assert_agreement(setup)


@pytest.mark.engine
@engine_test
async def test_a_version_that_is_not_ready_in_time_is_given_up_and_the_next_one_loads(setup: Setup, tmp_path: Path):
    await setup.generator.load_weights(setup.policy.perturb())
    old, engine, held = setup.policy.version, setup.generator._engine, setup.generator._weights
    await engine.collective_rpc(_hold_back, args=(str(tmp_path / "go on"),))
    weights_before = {name: tensor.clone() for name, tensor in setup.policy.module.state_dict().items()}
    offer = setup.policy.perturb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "spec", replace(held.spec, deadlines=DeadlineConfig(sync_s=1.0)))
        with pytest.raises(FailureError) as caught:
            await setup.generator.load_weights(offer)
    assert caught.value.failure.reason == "weights_not_staged"
    assert setup.generator._weights.version == old
    setup.policy.module.load_state_dict(weights_before)
    await assert_agreement(setup)
    (tmp_path / "go on").touch()
    await engine.collective_rpc(_let_go)
    await setup.generator.load_weights(setup.policy.perturb())
    await assert_agreement(setup)


@pytest.mark.engine
@engine_test
async def test_nothing_of_a_version_is_kept_once_the_next_one_is_in(setup: Setup):
    engine = setup.generator._engine
    await setup.generator.load_weights(setup.policy.perturb())
    before = await engine.collective_rpc(_count_modules)
    for _ in range(3):
        await setup.generator.load_weights(setup.policy.perturb())
    assert await engine.collective_rpc(_count_modules) == before
    await assert_agreement(setup)


def test_a_model_that_keeps_weights_elsewhere_is_named_and_not_staged():
    from actors.weights.worker.staging import staging_obstacle

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert staging_obstacle(model) is None
    model[1].quant_method = object()
    assert staging_obstacle(model) == "1 (Linear) computes with object"


def _hold_back(worker: Any, path: str) -> None:
    """Let no weight be read before there is a file."""
    engine = worker.weight_transfer_engine

    def late(parts: Any) -> Any:
        while not Path(path).exists():
            time.sleep(0.01)
        yield from type(engine)._tensors(engine, parts)

    engine._tensors = late


def _let_go(worker: Any) -> None:
    del worker.weight_transfer_engine._tensors


def _modules(objects: list[Any]) -> list[torch.nn.Module]:
    return [each for each in objects if issubclass(type(each), torch.nn.Module)]  # not what a weak proxy says it is


def _count_modules(worker: Any) -> int:
    """Of which vLLM keeps account, and layers that hold packed weights, wherever they are."""
    import gc

    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    worker.weight_transfer_engine._stager.submit(int).result()  # the old weights are given back behind this
    packed = sum("cpu_linear" in vars(item) for item in _modules(gc.get_objects()))
    return len(LAYERWISE_INFO) + packed
