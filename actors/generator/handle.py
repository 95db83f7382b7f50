"""The driver's side of a generator: starts the actor and calls it with deadlines. Imports neither torch nor vLLM."""

from __future__ import annotations

import contextlib
from typing import Any

import ray

from actors.calls import START, ActorResources, call
from actors.generator.generator import Generator
from actors.generator.spec import GeneratorSpec
from actors.generator.vllm_engine import engine_environment
from actors.weights.canary import Canaries, CanaryReport
from actors.weights.offer import WeightsOffer, WeightsReceipt
from actors.weights.push.port import GeneratorPort
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Generation

MAX_CONCURRENCY = 4096


class GeneratorHandle:
    """A running generator. Make it with :meth:`start`."""

    def __init__(self, actor: Any, spec: GeneratorSpec) -> None:
        self.actor = actor
        self.spec = spec
        self.name = spec.name

    @classmethod
    async def start(cls, spec: GeneratorSpec, resources: ActorResources | None = None) -> GeneratorHandle:
        """Start the actor and wait until its vLLM engine is up. Ray must be initialised.

        Args:
            resources: what the generator asks Ray for.

        Raises:
            FailureError: the vLLM engine didn't start, or not within `deadlines.start_s`.
        """
        options = (resources or ActorResources()).options(spec.config.threads) | {
            "max_concurrency": MAX_CONCURRENCY,
            "runtime_env": {"env_vars": engine_environment(spec.config)},
        }
        actor: Any = ray.remote(Generator).options(**options).remote(spec)
        handle = cls(actor, spec)
        try:
            await handle._call(actor.ready.remote(), START, spec.deadlines.start_s)
        except BaseException:
            ray.kill(actor)
            raise
        return handle

    async def generate(
        self, prompt: Prompt, n: int, sampling: SamplingConfig, seed: int | None, request_id: str
    ) -> Generation | Failure:
        """Sample n completions; see :meth:`Generator.generate`. A failure that is returned is the prompt's.

        Raises:
            FailureError: INFRASTRUCTURE if the generator is dead, doesn't answer in time or is stale.
        """
        reference = self.actor.generate.remote(prompt, n, sampling, seed, request_id)
        what = f"generate for prompt {prompt.prompt_id} (request {request_id})"
        answer: Generation | Failure = await self._call(reference, what, self.spec.deadlines.generate_s)
        if isinstance(answer, Failure) and answer.kind is not FailureKind.DATA:
            raise FailureError(answer)
        return answer

    async def load_weights(self, offer: WeightsOffer, *, anew: bool = False) -> WeightsReceipt:
        """Have the generator load the offered version, and check its receipt; see :meth:`Generator.load_weights`.

        Raises:
            FailureError: INFRASTRUCTURE; the generator doesn't serve that version.
        """
        reference = self.actor.load_weights.remote(offer, anew=anew)
        what = f"load policy version {offer.version}"
        receipt: WeightsReceipt = await self._call(reference, what, self.spec.deadlines.sync_s)
        if (receipt.version, receipt.digest) != (offer.version, offer.trained.digest):
            message = (
                f"{self.name} loaded version {receipt.version} with digest {receipt.digest}, but version "
                f"{offer.version} with digest {offer.trained.digest} was offered"
            )
            raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "weights_mismatch", message))
        return receipt

    def port(self, version: int) -> GeneratorPort:
        """What the trainer needs to push a version into the generator's vLLM engine."""
        return GeneratorPort(self.name, self.actor, self.spec.config.tensor_parallel, version)

    async def verify(self, canaries: Canaries) -> CanaryReport:
        """Compare its log-probabilities of the canaries with the trainer's; see :meth:`Generator.verify`."""
        what = f"compute the canaries of version {canaries.version}"
        reference = self.actor.verify.remote(canaries)
        report: CanaryReport = await self._call(reference, what, self.spec.deadlines.sync_s)
        return report

    async def sleep(self, level: int) -> None:
        """Free the generator's GPU memory for the trainer until the next version comes; see :meth:`Generator.sleep`."""
        await self._call(self.actor.sleep.remote(level), "fall asleep", 2 * self.spec.deadlines.generate_s)

    async def stop(self) -> None:
        """End the vLLM engine, then the actor. The actor is ended within `deadlines.stop_s` in any case."""
        try:
            with contextlib.suppress(FailureError):  # it may be dead already
                await self._call(self.actor.stop.remote(), "stop", self.spec.deadlines.stop_s)
        finally:
            ray.kill(self.actor)

    async def _call(self, reference: Any, what: str, deadline_s: float) -> Any:
        return await call(reference, role="generator", who=self.name, what=what, deadline_s=deadline_s)
