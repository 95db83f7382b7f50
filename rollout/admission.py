"""Admission: when a prompt may be admitted, and which groups make the next batch, within the staleness bound. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rollout.failures import Failure, FailureError, FailureKind
from rollout.groups import Group, GroupState


@dataclass(frozen=True, slots=True)
class AdmissionScheduler:
    """Decides how many groups may be admitted and which make the next batch, under a staleness bound.

    Let B be the groups in a batch and S the staleness bound. Batch b (0, 1, …) is learned from by the policy of version
    b, which makes version b + 1. A group admitted while its generator serves version w carries tokens no older than w,
    so the last batch it may be part of is its deadline w + S. Groups may become ready in any order. A slow one is
    overtaken as long as it can still be consumed by its deadline.

    Invariants, for `next_batch` = b, at every moment (the tests assert exactly these):

    1. Staleness: every group of batch b has served_version >= b - S.
    2. Feasibility: for every d >= b, at most (d - b + 1) · B open groups have a deadline of d or earlier. So every open
       group can still be consumed in time, whatever the order in which they become ready.
    3. Bound: where the generators serve version w = the newest, capacity is (S + w + 1) · B less the groups ever
       consumed and the open ones: group k among those not dropped is admitted at version >= k // B - S. A dropped
       group frees its slot at once.
    4. Progress: whenever every open group is ready and the served version is b, either a batch can be made or more
       groups can be admitted, so there is no deadlock.
    5. With S = 0 batch b holds groups admitted at version b only: synchronous training is this with S = 0.

    Attributes:
        batch_groups: B, groups in a training batch.
        max_staleness: S, in policy versions.
        batches: how many batches the run has in all; a group that no batch would take is not admitted. None: no end.
    """

    batch_groups: int
    max_staleness: int
    batches: int | None = None

    def __post_init__(self) -> None:
        if self.batch_groups < 1 or self.max_staleness < 0:
            raise ValueError(
                f"a batch needs at least one group and staleness can't be negative; got batch_groups="
                f"{self.batch_groups}, max_staleness={self.max_staleness}"
            )

    def deadline(self, group: Group) -> int:
        """The last batch that may hold the group."""
        return group.served_version + self.max_staleness

    def capacity(self, open_groups: Iterable[Group], *, next_batch: int, served_version: int) -> int:
        """How many groups may be admitted now.

        Args:
            open_groups: every group admitted and neither consumed nor dropped.
            next_batch: index of the batch to be made next: the batches consumed so far, those of an update still
                under way included.
            served_version: the version that the generator which is to get the group serves now (of several, the
                oldest). A retry must go to a generator that serves at least this version.
        """
        deadlines = self._open_by_deadline(open_groups, next_batch)
        own_deadline = served_version + self.max_staleness
        room = [
            (until - next_batch + 1) * self.batch_groups - _open_until(deadlines, until)
            for until in range(own_deadline, max([own_deadline, *deadlines]) + 1)
        ]
        if self.batches is not None:
            room.append((self.batches - next_batch) * self.batch_groups - deadlines.total())
        return max(0, min(room))

    def batch(self, open_groups: Iterable[Group], *, next_batch: int) -> tuple[Group, ...] | None:
        """The groups of the next batch, or None while more groups must become ready first.

        Ready groups are taken by deadline, then in the order of admission. That leaves the fewest near-deadline groups
        behind of any choice; if even so some would be left that can't all be consumed in time, there is no batch yet.

        Raises:
            FailureError: of kind bug, if a deadline has passed already (the caller's versions are wrong).
        """
        groups = sorted(open_groups, key=lambda group: (self.deadline(group), group.number))
        deadlines = self._open_by_deadline(groups, next_batch)
        chosen = [group for group in groups if group.state is GroupState.READY][: self.batch_groups]
        if len(chosen) < self.batch_groups:
            return None
        left = deadlines - Counter(self.deadline(group) for group in chosen)
        if any(_open_until(left, until) > (until - next_batch) * self.batch_groups for until in left):
            return None
        return tuple(chosen)

    def _open_by_deadline(self, groups: Iterable[Group], next_batch: int) -> Counter[int]:
        groups = tuple(groups)
        for group in groups:
            if self.deadline(group) < next_batch:
                message = (
                    f"group {group.group_id}, admitted at version {group.served_version}, is open at batch "
                    f"{next_batch}, which is more than max_staleness = {self.max_staleness} later"
                )
                raise FailureError(Failure(FailureKind.BUG, "staleness_deadline_passed", message))
        return Counter(self.deadline(group) for group in groups)


def _open_until(deadlines: Counter[int], until: int) -> int:
    """Groups whose deadline is `until` or earlier."""
    return sum(count for deadline, count in deadlines.items() if deadline <= until)
