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

from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig
from actors.vllm_engine import end_processes, engine_args, engine_processes
from actors.weights.offer import WeightsOffer, WeightsReceipt
from rollout.config import SamplingConfig
from rollout.encoding import EncodedPrompt, PromptEncoder
from rollout.failures import DataError, Failure, FailureError, FailureKind
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.samples import Completion, FinishReason, Generation

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import PauseMode

logger = logging.getLogger(__name__)

RECEIVE_SHARE = 0.8  # of the deadline of an update; the rest is for loading
REQUEST_FAILED = "request_failed"
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
        weights_folder: where versions are assembled; by default shared memory, else the temporary folder.
    """

    model: ModelConfig
    config: GeneratorConfig
    deadlines: DeadlineConfig
    media_folder: Path
    name: str = "generator-0"
    seed: int = 0
    initial_version: int = 0
    weights_folder: Path | None = None


@dataclass(frozen=True, slots=True)
class GeneratorStats:
    """A glance at a generator.

    Attributes:
        policy_version: the version it serves.
        is_stale: it refuses to generate, because an update left it between two versions.
        requests: prompts in flight.
        sequences: sequences in flight, running or waiting.
        generated_tokens: since its start.
        completions: since its start.
        memory_bytes: resident memory of the generator and its engine process.
    """

    policy_version: int
    is_stale: bool
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
    _stale: Failure | None = field(default=None, init=False)
    _counters: _Counters = field(default_factory=_Counters, init=False)

    def __post_init__(self) -> None:
        self._version = self.spec.initial_version
        self._starting = asyncio.Lock()
        self._updating = asyncio.Lock()

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
        if self._stale is not None:
            return self._stale
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
        return self._generation(output, n, started, has_text=bool(sampling.stop))

    async def load_weights(self, offer: WeightsOffer) -> WeightsReceipt:
        """Bring the engine to a new policy version while sequences are in flight; they go on with the new weights.

        The version is received and checked while generation goes on; only loading stops it.

        Raises:
            FailureError: INFRASTRUCTURE. Where receiving failed, the generator still serves its old version whole;
                where loading failed, it is stale (`weights_not_loaded`): its requests are aborted and it refuses new
                ones until it has loaded a version.
        """
        async with self._updating:
            started = time.monotonic()
            deadline_s = RECEIVE_SHARE * self.spec.deadlines.sync_s
            received = await asyncio.to_thread(self._receiver.receive, offer, deadline_s)
            transferred = time.monotonic()
            await self._pause("keep")
            paused = time.monotonic()
            try:
                await self._load(received.manifest.pack(), received.path, offer.version)
                loaded = time.monotonic()
            except asyncio.CancelledError as error:
                await self._give_up(offer, error)
                raise
            except Exception as error:
                raise await self._give_up(offer, error) from error
            finally:
                await self._engine.resume_generation()
            self._version, self._stale = offer.version, None
            return WeightsReceipt(
                version=offer.version,
                digest=received.manifest.digest,
                transfer_s=transferred - started,
                load_s=loaded - paused,
                pause_s=time.monotonic() - transferred,
            )

    async def policy_version(self) -> int:
        """The version that is being served."""
        return self._version

    async def stats(self) -> GeneratorStats:
        """Load and totals."""
        own = psutil.Process()
        processes = [own, *own.children(recursive=True)]
        return GeneratorStats(
            policy_version=self._version,
            is_stale=self._stale is not None,
            memory_bytes=sum(process.memory_info().rss for process in processes if process.is_running()),
            **vars(self._counters),
        )

    async def stop(self) -> None:
        """End the engine and its processes; requests in flight end with a failure. May be called twice."""
        if self._engine is None:
            return
        children = engine_processes(self._engine)
        engine, self._stale = self._engine, self._failure("generator_stopped", "was stopped")
        deadline_s = self.spec.deadlines.stop_s
        with contextlib.suppress(FailureError, TimeoutError):  # a dead or stuck engine has nothing left to abort
            await asyncio.wait_for(self._pause("abort"), deadline_s / 4)
            await asyncio.sleep(ABORTED_S)
        self._engine = None
        if engine.output_handler is not None:
            engine.output_handler.cancel()
        await asyncio.to_thread(engine.shutdown, timeout=deadline_s / 4)
        await asyncio.to_thread(end_processes, children, deadline_s / 4)
        self._receiver.close()

    async def _start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.weights.receiver import WeightReceiver

        model = self.spec.model
        self._encoder = PromptEncoder.from_pretrained(
            model.path, MediaStore(self.spec.media_folder), trust_remote_code=model.trust_remote_code
        )
        self._receiver = WeightReceiver(folder=self.spec.weights_folder)
        try:
            self._engine = AsyncLLM.from_engine_args(engine_args(self.spec, self._encoder.banned_token_ids))
            await self._engine.update_weight_version(str(self._version))
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
            "cache_salt": str(self._version),  # cached prefixes of older weights are never found again
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
            async for latest in self._engine.generate(engine_input, params, request_id):
                output = latest
        except (EngineDeadError, EngineGenerateError) as error:
            why = f"its engine died or failed while it served {request_id}: {error!r}"
            raise FailureError(self._failure("engine_dead", why)) from error
        reasons = {completion.finish_reason for completion in output.outputs} if output else {None}
        if output is None or not reasons <= {"stop", "length"}:
            reason = REQUEST_FAILED if "error" in reasons else "generation_aborted"
            why = f"request {request_id} ended with {reasons}"
            raise FailureError(self._stale or self._failure(reason, why))
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

    async def _load(self, manifest: bytes, path: Path, version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine
        await engine.start_weight_update()
        await engine.update_weights(WeightTransferUpdateRequest(update_info={"manifest": manifest, "path": str(path)}))
        await engine.finish_weight_update(str(version))
        freeze = self.spec.model.freeze
        if not (freeze.vision_tower and freeze.projector):
            await engine.reset_encoder_cache()
        if not self._counters.requests:
            await engine.reset_prefix_cache()  # frees the blocks; while requests run, the salt keeps them apart

    async def _give_up(self, offer: WeightsOffer, error: BaseException) -> FailureError:
        why = (
            f"policy version {offer.version} was received whole but not loaded: {error!r}. The "
            "engine may hold parts of two versions, so it serves nothing until a version is loaded."
        )
        self._stale = self._failure("weights_not_loaded", why)
        logger.error(self._stale.message)
        await self._pause("abort")
        return FailureError(self._stale)

    async def _pause(self, mode: PauseMode) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        # AsyncLLM.pause_generation does the same and then sleeps for 20 ms, a third of a small model's update
        pause = self._engine.engine_core.pause_scheduler_async
        try:
            await pause(mode=mode, clear_cache=False)
        except EngineDeadError as error:
            raise FailureError(self._failure("engine_dead", "its engine is dead")) from error

    def _failure(self, reason: str, why: str) -> Failure:
        return Failure(FailureKind.INFRASTRUCTURE, reason, f"{self.spec.name}: {why}")


def _policy_versions(output: CompletionOutput, tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    spans = output.weight_versions
    if spans is None:
        raise RuntimeError("vLLM reported no weight versions for sampled tokens; vllm 0.32 or newer is needed")
    versions = np.full(tokens, -1, dtype=np.int32)
    for span in spans:
        versions[span.start : span.end] = int(span.version)
    return versions
