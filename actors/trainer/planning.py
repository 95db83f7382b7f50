"""How one batch is split over optimiser steps, ranks and micro-batches. Pure: every rank plans the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TypeVar

from rollout.balance import micro_batches, padding_share, rows_of_sequences, split_evenly, split_over_ranks
from rollout.encoding import ExpandedPrompt
from rollout.failures import Failure, FailureError, FailureKind
from rollout.samples import TokenSequence

S = TypeVar("S", bound=TokenSequence)


class Together(StrEnum):
    """Which sequences of a batch stay in one micro-batch, because the loss compares them."""

    SEQUENCE = "sequence"
    """Each stands alone."""
    PAIR = "pair"
    """The first and the second, the third and the fourth, and so on."""
    GROUP = "group"
    """Sequences that follow one another and have the same prompt."""


@dataclass(frozen=True, eq=False)
class Split:
    """One optimiser batch over all ranks.

    Attributes:
        ranks: [ranks][micro-batches][rows] of indices into the batch; the sequences of a row share its prompt. Those
            that stay together follow one another, in the batch's order.
        padding_share: of all ranks' padded tokens.
    """

    ranks: list[list[list[list[int]]]]
    padding_share: float


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does with one optimiser batch.

    Attributes:
        samples: the whole batch.
        micro_batches: this rank's, as in :class:`Split`.
        rounds: micro-batches of the rank that has most; the others run fillers, so that collectives match.
        prompts: expanded prompts of this rank's samples, by index.
        padding_share: of all ranks' padded tokens.
    """

    samples: Sequence[TokenSequence]
    micro_batches: list[list[list[int]]]
    rounds: int
    prompts: dict[int, ExpandedPrompt]
    padding_share: float


def optimiser_batches(samples: Sequence[S], together: Together, steps: int) -> list[Sequence[S]]:
    """Consecutive parts of a batch, one for each optimiser step; sequences that stay together are in one part.

    Raises:
        FailureError: of kind bug: `sample_shape`, where sequences to be paired are odd in number.
    """
    units = _units(samples, together)
    parts = split_evenly(len(units), steps)
    return [samples[units[part.start].start : units[part.stop - 1].stop] for part in parts]


def split_batch(
    samples: Sequence[TokenSequence], *, together: Together, ranks: int, max_tokens: int, token_cost: int | None
) -> Split:
    """Give each rank its micro-batches, with tokens balanced over ranks and like lengths in a micro-batch.

    Args:
        samples: one optimiser batch.
        together: which of them must be in one micro-batch.
        ranks: number of ranks.
        max_tokens: bound of (rows of a micro-batch) x (longest of them).
        token_cost: see :func:`rollout.balance.rows_of_sequences`.
    Raises:
        DataError: `sample_exceeds_micro_batch`.
        FailureError: as :func:`optimiser_batches`.
    """
    # A row is never split, and long rows would balance badly over ranks.
    fair = sum(sample.total_tokens for sample in samples) // (2 * ranks)
    unit_of = [number for number, unit in enumerate(_units(samples, together)) for _ in unit]
    is_alone = together is Together.SEQUENCE
    rows, lengths = rows_of_sequences(
        samples,
        token_cost=token_cost,
        max_tokens=min(max_tokens, fair),
        units=None if is_alone else unit_of,
    )
    by_unit: dict[int, list[int]] = {}
    for row, members in enumerate(rows):
        by_unit.setdefault(row if is_alone else unit_of[members[0]], []).append(row)
    units = list(by_unit.values())
    shares = split_over_ranks([sum(lengths[row] for row in unit) for unit in units], ranks)
    longest, sizes = [max(lengths[row] for row in unit) for unit in units], [len(unit) for unit in units]
    planned = [
        [[row for index in group for row in units[index]] for group in micro_batches(longest, share, max_tokens, sizes)]
        for share in shares
    ]
    return Split(
        [[[rows[row] for row in group] for group in rank] for rank in planned],
        padding_share(lengths, [group for rank in planned for group in rank]),
    )


def _units(samples: Sequence[TokenSequence], together: Together) -> list[range]:
    """Consecutive ranges of sequences that stay together."""
    count = len(samples)
    if together is Together.SEQUENCE:
        return [range(index, index + 1) for index in range(count)]
    if together is Together.PAIR:
        if count % 2:
            message = f"{count} sequences can't be put into pairs. Give a chosen and a rejected one, in turn."
            raise FailureError(Failure(FailureKind.BUG, "sample_shape", message))
        return [range(index, index + 2) for index in range(0, count, 2)]
    ids = [sample.prompt.prompt_id for sample in samples]
    starts = [index for index in range(count) if index == 0 or ids[index] != ids[index - 1]]
    return [range(start, end) for start, end in pairwise([*starts, count])]
