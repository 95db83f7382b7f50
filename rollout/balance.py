"""Who trains on what: samples split over ranks and into micro-batches by their token counts. Pure and deterministic.

Every rank computes the same split from the same list, so that none has to be sent.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from rollout.failures import DataError


def split_evenly(count: int, parts: int) -> list[range]:
    """Consecutive ranges of 0..count-1 whose sizes differ by at most one; empty ones are left out."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds) if end > start]


def split_over_ranks(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each sample to one rank, so that tokens are balanced (longest first, to the rank with the fewest).

    The greedy rule keeps the largest load within 4/3 - 1/(3 ranks) of the best possible (Graham, 1969).

    Args:
        lengths: [samples] tokens of each sample.
        ranks: number of ranks.
    Returns:
        [ranks] ascending sample indices of each rank; some may be empty where samples are fewer than ranks.
    """
    if ranks < 1:
        raise ValueError(f"samples can't be split over {ranks} ranks")
    loads = [(0, 0, rank) for rank in range(ranks)]  # tokens, samples, rank
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in _longest_first(lengths, range(len(lengths))):
        tokens, samples, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (tokens + lengths[index], samples + 1, rank))
    return [sorted(share) for share in shares]


def micro_batches(lengths: Sequence[int], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group samples of like length, so that no group holds more than `max_tokens` with its padding.

    Args:
        lengths: [samples] tokens of each sample of the batch.
        indices: the samples to group.
        max_tokens: bound of (samples in a group) x (longest of them).
    Returns:
        Groups of indices, longest samples first. Every index occurs exactly once.
    Raises:
        DataError: `sample_exceeds_micro_batch` when one sample alone is beyond the bound.
    """
    groups: list[list[int]] = []
    for index in _longest_first(lengths, indices):
        if lengths[index] > max_tokens:
            raise DataError(
                "sample_exceeds_micro_batch",
                f"a sample of {lengths[index]:,} tokens (prompt and completion) doesn't fit a micro-batch of "
                f"{max_tokens:,} tokens. Raise micro_batch_tokens to at least {lengths[index]}, or lower "
                "rollout.sampling.max_tokens or model.max_length.",
            )
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens of `groups` that is padding; 0 for no groups."""
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    return 1.0 - sum(lengths[index] for group in groups for index in group) / padded if padded else 0.0


def _longest_first(lengths: Sequence[int], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-lengths[index], index))
