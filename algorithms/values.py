"""The critic's targets, which are lambda-returns, and its loss by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.inputs import AdvantageInputs
from algorithms.returns import generalised_advantages


@dataclass(frozen=True)
class ValueLoss:
    """The critic's loss by token; 0 (False) outside the mask.

    Attributes:
        values: [B, T] float, to be minimised; carries the gradient.
        is_clipped: [B, T] bool, tokens whose gradient was cut because the value went too far from the old one.
    """

    values: Tensor
    is_clipped: Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = None
) -> ValueLoss:
    """1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), or 1/2 (V - R)^2 without a bound.

    The bound keeps one update from moving a value by more than c towards its return (PPO's public code of 2017; not
    in the paper, arXiv 1707.06347). The larger of the two is taken, so that a value that moved away from its return is
    still pulled back.

    Args:
        values: [B, T] float, of the critic being trained; carries the gradient.
        old_values: [B, T] float, of the critic at the start of the update; no gradient.
        returns: [B, T] float, see :func:`lambda_returns`.
        mask: [B, T] bool, the tokens the policy chose; entries outside mean nothing.
        clip: c, in units of reward; None for no bound.
    Raises:
        ValueError: `clip` isn't above 0.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip = {clip:g} keeps every value where it is. Set it above 0, or to None for no bound.")
    values = torch.where(mask, values, 0.0)
    old_values, returns = torch.where(mask, old_values, 0.0), torch.where(mask, returns, 0.0)
    plain = (values - returns).square()
    if clip is None:
        return ValueLoss(0.5 * plain, torch.zeros_like(mask))
    moved = values - old_values
    bounded = (old_values + moved.clamp(-clip, clip) - returns).square()
    return ValueLoss(0.5 * torch.maximum(plain, bounded), (moved.abs() > clip) & (bounded > plain))


def lambda_returns(inputs: AdvantageInputs, discount: float = 1.0, trace_decay: float = 1.0) -> Tensor:
    """The critic's target before each token: its value plus the advantage, before any whitening.

    That is the lambda-return (Sutton & Barto, Reinforcement Learning, 2nd edition, section 12.1), whatever the
    advantage estimator. With trace_decay 1 the critic's own values cancel and the discounted sum of rewards is left.

    Args:
        inputs: with `values`.
        discount: gamma, 0 to 1.
        trace_decay: lambda, 0 to 1.
    Returns:
        [tokens] float, 0 outside the action mask.
    Raises:
        ValueError: there are no values.
    """
    if inputs.values is None:
        raise ValueError("AdvantageInputs.values is None: returns for a critic need the critic's own values")
    advantages = generalised_advantages(inputs, discount, trace_decay)
    return torch.where(inputs.mask, advantages + inputs.values, 0.0)
