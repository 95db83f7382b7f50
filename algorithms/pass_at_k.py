"""Advantage estimators for pass@k, where the best of several samples counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from algorithms.advantages import STD_EPSILON
from algorithms.group_statistics import Groups, centre
from algorithms.inputs import AdvantageInputs
from algorithms.registry import Options, advantage_estimator


class PassAtKOptions(Options):
    """How many samples the best is taken of."""

    k: int = Field(4, ge=1, description="Samples of which the best counts; below the group size. 1 is GRPO.")


@advantage_estimator(
    "grpo_pass_at_k",
    options=PassAtKOptions,
    compares_group=True,
    formula="(E[max of k | sample is one of them] − E[max of k]) / (std(max of k) + 1e-6), over all k of the group",
    source="Pass@k training, arXiv 2508.10751, analytical derivation; for any reward with PKPO, arXiv 2505.15201",
    use_when="Prompts that one attempt rarely solves and several may: keeps exploring where grpo narrows down.",
)
def grpo_pass_at_k(inputs: AdvantageInputs, options: PassAtKOptions) -> Tensor:
    """How much better the best of k gets by holding this sample, in units of its spread over the group's subsets.

    With rewards of 0 and 1, n samples and m failures, that is Pass@k training (arXiv 2508.10751): R = 1 - C(m, k) /
    C(n, k), sigma = sqrt(R (1 - R)), a success gets (1 - R) / sigma and a failure (1 - R - C(m-1, k-1) / C(n-1, k-1))
    / sigma. The paper stops at binary rewards; here the reward of a subset is its maximum, which is the same for them
    and defined for any (as in PKPO, arXiv 2505.15201). Sorted ascending, E[max] = sum_j C(j-1, k-1) r_j / C(n, k), and
    given sample i E_i[max] = (C(i-1, k-1) r_i + sum_{j>i} C(j-2, k-2) r_j) / C(n-1, k-1).

    Returns:
        [samples] float; those of a group sum to 0. Exactly 0 for a group whose rewards are all equal and for one of k
        samples or fewer, which has no two subsets to compare.
    """
    groups = Groups.of(inputs.group)
    ranked = _Ranked.of(inputs.rewards, groups)
    rewards, rank, size, k = ranked.rewards, ranked.rank, ranked.size, options.k
    of_all = _choose(rank - 1, k - 1, size, k)
    mean = ranked.mean(rewards, of_all)
    variance = ranked.mean((rewards - mean).square(), of_all)
    of_later = _choose(rank - 2, k - 2, size - 1, k - 1)
    of_own = _choose(rank - 1, k - 1, size - 1, k - 1)
    # Divided by the weights' own sum, which is 1 up to their rounding: a small spread would blow that up.
    total = of_own + ranked.after(of_later)
    own = (of_own * rewards + ranked.after(of_later * rewards)) / torch.where(size > k, total, 1.0)
    advantages = torch.where(size > k, (own - mean) / (variance.sqrt() + STD_EPSILON), torch.zeros_like(own))
    return torch.empty_like(inputs.rewards).index_copy_(0, ranked.order, advantages.to(inputs.rewards.dtype))


class WinnerOptions(Options):
    """What the winner's lead is divided by."""

    divide_by: Literal["none", "std"] = Field(
        "none",
        description="none leaves the lead as it is (the paper's unbiased gradient); std divides it as GRPO does.",
    )


@advantage_estimator(
    "grpo_winner",
    options=WinnerOptions,
    compares_group=True,
    formula="max(group) − max(other samples of the group), which is 0 for all but the best",
    source="Tang et al., arXiv 2503.19595, pass@k with a leave-one-out baseline",
    use_when="Only the best of the whole group counts and rewards have hardly any ties.",
)
def grpo_winner(inputs: AdvantageInputs, options: WinnerOptions) -> Tensor:
    """The lead of a group's best sample over its second best; 0 for the others (Tang et al., arXiv 2503.19595).

    The leave-one-out gradient of E[max over the group]: max of all minus max without the sample.

    Returns:
        [samples] float, never below 0. Exactly 0 for a group of one, and where two samples share the largest reward.
    """
    groups = Groups.of(inputs.group)
    ranked = _Ranked.of(inputs.rewards, groups)
    rewards, rank, size = ranked.rewards, ranked.rank, ranked.size
    lead = torch.where((rank == size) & (size > 1), rewards - rewards.roll(1), torch.zeros_like(rewards))
    if options.divide_by == "std":
        lead = lead / (centre(rewards, Groups(ranked.owner, groups.count)).std + STD_EPSILON)
    return torch.empty_like(inputs.rewards).index_copy_(0, ranked.order, lead.to(inputs.rewards.dtype))


@dataclass(frozen=True)
class _Ranked:
    """Samples sorted by group and, within it, by reward, in float64: [samples] each.

    Attributes:
        order: which sample stands at each place.
        owner: its group.
        rewards: its reward less the smallest of its group.
        rank: its place in the group, from 1.
        size: samples of its group.
        last: the place of its group's last sample.
    """

    order: Tensor
    owner: Tensor
    rewards: Tensor
    rank: Tensor
    size: Tensor
    last: Tensor

    @classmethod
    def of(cls, rewards: Tensor, groups: Groups) -> _Ranked:
        shifted = rewards.double() - groups.least(rewards.double())[groups.index]
        order = shifted.argsort(stable=True)
        order = order[groups.index[order].argsort(stable=True)]
        owner = groups.index[order]
        size = groups.sum(torch.ones_like(groups.index))
        end = size.cumsum(0)
        rank = torch.arange(1, len(order) + 1, device=order.device) - (end - size)[owner]
        return cls(order, owner, shifted[order], rank.double(), size[owner].double(), end[owner] - 1)

    def mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean of [samples] values over their group, for each sample; 0 without any weight."""
        groups = Groups(self.owner, int(self.owner[-1]) + 1)
        total = groups.sum(weights)
        return (groups.sum(weights * values) / torch.where(total > 0, total, 1.0))[self.owner]

    def after(self, values: Tensor) -> Tensor:
        """Sum of [samples] values over the places behind each in its group."""
        running = values.cumsum(0)
        return running[self.last] - running


def _choose(upper: Tensor, lower: int, of_upper: Tensor, of_lower: int) -> Tensor:
    """C(upper, lower) / C(of_upper, of_lower), elementwise; 0 where the first is 0. The second is taken as if it
    weren't."""
    is_zero = (upper < lower) | (lower < 0)
    first = _log_choose(upper.clamp(min=max(0, lower)), max(0, lower))
    return (first - _log_choose(of_upper.clamp(min=of_lower), of_lower)).exp().masked_fill(is_zero, 0.0)


def _log_choose(upper: Tensor, lower: int) -> Tensor:
    return (upper + 1).lgamma() - (upper - lower + 1).lgamma() - math.lgamma(lower + 1)
