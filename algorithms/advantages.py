"""Advantage estimators over groups of samples that answer the same prompt. A failed reward never comes this far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.inputs import AdvantageInputs
from algorithms.registry import Options, advantage_estimator

STD_EPSILON = 1e-6


@dataclass(frozen=True)
class _Centred:
    """Rewards relative to their group's mean: [samples] each."""

    values: Tensor
    group_size: Tensor
    group_std: Tensor


def _centre(rewards: Tensor, group: Tensor) -> _Centred:
    """Centre rewards over their group; the standard deviation is the sample one (n - 1), 0 for a group of one.

    The group's minimum is taken off first, so that equal rewards give exactly 0 whatever their size.
    """
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1
    size = torch.zeros(groups, dtype=rewards.dtype, device=rewards.device)
    size.index_add_(0, index, torch.ones_like(rewards))
    lowest = torch.full_like(size, float("inf")).scatter_reduce(0, index, rewards, "amin")
    shifted = rewards - lowest[index]
    mean = torch.zeros_like(size).index_add_(0, index, shifted) / size
    centred = shifted - mean[index]
    square_sum = torch.zeros_like(size).index_add_(0, index, centred.square())
    std = (square_sum / (size - 1).clamp(min=1)).sqrt()
    return _Centred(centred, size[index], std[index])


@advantage_estimator(
    "grpo",
    compares_group=True,
    formula="(r − mean(group)) / (std(group) + 1e-6)",
    source="GRPO, arXiv 2402.03300, section 4.1.2",
    use_when="The usual choice: verifiable rewards, no critic, groups of 4 and more.",
)
def grpo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """(r - mean of group) / standard deviation of group (GRPO, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample one (n - 1), plus 1e-6 so that rounding noise isn't blown up to size 1.

    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    centred = _centre(inputs.rewards, inputs.group)
    return centred.values / (centred.group_std + STD_EPSILON)


@advantage_estimator(
    "dr_grpo",
    compares_group=True,
    formula="r − mean(group)",
    source="Dr. GRPO, arXiv 2503.20783, section 3.2",
    use_when="As grpo, without its up-weighting of prompts that are nearly always or never solved.",
)
def dr_grpo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of group (Dr. GRPO, arXiv 2503.20783, section 3.2). Shapes and edge cases as :func:`grpo`."""
    return _centre(inputs.rewards, inputs.group).values


@advantage_estimator(
    "rloo",
    compares_group=True,
    formula="r − mean(other samples of the group)",
    source="RLOO, arXiv 2402.14740, eq. 8",
    use_when="An unbiased baseline for any reward scale; small groups.",
)
def rloo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of the group's other samples (RLOO, arXiv 2402.14740, eq. 8). Shapes and edge cases as :func:`grpo`.

    Computed as n / (n - 1) times the difference from the group's mean, which is the same.
    """
    centred = _centre(inputs.rewards, inputs.group)
    return centred.values * centred.group_size / (centred.group_size - 1).clamp(min=1)


@advantage_estimator(
    "reinforce",
    formula="r − mean(batch)",
    source="Williams, Machine Learning 8, 1992, section 4",
    use_when="One sample a prompt, rewards of one scale over all prompts.",
)
def reinforce(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of the whole batch (REINFORCE with a mean baseline; Williams, 1992, section 4).

    Groups play no part, so a group of one isn't 0 here; a batch whose rewards are all equal is.

    Returns:
        [samples] float.
    """
    return _centre(inputs.rewards, torch.zeros_like(inputs.group)).values
