"""Pairs of a better and a worse answer from groups of scored answers, for preference losses on the policy's own."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.registry import Options


class PairOptions(Options):
    """Which pairs a group of scored answers gives."""

    choice: Literal["best_worst", "all", "best_random"] = Field(
        "best_worst", description="The best and the worst of a group, all its pairs, or its best and a random other."
    )
    min_margin: float = Field(
        0.0, ge=0.0, description="A pair counts only if its rewards differ by more than this; equal ones never do."
    )


def pairs_from_groups(
    rewards: Tensor, group: Tensor, options: PairOptions, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Pairs of answers to the same prompt whose rewards differ by more than `min_margin`.

    Args:
        rewards: [samples] float, finite.
        group: [samples] int64, the prompt each sample answers; groups may differ in size and be in any order.
        generator: of the random others; needed for the choice "best_random", on the device of `rewards`.
    Returns:
        [pairs] int64, the better sample of each, and [pairs] int64, the worse one; by group, in ascending order.
        Groups of one or of equal rewards give none. Of equally good (or bad) samples the first is taken.
    Raises:
        NonFiniteError: a reward is NaN or infinite; names the sample.
        ValueError: shapes differ, or the choice is random and there is no generator.
    """
    if rewards.shape != group.shape or rewards.ndim != 1:
        raise ValueError(
            f"rewards {list(rewards.shape)} and group {list(group.shape)} should both be [samples], one entry a sample"
        )
    require_finite("the reward", rewards, index_name="sample")
    match options.choice:
        case "all":
            chosen, rejected = _within_groups(group)
        case "best_worst":
            chosen, rejected = _first_of_groups(-rewards, group), _first_of_groups(rewards, group)
        case "best_random":
            if generator is None:
                raise ValueError("the choice best_random draws the other answer: give a seeded torch.Generator")
            chosen = _first_of_groups(-rewards, group)
            best = rewards[chosen][group.unique(return_inverse=True)[1]]
            draw = torch.rand(len(rewards), generator=generator, device=rewards.device, dtype=torch.float64)
            # Those too near the best come after all others, and the check below leaves them out.
            rejected = _first_of_groups(draw + (best - rewards <= options.min_margin), group)
    is_apart = rewards[chosen] - rewards[rejected] > options.min_margin
    return chosen[is_apart], rejected[is_apart]


def pair_weights(group: Tensor, chosen: Tensor) -> Tensor:
    """Weights with which every group counts alike, however many pairs it gives (InstructGPT, arXiv 2203.02155, eq. 1).

    Args:
        group: [samples] int64, the prompt each sample answers.
        chosen: [pairs] int64, one sample of each pair.
    Returns:
        [pairs] float64, 1 / (pairs of the group).
    """
    _, inverse, counts = group[chosen].unique(return_inverse=True, return_counts=True)
    return 1 / counts[inverse].double()


def _first_of_groups(key: Tensor, group: Tensor) -> Tensor:
    """[groups] int64, the sample with the least key of each group, groups in ascending order, the first of equals."""
    by_key = key.argsort(stable=True)
    order = by_key[group[by_key].argsort(stable=True)]
    ordered = group[order]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return order[is_first]


def _within_groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs within groups, a sample with itself too: [sum of squared sizes] int64, twice."""
    order = group.argsort(stable=True)
    _, inverse, counts = group[order].unique(return_inverse=True, return_counts=True)
    sizes = counts[inverse]
    starts = (counts.cumsum(0) - counts)[inverse]
    place = torch.repeat_interleave(torch.arange(len(group), device=group.device), sizes)
    first_pair = sizes.cumsum(0) - sizes
    other = torch.arange(len(place), device=group.device) - first_pair[place] + starts[place]
    return order[place], order[other]
