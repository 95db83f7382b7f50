"""Policy losses by token: what is minimised, before the rollout correction and aggregation."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from algorithms.inputs import LossInputs, TokenLoss
from algorithms.registry import Options, policy_loss

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here, in nats, before they are exponentiated, so that no ratio overflows float32."""


def ratio_of(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Probability ratio exp(log_probs - other_log_probs), same shape, within exp(±20)."""
    return (log_probs - other_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class ClipOptions(Options):
    """Bounds of the ratio."""

    low: float = Field(0.2, gt=0.0, lt=1.0, description="The ratio is clipped below at 1 - low.")
    high: float = Field(0.2, gt=0.0, description="The ratio is clipped above at 1 + high; 0.28 is clip-higher.")


@policy_loss(
    "clip",
    options=ClipOptions,
    formula="−min(r·A, clip(r, 1 − low, 1 + high)·A)",
    source="PPO, arXiv 1707.06347, eq. 7; clip-higher: DAPO, arXiv 2503.14476, eq. 10",
    use_when="The usual choice; raise `high` to 0.28 where entropy collapses.",
)
def clip(inputs: LossInputs, options: ClipOptions) -> TokenLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = pi / pi_proximal.

    PPO (arXiv 1707.06347, eq. 7), with a bound of its own on each side (DAPO, arXiv 2503.14476, eq. 10). With the
    rollout correction it is the decoupled objective (arXiv 2110.00641, eq. 10), with behaviour and proximal policy
    apart.
    """
    ratio = ratio_of(inputs.log_probs, inputs.proximal_log_probs)
    low, high = 1 - options.low, 1 + options.high
    advantages = inputs.advantages
    values = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return TokenLoss(
        values,
        is_clipped_low=(ratio < low) & (advantages < 0),
        is_clipped_high=(ratio > high) & (advantages > 0),
    )


@policy_loss(
    "reinforce",
    formula="−A·log π",
    source="Williams, Machine Learning 8, 1992",
    use_when="One update a batch and no staleness; the gradient with nothing added.",
)
def reinforce(inputs: LossInputs, options: Options) -> TokenLoss:
    """-A log pi: the policy gradient itself, without a ratio (Williams, 1992)."""
    return TokenLoss(-inputs.advantages * inputs.log_probs)


@policy_loss(
    "nll",
    uses_rollouts=False,
    formula="−log π",
    source="maximum likelihood",
    use_when="Supervised fine-tuning (`counterpoint sft`).",
)
def nll(inputs: LossInputs, options: Options) -> TokenLoss:
    """-log pi: negative log-likelihood, i.e. supervised fine-tuning. Advantages play no part."""
    return TokenLoss(-inputs.log_probs)
