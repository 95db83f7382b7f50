"""The critic as Ray actors, one a rank, and the driver's side of them. Imports no torch."""

from __future__ import annotations

import numpy as np
import ray
from numpy.typing import NDArray

from actors.trainer.ranks import Rank, RankGroup
from rollout.samples import TrainingSample


class CriticRank(Rank):
    """One data-parallel rank of the critic."""

    def learner_class(self) -> type:
        """The value trainer."""
        from actors.trainer.value_trainer import ValueTrainer

        return ValueTrainer

    def values(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """See :meth:`actors.trainer.value_trainer.ValueTrainer.values`."""
        values: dict[int, NDArray[np.float32]] = self.learner.values(samples)
        return values

    def update(self, samples: list[TrainingSample]) -> dict[str, float]:
        """See :meth:`actors.trainer.value_trainer.ValueTrainer.update`."""
        metrics: dict[str, float] = self.learner.update(samples)
        return metrics


class CriticGroup(RankGroup):
    """All ranks of the critic, as one."""

    role = "critic"
    rank_class = CriticRank

    async def values(self, samples: list[TrainingSample]) -> list[NDArray[np.float32]]:
        """The value before each completion token, [tokens] float32 each."""
        return await self._by_sample("values", "compute values", samples)

    async def update(self, samples: list[TrainingSample]) -> dict[str, float]:
        """One training step on all ranks; metrics under `critic/`."""
        metrics: list[dict[str, float]] = await self._all(
            "update", "update", self.spec.deadlines.update_s, ray.put(samples)
        )
        return metrics[0]
