"""Policy losses that weigh each token by the behaviour policy themselves, and so need no rollout correction."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.inputs import BatchTokens, LossInputs, TokenLoss
from algorithms.losses import ClipOptions, clip, marks_of, ratio_of
from algorithms.registry import Need, Options, policy_loss

KL_EPSILON = 1e-8
"""Keeps the logarithm of the other tokens' probability finite where the sampled token has all of it."""


class DecoupledOptions(ClipOptions):
    """Bounds of the ratio to the proximal policy, and of the weight of the behaviour policy."""

    max_weight: float | None = Field(
        None, ge=1.0, description="Greatest pi_proximal / pi_behaviour; none is the paper's."
    )


@policy_loss(
    "decoupled",
    options=DecoupledOptions,
    corrects_mismatch=True,
    needs=frozenset({Need.PROXIMAL_LOG_PROBS}),
    formula="(π_proximal/π_behaviour)·clip's, r = π/π_proximal",
    source="Decoupled PPO, arXiv 2110.00641, eq. 10; AReaL, arXiv 2505.24298",
    use_when="Asynchronous training: old samples are weighed by who made them, clipped around who is trained.",
)
def decoupled(inputs: LossInputs, options: DecoupledOptions) -> TokenLoss:
    """-(pi_proximal / pi_behaviour) min(r A, clip(r, 1 - low, 1 + high) A), with r = pi / pi_proximal.

    Decoupled PPO (Hilton et al., arXiv 2110.00641, eq. 10), as AReaL trains with it (arXiv 2505.24298): the importance
    weight is to the policy that sampled, the trust region around the policy at the start of the update. The same as
    `clip` with the correction token_truncated bounded by `max_weight`: the rollout correction must be none.
    """
    weight = ratio_of(inputs.proximal_log_probs, inputs.behaviour_log_probs)
    if options.max_weight is not None:
        weight = weight.clamp(max=options.max_weight)
    loss = clip(inputs, options)
    return TokenLoss(weight * loss.values, loss.is_clipped_low, loss.is_clipped_high)


class DppoOptions(Options):
    """The trust region."""

    max_divergence: float = Field(0.15, gt=0.0, description="Divergence at a token beyond which it is masked.")
    max_ratio: float | None = Field(
        20.0, ge=1.0, description="Greatest weight pi / pi_behaviour of a token; none leaves it unbounded."
    )


class DppoKlOptions(DppoOptions):
    """The trust region, in nats."""

    max_divergence: float = Field(0.05, gt=0.0, description="KL at a token, in nats, beyond which it is masked.")


def _divergence_masked(inputs: LossInputs, divergence: Tensor, options: DppoOptions) -> TokenLoss:
    """-M min(r, max_ratio) A by value, and its gradient with the weight held: -M min(r, max_ratio) A grad log pi."""
    log_probs, advantages = inputs.log_probs, inputs.advantages
    ratio = ratio_of(log_probs, inputs.behaviour_log_probs).detach()
    is_outside = divergence > options.max_divergence
    is_low = is_outside & (advantages < 0) & (ratio < 1)
    is_high = is_outside & (advantages > 0) & (ratio > 1)
    weight = ratio if options.max_ratio is None else ratio.clamp(max=options.max_ratio)
    weight = weight.masked_fill(is_low | is_high, 0.0)
    # 1 by value; its gradient is that of log pi.
    one = 1 + log_probs - log_probs.detach()
    return TokenLoss(-weight * advantages * one, is_low, is_high)


@policy_loss(
    "dppo_tv",
    options=DppoOptions,
    corrects_mismatch=True,
    formula="−M·r·A, r = π/π_behaviour; M = 0 where A·(r − 1) > 0 and |π − π_behaviour| > max_divergence",
    source="DPPO (binary TV), arXiv 2602.04879",
    use_when="Mismatch between trainer and generator: rare tokens aren't clipped for ratios that mean little.",
)
def dppo_tv(inputs: LossInputs, options: DppoOptions) -> TokenLoss:
    """-M r A, with r = pi / pi_behaviour and M = 0 on tokens that would move further out of the trust region.

    Divergence PPO with the binary total variation (Qi et al., arXiv 2602.04879): the divergence at a token is
    |pi - pi_behaviour| of the sampled token, i.e. the total variation between "this token" and "any other". Masked are
    tokens beyond `max_divergence` whose update would take them further away (A > 0 and r > 1, or A < 0 and r < 1). The
    trust region is around the behaviour policy, as the paper finds it must be: the rollout correction must be none.
    `max_ratio` bounds the weight and leaves the gradient (the authors' code does so at 20; the formula has no bound).
    """
    divergence = (inputs.log_probs.detach().exp() - inputs.behaviour_log_probs.exp()).abs()
    return _divergence_masked(inputs, divergence, options)


