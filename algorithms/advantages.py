"""Advantage estimators over groups of samples that answer the same prompt. A failed reward never comes this far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.registry import ADVANTAGE_ESTIMATORS, advantage_estimator

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


@advantage_estimator("grpo")
def grpo(rewards: Tensor, group: Tensor) -> Tensor:
    """(r - mean of group) / standard deviation of group (GRPO, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample one (n - 1), plus 1e-6 so that rounding noise isn't blown up to size 1.

    Args:
        rewards: [samples] float, finite.
        group: [samples] int64, the prompt each sample answers; groups may differ in size.
    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    centred = _centre(rewards, group)
    return centred.values / (centred.group_std + STD_EPSILON)


@advantage_estimator("dr_grpo")
def dr_grpo(rewards: Tensor, group: Tensor) -> Tensor:
    """r - mean of group (Dr. GRPO, arXiv 2503.20783, section 3.2). Shapes and edge cases as :func:`grpo`."""
    return _centre(rewards, group).values


@advantage_estimator("rloo")
def rloo(rewards: Tensor, group: Tensor) -> Tensor:
    """r - mean of the group's other samples (RLOO, arXiv 2402.14740, eq. 8). Shapes and edge cases as :func:`grpo`.

    Computed as n / (n - 1) times the difference from the group's mean, which is the same.
    """
    centred = _centre(rewards, group)
    return centred.values * centred.group_size / (centred.group_size - 1).clamp(min=1)


@advantage_estimator("reinforce")
def reinforce(rewards: Tensor, group: Tensor) -> Tensor:
    """r - mean of the whole batch (REINFORCE with a mean baseline; Williams, 1992, section 4).

    Groups play no part, so a group of one isn't 0 here; a batch whose rewards are all equal is.

    Args:
        rewards: [samples] float, finite.
        group: [samples] int64; only its shape matters.
    Returns:
        [samples] float.
    """
    return _centre(rewards, torch.zeros_like(group)).values


def estimate_advantages(name: str, rewards: Tensor, group: Tensor) -> Tensor:
    """Advantages by the estimator called `name`, with the inputs checked.

    Args:
        name: a registered advantage estimator.
        rewards: [samples] float.
        group: [samples] int64, the prompt each sample answers.
    Returns:
        [samples] float, of the dtype of `rewards`; finite.
    Raises:
        RegistryError: no such estimator.
        NonFiniteError: a reward, or an advantage made of them, is NaN or infinite; names the sample.
        ValueError: the shapes differ, or `rewards` isn't floating point.
    """
    estimator = ADVANTAGE_ESTIMATORS.get(name)
    if rewards.dim() != 1 or rewards.shape != group.shape:
        raise ValueError(f"rewards and group must be [samples] both, got {list(rewards.shape)} and {list(group.shape)}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    require_finite("the reward", rewards, index_name="sample")
    if rewards.numel() == 0:
        return rewards.clone()
    advantages = estimator(rewards, group)
    require_finite(f"the advantage by {name!r}", advantages, index_name="sample")
    return advantages
