"""Preference losses on single answers, found good or bad, and what they remember or need of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.finite import require_finite
from algorithms.preferences.inputs import (
    BetaOptions,
    PreferenceOutcome,
    Sums,
    UnpairedInputs,
    preference_loss,
    weighted_sum,
)


class KTOOptions(BetaOptions):
    """Options of KTO."""

    desirable_weight: float = Field(1.0, ge=0.0, description="Weight of desirable answers (the paper's lambda_D).")
    undesirable_weight: float = Field(1.0, ge=0.0, description="Weight of undesirable answers (lambda_U).")
    has_baseline: bool = Field(
        True, description="Compare with the KL from the reference, estimated on mismatched answers; else with 0."
    )


class BCOOptions(BetaOptions):
    """Options of BCO."""

    decay: float = Field(
        0.9, ge=0.0, le=1.0, description="What is left after a step of the past in the reward shift; 1 keeps all of it."
    )
    max_density_ratio: float = Field(
        10.0, gt=0.0, description="Upper bound of an undesirable answer's weight, where `desirability` is given."
    )
    min_density_ratio: float = Field(0.5, ge=0.0, description="Lower bound of that weight.")


def mismatched_answers(prompt: Tensor) -> Tensor:
    """For each answer one that was given to another prompt, for KTO's KL baseline.

    Args:
        prompt: [answers] int64, the prompt each answers.
    Returns:
        [answers] int64, index of an answer to another prompt; with as many answers to each prompt, a permutation.
    Raises:
        ValueError: all answers are to one prompt.
    """
    if len(prompt) == 0 or bool((prompt == prompt[0]).all()):
        raise ValueError(
            f"the KL baseline needs answers to at least two prompts, got {len(prompt)} to one: put more prompts in a "
            "batch, or set has_baseline: false"
        )
    order = prompt.argsort(stable=True)
    _, inverse, counts = prompt.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    groups = inverse[order]
    place = torch.arange(len(prompt), device=prompt.device)
    rank = place - (ends - counts)[groups]
    partner = (ends[groups] + rank % (len(prompt) - counts[groups])) % len(prompt)
    return torch.empty_like(order).scatter_(0, order, order[partner])


def mismatched_sum(policy: Tensor, reference: Tensor, weights: Tensor | None = None) -> Tensor:
    """What one part of the batch adds to KTO's KL baseline; add up over micro-batches and ranks.

    Args:
        policy: [answers] float, nats, log-probability of an answer to another prompt (:func:`mismatched_answers`).
        reference: [answers] float, nats, the same of the reference.
        weights: [answers] float, 0 for padding; None for 1 each.
    Returns:
        [2] float, without gradient: the sum of log-ratios, and the weight it was taken over.
    """
    require_finite("the policy's log-probability (mismatched)", policy, index_name="answer")
    require_finite("the reference's log-probability (mismatched)", reference, index_name="answer")
    return weighted_sum(policy - reference, torch.ones_like(policy) if weights is None else weights)


def kl_baseline(total: Tensor) -> Tensor:
    """KTO's z_0 = max(0, mean of log pi(y')/pi_reference(y') over mismatched answers y') (arXiv 2402.01306, sec. 4).

    It belongs to the whole batch and carries no gradient, so it is made before the first micro-batch's loss: one
    forward pass of policy and reference over the mismatched answers. The mean is cut at 0, not each log-ratio.

    Args:
        total: [2] float, the sum of :func:`mismatched_sum` over all micro-batches and ranks.
    Returns:
        [] float, nats, at least 0.
    """
    return (total[0] / total[1]).clamp(min=0.0)


def _unpaired_sums(inputs: UnpairedInputs, rewards: Tensor) -> Sums:
    weights, is_desirable = inputs.answer_weights, inputs.is_desirable
    return {
        "desirable_reward": weighted_sum(rewards, weights * is_desirable),
        "undesirable_reward": weighted_sum(rewards, weights * ~is_desirable),
    }


@preference_loss(
    "kto",
    options=KTOOptions,
    is_paired=False,
    formula="λ_D σ(z₀ − r) for desirable answers, λ_U σ(r − z₀) for others,  r = β log π(y)/π_ref(y),  z₀ = β KL",
    source="Ethayarajh et al., arXiv 2402.01306, eq. 8",
    use_when="Thumbs up or down on single answers, also when the two kinds are far from balanced.",
)
def kto(inputs: UnpairedInputs, options: KTOOptions) -> PreferenceOutcome:
    """Kahneman-Tversky optimisation (Ethayarajh et al., arXiv 2402.01306, eq. 8): mean of lambda_y - v(x, y).

    v = lambda_D sigmoid(beta (log-ratio - z_0)) for desirable, lambda_U sigmoid(beta (z_0 - log-ratio)) for
    undesirable answers, z_0 the batch's `kl_baseline`, without gradient. The paper asks for lambda_D n_D / (lambda_U
    n_U) near 1 to 4/3, with n the numbers of answers of a kind.

    Returns:
        values [answers], from 0 to their lambda.
    Raises:
        ValueError: there is no `kl_baseline` although the options ask for one.
    """
    rewards = options.beta * inputs.answers.log_ratio
    baseline = rewards.detach().new_zeros(())
    if options.has_baseline:
        if inputs.kl_baseline is None:
            raise ValueError("the loss kto needs kl_baseline in its inputs; make it, or set has_baseline: false")
        baseline = inputs.kl_baseline.detach()
    above = rewards - options.beta * baseline
    values = torch.where(
        inputs.is_desirable,
        options.desirable_weight * torch.sigmoid(-above),
        options.undesirable_weight * torch.sigmoid(above),
    )
    sums = _unpaired_sums(inputs, rewards)
    sums["kl_baseline"] = weighted_sum(baseline.expand_as(rewards), inputs.answer_weights)
    return PreferenceOutcome(values, inputs.answer_weights, sums)


@dataclass(frozen=True)
class RewardShift:
    """Moving means of desirable and undesirable answers' implicit rewards, and the shift between them.

    Attributes:
        decay: what is left of the past after a step; 1 keeps all of it, 0 only the last step.
        desirable, desirable_weight: decayed sum of rewards, and of the weights it was taken over.
        undesirable, undesirable_weight: the same of the others.
    """

    decay: float
    desirable: float = 0.0
    desirable_weight: float = 0.0
    undesirable: float = 0.0
    undesirable_weight: float = 0.0

    @property
    def value(self) -> float:
        """delta, half of the sum of both means; of one kind alone its mean; 0 before the first step."""
        kinds = ((self.desirable, self.desirable_weight), (self.undesirable, self.undesirable_weight))
        found = [total / weight for total, weight in kinds if weight > 0]
        return sum(found) / len(found) if found else 0.0

    def after(self, sums: Mapping[str, Tensor]) -> RewardShift:
        """The shift after a step.

        Args:
            sums: of the whole batch, with "desirable_reward" and "undesirable_reward".
        Raises:
            NonFiniteError: a sum is NaN or infinite.
        """
        good, bad = sums["desirable_reward"], sums["undesirable_reward"]
        require_finite("the sum of desirable and undesirable rewards", torch.cat([good, bad]))
        return RewardShift(
            self.decay,
            self.decay * self.desirable + float(good[0]),
            self.decay * self.desirable_weight + float(good[1]),
            self.decay * self.undesirable + float(bad[0]),
            self.decay * self.undesirable_weight + float(bad[1]),
        )


def _first_shift(options: Any) -> RewardShift:
    return RewardShift(options.decay)


def shifted_classification(rewards: Tensor, is_desirable: Tensor, shift: float) -> Tensor:
    """[answers] float, -log sigmoid(r - shift) of desirable answers, -log sigmoid(shift - r) of the others."""
    above = rewards - shift
    return -logsigmoid(torch.where(is_desirable, above, -above))


@preference_loss(
    "bco",
    options=BCOOptions,
    is_paired=False,
    initial_state=_first_shift,
    formula="−log σ(r − δ) for desirable answers, −w log σ(δ − r) for others,  δ = (E⁺[r] + E⁻[r])/2,  w = p/(1 − p)",
    source="Jung et al., arXiv 2404.04656, the BCO loss with reward shift",
    use_when="Labels on single answers, where a classifier's logit should be the implicit reward.",
)
def bco(inputs: UnpairedInputs, options: BCOOptions) -> PreferenceOutcome:
    """Binary classifier optimisation: the implicit reward r, less a shift delta, classifies answers (arXiv 2404.04656).

    -log sigmoid(r - delta) for desirable, -w log sigmoid(delta - r) for undesirable answers, r = beta log(pi /
    pi_reference), delta half of the sum of both kinds' mean reward. Delta comes from the state, the means up to the
    step before, and so doesn't depend on micro-batches; public code moves it within the step it is used in. It starts
    at 0, where rewards do when the policy starts as the reference.

    Where `desirability` p is given, w = p / (1 - p), cut to the bounds of the options, makes up for prompts that
    differ between the kinds (the paper's underlying distribution matching); else w = 1.

    Returns:
        values [answers]; sums of desirable_reward and undesirable_reward, which the state learns from.
    """
    rewards = options.beta * inputs.answers.log_ratio
    shift = inputs.state.value if isinstance(inputs.state, RewardShift) else 0.0
    values = shifted_classification(rewards, inputs.is_desirable, shift)
    if inputs.desirability is not None:
        ratio = inputs.desirability / (1 - inputs.desirability)
        ratio = ratio.clamp(options.min_density_ratio, options.max_density_ratio).to(values)
        values = torch.where(inputs.is_desirable, values, ratio * values)
    sums = _unpaired_sums(inputs, rewards)
    weights = inputs.answer_weights
    is_right = torch.where(inputs.is_desirable, rewards > shift, rewards < shift)
    sums["accuracy"] = weighted_sum(is_right, weights)
    sums["reward_shift"] = weighted_sum(torch.full_like(rewards, shift), weights)
    return PreferenceOutcome(values, weights, sums)
