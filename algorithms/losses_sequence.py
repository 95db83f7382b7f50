"""Policy losses with one ratio for the whole sequence. Each row of the inputs is a whole sequence.

Every token of a sequence carries the loss of the sequence, so that the aggregation sequence_mean gives the papers'
mean over sequences. A row without a trained token is 0.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from algorithms.inputs import LossInputs, TokenLoss
from algorithms.losses import MAX_LOG_RATIO, ClipOptions, clipped_surrogate
from algorithms.registry import Options, policy_loss


def mean_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Mean log-ratio of each sequence's trained tokens: the logarithm of the ratios' geometric mean.

    Args:
        log_ratio: [B, T] float, nats; entries outside the mask play no part and get no gradient.
        mask: [B, T] bool, the trained tokens.
    Returns:
        [B, 1] float, within ±20; 0 for a row without a trained token.
    """
    inside = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    mean = inside.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


class GspoOptions(ClipOptions):
    """Bounds of the sequence's ratio, which as a geometric mean stays much closer to 1 than a token's."""

    low: float = Field(3e-4, gt=0.0, lt=1.0, description="The ratio is clipped below at 1 - low.")
    high: float = Field(4e-4, gt=0.0, description="The ratio is clipped above at 1 + high.")


@policy_loss(
    "gspo",
    options=GspoOptions,
    unit="sequence",
    formula="−min(s·A, clip(s, 1 − low, 1 + high)·A), s = (Π r)^(1/tokens)",
    source="GSPO, arXiv 2507.18071, eq. 5 to 7",
    use_when="Mixtures of experts and long answers, with one reward an answer and sequence_mean.",
)
def gspo(inputs: LossInputs, options: GspoOptions) -> TokenLoss:
    """-min(s A, clip(s, 1 - low, 1 + high) A), with s the geometric mean of the sequence's ratios pi / pi_proximal.

    GSPO (Zheng et al., arXiv 2507.18071, eq. 5 to 7). Sequences are clipped whole: either all tokens of one learn or
    none. The paper's aggregation is sequence_mean.

    Returns:
        [B, T]: the sequence's loss on each of its trained tokens; its gradient flows to all of them.
    """
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    ratio = mean_log_ratio(log_ratio, inputs.mask).exp().expand_as(log_ratio)
    return clipped_surrogate(ratio, inputs, options.low, options.high)


@policy_loss(
    "gspo_token",
    options=GspoOptions,
    formula="−min(s′·A, clip(s′, 1 − low, 1 + high)·A), s′ = sg(s)·π/sg(π)",
    source="GSPO, arXiv 2507.18071, eq. 13 and 14",
    use_when="As gspo, where tokens of one answer have advantages of their own (turns, a critic).",
)
def gspo_token(inputs: LossInputs, options: GspoOptions) -> TokenLoss:
    """-min(s' A, clip(s', 1 - low, 1 + high) A), with s' = sg(s) pi / sg(pi) at each token and sg the stop-gradient.

    GSPO-token (Zheng et al., arXiv 2507.18071, eq. 13 and 14): the value of the sequence's ratio s, the gradient of
    the token's own log-probability, so that each token can carry its own advantage. With one advantage a sequence and
    the aggregation sequence_mean, value and gradient are those of :func:`gspo`.
    """
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    ratio = mean_log_ratio(log_ratio.detach(), inputs.mask).exp() * (inputs.log_probs - inputs.log_probs.detach()).exp()
    return clipped_surrogate(ratio, inputs, options.low, options.high)


class GmpoOptions(Options):
    """Bounds of each token's log-ratio."""

    low: float = Field(0.4, gt=0.0, description="A token's ratio is clipped below at exp(-low).")
    high: float = Field(0.4, gt=0.0, description="A token's ratio is clipped above at exp(high).")


