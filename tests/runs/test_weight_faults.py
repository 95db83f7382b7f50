"""Real generators killed at every phase of a weight update, while both of them sample: the fleet ends with both on the
current version, proven, and every completion that was handed out is what its policy versions compute."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import ray
import torch
from torch import Tensor, nn

import actors.generator.handle
import orchestrator.roles.fleet
from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig, WeightsConfig
from actors.generator.handle import GeneratorHandle
from actors.generator.spec import GeneratorSpec
from actors.weights.canary import TEXT_CANARY, Canaries
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.source import PolicyPartSource, module_tensors
from orchestrator.roles.delivery import Publication
from orchestrator.roles.fleet import NO_GENERATOR, GeneratorFleet
from orchestrator.roles.members import Health, Member
from rollout.config import SamplingConfig
from rollout.encoding import PromptEncoder
from rollout.failures import FailureError, FailureKind
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.samples import Completion, Generation
from tests.actors.generator.test_generator import Policy, Setup, chosen
from tests.actors.generator.test_generator_updates import canaries_of
from tests.hosts import ROOT
from tests.orchestrator.stepping_generator import FOLDER, PHASES, STAGED_PHASES, SteppingGenerator, reached, wanted
from tests.tiny_model import build_tiny_vlm

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module")]

LONG = SamplingConfig(max_tokens=120, ignore_eos=True)
REQUESTS = 3
"""In flight at any time; together they have more sequences than a generator decodes at once, so that some wait."""
DEADLINE_S = 120.0
IN_PLACE, STAGING = "generator-0", "generator-1"
"""How each loads its versions."""
MAX_GAP = 1e-4
"""Of a log-probability, nats; other versions are off by half a nat and more."""


@dataclass
class Scene:
    """A trainer in miniature, a fleet of two generators, and requests without end."""

    setup: Setup
    fleet: GeneratorFleet
    folder: Path
    modules: dict[int, nn.Module] = field(default_factory=dict)
    answers: list[tuple[Prompt, Generation]] = field(default_factory=list)
    failures: list[FailureError] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    may_ask: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while a generator starts, which takes all there is."""

    async def publish(self) -> Publication:
        """Train a little, and bring the next version to the fleet."""
        policy = self.setup.policy
        offer = await asyncio.to_thread(policy.perturb)
        self.modules[policy.version] = copy.deepcopy(policy.module)
        return await self.fleet.publish(offer, self.canaries())

    async def canaries(self) -> Canaries:
        """What generators of the current version must reproduce."""
        prompts = [TEXT_CANARY, self.setup.prompt("an image", 1)]
        return await asyncio.to_thread(canaries_of, self.setup, prompts)

    async def ask(self, number: int) -> None:
        """One request after the other; prompts are long and come again, so that their prefixes are cached."""
        for index in itertools.count():
            await self.may_ask.wait()
            prompt = self.setup.prompt(f"tell me story number {(number + index) % 4} " + "again and " * 16)
            try:
                answer = await self.fleet.generate(prompt, 4, LONG, index, f"{number}-{index}")
            except FailureError as error:
                self.failures.append(error)
            else:
                assert isinstance(answer, Generation), answer
                self.answers.append((prompt, answer))

    def member(self, name: str) -> Member:
        """A generator as the fleet sees it."""
        return next(member for member in self.fleet.members if member.name == name)

    async def stopped(self, name: str) -> psutil.Process:
        """The generator's process, once it has come to the phase that it was told to stop at."""
        await until(reached(self.folder, name).exists, f"{name} to stop")
        return psutil.Process(int(reached(self.folder, name).read_text()))

    def are_all_current(self) -> bool:
        """Whether both may serve, and nothing but the current version."""
        version = self.setup.policy.version
        return all(m.health is Health.HEALTHY and m.version == version for m in self.fleet.members)

    async def until_all_serve_the_current_version(self) -> None:
        """Both are healthy, proven, and hand out what they sampled with it."""
        await until(self.are_all_current, "recovery")
        version = self.setup.policy.version
        for member in self.fleet.members:
            assert member.report is not None
            assert member.report.agrees
            assert member.report.version == version
            assert member.handle is not None
            assert await member.handle.actor.versions.remote() == (version, version, False)

        def serving() -> set[str]:
            return {a.generator for _, a in self.answers for c in a.completions if set(c.policy_versions) == {version}}

        await until(lambda: len(serving()) == 2, "completions of the current version from both")

    async def assert_no_mixture(self) -> None:
        """Every completion since the last time is what exactly its versions compute; what failed may be asked again."""
        for error in self.failures:
            assert error.failure.kind is FailureKind.INFRASTRUCTURE, error
            assert error.failure.reason != NO_GENERATOR, error
        self.failures.clear()
        assert not [data for _, data in self.events if "raised when asked" in data.get("why", "")], "a bug, not a death"
        answers, self.answers = self.answers, []
        assert answers
        gaps = await asyncio.to_thread(lambda: [self.gap(p, a, c) for p, a in answers for c in a.completions])
        assert max(gaps) < MAX_GAP

    def gap(self, prompt: Prompt, generation: Generation, completion: Completion) -> float:
        """Between a completion's log-probabilities and those recomputed, at worst."""
        expected = self.recomputed(generation, completion)
        assert np.array_equal(generation.prompt_token_ids, self.setup.encoder.expand(prompt).token_ids)
        return float(np.abs(completion.log_probs - expected.numpy()).max())

    @torch.no_grad()
    def recomputed(self, generation: Generation, completion: Completion) -> Tensor:
        """[tokens] as the engine computes them: after a seam, with the new weights on what the old ones cached."""
        versions, answer_start = completion.policy_versions, len(generation.prompt_token_ids)
        ids = torch.from_numpy(np.concatenate([generation.prompt_token_ids, completion.token_ids])).long()[None]
        seams = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist()]
        starts = [0, *(answer_start + seam - 1 for seam in seams[1:]), ids.shape[1]]
        cache, logits = None, []
        for seam, (start, end) in zip(seams, itertools.pairwise(starts), strict=True):
            positions = torch.arange(start, end).expand(3, 1, -1)
            out = self.modules[int(versions[seam])](
                input_ids=ids[:, start:end], past_key_values=cache, position_ids=positions, use_cache=True
            )
            cache = out.past_key_values
            logits.append(out.logits[0])
        return chosen(torch.cat(logits)[answer_start - 1 : -1], completion, self.setup.encoder.banned_token_ids)


