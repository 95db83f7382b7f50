"""The rollout generator: an asynchronous vLLM engine in a Ray actor. Prompts in, token ids with log-probabilities out.

Every token carries the policy version that sampled it, as the engine itself recorded it: versions change only while
the engine is paused, so a sequence that runs across an update is stamped right at the seam.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig, WeightsConfig
from actors.generator.engine_push import EnginePush
from actors.generator.engine_weights import EngineWeights
from actors.generator.vllm_engine import end_processes, engine_args, engine_processes
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


@dataclass(frozen=True)
class GeneratorSpec:
    """Everything a generator is made from.

    Attributes:
        model: the folder it starts from; its weights are version `initial_version`.
        config: size and place of the engine.
        deadlines: for receiving weights and for stopping.
        media_folder: the media store, on a file system the generator's node sees.
        name: what messages call it.
        seed: of the engine's own random state, used where a request has no seed.
        initial_version: policy version of the weights in the model folder.
        weights: how versions are received, loaded and proven.
        address: of its node, as others see it, where it serves versions onward; by default as Ray knows it.
        weights_folder: where versions are put; by default memory, or disk where there isn't enough of it.
    """

    model: ModelConfig
    config: GeneratorConfig
    deadlines: DeadlineConfig
    media_folder: Path
    name: str = "generator-0"
    seed: int = 0
    initial_version: int = 0
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    address: str | None = None
    weights_folder: Path | None = None


@dataclass(frozen=True, slots=True)
class GeneratorStats:
    """A glance at a generator.

    Attributes:
        policy_version: the version it serves.
        verified_version: the last version that was proven to be the trainer's.
        is_stale: it refuses to generate, because an update left it between two versions.
        is_asleep: it has given its memory to the trainer, and waits for the next version.
        requests: prompts in flight.
        sequences: sequences in flight, running or waiting.
        generated_tokens: since its start.
        completions: since its start.
        memory_bytes: resident memory of the generator and its engine process.
    """

    policy_version: int
    verified_version: int
    is_stale: bool
    is_asleep: bool
    requests: int
    sequences: int
    generated_tokens: int
    completions: int
    memory_bytes: int


def ratio_bias_warnings(sampling: SamplingConfig) -> list[str]:
    """What in these settings makes the sampled distribution another one than the trainer's, a sentence each."""
    cut = "cuts the sampled distribution off; the trainer's log-probabilities are of the whole one, so every "
    warnings = []
    if sampling.top_p < 1.0:
        warnings.append(f"sampling.top_p = {sampling.top_p:g} {cut}importance ratio is biased. Use top_p = 1.")
    if sampling.top_k > 0:
        warnings.append(f"sampling.top_k = {sampling.top_k} {cut}importance ratio is biased. Use top_k = 0.")
    if sampling.min_tokens > 0:
        warnings.append(
            f"sampling.min_tokens = {sampling.min_tokens} forbids the end of turn in the first tokens; the trainer "
            "doesn't, so the importance ratios of those tokens are biased. Use min_tokens = 0."
        )
    if sampling.temperature == 0.0:
        warnings.append("sampling.temperature = 0 samples nothing: all completions of a group are the same.")
    return warnings


