"""The driver's side of a generator: starts the actor, gives every call a deadline. Imports neither torch nor vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.calls import ActorResources
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
        """Start the actor and wait for its engine. Ray must be initialised.

        Args:
            resources: what the generator asks Ray for.

        Raises:
            FailureError: the engine didn't start, or not within `deadlines.start_s`.
        """
        options = (resources or ActorResources()).options(spec.config.threads) | {
            "max_concurrency": MAX_CONCURRENCY,
            "runtime_env": {"env_vars": engine_environment(spec.config)},
        }
        actor: Any = ray.remote(Generator).options(**options).remote(spec)
        handle = cls(actor, spec)
        try:
            await handle._call("ready", "start", spec.deadlines.start_s)
        except BaseException:
            ray.kill(actor)
            raise
        return handle

    async def generate(
        self, prompt: Prompt, n: int, sampling: SamplingConfig, seed: int | None, request_id: str
    ) -> Generation | Failure:
        """Sample n completions; see :meth:`Generator.generate`. A failure that is returned is the prompt's.

        Raises:
            FailureError: INFRASTRUCTURE where the generator is dead, silent or stale.
        """
        what = f"generate for prompt {prompt.prompt_id} (request {request_id})"
        deadline_s = self.spec.deadlines.generate_s
        answer: Generation | Failure = await self._call(
            "generate", what, deadline_s, prompt, n, sampling, seed, request_id
        )
        if isinstance(answer, Failure) and answer.kind is not FailureKind.DATA:
            raise FailureError(answer)
        return answer

    async def load_weights(self, offer: WeightsOffer, *, anew: bool = False) -> WeightsReceipt:
        """Bring the generator to the offered version and check its word; see :meth:`Generator.load_weights`.

        Raises:
            FailureError: INFRASTRUCTURE; the generator doesn't serve that version.
        """
        what = f"load policy version {offer.version}"
        receipt: WeightsReceipt = await self._call("load_weights", what, self.spec.deadlines.sync_s, offer, anew=anew)
        if (receipt.version, receipt.digest) != (offer.version, offer.trained.digest):
            raise self._failure(
                "weights_mismatch",
                f"{self.name} loaded version {receipt.version} with digest {receipt.digest}, but version "
                f"{offer.version} with digest {offer.trained.digest} was offered",
            )
        return receipt

    def port(self, version: int) -> GeneratorPort:
        """What the trainer needs to push a version into its engine."""
        return GeneratorPort(self.name, self.actor, self.spec.config.tensor_parallel, version)

    async def verify(self, canaries: Canaries) -> CanaryReport:
        """Compare its log-probabilities with the trainer's; see :meth:`Generator.verify`."""
        what = f"compute the canaries of version {canaries.version}"
        report: CanaryReport = await self._call("verify", what, self.spec.deadlines.sync_s, canaries)
        return report

    async def sleep(self, level: int) -> None:
        """Have it give its memory to the trainer until the next version comes; see :meth:`Generator.sleep`."""
        await self._call("sleep", "fall asleep", 2 * self.spec.deadlines.generate_s, level)

    async def stop(self) -> None:
        """End the engine, then the actor; the actor in any case, within `deadlines.stop_s`."""
        try:
            with contextlib.suppress(FailureError):  # dead already is what we want
                await self._call("stop", "stop", self.spec.deadlines.stop_s)
        finally:
            ray.kill(self.actor)

    async def _call(self, method: str, what: str, deadline_s: float, *arguments: Any, **options: Any) -> Any:
        started = time.monotonic()
        reference = getattr(self.actor, method).remote(*arguments, **options)
        try:
            async with asyncio.timeout(deadline_s):  # wait_for may forget that it was cancelled, before Python 3.12
                return await asyncio.wrap_future(reference.future())
        except TimeoutError:
            ray.cancel(reference)
            raise self._failure("generator_timeout", f"{self.name} didn't {what} within {deadline_s:g} s") from None
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, FailureError):
                raise FailureError(cause.failure) from error
            message = f"{self.name} raised when asked to {what}: {error}"
            raise FailureError(Failure(FailureKind.BUG, "generator_raised", message)) from error
        except RayError as error:
            after = time.monotonic() - started
            message = f"{self.name} couldn't {what}: {type(error).__name__} after {after:.1f} s: {error}"
            raise self._failure("generator_died", message) from error

    def _failure(self, reason: str, message: str) -> FailureError:
        return FailureError(Failure(FailureKind.INFRASTRUCTURE, reason, message))
