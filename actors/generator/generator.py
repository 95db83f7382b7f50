"""The rollout generator: an asynchronous vLLM engine in a Ray actor. Prompts in, token ids with log-probabilities out.

Every token carries the policy version that sampled it, as recorded by the vLLM engine: versions change only while the
engine is paused, so the tokens of a sequence that spans an update carry the right version on each side.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.generator.spec import GeneratorSpec
from actors.generator.vllm_engine import end_processes, engine_args, engine_processes
from actors.generator.vllm_push import VllmPush
from actors.generator.vllm_weights import VllmWeights
from actors.weights.canary import Canaries, CanaryReport
from actors.weights.offer import WeightsOffer, WeightsReceipt
from rollout.config import SamplingConfig
from rollout.encoding import EncodedPrompt, PromptEncoder
from rollout.failures import DataError, Failure, FailureError
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.samples import Completion, FinishReason, Generation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

    from actors.weights.canary import CanarySequence

logger = logging.getLogger(__name__)

REQUEST_FAILED = "request_failed"
KEPT_CANARIES = 64
ABORTED_S = 0.05  # for the outputs of aborted requests to reach their callers


def sequence_seed(seed: int) -> int:
    """Hash a request's seed, so that neighbouring seeds share no sample although vLLM adds the sample's index to it."""
    digest = hashlib.blake2b(seed.to_bytes(16, "little", signed=True), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


@dataclass
class Generator:
    """Generates completions and loads new weights meanwhile. `ray.remote` makes it an actor; it imports no Ray.

    Call :meth:`ready` first: it starts the engine.
    """

    spec: GeneratorSpec
    _engine: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._weights = VllmWeights(self.spec)
        self._starting = asyncio.Lock()
        self._encoded_canaries: dict[str, EncodedPrompt] = {}

    async def ready(self) -> float:
        """Start the vLLM engine, once. Returns the seconds it took.

        Raises:
            FailureError: `engine_start_failed`: vLLM rejects this model or these settings.
        """
        async with self._starting:
            started = time.monotonic()
            if self._engine is None:
                await self._start()
            return time.monotonic() - started

    async def generate(
        self, prompt: Prompt, n: int, sampling: SamplingConfig, seed: int | None, request_id: str
    ) -> Generation | Failure:
        """Sample n completions of one prompt.

        Args:
            prompt: what to answer.
            n: how many samples.
            sampling: settings of the sampler; temperature 0 is greedy.
            seed: makes the n samples reproducible and different from one another; None draws fresh randomness.
            request_id: unique among the requests in flight.
        Returns:
            The generation, or a failure: of kind DATA where the prompt or its media are at fault (`prompt_too_long` and
            those of the media store), of kind INFRASTRUCTURE where this generator cannot serve (its `stale` failure,
            `generation_aborted`, `engine_dead`).
        """
        refusal = self._weights.stale or await self._weights.wait_until_awake(self.spec.deadlines.generate_s)
        if refusal is not None:
            return refusal
        started = time.monotonic()
        try:
            output = await self._answer(prompt, self._sampling_params(n, sampling, seed), request_id)
        except FailureError as error:
            return error.failure
        generation = self._generation(output, n, started, has_text=bool(sampling.stop))
        newest = max((int(c.policy_versions.max()) for c in generation.completions if len(c)), default=-1)
        return await self._weights.wait_until_verified(newest) or generation

    async def load_weights(self, offer: WeightsOffer, *, anew: bool = False) -> WeightsReceipt:
        """Load a new policy version while sequences are in flight.

        Prepare (receive and check, while generation runs), pause, load, invalidate caches, resume. Samples of the new
        version are released once :meth:`verify` has verified it, if the recipe has canaries.

        Args:
            offer: the version.
            anew: receive and load all of it, frozen weights too, and report which of the engine's tensors that changed.
        Raises:
            FailureError: INFRASTRUCTURE. Where receiving failed, the generator still serves its former version whole.
                Where loading failed, it is stale (`weights_not_loaded`): its requests are aborted and it refuses new
                ones until it has loaded a version.
        """
        return await self._weights.load(offer, anew=anew)

    async def verify(self, canaries: Canaries) -> CanaryReport:
        """Compare the canaries' log-probabilities with the trainer's. Where they agree, the version is verified.

        Where they differ, the generator is stale: its samples of that version are discarded, and it refuses requests
        until it has loaded a version again.

        Raises:
            FailureError: INFRASTRUCTURE: it holds another version than the canaries' (`canary_version`), or the vLLM
                engine has died (`engine_dead`).
        """
        return await self._weights.verify(canaries, self._log_probs)

    async def push_connect(self, init_info: dict[str, Any]) -> None:
        """See :meth:`actors.generator.vllm_push.VllmPush.connect`."""
        await self._push.connect(init_info)

    async def push_begin(self, version: int) -> None:
        """See :meth:`actors.generator.vllm_push.VllmPush.begin`."""
        await self._push.begin(version)

    async def push_update(self, update_info: dict[str, Any]) -> None:
        """See :meth:`actors.generator.vllm_push.VllmPush.update`."""
        await self._push.update(update_info)

    async def push_finish(self, version: int, digest: str) -> WeightsReceipt:
        """See :meth:`actors.generator.vllm_push.VllmPush.finish`."""
        return await self._push.finish(version, digest)

    async def sleep(self, level: int) -> None:
        """Give the GPU's memory to the trainer until the next version; see :meth:`VllmWeights.sleep`."""
        await self._weights.sleep(level)

    async def stop(self) -> None:
        """Stop the vLLM engine and its processes; requests in flight end with a failure. Safe to call twice."""
        if self._engine is None:
            return
        children = engine_processes(self._engine)
        engine, self._weights.stale = self._engine, self._failure("generator_stopped", "was stopped")
        deadline_s = self.spec.deadlines.stop_s
        with contextlib.suppress(FailureError, TimeoutError):  # a dead or hung engine has nothing to abort
            await asyncio.wait_for(self._weights.pause("abort"), deadline_s / 4)
            await asyncio.sleep(ABORTED_S)
        self._engine = None
        if engine.output_handler is not None:
            engine.output_handler.cancel()
        await asyncio.to_thread(engine.shutdown, timeout=deadline_s / 4)
        await asyncio.to_thread(end_processes, children, deadline_s / 4)
        await self._weights.close(deadline_s / 4)

    async def _start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        model = self.spec.model
        self._encoder = PromptEncoder.from_pretrained(
            model.path, MediaStore(self.spec.media_folder), trust_remote_code=model.trust_remote_code
        )
        try:
            self._engine = AsyncLLM.from_engine_args(engine_args(self.spec, self._encoder.banned_token_ids))
            await self._weights.start(self._engine)
            self._push = VllmPush(self._weights, self._engine)
        except Exception as error:
            why = f"vLLM could not start with {model.path}: {error}"
            raise FailureError(self._failure("engine_start_failed", why)) from error

    async def _answer(self, prompt: Prompt, params: SamplingParams, request_id: str) -> RequestOutput:
        encoded = await asyncio.to_thread(self._encoder.encode, prompt)
        try:
            return await self._run(await self._expand(prompt, encoded), params, request_id)
        except FailureError as error:
            if error.failure.reason != REQUEST_FAILED:
                raise
        # vLLM caches media in two processes; when the caches disagree the request fails and has to be sent again
        return await self._run(await self._expand(prompt, encoded), params, f"{request_id}-again")

    async def _expand(self, prompt: Prompt, encoded: EncodedPrompt) -> Any:
        """vLLM's input for a prompt, with media placeholders expanded by the engine's own processor."""
        request: dict[str, Any] = {
            "prompt_token_ids": encoded.token_ids.tolist(),
            "cache_salt": str(self._weights.version),  # hides prefixes of older weights
        }
        if encoded.images:
            request["multi_modal_data"] = {"image": encoded.images}
            request["multi_modal_uuids"] = {"image": [media.sha256 for media in prompt.media]}
        try:
            engine_input = await self._engine.renderer.process_for_engine_async(request, time.time())
        except (ValueError, TypeError) as error:
            raise DataError("media_unprocessable", f"vLLM cannot process prompt {prompt.prompt_id}: {error}") from error
        length, limit = len(engine_input["prompt_token_ids"]), self.spec.model.max_length
        if length >= limit:
            raise DataError(
                "prompt_too_long",
                f"prompt {prompt.prompt_id} has {length} tokens with its media, so no completion fits into "
                f"model.max_length = {limit}. Raise model.max_length, or filter such prompts out.",
            )
        return engine_input

    def _sampling_params(self, n: int, sampling: SamplingConfig, seed: int | None) -> SamplingParams:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        is_greedy = sampling.temperature == 0.0
        stop_ids = () if sampling.ignore_eos else (*self._encoder.stop_token_ids, *sampling.stop_token_ids)
        return SamplingParams(
            n=1 if is_greedy else n,  # all greedy samples are equal: one is drawn and repeated
            temperature=sampling.temperature,
            top_p=1.0 if is_greedy else sampling.top_p,
            top_k=0 if is_greedy else sampling.top_k,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop=list(sampling.stop),
            stop_token_ids=list(stop_ids),
            ignore_eos=sampling.ignore_eos,
            seed=None if seed is None or is_greedy else sequence_seed(seed),
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),  # only stop strings need text during sampling
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _run(self, engine_input: Any, params: SamplingParams, request_id: str) -> RequestOutput:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        output: RequestOutput | None = None
        try:
            adapter = self._weights.adapter
            lora = None if adapter is None else adapter.request
            async for latest in self._engine.generate(engine_input, params, request_id, lora_request=lora):
                output = latest
        except (EngineDeadError, EngineGenerateError) as error:
            why = f"its vLLM engine died or failed during request {request_id}: {error!r}"
            raise FailureError(self._failure("engine_dead", why)) from error
        reasons = {completion.finish_reason for completion in output.outputs} if output else {None}
        if output is None or not reasons <= {"stop", "length"}:
            reason = REQUEST_FAILED if "error" in reasons else "generation_aborted"
            why = f"request {request_id} ended with finish reason {', '.join(sorted(map(str, reasons)))}"
            raise FailureError(self._weights.stale or self._failure(reason, why))
        return output

    def _generation(self, output: RequestOutput, n: int, started: float, *, has_text: bool) -> Generation:
        completions = tuple(self._completion(completion, has_text) for completion in output.outputs)
        completions *= n // len(completions)
        return Generation(
            prompt_token_ids=np.asarray(output.prompt_token_ids, dtype=np.int32),
            completions=completions,
            generator=self.spec.name,
            seconds=time.monotonic() - started,
        )

    def _completion(self, output: CompletionOutput, has_text: bool) -> Completion:
        token_ids = np.asarray(output.token_ids, dtype=np.int32)
        return Completion(
            token_ids=token_ids,
            log_probs=np.asarray(output.logprobs.logprobs, dtype=np.float32),  # type: ignore[union-attr]
            policy_versions=_policy_versions(output, len(token_ids)),
            finish_reason=FinishReason(str(output.finish_reason)),
            text=output.text if has_text else self._encoder.decode(token_ids),
        )

    async def _log_probs(self, sequence: CanarySequence, request_id: str) -> NDArray[np.float32]:
        """[tokens] log-probabilities of a given completion under the untruncated distribution, nats."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        prompt, known = sequence.prompt, self._encoded_canaries
        if prompt.prompt_id not in known:  # the same few canaries come after every update
            while len(known) >= KEPT_CANARIES:
                known.pop(next(iter(known)))
            known[prompt.prompt_id] = await asyncio.to_thread(self._encoder.encode, prompt)
        engine_input = await self._expand(prompt, known[prompt.prompt_id])
        engine_input["prompt_token_ids"] = [*engine_input["prompt_token_ids"], *sequence.token_ids.tolist()]
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(engine_input, params, request_id)
        found: Any = output.prompt_logprobs
        return np.asarray(found.logprobs[-len(sequence.token_ids) :], dtype=np.float32)

    def _failure(self, reason: str, why: str) -> Failure:
        return self._weights.failure(reason, why)


def _policy_versions(output: CompletionOutput, tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    spans = output.weight_versions
    if spans is None:
        raise RuntimeError("vLLM reported no weight versions for sampled tokens. Install vllm 0.32 or newer.")
    versions = np.full(tokens, -1, dtype=np.int32)
    for span in spans:
        versions[span.start : span.end] = int(span.version)
    return versions
