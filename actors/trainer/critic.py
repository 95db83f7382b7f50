"""The critic as Ray actors, one a rank, and the group that the driver calls. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.trainer.ranks import Rank, RankGroup
from rollout.samples import TokenSequence, TrainingSample


class CriticRank(Rank):
    """One data-parallel rank of the critic."""

    def learner_maker(self) -> Callable[[Any, Any, Any], Any]:
        """See :func:`actors.trainer.value_objective.critic_learner`."""
        from actors.trainer.value_objective import critic_learner

        return critic_learner

    def values(self, sequences: Sequence[TokenSequence]) -> dict[int, NDArray[np.float32]]:
        """Values of this rank's share of the sequences, by index: [tokens] float32, before each completion token."""
        values: dict[int, NDArray[np.float32]] = self.learner.each_token(sequences, self.learner.objective.values)
        return values

    def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """See :meth:`actors.trainer.learner.Learner.update`."""
        metrics: dict[str, float] = self.learner.update(samples)
        return metrics


class CriticGroup(RankGroup):
    """All ranks of the critic, as one."""

    role = "critic"
    rank_class = CriticRank

    async def values(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """The value before each completion token, [tokens] float32 each."""
        return await self._by_sample("values", "compute values", sequences)

    async def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """One training step on all ranks; metrics under `critic/`."""
        metrics: list[dict[str, float]] = await self._all(
            "update", "update", self.spec.deadlines.update_s, ray.put(samples)
        )
        return metrics[0]
