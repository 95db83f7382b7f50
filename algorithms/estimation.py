"""Estimates advantages with a registered estimator: checks its inputs and outputs, and weighs groups by difficulty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from algorithms import advantages as _advantages  # noqa: F401  registered by being imported
from algorithms import pass_at_k as _pass_at_k  # noqa: F401
from algorithms.finite import require_finite
from algorithms.group_statistics import Groups
from algorithms.inputs import AdvantageInputs
from algorithms.registry import ADVANTAGE_ESTIMATORS, AdvantageEstimator, Need
from algorithms.turns import by_turn

FIELDS = {
    Need.COMPONENTS: ("components", "is_present", "component_weights"),
    Need.GREEDY_REWARDS: ("greedy_rewards",),
    Need.VALUES: ("values",),
    Need.PROXIMAL_LOG_PROBS: ("log_probs",),
    Need.COLLISION: ("collision",),
}
"""Fields of AdvantageInputs that hold what an estimator may need."""
OF_TOKENS = ("token_rewards", "values", "log_probs", "collision")


def estimate_advantages(
    name: str,
    inputs: AdvantageInputs,
    options: Mapping[str, Any] | None = None,
    *,
    credit: Literal["trajectory", "turn"] = "trajectory",
    turn_discount: float = 1.0,
) -> Tensor:
    """Advantages by the estimator called `name`.

    Estimators of one advantage a sample get token rewards summed into the sample's reward, and their advantage stands
    on each of its tokens. With credit by turn they work on turns in the same way: see :func:`algorithms.turns.by_turn`.

    Args:
        name: a registered advantage estimator.
        inputs: the batch. Of [tokens] fields only what lies inside the mask counts.
        options: of the method, by name.
        credit: whether whole samples are compared and credited, or each turn of the policy.
        turn_discount: with credit by turn, what the reward of the next turn is worth to this one: 0 for a turn's own
            reward alone, 1 for all that is still to come.
    Returns:
        [tokens] float64, 0 outside the action mask; finite.
    Raises:
        RegistryError: no such estimator, or no such option.
        NonFiniteError: a reward, or an advantage made of them, is NaN or infinite; names the sample.
        ValueError: shapes differ, `rewards` isn't floating point, a field that the estimator needs is missing, or what
            it works on can't be divided as asked.
    """
    estimator = ADVANTAGE_ESTIMATORS.get(name)
    method_options = estimator.read_options(options or {}, "algorithm.advantage_options")
    _check(inputs)
    _check_needs(estimator, inputs, credit, turn_discount)
    if inputs.rewards.numel() == 0:
        return inputs.rewards.new_zeros(0)
    if estimator.level == "token":
        advantages = estimator.function(inputs, method_options)
        require_finite(f"the advantage by {name!r}", advantages, inputs.mask, index_name="token")
        return torch.where(inputs.mask, advantages, 0.0)
    if credit == "turn":
        turns = by_turn(inputs, turn_discount)
        if turns.inputs.rewards.numel() == 0:
            return inputs.rewards.new_zeros(inputs.mask.shape)
        advantages = estimator.function(turns.inputs, method_options)
        require_finite(f"the advantage by {name!r}", advantages, index_name="turn")
        return turns.to_tokens(advantages, inputs.mask)
    advantages = estimator.function(_with_summed_rewards(inputs), method_options)
    require_finite(f"the advantage by {name!r}", advantages, index_name="sample")
    return torch.where(inputs.mask, advantages[inputs.sample], 0.0)


def weigh_by_difficulty(
    advantages: Tensor, inputs: AdvantageInputs, *, low: float | None = None, high: float | None = None
) -> Tensor:
    """Advantages times 4 p (1 - p) of their group, p its mean reward between the bounds: 1 for a prompt that is solved
    half of the time, 0 for one that always or never is.

    p(1 - p) is the variance of a reward of 0 or 1, and with it what a group can teach.

    Args:
        advantages: [tokens] float.
        inputs: the batch. Token rewards play no part.
        low, high: the rewards that mean p = 0 and p = 1; the batch's smallest and largest unless given. Rewards
            outside count as the bound.
    Returns:
        [tokens] float. The advantages as they are where the bounds are equal, as for a batch of equal rewards.
    Raises:
        NonFiniteError: a reward is NaN or infinite.
        ValueError: `low` is above `high`.
    """
    rewards = inputs.rewards
    require_finite("the reward", rewards, index_name="sample")
    if rewards.numel() == 0:
        return advantages
    bottom = float(rewards.min()) if low is None else low
    top = float(rewards.max()) if high is None else high
    if low is not None and high is not None and low > high:
        raise ValueError(f"low = {low:g} is above high = {high:g}: no reward lies between. Swap them.")
    if top <= bottom:
        return advantages
    groups = Groups.of(inputs.group)
    solved = ((rewards - bottom) / (top - bottom)).clamp(0, 1)
    p = groups.sum(solved) / groups.size(solved)
    weights = (4 * p * (1 - p))[groups.index]
    return advantages * weights[inputs.sample].to(advantages.dtype)


def _with_summed_rewards(inputs: AdvantageInputs) -> AdvantageInputs:
    if inputs.token_rewards is None:
        return inputs
    inside = torch.where(inputs.mask, inputs.token_rewards, 0.0).to(inputs.rewards.dtype)
    return replace(inputs, rewards=inputs.rewards.index_add(0, inputs.sample, inside), token_rewards=None)


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
    for name in ("mask", *OF_TOKENS):
        values = getattr(inputs, name)
        if values is not None and values.shape != (tokens,):
            raise ValueError(f"{name} must be [{tokens}], one a completion token, got {list(values.shape)}")
    require_finite("the reward", rewards, index_name="sample")
    for name in OF_TOKENS:
        values = getattr(inputs, name)
        if values is not None:
            require_finite(f"the {_words(name)}", values, inputs.mask, index_name="token")
    _check_of_samples(inputs)


def _check_of_samples(inputs: AdvantageInputs) -> None:
    samples = len(inputs.rewards)
    if inputs.greedy_rewards is not None:
        if inputs.greedy_rewards.shape != (samples,):
            raise ValueError(f"greedy_rewards must be [{samples}], got {list(inputs.greedy_rewards.shape)}")
        require_finite("the greedy reward", inputs.greedy_rewards, index_name="sample")
    if inputs.components is None:
        return
    shape = (samples, inputs.components.shape[-1])
    is_present, weights = inputs.is_present, inputs.component_weights
    for name, values, wanted in (
        ("components", inputs.components, shape),
        ("is_present", is_present, shape),
        ("component_weights", weights, shape[1:]),
    ):
        if values is not None and values.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(values.shape)}")
    require_finite("the reward component", inputs.components, is_present, index_name="(sample, component)")
    if weights is not None:
        require_finite("the weight", weights, index_name="component")


def _check_needs(
    estimator: AdvantageEstimator, inputs: AdvantageInputs, credit: Literal["trajectory", "turn"], turn_discount: float
) -> None:
    for need in sorted(estimator.needs):
        missing = [name for name in FIELDS[need] if getattr(inputs, name) is None]
        if missing:
            raise ValueError(
                f"the advantage estimator {estimator.name!r} needs {_words(need)}, but AdvantageInputs has no "
                f"{', '.join(missing)}"
            )
    if Need.COMPONENTS in estimator.needs and inputs.token_rewards is not None:
        raise ValueError(
            f"the advantage estimator {estimator.name!r} works on reward components, and token rewards (a KL penalty "
            "in the reward, a reward by turn) belong to none of them. Place the KL in the loss, or choose another."
        )
    if credit == "trajectory":
        return
    if estimator.level == "token":
        raise ValueError(
            f"the advantage estimator {estimator.name!r} credits each token already, so credit by turn can't be "
            "applied. Use credit by trajectory."
        )
    whole = estimator.needs & {Need.COMPONENTS, Need.GREEDY_REWARDS}
    if whole:
        raise ValueError(
            f"the advantage estimator {estimator.name!r} works on {' and '.join(map(_words, sorted(whole)))}, which "
            "belong to a whole completion and not to a turn. Use credit by trajectory."
        )
    if not 0.0 <= turn_discount <= 1.0:
        raise ValueError(f"turn_discount = {turn_discount:g} must lie between 0 and 1")


def _words(name: str) -> str:
    return name.replace("_", " ")