def sequence_seed(seed: int) -> int:
    """Spread a request's seed, so that the n samples of neighbouring seeds (vLLM adds the index) never coincide."""
    digest = hashlib.blake2b(seed.to_bytes(16, "little", signed=True), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


@dataclass
class _Counters:
    requests: int = 0
    sequences: int = 0
    generated_tokens: int = 0
    completions: int = 0


@dataclass
class Generator:
    """Serves generations and takes new weights while it does. Becomes an actor by `ray.remote`; needs no Ray itself.

    Call :meth:`ready` first: it starts the engine.
    """

    spec: GeneratorSpec
    _engine: Any = field(default=None, init=False)
    _counters: _Counters = field(default_factory=_Counters, init=False)

    def __post_init__(self) -> None:
        self._weights = EngineWeights(self.spec)
        self._starting = asyncio.Lock()
        self._encoded_canaries: dict[str, EncodedPrompt] = {}

    async def ready(self) -> float:
        """Start the engine, once. Returns the seconds it took.

        Raises:
            FailureError: the engine doesn't start with this model or these settings.
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
            sampling: how; temperature 0 is greedy.
            seed: makes each of the n samples reproducible, and all of them different; None for fresh randomness.
            request_id: unique among the requests in flight.
        Returns:
            The generation, or a failure: of kind DATA for a prompt or media at fault (`prompt_too_long` and those of
            the media store), of kind INFRASTRUCTURE where this generator can't serve (`generator_stale`,
            `generation_aborted`, `engine_dead`).
        """
        refusal = self._weights.stale or await self._weights.once_awake(self.spec.deadlines.generate_s)
        if refusal is not None:
            return refusal
        started = time.monotonic()
        try:
            self._counters.requests += 1
            self._counters.sequences += n
            output = await self._answer(prompt, self._sampling_params(n, sampling, seed), request_id)
        except FailureError as error:
            return error.failure
        finally:
            self._counters.requests -= 1
            self._counters.sequences -= n
        generation = self._generation(output, n, started, has_text=bool(sampling.stop))
        newest = max((int(c.policy_versions.max()) for c in generation.completions if len(c)), default=-1)
        return await self._weights.once_proven(newest) or generation

    async def load_weights(self, offer: WeightsOffer, *, anew: bool = False) -> WeightsReceipt:
        """Bring the engine to a new policy version while sequences are in flight.

        Prepare (receive and check, while generation goes on), pause, load, invalidate caches, resume. What it samples
        from then on is handed out once :meth:`verify` has proven the version, if the recipe has canaries.

        Args:
            offer: the version.
            anew: receive and load all of it, frozen weights too, and find out which tensors of the engine that changes.
        Raises:
            FailureError: INFRASTRUCTURE. Where receiving failed, the generator still serves its old version whole;
                where loading failed, it is stale (`weights_not_loaded`): its requests are aborted and it refuses new
                ones until it has loaded a version.
        """
        return await self._weights.load(offer, anew=anew)

    async def verify(self, canaries: Canaries) -> CanaryReport:
        """Compare log-probabilities with the trainer's. Where they agree, the version counts as proven.

        Where they don't, the generator is stale: what it has sampled with that version isn't handed out, and it refuses
        requests until it has loaded a version again.

        Raises:
            FailureError: INFRASTRUCTURE: it serves another version than the canaries' (`canary_version`), or the engine
                is dead.
        """
        return await self._weights.verify(canaries, self._log_probs)

    async def push_connect(self, init_info: dict[str, Any]) -> None:
        """See :meth:`actors.generator.engine_push.EnginePush.connect`."""
        await self._push.connect(init_info)

    async def push_begin(self, version: int) -> None:
        """See :meth:`actors.generator.engine_push.EnginePush.begin`."""
        await self._push.begin(version)

    async def push_update(self, update_info: dict[str, Any]) -> None:
        """See :meth:`actors.generator.engine_push.EnginePush.update`."""
        await self._push.update(update_info)

    async def push_finish(self, version: int, digest: str) -> WeightsReceipt:
        """See :meth:`actors.generator.engine_push.EnginePush.finish`."""
        return await self._push.finish(version, digest)

    async def sleep(self, level: int) -> None:
        """Give the GPU's memory to the trainer until the next version comes; see :meth:`EngineWeights.sleep`."""
        await self._weights.sleep(level)

    async def policy_version(self) -> int:
        """The version that is being served."""
        return self._weights.version

    async def stats(self) -> GeneratorStats:
        """Load and totals."""
        own = psutil.Process()
        processes = [own, *own.children(recursive=True)]
        return GeneratorStats(
            policy_version=self._weights.version,
            verified_version=self._weights.verified,
            is_stale=self._weights.stale is not None,
            is_asleep=self._weights.is_asleep,
            memory_bytes=sum(process.memory_info().rss for process in processes if process.is_running()),
            **vars(self._counters),
        )

    async def stop(self) -> None:
        """End the engine and its processes; requests in flight end with a failure. May be called twice."""
        if self._engine is None:
            return
        children = engine_processes(self._engine)
        engine, self._weights.stale = self._engine, self._failure("generator_stopped", "was stopped")
        deadline_s = self.spec.deadlines.stop_s
        with contextlib.suppress(FailureError, TimeoutError):  # a dead or stuck engine has nothing left to abort
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
            self._push = EnginePush(self._weights, self._engine)
        except Exception as error:
            why = f"vLLM didn't start with {model.path}: {error}"
            raise FailureError(self._failure("engine_start_failed", why)) from error

    async def _answer(self, prompt: Prompt, params: SamplingParams, request_id: str) -> RequestOutput:
        encoded = await asyncio.to_thread(self._encoder.encode, prompt)
        try:
            return await self._run(await self._expand(prompt, encoded), params, request_id)
        except FailureError as error:
            if error.failure.reason != REQUEST_FAILED:
                raise
        # vLLM keeps media in two caches; where they drift apart it forgets the media and wants the request again
        return await self._run(await self._expand(prompt, encoded), params, f"{request_id}-again")

    async def _expand(self, prompt: Prompt, encoded: EncodedPrompt) -> Any:
        """vLLM's input for a prompt: media placeholders expanded, once, by the engine's own processor."""
        request: dict[str, Any] = {
            "prompt_token_ids": encoded.token_ids.tolist(),
            "cache_salt": str(self._weights.version),  # what requests that began with older weights cache isn't found
        }
        if encoded.images:
            request["multi_modal_data"] = {"image": encoded.images}
            request["multi_modal_uuids"] = {"image": [media.sha256 for media in prompt.media]}
        try:
            engine_input = await self._engine.renderer.process_for_engine_async(request, time.time())
        except (ValueError, TypeError) as error:
            raise DataError("media_unprocessable", f"prompt {prompt.prompt_id}: vLLM refused it: {error}") from error
        length, limit = len(engine_input["prompt_token_ids"]), self.spec.model.max_length
        if length >= limit:
            raise DataError(
                "prompt_too_long",
                f"prompt {prompt.prompt_id} has {length} tokens with its media, which leaves no room for an answer in "
                f"model.max_length = {limit}. Raise it, or leave such prompts out.",
            )
        return engine_input

    def _sampling_params(self, n: int, sampling: SamplingConfig, seed: int | None) -> SamplingParams:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        is_greedy = sampling.temperature == 0.0
        stop_ids = () if sampling.ignore_eos else (*self._encoder.stop_token_ids, *sampling.stop_token_ids)
        return SamplingParams(
            n=1 if is_greedy else n,  # greedy samples are all the same: one is drawn, and repeated
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
            detokenize=bool(sampling.stop),  # only stop strings need text while sampling
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _run(self, engine_input: Any, params: SamplingParams, request_id: str) -> RequestOutput:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        output: RequestOutput | None = None
        try:
            async for latest in self._engine.generate(
                engine_input, params, request_id, lora_request=self._weights.adapter
            ):
                output = latest
        except (EngineDeadError, EngineGenerateError) as error:
            why = f"its engine died or failed while it served {request_id}: {error!r}"
            raise FailureError(self._failure("engine_dead", why)) from error
        reasons = {completion.finish_reason for completion in output.outputs} if output else {None}
        if output is None or not reasons <= {"stop", "length"}:
            reason = REQUEST_FAILED if "error" in reasons else "generation_aborted"
            why = f"request {request_id} ended with {reasons}"
            raise FailureError(self._weights.stale or self._failure(reason, why))
        return output

    def _generation(self, output: RequestOutput, n: int, started: float, *, has_text: bool) -> Generation:
        completions = tuple(self._completion(completion, has_text) for completion in output.outputs)
        completions *= n // len(completions)
        self._counters.completions += len(completions)
        self._counters.generated_tokens += sum(map(len, completions))
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
        """[tokens] of a given completion, under the whole distribution, nats."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        prompt, known = sequence.prompt, self._encoded_canaries
        if prompt.prompt_id not in known:  # the same few after every update
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
        raise RuntimeError("vLLM reported no weight versions for sampled tokens; vllm 0.32 or newer is needed")
    versions = np.full(tokens, -1, dtype=np.int32)
    for span in spans:
        versions[span.start : span.end] = int(span.version)
    return versions
