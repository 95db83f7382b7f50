"""Splits samples over ranks and into micro-batches and rows, by their token counts. Pure and deterministic.

Every rank computes the same split from the same list, so the split itself is never sent.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from rollout.failures import DataError
from rollout.samples import TokenSequence


def split_evenly(count: int, parts: int) -> list[range]:
    """Consecutive ranges of 0..count-1 whose sizes differ by at most one; empty ones are left out."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds) if end > start]


def split_over_ranks(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each sample to one rank so that tokens are balanced: longest first, to the rank with the fewest tokens.

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


def micro_batches(
    lengths: Sequence[int], indices: Sequence[int], max_tokens: int, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Group samples of like length, so that no group holds more than `max_tokens` with its padding.

    Args:
        lengths: [samples] tokens of each sample of the batch; of its longest row where it has several.
        indices: the samples to group.
        max_tokens: bound of (rows in a group) x (longest of them).
        rows: [samples] rows of each, which stay together; None for one each.
    Returns:
        Groups of indices, longest samples first. Every index occurs exactly once.
    Raises:
        DataError: `sample_exceeds_micro_batch` when one sample alone is beyond the bound.
    """
    groups: list[list[int]] = []
    count = 0
    for index in _longest_first(lengths, indices):
        own = 1 if rows is None else rows[index]
        if own * lengths[index] > max_tokens:
            raise _too_long(own, lengths[index], max_tokens)
        if groups and (count + own) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
            count += own
        else:
            groups.append([index])
            count = own
    return groups


def _too_long(rows: int, length: int, max_tokens: int) -> DataError:
    what = (
        f"a sample of {length:,} tokens (prompt and completion) doesn't fit"
        if rows == 1
        else f"{rows} rows that must stay together, the longest of {length:,} tokens, don't fit"
    )
    return DataError(
        "sample_exceeds_micro_batch",
        f"{what} a micro-batch of {max_tokens:,} tokens. Raise micro_batch_tokens to at least {rows * length}, or "
        "lower rollout.sampling.max_tokens or model.max_length.",
    )


def rows_of_sequences(
    sequences: Sequence[TokenSequence],
    *,
    token_cost: int | None,
    max_tokens: int,
    units: Sequence[int] | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Which sequences share a row because they have the same prompt, and how long each row is.

    Args:
        sequences: of one batch.
        token_cost: see :func:`rows_of_prompts`; None where the model takes one sequence a row.
        max_tokens: bound of a row.
        units: [sequences] number of the unit that each belongs to; sequences of two units share no row. None for a
            single unit.
    Returns:
        Rows of sequence indices, and [rows] tokens of each row.
    """
    prompt_lengths = [len(sequence.prompt_token_ids) for sequence in sequences]
    completion_lengths = [len(sequence.token_ids) for sequence in sequences]
    rows = [[index] for index in range(len(sequences))]
    if token_cost is not None:
        ids = [sequence.prompt.prompt_id for sequence in sequences]
        rows = rows_of_prompts(
            ids if units is None else [f"{unit}/{key}" for unit, key in zip(units, ids, strict=True)],
            prompt_lengths,
            completion_lengths,
            max_tokens=max_tokens,
            token_cost=token_cost,
        )
    return rows, row_lengths(rows, prompt_lengths, completion_lengths)


def rows_of_prompts(
    prompts: Sequence[str],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    max_tokens: int,
    token_cost: int,
) -> list[list[int]]:
    """Which samples share a row, so that their common prompt is computed once.

    A row of k completions saves k - 1 copies of the prompt, but every token of it is set against every other in the
    attention. Of each prompt, the number of completions a row is chosen that costs least, with the cost of a row of T
    tokens taken as token_cost * T + T^2.

    Args:
        prompts: [samples] id of each sample's prompt.
        prompt_lengths, completion_lengths: [samples] tokens.
        max_tokens: bound of a row, which a single sample may exceed (see :func:`micro_batches`).
        token_cost: cost of a token outside the attention, in pairs of tokens inside it.
    Returns:
        Rows of sample indices, each of one prompt. Every index occurs exactly once.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    rows: list[list[int]] = []
    for group in groups.values():
        sizes = {len(group)} | {2**power for power in range(len(group).bit_length())}
        options = [_packed(group, prompt_lengths, completion_lengths, size, max_tokens) for size in sorted(sizes)]
        costs = [_cost(option, prompt_lengths, completion_lengths, token_cost) for option in options]
        rows += options[costs.index(min(costs))]
    return rows


def row_lengths(
    rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], completion_lengths: Sequence[int]
) -> list[int]:
    """[rows] tokens of each row: the prompt once, and every completion."""
    return [prompt_lengths[row[0]] + sum(completion_lengths[index] for index in row) for row in rows]


def _packed(
    group: Sequence[int], prompt_lengths: Sequence[int], completion_lengths: Sequence[int], size: int, max_tokens: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    tokens = 0
    for index in group:
        if rows and len(rows[-1]) < size and tokens + completion_lengths[index] <= max_tokens:
            rows[-1].append(index)
            tokens += completion_lengths[index]
        else:
            rows.append([index])
            tokens = prompt_lengths[index] + completion_lengths[index]
    return rows


def _cost(
    rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], completion_lengths: Sequence[int], token_cost: int
) -> int:
    return sum(length * (token_cost + length) for length in row_lengths(rows, prompt_lengths, completion_lengths))


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens of `groups` that is padding; 0 for no groups."""
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    return 1.0 - sum(lengths[index] for group in groups for index in group) / padded if padded else 0.0


def _longest_first(lengths: Sequence[int], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-lengths[index], index))
