"""The policy under training as Ray actors, one a rank, and the driver's side of them. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.calls import Share, gather
from actors.config import DeadlineConfig, ModelConfig, TrainerConfig, WeightsConfig
from actors.weights.offer import WeightsOffer
from algorithms.config import AlgorithmConfig
from rollout.samples import TrainingSample

ROLE = "policy"


@dataclass(frozen=True)
class PolicySpec:
    """Everything a rank of the policy trainer is made from.

    Attributes:
        model: where it starts from, precision and what is frozen.
        trainer: optimiser, schedule, ranks and micro-batches.
        algorithm: the loss.
        deadlines: of calls and collectives.
        temperature: of sampling; log-probabilities are of the tempered distribution.
        media_folder: the media store, on a file system that every rank's node sees.
        seed: of dropout, if the model has any.
        total_updates: optimiser steps of the whole run, for the schedule.
        weights: how new versions are handed to the generators.
    """

    model: ModelConfig
    trainer: TrainerConfig
    algorithm: AlgorithmConfig
    deadlines: DeadlineConfig
    temperature: float
    media_folder: Path
    seed: int
    total_updates: int
    weights: WeightsConfig = field(default_factory=WeightsConfig)


class PolicyRank:
    """One data-parallel rank. Every method that touches the model must be called on all ranks together."""

    def __init__(self, spec: PolicySpec, rank: int, device: str) -> None:
        self.spec = spec
        self.rank = rank
        self.device: Any = device
        self.store: Any = None
        self.trainer: Any = None
        """The :class:`actors.trainer.RankTrainer`, once joined."""
        self.source: Any = None
        self.publisher: Any = None

    def prepare(self) -> tuple[str, int]:
        """Import the engine; rank 0 also opens the rendezvous store. Returns the node's address and the port."""
        from actors import trainer  # noqa: F401  # heavy: all ranks import side by side
        from actors.engine import open_store

        if self.rank:
            return "", 0
        self.store = open_store(self.spec.deadlines.start_s, self.spec.trainer.ranks)
        return ray.util.get_node_ip_address(), self.store.port

    def join(self, address: str, port: int) -> None:
        """Join the other ranks, and load the model."""
        from actors.engine import Place
        from actors.trainer import RankTrainer

        place = Place(self.rank, self.spec.trainer.ranks, self.device, address, port)
        self.trainer = RankTrainer(self.spec, place, self.store)

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.trainer.module

    def update(self, samples: list[TrainingSample], kl_coefficient: float) -> dict[str, float]:
        """See :meth:`actors.trainer.RankTrainer.update`."""
        metrics: dict[str, float] = self.trainer.update(samples, kl_coefficient)
        return metrics

    def log_probs(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """See :meth:`actors.trainer.RankTrainer.log_probs`."""
        log_probs: dict[int, NDArray[np.float32]] = self.trainer.log_probs(samples)
        return log_probs

    def publish(self, version: int) -> WeightsOffer | None:
        """Serve the weights as they are now, as this policy version. Rank 0 returns the offer, the others None."""
        from actors.weights.publisher import LOOPBACK, WeightPublisher
        from actors.weights.source import WeightSource

        settings = self.spec.weights
        if self.source is None:
            precision = self.spec.model.precision
            self.source = WeightSource(self.module, precision=precision, bucket_bytes=settings.bucket_mib << 20)
        snapshot = self.source.snapshot(version, keep=self.rank == 0)
        if snapshot is None:
            return None
        if self.publisher is None:
            host = LOOPBACK if settings.listen == "loopback" else ray.util.get_node_ip_address()
            self.publisher = WeightPublisher(host=host)
        offer: WeightsOffer = self.publisher.publish(snapshot)
        return offer

    def save(self, folder: Path) -> None:
        """See :meth:`actors.trainer.RankTrainer.save`."""
        self.trainer.save(folder)

    def load(self, folder: Path) -> None:
        """See :meth:`actors.trainer.RankTrainer.load`."""
        self.trainer.load(folder)

    def export(self, folder: Path) -> None:
        """See :meth:`actors.trainer.RankTrainer.export`."""
        self.trainer.export(folder)


class PolicyGroup:
    """All ranks of the policy, as one. Make it with :meth:`start`. Every call has a deadline from the spec.

    Calls raise :class:`FailureError`: the ranks' own failures, INFRASTRUCTURE where a rank died (`policy_died`) or
    didn't answer in time (`policy_timeout`), BUG where it raised (`policy_raised`). After any but a refusal of the
    samples, the ranks are in an unknown state: stop the group and start another from the last checkpoint.
    """

    def __init__(self, spec: PolicySpec, actors: Sequence[Any]) -> None:
        self.spec = spec
        self.actors = tuple(actors)
        """The Ray actors, rank by rank."""

    @classmethod
    async def start(cls, spec: PolicySpec, share: Share | None = None) -> PolicyGroup:
        """Start all ranks and wait until their models are loaded. Ray must be initialised.

        Args:
            share: what each rank asks Ray for; with a GPU, it trains on it.
        """
        share = share or Share()
        device = "cuda" if share.num_gpus > 0 else "cpu"
        rank_class: Any = ray.remote(PolicyRank).options(**share.options(spec.trainer.threads))
        group = cls(spec, [rank_class.remote(spec, rank, device) for rank in range(spec.trainer.ranks)])
        try:
            started = time.monotonic()
            places = await group._all("prepare", "start", spec.deadlines.start_s)
            left_s = max(1.0, spec.deadlines.start_s - (time.monotonic() - started))
            await group._all("join", "load its model", left_s, *places[0])
        except BaseException:
            group._kill()
            raise
        return group

    async def update(self, samples: list[TrainingSample], kl_coefficient: float) -> dict[str, float]:
        """One training step on all ranks; metrics under `train/` (see :meth:`actors.trainer.RankTrainer.update`)."""
        samples_ref = ray.put(samples)
        metrics: list[dict[str, float]] = await self._all(
            "update", "update", self.spec.deadlines.update_s, samples_ref, kl_coefficient
        )
        return metrics[0]

    async def log_probs(self, samples: list[TrainingSample]) -> list[NDArray[np.float32]]:
        """The policy's log-probabilities of the samples' completions, [tokens] float32 each, nats."""
        shares = await self._all(
            "log_probs", "compute log-probabilities", self.spec.deadlines.update_s, ray.put(samples)
        )
        by_index = {index: values for share in shares for index, values in share.items()}
        return [by_index[index] for index in range(len(samples))]

    async def publish(self, version: int) -> WeightsOffer:
        """Serve the weights as they are now, as this policy version, until two later ones have been published."""
        offers = await self._all("publish", f"publish version {version}", self.spec.deadlines.sync_s, version)
        offer: WeightsOffer = offers[0]
        return offer

    async def save(self, folder: Path) -> None:
        """Write model, optimiser, schedule and random states of all ranks, for :meth:`load`."""
        await self._all("save", "save its state", self.spec.deadlines.update_s, folder.absolute())

    async def load(self, folder: Path) -> None:
        """Continue from :meth:`save`, with as many ranks and the same ZeRO stage."""
        await self._all("load", "load its state", self.spec.deadlines.start_s, folder.absolute())

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder that transformers and vLLM load."""
        await self._all("export", "export", self.spec.deadlines.update_s, folder.absolute())

    async def stop(self) -> None:
        """End all ranks at once; they hold nothing that isn't in a checkpoint."""
        self._kill()

    def _kill(self) -> None:
        for actor in self.actors:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be gone already
                ray.kill(actor)

    async def _all(self, method: str, what: str, deadline_s: float, *arguments: Any) -> list[Any]:
        calls = {f"rank {rank}": getattr(actor, method).remote(*arguments) for rank, actor in enumerate(self.actors)}
        results = await gather(calls, ROLE, what, deadline_s)
        return [results[name] for name in calls]