@policy_loss(
    "gmpo",
    options=GmpoOptions,
    unit="sequence",
    formula="−A·(Π clipped r)^(1/tokens), r within exp(−low), exp(high)",
    source="GMPO, arXiv 2507.20673",
    use_when="One reward an answer and outlier ratios: a geometric mean with wide bounds on each token.",
)
def gmpo(inputs: LossInputs, options: GmpoOptions) -> TokenLoss:
    """-A times the geometric mean of the sequence's ratios pi / pi_proximal, each clipped as PPO clips it.

    GMPO (Zhao et al., arXiv 2507.20673): where A > 0 the ratio is bounded above by exp(high), where A < 0 below by
    exp(-low); the other side stays free. Unlike :func:`gspo`, a token that has moved far
    is clipped alone. The paper's aggregation is sequence_mean.

    Returns:
        [B, T]: the sequence's loss on each of its trained tokens; its gradient flows to those not clipped.
    """
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    advantages = inputs.advantages
    is_low = (log_ratio < -options.low) & (advantages < 0)
    is_high = (log_ratio > options.high) & (advantages > 0)
    bounded = torch.where(is_low | is_high, log_ratio.clamp(-options.low, options.high), log_ratio)
    ratio = mean_log_ratio(bounded, inputs.mask).exp()
    return TokenLoss(-ratio * advantages, is_low, is_high)


class ToprOptions(Options):
    """Bounds of the sequence's importance weight, by the sign of the advantage."""

    positive_low: float = Field(1.0, ge=0.0, description="Least weight where the advantage is positive.")
    positive_high: float = Field(1.0, ge=0.0, description="Greatest weight where the advantage is positive.")
    negative_low: float = Field(0.0, ge=0.0, description="Least weight where the advantage is negative.")
    negative_high: float = Field(1.0, ge=0.0, description="Greatest weight where the advantage is negative.")

    @model_validator(mode="after")
    def _is_in_order(self) -> ToprOptions:
        for sign in ("positive", "negative"):
            low, high = getattr(self, f"{sign}_low"), getattr(self, f"{sign}_high")
            if low > high:
                raise ValueError(
                    f"{sign}_low = {low:g} is above {sign}_high = {high:g}, so no weight is within. Lower {sign}_low "
                    f"to at most {high:g}"
                )
        return self


@policy_loss(
    "topr",
    options=ToprOptions,
    unit="sequence",
    corrects_mismatch=True,
    formula="−sg(w)·A·log π, w = 1 where A > 0, min(Π π/π_behaviour, 1) where A < 0",
    source="TOPR, arXiv 2503.14286",
    use_when="Very stale or offline samples: good answers are imitated, bad ones left once they are unlikely.",
)
def topr(inputs: LossInputs, options: ToprOptions) -> TokenLoss:
    """-sg(w) A log pi, with w the product of the sequence's ratios pi / pi_behaviour, tapered by the sign of A.

    Tapered off-policy REINFORCE (Le Roux et al., arXiv 2503.14286): w lies within [positive_low, positive_high] where
    A > 0 and within [negative_low, negative_high] where A < 0. The defaults are the paper's: answers that were good
    weigh 1, as in supervised learning; answers that were bad lose their weight as the policy leaves them, so that
    their loss can't grow without bound. It weighs by the behaviour policy itself: the rollout correction must be none.
    Over a sequence the paper sums: aggregation sequence_sum, or constant_length.

    Clipped are the tokens of sequences with A < 0 whose weight was bounded.
    """
    log_ratio = (inputs.log_probs - inputs.behaviour_log_probs).detach()
    whole = log_ratio.sum(-1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_ratio)
    is_worse = inputs.advantages < 0
    weight = torch.where(
        is_worse,
        whole.clamp(options.negative_low, options.negative_high),
        whole.clamp(options.positive_low, options.positive_high),
    )
    return TokenLoss(
        -weight * inputs.advantages * inputs.log_probs,
        is_clipped_low=is_worse & (whole < options.negative_low),
        is_clipped_high=is_worse & (whole > options.negative_high),
    )
