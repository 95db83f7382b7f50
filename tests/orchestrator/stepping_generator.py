"""A generator that stops at a phase of a weight update until a test tells it to go on, or kills it there.

The test names the phase in a file of the generator's name; the generator answers with its process id in a file beside
it, and goes on once that is deleted. The folder lies next to the media store.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from actors.generator.generator import Generator
from actors.generator.vllm_weights import LogProbs, VllmWeights
from actors.weights.canary import Canaries, CanaryReport
from actors.weights.offer import WeightsOffer
from actors.weights.pull.receiver import ReceivedWeights

PHASES = ("received", "prepared", "paused", "loading", "half_loaded", "resumed", "verifying", "verified")
STAGED_PHASES = ("staging", "prepared", "half_loaded", "resumed")
"""Those in which a version that is staged differs from one that is loaded in place."""
FOLDER = "phases"
STOPPED_S = 120.0


def wanted(folder: Path, name: str) -> Path:
    """Where a test names the phase at which a generator is to stop next."""
    return folder / FOLDER / name


def reached(folder: Path, name: str) -> Path:
    """Where a generator that has stopped says so."""
    return folder / FOLDER / f"{name}.reached"


class SteppingWeights(VllmWeights):
    """All phases but those within the engine's own update."""

    async def start(self, engine: Any) -> None:
        await super().start(engine)
        self._engine = SteppingEngine(engine, self)

    async def reach(self, phase: str) -> None:
        """This generator has come so far."""
        folder, name = self.spec.media_folder.parent, self.spec.name
        if not wanted(folder, name).exists() or wanted(folder, name).read_text() != phase:
            return
        wanted(folder, name).unlink()
        file = reached(folder, name)
        file.with_suffix(".writing").write_text(str(os.getpid()))
        file.with_suffix(".writing").rename(file)
        async with asyncio.timeout(STOPPED_S):
            while file.exists():
                await asyncio.sleep(0.02)

    async def _receive(self, offer: WeightsOffer, deadline_s: float, *, anew: bool) -> ReceivedWeights:
        received = await super()._receive(offer, deadline_s, anew=anew)
        await self.reach("received")
        return received

    async def _prepare(self, received: ReceivedWeights, version: int, until: float) -> None:
        await super()._prepare(received, version, until)
        await self.reach("prepared")

    async def pause_for(self, version: int) -> None:
        await super().pause_for(version)
        await self.reach("paused")

    async def set_loaded(self, version: int) -> None:
        await self.reach("resumed")
        await super().set_loaded(version)

    async def verify(self, canaries: Canaries, log_probs: LogProbs) -> CanaryReport:
        await self.reach("verifying")
        return await super().verify(canaries, log_probs)

    async def _set_verified(self, version: int) -> None:
        await self.reach("verified")
        await super()._set_verified(version)


class SteppingEngine:
    """The engine, which stops while it stages, before (`loading`) and after (`half_loaded`) its layers are filled."""

    def __init__(self, engine: Any, weights: SteppingWeights) -> None:
        self._engine = engine
        self._weights = weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def collective_rpc(self, method: str, **options: Any) -> Any:
        if method == "is_staged":
            await self._weights.reach("staging")
        return await self._engine.collective_rpc(method, **options)

    async def update_weights(self, request: Any) -> None:
        await self._weights.reach("loading")
        await self._engine.update_weights(request)
        await self._weights.reach("half_loaded")


class SteppingGenerator(Generator):
    """See above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights = SteppingWeights(self.spec)

    async def versions(self) -> tuple[int, int, bool]:
        """The version that it serves, the last one that was verified, and whether it refuses to generate."""
        return self._weights.version, self._weights.verified, self._weights.stale is not None