@policy_loss(
    "dppo_kl",
    options=DppoKlOptions,
    corrects_mismatch=True,
    formula="−M·r·A, r = π/π_behaviour; M = 0 where A·(r − 1) > 0 and binary KL(π_behaviour‖π) > max_divergence",
    source="DPPO (binary KL), arXiv 2602.04879",
    use_when="As dppo_tv, with a trust region in nats.",
)
def dppo_kl(inputs: LossInputs, options: DppoKlOptions) -> TokenLoss:
    """As :func:`dppo_tv`, with the binary KL divergence mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)).

    mu is the behaviour policy's probability of the sampled token (Qi et al., arXiv 2602.04879).
    """
    log_probs, behaviour = inputs.log_probs.detach(), inputs.behaviour_log_probs
    mu = behaviour.exp()
    # -expm1(log p) is 1 - p without its rounding error where p is nearly 1.
    others = (-log_probs.expm1()).clamp(min=0) + KL_EPSILON
    behaviour_others = (-behaviour.expm1()).clamp(min=0) + KL_EPSILON
    divergence = mu * (behaviour - log_probs) + (1 - mu) * (behaviour_others / others).log()
    return _divergence_masked(inputs, divergence, options)


class M2poOptions(Options):
    """The second-moment budget."""

    max_second_moment: float = Field(
        0.04, gt=0.0, description="Greatest mean squared log-ratio of the tokens that are kept."
    )


def second_moment_marks(tokens: BatchTokens, options: M2poOptions) -> Tensor:
    """1 on tokens that M2PO masks, 0 elsewhere; from the whole optimiser batch at the start of the update.

    Of the tokens that are moving away from the behaviour policy in the direction of their advantage (A > 0 and r > 1,
    or A < 0 and r < 1, with r = pi_proximal / pi_behaviour), those with the greatest (log r)^2 are masked until the
    mean of the rest is at most `max_second_moment` (M2PO, arXiv 2510.01161, algorithm 1).

    Returns:
        [tokens] float32.
    Raises:
        NonFiniteError: a log-probability or an advantage is NaN or infinite inside the mask.
    """
    log_ratio = tokens.proximal_log_probs.double() - tokens.behaviour_log_probs.double()
    require_finite("the log-ratio of proximal and behaviour policy", log_ratio, tokens.mask, index_name="token")
    require_finite("advantages", tokens.advantages, tokens.mask, index_name="token")
    is_moving = tokens.mask & (log_ratio * tokens.advantages > 0)
    square, order = torch.sort(log_ratio[is_moving].square(), stable=True)
    count = torch.arange(1, len(square) + 1, device=square.device, dtype=square.dtype)
    marks = torch.zeros_like(log_ratio, dtype=torch.float32)
    # Sorted upwards, the running mean only grows: beyond the budget it stays beyond.
    marks[is_moving.nonzero().squeeze(-1)[order]] = (square.cumsum(0) / count > options.max_second_moment).float()
    return marks


@policy_loss(
    "m2po",
    options=M2poOptions,
    corrects_mismatch=True,
    prepare=second_moment_marks,
    needs=frozenset({Need.PROXIMAL_LOG_PROBS}),
    formula="−M·r·A, r = π/π_behaviour; M = 0 on the greatest (log r)² until their mean ≤ max_second_moment",
    source="M2PO, arXiv 2510.01161",
    use_when="Samples stale by many versions: only the outliers that carry the variance are left out.",
)
def m2po(inputs: LossInputs, options: M2poOptions) -> TokenLoss:
    """-M r A, with r = pi / pi_behaviour and M = 0 on the outliers of the batch's second moment.

    Second-moment trust policy optimisation (Zheng et al., arXiv 2510.01161). M is made once, by
    :func:`second_moment_marks`, from the whole optimiser batch and the policy at the start of the update, so that it
    doesn't depend on micro-batches and ranks; a second update on the same batch keeps it, where the paper ranks again.
    The ratio is to the behaviour policy: the rollout correction must be none.
    """
    is_masked = marks_of(inputs)
    ratio = ratio_of(inputs.log_probs, inputs.behaviour_log_probs)
    values = torch.where(is_masked, torch.zeros_like(ratio), -ratio * inputs.advantages)
    return TokenLoss(values, is_masked & (inputs.advantages < 0), is_masked & (inputs.advantages > 0))
