"""Importance weights for the gap between the distribution that sampled and the one that is trained.

A method makes weights of the log-ratios; what it saw and did is measured here, in the same way for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from algorithms.config import CorrectionConfig
from algorithms.losses import MAX_LOG_RATIO
from algorithms.registry import CORRECTIONS, Options, method


@dataclass(frozen=True)
class CorrectionWeights:
    """What a method returns. Entries outside the mask mean nothing.

    Attributes:
        weights: [B, T] float, what each token's loss is multiplied with, at least 0.
        is_touched: [B, T] bool, tokens whose weight was truncated, or that were left out.
        is_rejected: [B, T] bool, tokens that were left out; None where the method leaves none out.
    """

    weights: Tensor
    is_touched: Tensor
    is_rejected: Tensor | None = None


@dataclass(frozen=True)
class Correction:
    """Weights of the tokens' losses, and what they were made of. No gradient; 0 (False) outside the mask.

    Attributes:
        weights: [B, T] float, what each token's loss is multiplied with.
        is_touched: [B, T] bool, tokens whose weight was truncated, or that were left out.
        is_rejected: [B, T] bool, tokens that were left out, weight 0.
        is_vetoed: [B] bool, sequences left out because of one token.
        kl: [B, T] float, nats: KL(behaviour || trainer) by token, by the k3 estimator, which is never negative.
        signed_kl: [B, T] float, nats: the same by k1, log behaviour - log trainer; its mean has no bias and no cut.
        gap: [B, T] float, nats: |trainer - behaviour| log-probability.
    """

    weights: Tensor
    is_touched: Tensor
    is_rejected: Tensor
    is_vetoed: Tensor
    kl: Tensor
    signed_kl: Tensor
    gap: Tensor


def effective_sample_share(weight_mean: float, weight_square_mean: float) -> float:
    """Kish's effective sample size as a share of the samples, mean(w)^2 / mean(w^2): 1 when all weigh the same.

    0 when every weight is 0.
    """
    return weight_mean**2 / weight_square_mean if weight_square_mean > 0 else 0.0


@torch.no_grad()
def importance_correction(
    trainer_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, config: CorrectionConfig
) -> Correction:
    """Importance weights from the ratio r = pi_trainer / pi_behaviour, by the method the recipe names.

    With `config.veto`, a sequence that has a token of r below it is left out whole, whatever the method: one token the
    trainer would all but never have written shows that the rest was written for another model (Liu, Li et al., "When
    Speed Kills Stability", 2025).

    Args:
        trainer_log_probs: [B, T] float, nats, finite inside the mask; a row is a whole sequence.
        behaviour_log_probs: [B, T] float, nats, finite inside the mask.
        mask: [B, T] bool, the trained tokens.
        config: the method, its switches, and the veto.
    Raises:
        RegistryError: no such method, or no such switch; says which bound is wrong and why.
    """
    entry = CORRECTIONS.get(config.method)
    options = entry.read_options(config.options, "algorithm.correction.options")
    log_ratio = torch.where(mask, trainer_log_probs - behaviour_log_probs, 0.0)
    made: CorrectionWeights = entry.function(log_ratio, mask, options)
    is_rejected = torch.zeros_like(mask) if made.is_rejected is None else made.is_rejected & mask
    is_vetoed = torch.zeros_like(mask[:, 0])
    if config.veto is not None:
        is_vetoed = (mask & (log_ratio.exp() < config.veto)).any(-1)
        is_rejected = is_rejected | (is_vetoed[:, None] & mask)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return Correction(
        weights=made.weights.masked_fill(~mask | is_rejected, 0.0),
        is_touched=(made.is_touched & mask) | is_rejected,
        is_rejected=is_rejected,
        is_vetoed=is_vetoed,
        kl=bounded.expm1() - bounded,
        signed_kl=-log_ratio,
        gap=log_ratio.abs(),
    )


def no_correction(log_ratio: Tensor, mask: Tensor) -> CorrectionWeights:
    """Weight 1 for every token, whatever its ratio."""
    return CorrectionWeights(torch.ones_like(log_ratio), torch.zeros_like(mask))


class TruncationOptions(Options):
    """Upper bound of the importance weight."""

    high: float = Field(2.0, description="Weights are cut here; at least 1.")

    @field_validator("high")
    @classmethod
    def _keeps_samples_that_agree(cls, high: float) -> float:
        return _high(high)


class MaskingOptions(Options):
    """Bounds of the importance weight, beyond which it is 0."""

    low: float = Field(0.5, ge=0.0, description="Left out below this ratio; below 1.")
    high: float = Field(2.0, description="Left out above this ratio; at least 1.")

    @model_validator(mode="after")
    def _keep_samples_that_agree(self) -> MaskingOptions:
        _bounds(self.low, self.high)
        return self


def _high(high: float) -> float:
    # `not`, so that NaN is refused too.
    if not high >= 1.0:
        raise ValueError(f"high = {high:g} cuts even the weight of samples that agree (1). Set it to at least 1")
    return high


def _bounds(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low = {low:g} must be below high = {high:g}, or every token is masked")
    if not low < 1.0:
        raise ValueError(f"low = {low:g} masks even tokens that agree (weight 1). Set it below 1")
    _high(high)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@method(
    CORRECTIONS,
    "none",
    formula="w = 1",
    source="no correction",
    use_when="Generator and trainer agree to rounding and no sample is stale, or the loss corrects by itself.",
)
def none(log_ratio: Tensor, mask: Tensor, options: Options) -> CorrectionWeights:
    """w = 1: the samples are taken as the trainer's own.

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens.
    """
    return no_correction(log_ratio, mask)


@method(
    CORRECTIONS,
    "token_truncated",
    options=TruncationOptions,
    formula="wₜ = min(rₜ, high)",
    source="V-trace, arXiv 1802.01561, section 4.1; for generators: Yao et al., 2025",
    use_when="The usual choice: bounded variance, no token lost; biased where whole prefixes drift apart.",
)
def token_truncated(log_ratio: Tensor, mask: Tensor, options: TruncationOptions) -> CorrectionWeights:
    """w = min(r, high) by token: truncated importance sampling (Espeholt et al., arXiv 1802.01561, section 4.1).

    For the mismatch of generator and trainer: Yao et al., "Your efficient RL framework secretly brings you off-policy
    RL training", 2025.

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens.
    """
    ratio = _ratio(log_ratio)
    return CorrectionWeights(ratio.clamp(max=options.high), ratio > options.high)


@method(
    CORRECTIONS,
    "sequence_truncated",
    options=TruncationOptions,
    formula="w = min(Πₜ rₜ, high) for the whole sequence",
    source="truncated importance sampling: Ionides, 2008; by sequence: Liu, Li et al., 2025",
    use_when="Short answers, where the product of ratios stays near 1; less biased than by token, more variance.",
)
def sequence_truncated(log_ratio: Tensor, mask: Tensor, options: TruncationOptions) -> CorrectionWeights:
    """w = min(product of r over the sequence, high), for each of its tokens.

    Truncated importance sampling (Ionides, 2008) of whole sequences (Liu, Li et al., "When Speed Kills Stability",
    2025).

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens; a row is a whole sequence.
    """
    whole = _ratio(log_ratio.sum(-1, keepdim=True)).expand_as(log_ratio)
    return CorrectionWeights(whole.clamp(max=options.high), whole > options.high)


@method(
    CORRECTIONS,
    "token_masked",
    options=MaskingOptions,
    formula="wₜ = rₜ if low ≤ rₜ ≤ high, else 0",
    source="IcePop, arXiv 2510.18855, section 3",
    use_when="Mixtures of experts, where a few tokens disagree wildly and no weight would make them useful.",
)
def token_masked(log_ratio: Tensor, mask: Tensor, options: MaskingOptions) -> CorrectionWeights:
    """w = r where low <= r <= high, 0 elsewhere (IcePop; Ling team, arXiv 2510.18855, section 3).

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens.
    """
    ratio = _ratio(log_ratio)
    is_out = (ratio < options.low) | (ratio > options.high)
    return CorrectionWeights(ratio, is_out, is_out)
