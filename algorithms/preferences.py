"""Preference losses on text: from log-probabilities of preferred and other answers to a loss by pair or by answer.

The multimodal family is in multimodal_preferences.py; pairs from the policy's own groups are made in
preference_pairs.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.finite import require_finite
from algorithms.preference_inputs import (
    PreferenceInputs,
    PreferenceOutcome,
    Sums,
    UnpairedInputs,
    preference_loss,
    weighted_sum,
)
from algorithms.registry import PREFERENCE_LOSSES, Options

MAX_TOKEN_MEAN = -1e-6
"""Nats; nearest to certainty that a mean log-probability may come in odds, which are infinite at 0."""


class BetaOptions(Options):
    """The switch of losses with an implicit reward beta log(pi / pi_reference)."""

    beta: float = Field(
        0.1, gt=0.0, description="Strength of the pull to the reference; the implicit reward's scale a nat."
    )


class FlipOptions(BetaOptions):
    """Switches of losses that expect wrong labels."""

    flip_rate: float = Field(0.1, ge=0.0, lt=0.5, description="Share of pairs whose label is the wrong way round.")


class IPOOptions(Options):
    """Switches of IPO."""

    beta: float = Field(
        0.1, gt=0.0, description="Strength of the pull to the reference (the paper's tau); the margin aimed at is 1/2β."
    )
    is_length_averaged: bool = Field(
        False, description="Take mean log-probabilities a token instead of the paper's sums over the answer."
    )


class SimPOOptions(Options):
    """Switches of SimPO."""

    beta: float = Field(2.0, gt=0.0, description="Scale of the reward, the mean log-probability a token.")
    gamma: float = Field(
        1.0, ge=0.0, description="Reward by which the chosen answer should win; the paper's ratio is gamma / beta."
    )


class ORPOOptions(Options):
    """Switches of ORPO."""

    odds_weight: float = Field(0.1, ge=0.0, description="Weight of the odds-ratio term (the paper's lambda).")


class KTOOptions(BetaOptions):
    """Switches of KTO."""

    desirable_weight: float = Field(1.0, ge=0.0, description="Weight of desirable answers (the paper's lambda_D).")
    undesirable_weight: float = Field(1.0, ge=0.0, description="Weight of undesirable answers (lambda_U).")
    has_baseline: bool = Field(
        True, description="Compare with the KL from the reference, estimated on mismatched answers; else with 0."
    )


class BCOOptions(BetaOptions):
    """Switches of BCO."""

    decay: float = Field(
        0.9, ge=0.0, le=1.0, description="What is left after a step of the past in the reward shift; 1 keeps all of it."
    )
    max_density_ratio: float = Field(
        10.0, gt=0.0, description="Upper bound of an undesirable answer's weight, where `desirability` is given."
    )
    min_density_ratio: float = Field(0.5, ge=0.0, description="Lower bound of that weight.")


def preference_outcome(
    name: str, inputs: PreferenceInputs | UnpairedInputs, options: Mapping[str, Any] | Options
) -> PreferenceOutcome:
    """The registered preference loss `name` on `inputs`; starts its state where it has one and none is given.

    Args:
        options: its switches, by name or as read before.
    Raises:
        RegistryError: no such loss, or no such switch.
        ValueError: the inputs lack something the loss needs, or are paired for an unpaired one; names it.
    """
    entry = PREFERENCE_LOSSES.get(name)
    read = options if isinstance(options, Options) else entry.read_options(options)
    if entry.is_paired and not isinstance(inputs, PreferenceInputs):
        raise ValueError(f"the loss {name} compares answers in pairs and takes PreferenceInputs, not single answers")
    if not entry.is_paired and isinstance(inputs, PreferenceInputs):
        inputs = inputs.answers(inputs.state)
    if inputs.state is None and entry.initial_state is not None:
        inputs = replace(inputs, state=entry.initial_state(read))
    absent = sorted(need for need in entry.needs if not _has(inputs, need))
    if entry.needs_negative_image and not _has(inputs, "chosen_negative_image"):
        absent.append("chosen_negative_image")
    if absent:
        raise ValueError(f"the loss {name} needs {', '.join(absent)} in its inputs, which weren't given")
    outcome: PreferenceOutcome = entry.function(inputs, read)
    return outcome


def _has(inputs: PreferenceInputs | UnpairedInputs, field: str) -> bool:
    answers = (inputs.chosen, inputs.rejected) if isinstance(inputs, PreferenceInputs) else (inputs.answers,)
    if hasattr(inputs, field):
        return getattr(inputs, field) is not None
    if hasattr(answers[0], field):
        return all(getattr(each, field) is not None for each in answers)
    return all(each.by_token is not None and getattr(each.by_token, field) is not None for each in answers)


def paired_outcome(
    inputs: PreferenceInputs, values: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, **metrics: Tensor
) -> PreferenceOutcome:
    """The outcome of a paired loss, with what every one of them reports.

    Args:
        values: [pairs] float, the loss of each.
        chosen_rewards, rejected_rewards: [pairs] float, implicit rewards.
        metrics: [pairs] float each, further ones.
    Returns:
        sums of chosen_reward, rejected_reward, margin, accuracy (a draw counts a half) and of `metrics`.
    """
    weights = inputs.pair_weights
    margins = (chosen_rewards - rejected_rewards).detach()
    reported = {
        "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards,
        "margin": margins,
        "accuracy": (margins.sign() + 1) / 2,
        **metrics,
    }
    return PreferenceOutcome(values, weights, {name: weighted_sum(each, weights) for name, each in reported.items()})


def log_ratio_margin(inputs: PreferenceInputs) -> Tensor:
    """[pairs] float, nats: h = log pi(y_w)/pi_reference(y_w) - log pi(y_l)/pi_reference(y_l)."""
    return inputs.chosen.log_ratio - inputs.rejected.log_ratio


def _implicit_rewards(inputs: PreferenceInputs, beta: float) -> tuple[Tensor, Tensor]:
    return beta * inputs.chosen.log_ratio, beta * inputs.rejected.log_ratio


@preference_loss(
    "dpo",
    options=BetaOptions,
    formula="−log σ(β h),  h = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)",
    source="Rafailov et al., arXiv 2305.18290, eq. 7",
    use_when="Pairs whose labels you trust; the plain choice to compare others with.",
)
def dpo(inputs: PreferenceInputs, options: BetaOptions) -> PreferenceOutcome:
    """Direct preference optimisation: -log sigmoid(beta h) (Rafailov et al., arXiv 2305.18290, eq. 7).

    h is the chosen answer's log-ratio to the reference less the rejected one's, sums over tokens.

    Returns:
        values [pairs]; log 2 where the policy is the reference. Finite for any finite h: about -beta h for very
        negative ones.
    """
    return paired_outcome(
        inputs, -logsigmoid(options.beta * log_ratio_margin(inputs)), *_implicit_rewards(inputs, options.beta)
    )


@preference_loss(
    "cdpo",
    options=FlipOptions,
    formula="−(1 − ε) log σ(β h) − ε log σ(−β h)",
    source="Mitchell, “A note on DPO with noisy preferences and relationship to IPO”, 2023",
    use_when="Some labels are wrong and the margin should stop growing at log((1 − ε)/ε)/β.",
)
def cdpo(inputs: PreferenceInputs, options: FlipOptions) -> PreferenceOutcome:
    """Conservative DPO, label smoothing: the cross-entropy with labels that are right with chance 1 - epsilon.

    -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h) (Mitchell, "A note on DPO with noisy preferences and
    relationship to IPO", 2023). Least at beta h = log((1 - eps) / eps), so the margin stays bounded. DPO at eps = 0.
    """
    logits = options.beta * log_ratio_margin(inputs)
    values = -(1 - options.flip_rate) * logsigmoid(logits) - options.flip_rate * logsigmoid(-logits)
    return paired_outcome(inputs, values, *_implicit_rewards(inputs, options.beta))


@preference_loss(
    "robust_dpo",
    options=FlipOptions,
    formula="[−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε)",
    source="Chowdhury et al., arXiv 2403.00409, the rDPO loss",
    use_when="A known share of labels is flipped at random and the loss on clean labels is wanted, in expectation.",
)
def robust_dpo(inputs: PreferenceInputs, options: FlipOptions) -> PreferenceOutcome:
    """Provably robust DPO: an unbiased estimate, from labels flipped with chance epsilon, of DPO's loss on clean ones.

    [(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps) with l(h) = -log sigmoid(beta h) (Chowdhury, Kini and Natarajan, arXiv
    2403.00409). Not bounded below: its gradient by h never falls under beta eps / (1 - 2 eps) in size, so it needs
    early stopping. DPO at eps = 0.

    Returns:
        values [pairs]; may be negative.
    """
    logits = options.beta * log_ratio_margin(inputs)
    kept, flipped = -logsigmoid(logits), -logsigmoid(-logits)
    values = ((1 - options.flip_rate) * kept - options.flip_rate * flipped) / (1 - 2 * options.flip_rate)
    return paired_outcome(inputs, values, *_implicit_rewards(inputs, options.beta))


@preference_loss(
    "ipo",
    options=IPOOptions,
    formula="(h − 1/(2β))²",
    source="Azar et al., arXiv 2310.12036, eq. 17",
    use_when="Labels are near certain and DPO would drive the margin without bound.",
)
def ipo(inputs: PreferenceInputs, options: IPOOptions) -> PreferenceOutcome:
    """Identity preference optimisation: (h - 1 / (2 beta))^2 (Azar et al., arXiv 2310.12036, eq. 17).

    In eq. 17, h is made of the log-probabilities of whole answers, sums over tokens, and only so does the optimum
    follow from the KL-regularised objective; that is the default. Public code mostly takes means over tokens instead
    (the paper's authors are cited for it in Hugging Face's "Preference tuning LLMs with DPO methods", 2024): the margin
    aimed at is then 1 / (2 beta) a token and no longer depends on length, at another strength of beta. `beta` isn't
    comparable between the two.
    """
    chosen, rejected = inputs.chosen.log_ratio, inputs.rejected.log_ratio
    if options.is_length_averaged:
        chosen, rejected = chosen / inputs.chosen.tokens, rejected / inputs.rejected.tokens
    values = (chosen - rejected - 1 / (2 * options.beta)).square()
    return paired_outcome(inputs, values, options.beta * chosen, options.beta * rejected)


@preference_loss(
    "simpo",
    options=SimPOOptions,
    needs_reference=False,
    formula="−log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)",
    source="Meng et al., arXiv 2405.14734, eq. 6",
    use_when="No memory for a reference model, or answers grow longer under DPO.",
)
def simpo(inputs: PreferenceInputs, options: SimPOOptions) -> PreferenceOutcome:
    """Simple preference optimisation: the reward is beta times the mean log-probability a token; no reference.

    -log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma) (Meng et al., arXiv 2405.14734, eq. 6). The
    paper's code is set by the ratio gamma / beta; `gamma` here is eq. 6's own.
    """
    chosen, rejected = options.beta * inputs.chosen.token_mean, options.beta * inputs.rejected.token_mean
    return paired_outcome(inputs, -logsigmoid(chosen - rejected - options.gamma), chosen, rejected)


def _log_odds(token_mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(token_mean), which is cut just below certainty."""
    bounded = token_mean.clamp(max=MAX_TOKEN_MEAN)
    return bounded - torch.log(-torch.expm1(bounded))


@preference_loss(
    "orpo",
    options=ORPOOptions,
    needs_reference=False,
    formula="−log π(y_w)/|y_w| − λ log σ(log odds(y_w)/odds(y_l)),  odds = p/(1 − p),  p = π(y)^(1/|y|)",
    source="Hong et al., arXiv 2403.07691, eqs. 6 and 7",
    use_when="From a base model straight to preferences, without supervised training before or a reference.",
)
def orpo(inputs: PreferenceInputs, options: ORPOOptions) -> PreferenceOutcome:
    """Odds-ratio preference optimisation: supervised loss of the chosen answer plus a log odds ratio.

    -log p_w - lambda log sigmoid(log(odds(p_w) / odds(p_l))), odds(p) = p / (1 - p), log p the mean log-probability a
    token (Hong, Lee and Thorne, arXiv 2403.07691, eqs. 6 and 7).

    A mean above -1e-6 nats counts as -1e-6 in the odds, which are infinite at certainty; its gradient through them is
    then 0.
    """
    chosen, rejected = inputs.chosen.token_mean, inputs.rejected.token_mean
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    values = -chosen - options.odds_weight * logsigmoid(log_odds_ratio)
    return paired_outcome(inputs, values, chosen, rejected, log_odds_ratio=log_odds_ratio, nll=-chosen)


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
        ValueError: there is no `kl_baseline` although the switches ask for one.
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

    Where `desirability` p is given, w = p / (1 - p), cut to the bounds of the switches, makes up for prompts that
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
