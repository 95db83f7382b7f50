"""Preference losses whose beta differs by pair and by step: by a reward model's margin, by how hard the data and the
model find the pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.finite import require_finite
from algorithms.preferences.inputs import (
    PreferenceInputs,
    PreferenceOutcome,
    preference_loss,
    weighted_sum,
)
from algorithms.preferences.text import BetaOptions, log_ratio_margin, paired_outcome


class ScaledBetaOptions(BetaOptions):
    """The options of losses that scale beta, within bounds."""

    least_scale: float = Field(0.1, gt=0.0, le=1.0, description="Beta never falls below this share of itself.")
    most_scale: float = Field(10.0, ge=1.0, description="Beta never rises above this multiple of itself.")


class MMDPOOptions(ScaledBetaOptions):
    """Options of MM-DPO."""

    strength: float = Field(
        0.5, ge=0.0, description="How far a large margin raises beta: up to 1 + strength times (the paper's w)."
    )
    rate: float = Field(0.5, gt=0.0, description="How fast it does so with the margin (the paper's k).")
    nll_weight: float = Field(0.0, ge=0.0, description="Weight of the chosen answer's NLL a token.")


class DAMAOptions(ScaledBetaOptions):
    """Options of DAMA."""

    is_data_aware: bool = Field(True, description="Scale beta by the pair's own hardness, from `reward_margins`.")
    is_model_aware: bool = Field(True, description="Scale beta by how well the model tells the batch's pairs apart.")
    margin_mean: float | None = Field(
        None, description="Mean of reward_margins over the data set; None learns it from step to step."
    )
    decay: float = Field(0.9, ge=0.0, le=1.0, description="What is left after a step of the past in the moving means.")
    outlier_deviations: float = Field(
        2.0, gt=0.0, description="A pair this many standard deviations from the mean gap isn't counted in its batch's."
    )


def _reward_margins(inputs: PreferenceInputs, name: str) -> Tensor:
    if inputs.reward_margins is None:
        raise ValueError(f"the loss {name} needs reward_margins: by how much each chosen answer is better")
    return inputs.reward_margins.detach()


@preference_loss(
    "mm_dpo",
    options=MMDPOOptions,
    needs=frozenset({"reward_margins"}),
    formula="−log σ(β(δ) h),  β(δ) = clamp(β₀ (1 + w (1 − e^(−kδ))))",
    source="Zhang et al., MM-RLHF, arXiv 2502.10391, dynamic reward scaling",
    use_when="Pairs with a reward model's margin you trust: clear pairs weigh more than doubtful ones.",
)
def mm_dpo(inputs: PreferenceInputs, options: MMDPOOptions) -> PreferenceOutcome:
    """MM-DPO: DPO whose beta grows with the reward margin delta of the pair (Zhang et al., arXiv 2502.10391).

    -log sigmoid(beta(delta) h), beta(delta) = beta_0 (1 + w (1 - exp(-k delta))). For delta above 0 it lies between
    beta_0 and (1 + w) beta_0. For a pair that the reward model orders the other way it falls without bound and would
    turn negative, which rewards the rejected answer; it is kept within least_scale and most_scale times beta_0.

    Returns:
        values [pairs]; DPO at strength 0 and nll_weight 0, and for a margin of 0. Rewards are reported at the pair's
        own beta.
    """
    policy = inputs.chosen.policy
    margins = _reward_margins(inputs, "mm_dpo").to(policy.device, torch.promote_types(policy.dtype, torch.float32))
    # A margin below -80/k is at least_scale long before; cut, so that no exponential overflows.
    growth = -torch.expm1(-(options.rate * margins).clamp(min=-80.0))
    beta = options.beta * (1 + options.strength * growth).clamp(options.least_scale, options.most_scale)
    nll = -inputs.chosen.token_mean
    values = -logsigmoid(beta * log_ratio_margin(inputs)) + options.nll_weight * nll
    return paired_outcome(
        inputs, values, beta * inputs.chosen.log_ratio, beta * inputs.rejected.log_ratio, beta=beta, nll=nll
    )


@dataclass(frozen=True)
class Hardness:
    """What DAMA remembers: decayed sums over steps, and the scale that the last step's pairs gave.

    Attributes:
        decay: what is left of the past after a step.
        outlier_deviations: as in the options.
        weight: decayed sum of pair weights.
        gap, gap_square: decayed sums of pairs' implicit reward gaps and their squares.
        kept_gap, kept_weight: decayed sums of batches' mean gaps without outliers, each weighted by its batch.
        margin, margin_weight: decayed sums of given reward margins.
        model_scale: sigmoid(last batch's gap) / sigmoid(mean gap before it); 1 before there are two batches.
    """

    decay: float
    outlier_deviations: float
    weight: float = 0.0
    gap: float = 0.0
    gap_square: float = 0.0
    kept_gap: float = 0.0
    kept_weight: float = 0.0
    margin: float = 0.0
    margin_weight: float = 0.0
    model_scale: float = 1.0

    @property
    def gap_mean(self) -> float | None:
        """Moving mean of implicit reward gaps, outliers left out; None before the first step."""
        return self.kept_gap / self.kept_weight if self.kept_weight > 0 else None

    @property
    def margin_mean(self) -> float | None:
        """Moving mean of the given reward margins; None before the first step."""
        return self.margin / self.margin_weight if self.margin_weight > 0 else None

    def is_kept(self, gaps: Tensor) -> Tensor:
        """[pairs] bool, whether each gap is no outlier against the steps before; all are where those had no spread."""
        if self.gap_mean is None or self.weight <= 0:
            return torch.ones_like(gaps, dtype=torch.bool)
        mean = self.gap / self.weight
        deviation = math.sqrt(max(0.0, self.gap_square / self.weight - mean**2))
        if deviation <= 1e-6 * abs(mean):
            return torch.ones_like(gaps, dtype=torch.bool)
        return (gaps - self.gap_mean).abs() <= self.outlier_deviations * deviation

    def after(self, sums: Mapping[str, Tensor]) -> Hardness:
        """The state after a step; `sums` are those of the whole batch.

        Raises:
            NonFiniteError: a sum is NaN or infinite.
        """
        names = ("reward_gap", "reward_gap_square", "kept_reward_gap", "given_margin")
        for name in names:
            if name in sums:
                require_finite(f"the sum of {name}", sums[name])
        gap, square, kept = sums["reward_gap"].double(), sums["reward_gap_square"].double(), sums["kept_reward_gap"]
        counted = kept.double() if float(kept[1]) > 0 else gap
        margin = sums["given_margin"].double() if "given_margin" in sums else torch.zeros(2, dtype=torch.float64)
        scale = self.model_scale
        if float(counted[1]) > 0:
            past = self.gap_mean
            scale = 1.0 if past is None else math.exp(_log_sigmoid(float(counted[0] / counted[1])) - _log_sigmoid(past))
        return Hardness(
            self.decay,
            self.outlier_deviations,
            self.decay * self.weight + float(gap[1]),
            self.decay * self.gap + float(gap[0]),
            self.decay * self.gap_square + float(square[0]),
            self.decay * self.kept_gap + float(counted[0]),
            self.decay * self.kept_weight + float(counted[1]),
            self.decay * self.margin + float(margin[0]),
            self.decay * self.margin_weight + float(margin[1]),
            scale,
        )


def _log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def _first_hardness(options: Any) -> Hardness:
    return Hardness(options.decay, options.outlier_deviations)


def _beta_scale(inputs: PreferenceInputs, options: DAMAOptions, state: Hardness) -> Tensor:
    """[pairs] float, without gradient: alpha_D alpha_M, within the bounds."""
    scale = torch.ones_like(inputs.chosen.policy.detach())
    if options.is_model_aware:
        scale = scale * state.model_scale
    if options.is_data_aware:
        margins = _reward_margins(inputs, "dama").to(scale)
        mean = state.margin_mean if options.margin_mean is None else options.margin_mean
        if mean is not None:
            scale = scale * (logsigmoid(margins) - _log_sigmoid(mean)).exp()
    return scale.clamp(options.least_scale, options.most_scale)


@preference_loss(
    "dama",
    options=DAMAOptions,
    initial_state=_first_hardness,
    formula="−log σ(β α_D α_M h),  α_D = σ(δ)/σ(mean δ),  α_M = σ(R_batch)/σ(mean R),  R = β h",
    source="Lu et al., arXiv 2502.01943, eqs. 6, 12, 15 and 16",
    use_when="Pairs of very different hardness: beta is larger for easy pairs and smaller for hard ones.",
)
def dama(inputs: PreferenceInputs, options: DAMAOptions) -> PreferenceOutcome:
    """DAMA: beta scaled by how easy the pair is and by how well the model tells pairs apart (arXiv 2502.01943).

    -log sigmoid(beta alpha_D alpha_M h) (Lu et al., eqs. 6, 12, 15, 16). alpha_D = sigmoid(delta) / sigmoid(mean
    delta), delta the pair's `reward_margins` (in the paper, by how much more of the chosen answer's statements CLIP
    finds in the image). alpha_M = sigmoid(R_B) / sigmoid(R), R_B the batch's mean of the gaps R_i = beta h_i without
    outliers, R their moving mean.

    Two things differ from the paper, so that the result doesn't depend on micro-batches or ranks: alpha_M is that of
    the last whole batch rather than of the one in hand, and an outlier is a pair far from the moving mean, in the
    moving standard deviation, rather than one ranked far within its batch. The scale is kept within least_scale and
    most_scale.

    Returns:
        values [pairs]; DPO with both kinds of awareness off, and at the first step. Sums that the state learns from.
    Raises:
        ValueError: it is data-aware and there are no `reward_margins`.
    """
    state = inputs.state if isinstance(inputs.state, Hardness) else _first_hardness(options)
    beta = options.beta * _beta_scale(inputs, options, state)
    margin = log_ratio_margin(inputs)
    gaps = (options.beta * margin).detach()
    is_kept = state.is_kept(gaps)
    given = {} if inputs.reward_margins is None else {"given_margin": inputs.reward_margins}
    outcome = paired_outcome(
        inputs,
        -logsigmoid(beta * margin),
        beta * inputs.chosen.log_ratio,
        beta * inputs.rejected.log_ratio,
        beta=beta,
        reward_gap=gaps,
        reward_gap_square=gaps.double().square(),
        outlier_share=~is_kept,
        **given,
    )
    outcome.sums["kept_reward_gap"] = weighted_sum(gaps, outcome.weights * is_kept)
    return outcome
