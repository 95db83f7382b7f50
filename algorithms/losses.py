"""Policy losses by token: what is minimised, before the rollout correction and aggregation."""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.config import AlgorithmConfig
from algorithms.registry import LossInputs, TokenLoss, policy_loss

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here, in nats, before they are exponentiated, so that no ratio overflows float32."""


def ratio_of(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Probability ratio exp(log_probs - other_log_probs), same shape, within exp(±20)."""
    return (log_probs - other_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@policy_loss("clip")
def clip(inputs: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = pi / pi_proximal.

    PPO (arXiv 1707.06347, eq. 7), with a bound of its own on each side (DAPO, arXiv 2503.14476, eq. 10). With the
    rollout correction it is the decoupled objective (arXiv 2110.00641, eq. 10), with behaviour and proximal policy
    apart.
    """
    ratio = ratio_of(inputs.log_probs, inputs.proximal_log_probs)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    advantages = inputs.advantages
    values = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return TokenLoss(
        values,
        is_clipped_low=(ratio < low) & (advantages < 0),
        is_clipped_high=(ratio > high) & (advantages > 0),
    )


@policy_loss("reinforce")
def reinforce(inputs: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    """-A log pi: the policy gradient itself, without a ratio (Williams, 1992)."""
    return TokenLoss(-inputs.advantages * inputs.log_probs)


@policy_loss("nll", uses_rollouts=False)
def nll(inputs: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    """-log pi: negative log-likelihood, i.e. supervised fine-tuning. Advantages play no part."""
    return TokenLoss(-inputs.log_probs)
