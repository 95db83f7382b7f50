"""In-process roles with the interfaces of the real handles, so that the driver's shells can be tested without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.config import DeadlineConfig, RestartsConfig, WeightsConfig
from actors.weights.canary import Canaries, CanaryReport, CanarySequence, compare_canaries
from actors.weights.manifest import WeightsPart
from actors.weights.offer import PartOffer, WeightsOffer, WeightsReceipt
from orchestrator.roles.fleet import GeneratorFleet
from orchestrator.roles.rewards import Rewards
from rollout.config import SamplingConfig
from rollout.datasets import PromptSet
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Message, Prompt, TextPart
from rollout.samples import Completion, FinishReason, Generation, Score, TrainingSample

DEADLINE_S = 10.0
DEADLINES = DeadlineConfig(start_s=DEADLINE_S, score_s=DEADLINE_S, stop_s=1.0)
AT_ONCE = RestartsConfig(backoff_s=0.0)
"""Restarts without a pause."""
PROMPT_TOKENS = np.arange(3, dtype=np.int32)


def prompt(text: str) -> Prompt:
    """A prompt of this text."""
    return Prompt((Message("user", (TextPart(text),)),), target=text)


def prompt_set(count: int) -> PromptSet:
    """Prompts "0", "1", …"""
    return PromptSet("numbers", "numbers", tuple(prompt(str(index)) for index in range(count)), ())


def offer(version: int) -> WeightsOffer:
    """A version to load."""
    part = PartOffer(WeightsPart.TRAINED, f"digest-{version}", 100)
    return WeightsOffer(1, version, "inproc://here", b"", None, (part,))


def canaries(version: int) -> Canaries:
    """What a generator of that version must reproduce."""
    sequence = CanarySequence(prompt("canary"), np.zeros(2, np.int32), np.zeros(2, np.float32))
    return Canaries(version, (sequence,), tolerance_nats=1e-3)


def completion(text: str, version: int = 0, tokens: int = 2, log_prob: float = -1.0) -> Completion:
    """One sampled answer."""
    return Completion(
        np.full(tokens, 7, np.int32),
        np.full(tokens, log_prob, np.float32),
        np.full(tokens, version, np.int32),
        FinishReason.STOP,
        text,
    )


def infrastructure(reason: str = "generator_died") -> FailureError:
    """A failure of a host or an actor."""
    return FailureError(Failure(FailureKind.INFRASTRUCTURE, reason, f"for a test: {reason}"))


class Generator:
    """A generator's handle. It answers while its gate is open, and dies with its requests when told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = -1
        self.loads: list[int] = []
        self.requests: list[tuple[str, int | None, int]] = []
        """Text of the prompt, seed, and version served when it was asked."""
        self.temperatures: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refused: dict[str, Failure] = {}
        """Text of a prompt and what the generator says about it."""
        self.refuses_loads = 0
        self.refusal = "weights_not_loaded"
        self.loads_anew: list[bool] = []
        self.proofs: list[int] = []
        self.naps: list[int] = []
        self.error_nats = 0.0
        """By which its log-probabilities are off."""
        self.is_cured_by_resending = True
        self.loading = asyncio.Event()
        self.loading.set()
        self.death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_stopped = False

    def die(self) -> None:
        """From now on every call fails, those under way too."""
        if not self.death.done():
            self.death.set_result(None)

    async def _alive_until(self, event: asyncio.Event) -> None:
        waiting = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait({waiting, self.death}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self.death.done():
            raise infrastructure()

    async def generate(
        self, prompt: Prompt, n: int, sampling: SamplingConfig, seed: int | None, request_id: str
    ) -> Generation | Failure:
        (text,) = (part.text for part in prompt.messages[0].parts if isinstance(part, TextPart))
        self.requests.append((text, seed, self.version))
        await self._alive_until(self.gate)
        await asyncio.sleep(0)
        if text in self.refused:
            return self.refused[text]
        self.temperatures.append(sampling.temperature)
        completions = tuple(completion(f"{text}-{index}", self.version) for index in range(n))
        return Generation(PROMPT_TOKENS, completions, self.name, 0.0)

    async def load_weights(self, offer: WeightsOffer, *, anew: bool = False) -> WeightsReceipt:
        await self._alive_until(self.loading)
        if self.refuses_loads:
            self.refuses_loads -= 1
            raise infrastructure(self.refusal)
        self.version = offer.version
        self.loads.append(offer.version)
        self.loads_anew.append(anew)
        corrected = ("layers.0.qkv_proj.weight",) if anew and self.error_nats else ()
        if anew and self.is_cured_by_resending:
            self.error_nats = 0.0
        return WeightsReceipt(offer.version, offer.trained.digest, 0.1, 0.2, 0.3, corrected=corrected)

    async def verify(self, canaries: Canaries) -> CanaryReport:
        self.proofs.append(canaries.version)
        return compare_canaries(canaries, [s.log_probs + self.error_nats for s in canaries.sequences])

    async def sleep(self, level: int) -> None:
        self.naps.append(level)
        await self._alive_until(self.gate)

    async def stop(self) -> None:
        self.is_stopped = True
        self.die()


class Generators:
    """Launches generators and remembers every one, by name in the order of their starts."""

    def __init__(self) -> None:
        self.started: list[Generator] = []
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.refuses_starts = False
        self.prepare: Callable[[Generator], None] = lambda generator: None

    async def launch(self, name: str) -> Any:
        await asyncio.wait_for(self.may_start.wait(), DEADLINE_S)
        if self.refuses_starts:
            raise infrastructure("engine_start_failed")
        generator = Generator(name)
        self.prepare(generator)
        self.started.append(generator)
        return generator


class RewardServer:
    """A reward server's handle: a value by completion text, or a failure by prompt."""

    def __init__(self, value: Callable[[str], float]) -> None:
        self.value = value
        self.failures: dict[str, Failure] = {}
        self.raises: list[FailureError] = []
        """What its next calls raise."""
        self.calls = 0

    async def score(
        self, prompt: Prompt, completions: tuple[Completion, ...], *, deadline_s: float
    ) -> tuple[Score, ...] | Failure:
        self.calls += 1
        await asyncio.sleep(0)
        if self.raises:
            raise self.raises.pop(0)
        if prompt.target in self.failures:
            return self.failures[prompt.target]
        return tuple(Score(self.value(c.text), {"value": self.value(c.text)}) for c in completions)

    async def stop(self, *, deadline_s: float) -> None:
        pass


class Events:
    """Collects events."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **data: Any) -> None:
        self.all.append((kind, data))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.all if name == kind]


class Policy:
    """The trainer's handle: keeps what it was given, in order."""

    def __init__(self, log_prob: float = -1.0) -> None:
        self.log_prob = log_prob
        self.updates: list[list[TrainingSample]] = []
        self.acts: list[str] = []
        self.raises: dict[str, Exception] = {}
        self.different: list[str] = []
        """Tensors that differ from what was published."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.spec = SimpleNamespace(weights=WeightsConfig())

    def _act(self, name: str) -> None:
        self.acts.append(name)
        if name in self.raises:
            raise self.raises[name]

    async def update(self, samples: list[TrainingSample], kl_coefficient: float) -> dict[str, float]:
        self._act("update")
        await asyncio.wait_for(self.gate.wait(), DEADLINE_S)
        self.updates.append(samples)
        return {"train/loss": 0.0, "train/kl_reference": 0.1, "train/mismatch_kl": 0.0, "train/max_logprob_gap": 0.0}

    async def log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        return [np.full(len(sample.token_ids), self.log_prob, np.float32) for sample in samples]

    async def publish(self, version: int) -> WeightsOffer:
        self._act(f"publish {version}")
        return offer(version)

    async def canaries(self, prompts: Sequence[Prompt], version: int) -> Canaries:
        return canaries(version)

    async def unpublished(self) -> list[str]:
        return self.different

    async def save(self, folder: Path) -> None:
        self._act("save")
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"after {len(self.updates)} updates")


class Critic:
    """The critic's handle: says one value of every token, and keeps what it was given."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.updates: list[list[TrainingSample]] = []

    async def values(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        return [np.full(len(sample.token_ids), self.value, np.float32) for sample in samples]

    async def update(self, samples: list[TrainingSample]) -> dict[str, float]:
        self.updates.append(samples)
        return {"critic/loss": 0.0}

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"after {len(self.updates)} updates")


async def fleet_of(replicas: int, events: Events, deadline_s: float = DEADLINE_S) -> tuple[GeneratorFleet, Generators]:
    """A started fleet that serves version 0."""
    generators = Generators()
    fleet = GeneratorFleet(generators.launch, deadline_s, events)
    await fleet.start(replicas)
    await fleet.publish(offer(0))
    return fleet, generators


async def rewards_of(server: RewardServer, events: Events) -> Rewards:
    """A started rewards whose server is always this one, also after a restart."""

    async def launch() -> Any:
        return server

    rewards = Rewards(launch, restarts=AT_ONCE, deadlines=DEADLINES, on_event=events)
    await rewards.start()
    return rewards


async def until(is_so: Callable[[], Any]) -> None:
    """Let the event loop run until something is so."""
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():
            await asyncio.sleep(0)
