"""The one function the driver calls for advantages: a registered estimator, its inputs and outputs checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.inputs import AdvantageInputs
from algorithms.registry import ADVANTAGE_ESTIMATORS


def estimate_advantages(name: str, inputs: AdvantageInputs, options: Mapping[str, Any] | None = None) -> Tensor:
    """Advantages by the estimator called `name`.

    Args:
        name: a registered advantage estimator.
        inputs: the batch.
        options: its switches.
    Returns:
        [tokens] float64, 0 outside the action mask; finite.
    Raises:
        RegistryError: no such estimator, or no such switch.
        NonFiniteError: a reward, or an advantage made of them, is NaN or infinite; names the sample.
        ValueError: shapes differ, or `rewards` isn't floating point.
    """
    estimator = ADVANTAGE_ESTIMATORS.get(name)
    switches = estimator.read_options(options or {}, "algorithm.advantage_options")
    _check(inputs)
    if inputs.rewards.numel() == 0:
        return inputs.rewards.new_zeros(0)
    advantages = estimator.function(inputs, switches)
    index_name = "sample" if estimator.level == "sample" else "token"
    require_finite(f"the advantage by {name!r}", advantages, index_name=index_name)
    if estimator.level == "sample":
        advantages = advantages[inputs.sample]
    return torch.where(inputs.mask, advantages, torch.zeros_like(advantages))


def _check(inputs: AdvantageInputs) -> None:
    rewards, group = inputs.rewards, inputs.group
    if rewards.dim() != 1 or rewards.shape != group.shape or rewards.shape != inputs.lengths.shape:
        raise ValueError(
            f"rewards, group and lengths must be [samples] all, got {list(rewards.shape)}, {list(group.shape)} and "
            f"{list(inputs.lengths.shape)}"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    tokens = int(inputs.lengths.sum())
    for name in ("mask", "token_rewards", "values", "log_probs", "collision"):
        values = getattr(inputs, name)
        if values is not None and values.shape != (tokens,):
            raise ValueError(f"{name} must be [{tokens}], one a completion token, got {list(values.shape)}")
    require_finite("the reward", rewards, index_name="sample")
    for name in ("token_rewards", "values", "log_probs", "collision"):
        values = getattr(inputs, name)
        if values is not None:
            require_finite(f"{name.replace('_', ' ')}", values, inputs.mask, index_name="token")
