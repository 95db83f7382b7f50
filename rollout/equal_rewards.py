"""Groups whose rewards are all equal teach nothing: which they are, how many came in a row, when the run ends. Pure.

Advantages are relative to the group, so a group of equal rewards has no gradient. Dropping such groups and sampling
others in their place is DAPO's dynamic sampling (arXiv 2503.14476, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollout.failures import Failure, FailureKind

EQUAL_REWARDS = "equal_rewards"
"""The reason with which such a group is dropped."""
MAX_BATCHES = 20
"""Batches' worth of such groups in a row, after which there is nothing left to learn."""


def teaches_nothing(rewards: Sequence[float]) -> bool:
    """Whether all rewards of a group are equal, which holds for a group of one too."""
    return len(set(rewards)) == 1


@dataclass(frozen=True, slots=True)
class EqualRewards:
    """How many groups in a row taught nothing.

    Attributes:
        batch_groups: groups in a training batch.
        in_a_row: groups with equal rewards since the last group with different ones. A group that failed and has no
            rewards changes nothing.
    """

    batch_groups: int
    in_a_row: int = 0

    def after(self, rewards: Sequence[float]) -> EqualRewards:
        """The count after one more scored group."""
        return replace(self, in_a_row=self.in_a_row + 1 if teaches_nothing(rewards) else 0)

    def verdict(self) -> Failure | None:
        """Why the run should end (`nothing_to_learn`), once that many groups in a row taught nothing."""
        if self.in_a_row < MAX_BATCHES * self.batch_groups:
            return None
        message = (
            f"the rewards within each of the last {self.in_a_row} groups were all equal, so rollout.drop_equal_rewards "
            "dropped every one of them. Either the policy has learned all that this reward teaches, or the reward is "
            "the same for every answer: look at the samples of the last step."
        )
        return Failure(FailureKind.DATA, "nothing_to_learn", message)
