"""The policy under training as Ray actors, one a rank, and the driver's side of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.config import WeightsConfig
from actors.ranks import LearnerSpec, Rank, RankGroup
from actors.weights.offer import WeightsOffer
from algorithms.config import AlgorithmConfig
from rollout.samples import TrainingSample


@dataclass(frozen=True)
class PolicySpec(LearnerSpec):
    """Everything a rank of the policy trainer is made from; further attributes as :class:`LearnerSpec`.

    Attributes:
        algorithm: the loss.
        temperature: of sampling; log-probabilities are of the tempered distribution.
        reference: the reference's folder, whose output head the exact KL needs; None takes the model's own.
        weights: how new versions are handed to the generators.
    """

    algorithm: AlgorithmConfig
    temperature: float
    reference: Path | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)


class PolicyRank(Rank):
    """One data-parallel rank of the policy."""

    def __init__(self, spec: PolicySpec, rank: int, device: str) -> None:
        super().__init__(spec, rank, device)
        self.source: Any = None
        self.publisher: Any = None

    def learner_class(self) -> type:
        """The policy trainer."""
        from actors.trainer import PolicyTrainer

        return PolicyTrainer

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.learner.module

    def update(self, samples: list[TrainingSample], kl_coefficient: float) -> dict[str, float]:
        """See :meth:`actors.trainer.PolicyTrainer.update`."""
        metrics: dict[str, float] = self.learner.update(samples, kl_coefficient)
        return metrics

    def log_probs(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """See :meth:`actors.trainer.PolicyTrainer.log_probs`."""
        log_probs: dict[int, NDArray[np.float32]] = self.learner.log_probs(samples)
        return log_probs

    def log_probs_and_collision(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """See :meth:`actors.trainer.PolicyTrainer.log_probs_and_collision`."""
        values: dict[int, NDArray[np.float32]] = self.learner.log_probs_and_collision(samples)
        return values

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

    def export(self, folder: Path) -> None:
        """See :meth:`actors.trainer.PolicyTrainer.export`."""
        self.learner.export(folder)


class PolicyGroup(RankGroup):
    """All ranks of the policy, as one."""

    role = "policy"
    rank_class = PolicyRank

    async def update(self, samples: list[TrainingSample], kl_coefficient: float) -> dict[str, float]:
        """One training step on all ranks; metrics under `train/` (see :meth:`actors.trainer.PolicyTrainer.update`)."""
        samples_ref = ray.put(samples)
        metrics: list[dict[str, float]] = await self._all(
            "update", "update", self.spec.deadlines.update_s, samples_ref, kl_coefficient
        )
        return metrics[0]

    async def log_probs(self, samples: list[TrainingSample]) -> list[NDArray[np.float32]]:
        """The policy's log-probabilities of the samples' completions, [tokens] float32 each, nats."""
        return await self._by_sample("log_probs", "compute log-probabilities", samples)

    async def log_probs_and_collision(self, samples: list[TrainingSample]) -> list[NDArray[np.float32]]:
        """The same and, as a second row, the sum of squared probabilities at each token: [2, tokens] float32 each."""
        return await self._by_sample("log_probs_and_collision", "compute log-probabilities", samples)

    async def publish(self, version: int) -> WeightsOffer:
        """Serve the weights as they are now, as this policy version, until two later ones have been published."""
        offers = await self._all("publish", f"publish version {version}", self.spec.deadlines.sync_s, version)
        offer: WeightsOffer = offers[0]
        return offer

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder that transformers and vLLM load."""
        await self._all("export", "export", self.spec.deadlines.update_s, folder.absolute())
