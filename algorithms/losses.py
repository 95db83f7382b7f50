"""Policy losses with a ratio for each token, before the rollout correction and aggregation.

Losses with one ratio a sequence are in losses_sequence.py, losses by the whole batch's covariances in
losses_covariance.py, and losses that weigh by the behaviour policy themselves in losses_behaviour.py.
"""

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


def clipped_surrogate(ratio: Tensor, inputs: LossInputs, low: float, high: float) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A) by token, whatever the ratio is one of.

    Args:
        ratio: [B, T] float; carries the gradient.
        low, high: how far the ratio may fall below and rise above 1.
    """
    advantages = inputs.advantages
    values = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return TokenLoss(
        values,
        is_clipped_low=(ratio < 1 - low) & (advantages < 0),
        is_clipped_high=(ratio > 1 + high) & (advantages > 0),
    )


@policy_loss(
    "clip",
    options=ClipOptions,
    formula="−min(r·A, clip(r, 1 − low, 1 + high)·A)",
    source="PPO, arXiv 1707.06347, eq. 7; clip-higher: DAPO, arXiv 2503.14476, eq. 10",
    use_when="The usual choice; raise `high` to 0.28 where entropy collapses.",
)
def clip(inputs: LossInputs, options: ClipOptions) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), with r = pi / pi_proximal.

    PPO (arXiv 1707.06347, eq. 7), with a bound of its own on each side (DAPO, arXiv 2503.14476, eq. 10). With the
    rollout correction it is the decoupled objective (arXiv 2110.00641), with behaviour and proximal policy apart.
    """
    ratio = ratio_of(inputs.log_probs, inputs.proximal_log_probs)
    return clipped_surrogate(ratio, inputs, options.low, options.high)


class DualClipOptions(ClipOptions):
    """Bounds of the ratio, with one more for actions that were worse than expected."""

    dual: float = Field(
        3.0, gt=1.0, description="Where the advantage is negative, the loss stops growing at this ratio."
    )


@policy_loss(
    "dual_clip",
    options=DualClipOptions,
    formula="clip's; where A < 0: min(clip's, −dual·A)",
    source="Dual-clip PPO, arXiv 1912.09729, eq. 5",
    use_when="Stale samples, where a ratio far above 1 under a negative advantage would dominate the gradient.",
)
def dual_clip(inputs: LossInputs, options: DualClipOptions) -> TokenLoss:
    """The clipped loss, bounded above by -c A where A < 0 (Ye et al., arXiv 1912.09729, eq. 5).

    `clip` leaves r A unbounded where A < 0 and r is large; here the gradient of such a token is 0. A loss of its own
    rather than an option of `clip`, so that `clip` has exactly PPO's two bounds.
    """
    ratio = ratio_of(inputs.log_probs, inputs.proximal_log_probs)
    single = clipped_surrogate(ratio, inputs, options.low, options.high)
    is_worse = inputs.advantages < 0
    bound = -options.dual * inputs.advantages
    is_high = torch.where(is_worse, ratio > options.dual, (ratio > 1 + options.high) & (inputs.advantages > 0))
    values = torch.where(is_worse, torch.minimum(single.values, bound), single.values)
    return TokenLoss(values, single.is_clipped_low, is_high)


def marks_of(inputs: LossInputs) -> Tensor:
    """[B, T] bool, the tokens that the loss's `prepare` marked.

    Raises:
        ValueError: the inputs have none.
    """
    if inputs.marks is None:
        raise ValueError(
            "this loss needs marks from the whole optimiser batch, and the inputs have none. Call its prepare on all "
            "tokens before the first micro-batch, and pass what it returns as marks"
        )
    return inputs.marks > 0


class CispoOptions(Options):
    """Bounds of the importance weight."""

    low: float = Field(1.0, gt=0.0, le=1.0, description="The weight is at least 1 - low; 1 is no bound, the paper's.")
    high: float = Field(4.0, gt=0.0, description="The weight is at most 1 + high.")


@policy_loss(
    "cispo",
    options=CispoOptions,
    formula="−sg(clip(r, 1 − low, 1 + high))·A·log π",
    source="CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5",
    use_when="Long reasoning with several updates a batch: rare tokens that matter keep a gradient, however they move.",
)
def cispo(inputs: LossInputs, options: CispoOptions) -> TokenLoss:
    """-sg(clip(r, 1 - low, 1 + high)) A log pi, with r = pi / pi_proximal and sg the stop-gradient.

    MiniMax-M1 (arXiv 2506.13585, eq. 4 and 5): the weight is bounded, not the update, so that no token loses its
    gradient. The clipped tokens reported are those whose weight was bounded.
    """
    ratio = ratio_of(inputs.log_probs, inputs.proximal_log_probs).detach()
    low, high = 1 - options.low, 1 + options.high
    values = -ratio.clamp(low, high) * inputs.advantages * inputs.log_probs
    return TokenLoss(values, is_clipped_low=ratio < low, is_clipped_high=ratio > high)


class SapoOptions(Options):
    """Temperatures of the gate; the higher, the faster a token that has moved loses its gradient."""

    positive: float = Field(1.0, gt=0.0, description="Temperature where the advantage is positive.")
    negative: float = Field(1.05, gt=0.0, description="Temperature elsewhere; above `positive` is steadier.")


@policy_loss(
    "sapo",
    options=SapoOptions,
    formula="−(4/τ)·σ(τ·(r − 1))·A, τ by the sign of A",
    source="SAPO, arXiv 2511.20347",
    use_when="As clip, where its hard edge costs stability: mixtures of experts, long answers.",
)
def sapo(inputs: LossInputs, options: SapoOptions) -> TokenLoss:
    """-(4 / tau) sigmoid(tau (r - 1)) A, with r = pi / pi_proximal (Gao et al., arXiv 2511.20347).

    tau is `positive` where A > 0 and `negative` elsewhere. The gradient is that of r A times 4 p (1 - p), with p the
    sigmoid: 1 on policy, falling smoothly on both sides. Nothing is clipped.
    """
    ratio = ratio_of(inputs.log_probs, inputs.proximal_log_probs)
    temperature = torch.full_like(ratio, options.negative).masked_fill(inputs.advantages > 0, options.positive)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return TokenLoss(-gate * inputs.advantages)


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
    "gpg",
    formula="−A·log π",
    source="GPG, arXiv 2504.02546",
    use_when="With the advantage estimator gpg, whose scale makes up for groups that teach nothing.",
)
def gpg(inputs: LossInputs, options: Options) -> TokenLoss:
    """-A log pi: the objective itself, without ratio, clipping or KL (Chu et al., arXiv 2504.02546).

    The same as :func:`reinforce`. The paper's factor for groups whose rewards are all equal belongs to the advantages
    (the estimator `gpg`), so that it is not counted twice; its aggregation is token_mean.
    """
    return reinforce(inputs, options)


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
