"""Preference losses on pairs of texts, from the log-probabilities of the chosen and the rejected answer.

Losses on single answers with a label are in unpaired.py, the multimodal family is in
multimodal.py; pairs from the policy's own groups are made in pairs.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preferences.inputs import (
    BetaOptions,
    PreferenceInputs,
    PreferenceOutcome,
    UnpairedInputs,
    preference_loss,
    weighted_sum,
)
from algorithms.registry import PREFERENCE_LOSSES, Options

MAX_TOKEN_MEAN = -1e-6
"""Nats; nearest to certainty that a mean log-probability may come in odds, which are infinite at 0."""


class FlipOptions(BetaOptions):
    """Options of losses that expect wrong labels."""

    flip_rate: float = Field(0.1, ge=0.0, lt=0.5, description="Share of pairs whose label is wrong.")


class IPOOptions(Options):
    """Options of IPO."""

    beta: float = Field(
        0.1, gt=0.0, description="Strength of the pull to the reference (the paper's tau); the margin aimed at is 1/2β."
    )
    is_length_averaged: bool = Field(
        False, description="Take mean log-probabilities a token instead of the paper's sums over the answer."
    )


class SimPOOptions(Options):
    """Options of SimPO."""

    beta: float = Field(2.0, gt=0.0, description="Scale of the reward, the mean log-probability a token.")
    gamma: float = Field(
        1.0, ge=0.0, description="Reward by which the chosen answer should win; the paper's ratio is gamma / beta."
    )


class ORPOOptions(Options):
    """Options of ORPO."""

    odds_weight: float = Field(0.1, ge=0.0, description="Weight of the odds-ratio term (the paper's lambda).")


def preference_outcome(
    name: str, inputs: PreferenceInputs | UnpairedInputs, options: Mapping[str, Any] | Options
) -> PreferenceOutcome:
    """The registered preference loss `name` on `inputs`; starts its state where it has one and none is given.

    Args:
        options: of the method, by name or as read before.
    Raises:
        RegistryError: no such loss, or no such option.
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
    """Conservative DPO, label smoothing: the cross-entropy with labels that are right with probability 1 - epsilon.

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
    """Provably robust DPO: an unbiased estimate of DPO's loss on clean labels, from labels flipped at rate epsilon.

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
