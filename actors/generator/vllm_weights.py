"""The weights of one generator's vLLM engine: receives policy versions, loads them while requests run, verifies them.

Sampling is in generator.py, the transfer of bytes in actors/weights/.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.config import WeightsConfig
from actors.generator.spec import GeneratorSpec
from actors.generator.vllm_adapter import VllmAdapter
from actors.weights.canary import Canaries, CanaryReport, compare_canaries
from actors.weights.manifest import WeightsPart
from actors.weights.offer import WeightsOffer, WeightsReceipt
from rollout.failures import Failure, FailureError, FailureKind

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.engine import PauseMode

    from actors.weights.canary import CanarySequence
    from actors.weights.pull.receiver import ReceivedPart, ReceivedWeights, WeightReceiver

logger = logging.getLogger(__name__)

STAGED_POLL_S = 0.01
RECEIVE_FRACTION = 0.8  # of an update's deadline; the rest is for loading
WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's tags of memory that sleeps
LogProbs = Callable[["CanarySequence", str], Awaitable["NDArray[np.float32]"]]


class VllmWeights:
    """The policy versions of one vLLM engine.

    Attributes:
        config: how versions are received, loaded and verified.
        version: the loaded version.
        verified: the last version whose canaries agreed with the trainer.
        stale: why the generator refuses requests; None while it serves.
        is_asleep: whether the GPU's memory is given to the trainer.
        adapter: the policy's adapter, where generators receive one; else None.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self.spec = spec
        self.config: WeightsConfig = spec.weights
        self.version = self.verified = spec.initial_version
        self.stale: Failure | None = None
        self.is_asleep = False
        self.adapter: VllmAdapter | None = None
        self._engine: Any = None
        self._receiver: WeightReceiver | None = None
        self._changed = asyncio.Condition()
        self._updating = asyncio.Lock()
        self._can_stage = True

    async def start(self, engine: Any) -> None:
        """Attach to a started vLLM engine."""
        self._engine = engine
        self._receiver = self._make_receiver()
        await engine.update_weight_version(str(self.version))
        lora = self.spec.model.lora
        if lora is not None and lora.sync == "adapter":
            self.adapter = await VllmAdapter.start(engine, self.spec.model)

    async def load(self, offer: WeightsOffer, *, anew: bool = False) -> WeightsReceipt:
        """See :meth:`actors.generator.generator.Generator.load_weights`."""
        async with self._updating:
            with self._engine_death_named():
                return await self._update(offer, anew=anew)

    async def verify(self, canaries: Canaries, log_probs: LogProbs) -> CanaryReport:
        """See :meth:`actors.generator.generator.Generator.verify`.

        Args:
            log_probs: computes the engine's log-probabilities of a sequence, under a request id.
        """
        with self._engine_death_named():
            return await self._verify(canaries, log_probs)

    async def sleep(self, level: int) -> None:
        """Give the GPU's memory to the trainer until the next version: the KV cache, and the weights.

        Requests in flight finish first.

        Args:
            level: 1 keeps the weights in host memory, 2 discards them.
        Raises:
            FailureError: `generator_restless`: requests were still running at the deadline.
        """
        async with self._updating:
            if self.is_asleep:
                return
            deadline_s = self.spec.deadlines.generate_s
            try:
                async with asyncio.timeout(deadline_s):
                    await self._engine.sleep(level=level, mode="wait")
            except TimeoutError:
                why = f"requests still ran after deadlines.generate_s = {deadline_s:g} s, so it stays awake"
                raise FailureError(self.failure("generator_restless", why)) from None
            self.is_asleep = True
            if level > 1 and self._receiver is not None:
                await asyncio.to_thread(self._receiver.forget_loaded)

    async def wait_until_awake(self, deadline_s: float) -> Failure | None:
        """Wait until the engine is awake. Returns a failure at the deadline."""
        if not self.is_asleep:
            return None
        return await self._wait(lambda: not self.is_asleep, deadline_s, "generator_asleep", "it did not wake up")

    async def wait_until_verified(self, version: int) -> Failure | None:
        """Wait until a version is verified. Returns a failure at the deadline, or where the generator is stale."""
        if self.verified >= version:
            return None
        why = f"version {version} was not verified"
        failure = await self._wait(
            lambda: self.verified >= version or self.stale is not None,
            self.spec.deadlines.sync_s,
            "weights_unverified",
            why,
        )
        return failure or self.stale

    async def pause(self, mode: PauseMode) -> None:
        """Pause sampling. Raises FailureError (`engine_dead`) where the engine has died."""
        # AsyncLLM.pause_generation does the same and then sleeps for 20 ms, a third of a small model's update
        pause = self._engine.engine_core.pause_scheduler_async
        with self._engine_death_named():
            await pause(mode=mode, clear_cache=False)

    async def pause_for(self, version: int) -> None:
        """Pause sampling to load a version, in the way of `weights.in_flight`. Does nothing where the engine sleeps.

        Raises:
            FailureError: `weights_not_paused`: requests that must end first were still running at the deadline.
                Sampling continues.
        """
        if self.is_asleep:
            return
        deadline_s = self.spec.deadlines.sync_s
        try:
            async with asyncio.timeout(deadline_s):
                await self.pause(self.config.in_flight)
        except TimeoutError:
            await self._engine.resume_generation()
            why = f"requests still ran after deadlines.sync_s = {deadline_s:g} s, so version {version} was not loaded"
            raise FailureError(self.failure("weights_not_paused", why)) from None

    async def begin_update(self) -> None:
        """Exclude other updates until :meth:`end_update`, and wake the weights' memory."""
        async with asyncio.timeout(self.spec.deadlines.sync_s):
            await self._updating.acquire()
        if self.is_asleep:
            await self._engine.wake_up([WEIGHTS])

    def end_update(self) -> None:
        """Allow other updates."""
        if self._updating.locked():
            self._updating.release()

    async def set_loaded(self, version: int) -> None:
        """Record that the engine has loaded a version. Its samples are released once it is verified."""
        async with self._changed:
            self.version, self.stale, self.is_asleep = version, None, False
            is_proven = self.config.canaries == 0
            self.verified = version if is_proven else min(self.verified, version - 1)
            self._changed.notify_all()

    async def set_broken(self, error: BaseException) -> FailureError:
        """Make the generator stale and abort its requests: the engine may hold parts of two versions."""
        why = (
            f"loading a policy version failed part-way: {error!r}. The engine may hold parts of two versions, so this "
            "generator refuses requests until it has loaded a version."
        )
        failure = self.failure("weights_not_loaded", why)
        await self._set_stale(failure)
        await self.pause("abort")
        return FailureError(failure)

    async def close(self, deadline_s: float) -> None:
        """Release the received versions and stop serving them."""
        if self._receiver is not None:
            with contextlib.suppress(TimeoutError):  # a transfer in progress ends with the process
                await asyncio.wait_for(asyncio.to_thread(self._receiver.close), deadline_s)
        if self.adapter is not None:
            self.adapter.close()

    def failure(self, reason: str, why: str) -> Failure:
        """An infrastructure failure of this generator."""
        return Failure(FailureKind.INFRASTRUCTURE, reason, f"{self.spec.name}: {why}")

    def _make_receiver(self) -> WeightReceiver:
        from actors.weights.pull.pull import ReceiverSettings
        from actors.weights.pull.receiver import WeightReceiver
        from actors.weights.pull.server import LOOPBACK

        settings = ReceiverSettings(
            maps_memory=self.config.shared_memory,
            serves=self.config.fan_out > 0,
            listen=LOOPBACK if self.config.listen == "loopback" else self.spec.address or _node_address(),
            patience_s=self.config.patience_s,
            folder=self.spec.weights_folder,
        )
        return WeightReceiver(self.spec.name, settings)

    async def _verify(self, canaries: Canaries, log_probs: LogProbs) -> CanaryReport:
        started = time.monotonic()
        if canaries.version != self.version:
            why = f"holds version {self.version}, but the canaries are of version {canaries.version}"
            raise FailureError(self.failure("canary_version", why))
        requests = [
            log_probs(sequence, f"canary-{canaries.version}-{index}-{time.monotonic_ns()}")
            for index, sequence in enumerate(canaries.sequences)
        ]
        report = compare_canaries(canaries, await asyncio.gather(*requests), time.monotonic() - started)
        if report.agrees:
            await self._set_verified(canaries.version)
        else:
            why = f"policy version {canaries.version} gives other log-probabilities than in the trainer: {report.words}"
            await self._set_stale(self.failure("weights_disagree", why))
            await self.pause("abort")
            await self._engine.resume_generation()
        return report

    async def _update(self, offer: WeightsOffer, *, anew: bool) -> WeightsReceipt:
        started = time.monotonic()
        deadline_s = RECEIVE_FRACTION * self.spec.deadlines.sync_s
        received = await self._receive(offer, deadline_s, anew=anew)
        transferred = time.monotonic()
        await self._prepare(received, offer.version, started + self.spec.deadlines.sync_s)
        before = await self._held_digests() if anew else {}
        prepared = time.monotonic()
        await self.pause_for(offer.version)
        paused = time.monotonic()
        try:
            await self._load(received, offer.version)
            loaded = time.monotonic()
        except asyncio.CancelledError as error:
            await self.set_broken(error)
            raise
        except Exception as error:
            raise await self.set_broken(error) from error
        finally:
            await self._engine.resume_generation()
        resumed = time.monotonic()
        assert self._receiver is not None
        self._receiver.loaded(received)
        await self.set_loaded(offer.version)
        after = await self._held_digests() if anew else {}
        return WeightsReceipt(
            version=offer.version,
            digest=received.parts[-1].manifest.digest,
            transfer_s=transferred - started,
            load_s=loaded - paused,
            pause_s=resumed - prepared,
            stage_s=prepared - transferred,
            received_bytes=received.received_bytes,
            route=received.route,
            source=received.source,
            corrected=tuple(sorted(name for name in after if before.get(name) != after[name])),
        )

    async def _receive(self, offer: WeightsOffer, deadline_s: float, *, anew: bool) -> ReceivedWeights:
        assert self._receiver is not None
        try:
            return await asyncio.to_thread(self._receiver.receive, offer, deadline_s, anew=anew)
        except asyncio.CancelledError:
            self._receiver.interrupt()  # ends the thread
            raise

    async def _prepare(self, received: ReceivedWeights, version: int, until: float) -> None:
        """Do everything that needs no pause: wake, map or stage the weights, write the adapter."""
        plain = _plain(received)
        if self.is_asleep:
            await self._engine.wake_up([WEIGHTS])
        least = self.config.stage_from_mib
        is_large = least is not None and sum(part.manifest.nbytes for part in plain) >= least << 20
        may_stage = is_large and self._can_stage and not self.is_asleep
        if plain and not (may_stage and await self._stage(plain, version, until)):
            await self._engine.collective_rpc("prepare_weights", args=([part.path for part in plain],))
        for part in received.parts:
            if part.manifest.part is WeightsPart.ADAPTER:
                assert self.adapter is not None
                await asyncio.to_thread(self.adapter.write, part)

    async def _stage(self, parts: list[ReceivedPart], version: int, until: float) -> bool:
        """Have the workers stage a version while generation runs. Returns False where the model cannot be staged.

        Raises:
            FailureError: `weights_not_staged`; the generator still serves its former version, whole.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with asyncio.timeout(until - time.monotonic()):
                obstacles = await self._engine.collective_rpc("stage_weights", args=(_update_info(parts),))
                obstacle = next((each for each in obstacles if each is not None), None)
                if obstacle is not None:
                    logger.info(
                        "%s: weights are loaded in place while generation is paused: %s", self.spec.name, obstacle
                    )
                    self._can_stage = False  # for this model, permanently
                    return False
                while not all(await self._engine.collective_rpc("is_staged")):
                    await asyncio.sleep(STAGED_POLL_S)
        except TimeoutError:
            why = f"staging version {version} took longer than deadlines.sync_s = {self.spec.deadlines.sync_s:g} s"
        except EngineDeadError:
            raise
        except Exception as error:
            why = (
                f"staging version {version} failed: {error!r}. If the same version loads with "
                "weights.stage_from_mib: null, this model cannot be staged: keep that setting"
            )
        else:
            return True
        raise FailureError(self.failure("weights_not_staged", why))

    async def _load(self, received: ReceivedWeights, version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine, plain = self._engine, _plain(received)
        if plain:
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info=_update_info(plain)))
            await engine.finish_weight_update()
        if self.adapter is not None:
            await self.adapter.load()
        await engine.update_weight_version(str(version))
        await self.invalidate(has_frozen=len(received.parts) > 1)

    async def invalidate(self, *, has_frozen: bool) -> None:
        """Reset the caches that other weights have filled; a sleeping engine's KV cache is woken first."""
        if self.is_asleep:
            await self._engine.wake_up([CACHE])
        model, freeze = self.spec.model, self.spec.model.freeze
        if has_frozen or not (model.lora is not None or (freeze.vision_tower and freeze.projector)):
            await self._engine.reset_encoder_cache()
        await self._engine.reset_prefix_cache(reset_running_requests=self.config.recompute_cache)

    async def _held_digests(self) -> dict[str, str]:
        """Digest of each tensor that the workers' models compute with."""
        workers = await self._engine.collective_rpc("held_digests")
        return {
            f"{name} (worker {index})" if index else name: digest
            for index, held in enumerate(workers)
            for name, digest in held.items()
        }

    async def _wait(self, happened: Callable[[], bool], deadline_s: float, reason: str, why: str) -> Failure | None:
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(happened)
        except TimeoutError:
            return self.failure(reason, f"{why} within {deadline_s:g} s")
        return None

    @contextlib.contextmanager
    def _engine_death_named(self) -> Iterator[None]:
        """Turn vLLM's error about a dead engine into the failure `engine_dead`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise FailureError(self.failure("engine_dead", "its vLLM engine has died")) from error

    async def _set_verified(self, version: int) -> None:
        async with self._changed:
            self.verified = version
            self._changed.notify_all()

    async def _set_stale(self, failure: Failure) -> None:
        logger.error(failure.message)
        async with self._changed:
            self.stale = failure
            self._changed.notify_all()


def _plain(received: ReceivedWeights) -> list[ReceivedPart]:
    """The parts that the engine's workers load: all but an adapter, which vLLM loads from a folder."""
    return [part for part in received.parts if part.manifest.part is not WeightsPart.ADAPTER]


def _update_info(parts: list[ReceivedPart]) -> dict[str, Any]:
    """See :class:`actors.weights.worker.transfer_backend.ZmqUpdateInfo`."""
    return {"parts": [(part.manifest.packed, part.path) for part in parts]}


def _node_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