async def until(happened: Callable[[], Any], what: str) -> None:
    """Wait for something to have happened."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not happened():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"no {what} within {DEADLINE_S:g} s") from None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("faults")
    (folder / FOLDER).mkdir()
    model = ModelConfig(path=build_tiny_vlm(folder / "model"), precision="float32", max_length=512)
    media = MediaStore(folder / "media")
    config = GeneratorConfig(enforce_eager=True, kv_cache_gib=0.1, max_sequences=6)
    deadlines = DeadlineConfig(start_s=DEADLINE_S, generate_s=60.0, sync_s=30.0, stop_s=5.0)

    async def launch(name: str) -> GeneratorHandle:
        weights = WeightsConfig(canaries=2, patience_s=1.0, stage_from_mib=0 if name == STAGING else None)
        return await GeneratorHandle.start(
            GeneratorSpec(model, config, deadlines, media.folder, name=name, weights=weights)
        )

    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(model.path, dtype=torch.float32).eval()
    source = PolicyPartSource(module_tensors(module, "float32"), gather_bytes=300_000)
    encoder = PromptEncoder.from_pretrained(model.path, media)
    policy = Policy(module, source, WeightPublisher(bucket_bytes=64 << 10))
    made = Scene(Setup(None, policy, encoder, media), None, folder)  # type: ignore[arg-type]
    made.fleet = GeneratorFleet(launch, DEADLINE_S, lambda kind, **data: made.events.append((kind, data)), DEADLINE_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors.generator.handle, "Generator", SteppingGenerator)
        patch.setattr(orchestrator.roles.fleet, "MAX_RESTARTS", 100)
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.shutdown()  # of the session that other files share
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
        try:
            await made.fleet.start(2)
            await made.publish()
            made.may_ask.set()
            asking = [asyncio.create_task(made.ask(number)) for number in range(REQUESTS)]
            yield made
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        finally:
            await made.fleet.stop()
            policy.publisher.stop()
            ray.shutdown()


def kill_generator(process: psutil.Process) -> None:
    """The actor, with which its engine ends."""
    process.kill()


def kill_engine(process: psutil.Process) -> None:
    """The engine's process alone."""
    (engine,) = (child for child in process.children() if "EngineCore" in " ".join(child.cmdline()))
    engine.kill()
    engine.wait(DEADLINE_S)


VICTIMS = [(IN_PLACE, phase) for phase in PHASES] + [(STAGING, phase) for phase in STAGED_PHASES]


@pytest.mark.parametrize("kill", [kill_generator, kill_engine])
@pytest.mark.parametrize(("name", "phase"), VICTIMS)
async def test_a_generator_killed_at_any_phase_of_an_update_comes_back_current_and_nobody_serves_a_mixture(
    scene: Scene, kill: Callable[[psutil.Process], None], name: str, phase: str
):
    restarts, handle = scene.member(name).restarts, scene.member(name).handle
    wanted(scene.folder, name).write_text(phase)
    publishing = asyncio.create_task(scene.publish())
    process = await scene.stopped(name)
    await asyncio.to_thread(kill, process)
    reached(scene.folder, name).unlink()
    publication = await publishing
    assert publication.delivered >= 1
    answered = len(scene.answers)
    await until(lambda: len(scene.answers) > answered, "answer of the other generator")
    await until(lambda: scene.member(name).health is Health.DEAD or scene.member(name).handle is not handle, "notice")
    scene.may_ask.clear()
    await until(lambda: scene.member(name).restarts == restarts + 1 and scene.are_all_current(), "recovery")
    scene.may_ask.set()
    await scene.until_all_serve_the_current_version()
    assert scene.member(name).handle is not handle
    await scene.assert_no_mixture()


async def test_updates_without_a_fault_disturb_no_request_and_leave_no_mixture(scene: Scene):
    for _ in range(4):
        publication = await scene.publish()
        assert publication.delivered == 2
        await asyncio.sleep(0.3)
    await scene.until_all_serve_the_current_version()
    assert scene.failures == []
    versions = {len(set(completion.policy_versions)) for _, a in scene.answers for completion in a.completions}
    assert {1, 2} <= versions, "some were sampled across an update, others after they had waited for it"
    await scene.assert_no_mixture()


async def test_a_later_publisher_goes_on_with_the_same_generators(scene: Scene):
    scene.setup.policy.publisher.stop()
    scene.setup.policy.publisher = WeightPublisher(bucket_bytes=64 << 10)
    assert (await scene.publish()).delivered == 2
    await scene.until_all_serve_the_current_version()
    await scene.assert_no_mixture()
