"""Importance weights for the gap between the distribution that sampled and the one that is trained.

A method computes weights from the log-ratios; the metrics here are the same for every method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from algorithms.aggregation import Denominators
from algorithms.config import CorrectionConfig
from algorithms.kl import k3
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
    Speed Kills Stability", 2025). What is left out weighs 0 and still counts in the loss's denominators, so that the
    others weigh no more for it and parts of a batch still add up.

    Args:
        trainer_log_probs: [B, T] float, nats, finite inside the mask; a row is a whole sequence.
        behaviour_log_probs: [B, T] float, nats, finite inside the mask.
        mask: [B, T] bool, the trained tokens.
        config: the method, its options, and the veto.
    Raises:
        RegistryError: no such method, or no such option; says which bound is wrong and why.
        ValueError: a registered method returned another shape.
    """
    entry = CORRECTIONS.get(config.method)
    options = entry.read_options(config.options, "algorithm.correction.options")
    log_ratio = torch.where(mask, trainer_log_probs - behaviour_log_probs, 0.0)
    made: CorrectionWeights = entry.function(log_ratio, mask, options)
    if made.weights.shape != mask.shape:
        raise ValueError(
            f"the rollout correction {entry.name!r} returned weights of {list(made.weights.shape)} for a mask of "
            f"{list(mask.shape)}; return one for each token"
        )
    is_rejected = torch.zeros_like(mask) if made.is_rejected is None else made.is_rejected & mask
    is_vetoed = torch.zeros_like(mask[:, 0])
    if config.veto is not None:
        is_vetoed = (log_ratio < math.log(config.veto)).any(-1)
        is_rejected = is_rejected | (is_vetoed[:, None] & mask)
    return Correction(
        weights=made.weights.masked_fill(~mask | is_rejected, 0.0),
        is_touched=(made.is_touched & mask) | is_rejected,
        is_rejected=is_rejected,
        is_vetoed=is_vetoed,
        # KL(behaviour || trainer): the samples are the behaviour's.
        kl=k3(torch.zeros_like(log_ratio), log_ratio),
        signed_kl=-log_ratio,
        gap=log_ratio.abs(),
    )


def correction_sums(correction: Correction, mask: Tensor, denominators: Denominators) -> dict[str, Tensor]:
    """Metrics of the correction over a part of the batch, as sums that add up over parts.

    Args:
        correction: of the part.
        mask: [B, T] bool, its trained tokens.
        denominators: of the whole batch.
    Returns:
        Scalars. Means over the trained tokens: `importance_weight_mean`, `importance_weight_square`,
        `corrected_share`, `rejected_share`, `mismatch_kl` (by k3), `mismatch_kl_k1`. Means over the sequences, each of
        the mean weight of its tokens: `sequence_weight_mean`, `sequence_weight_square`; shares of them with a token
        touched, with no token left, and vetoed: `corrected_sequences_share`, `rejected_sequences_share`,
        `vetoed_sequences_share`.
    """
    weights = correction.weights
    lengths = mask.sum(-1)
    by_sequence = weights.sum(-1) / lengths.clamp(min=1)
    is_gone = (lengths > 0) & (correction.is_rejected.sum(-1) == lengths)

    def of_tokens(values: Tensor) -> Tensor:
        return values.to(weights.dtype).sum() / denominators.tokens

    def of_sequences(values: Tensor) -> Tensor:
        return values.to(weights.dtype).sum() / denominators.sequences

    return {
        "importance_weight_mean": of_tokens(weights),
        "importance_weight_square": of_tokens(weights.square()),
        "corrected_share": of_tokens(correction.is_touched),
        "rejected_share": of_tokens(correction.is_rejected),
        "mismatch_kl": of_tokens(correction.kl),
        "mismatch_kl_k1": of_tokens(correction.signed_kl),
        "sequence_weight_mean": of_sequences(by_sequence),
        "sequence_weight_square": of_sequences(by_sequence.square()),
        "corrected_sequences_share": of_sequences(correction.is_touched.any(-1)),
        "rejected_sequences_share": of_sequences(is_gone),
        "vetoed_sequences_share": of_sequences(correction.is_vetoed),
    }


def finish_correction(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with the effective sample sizes, shares of the tokens and of the sequences, in place of the squares.

    `effective_sample_share` and `effective_sequence_share` are ratios, which don't add up over parts of a batch; the
    sums they are made of do. Metrics of a loss without a correction pass through.
    """
    finished = dict(metrics)
    for unit, share in (("importance", "effective_sample_share"), ("sequence", "effective_sequence_share")):
        square = finished.pop(f"{unit}_weight_square", None)
        if square is not None:
            finished[share] = effective_sample_share(finished[f"{unit}_weight_mean"], square)
    return finished


class TruncationOptions(Options):
    """Upper bound of the importance weight."""

    high: float = Field(2.0, description="Weights are cut here; at least 1.")

    @model_validator(mode="after")
    def _keep_samples_that_agree(self) -> TruncationOptions:
        _require_at_least_one("high", self.high)
        return self


class MaskingOptions(Options):
    """Bounds of the importance weight, beyond which it is 0."""

    low: float = Field(0.5, ge=0.0, description="Left out below this ratio; below 1.")
    high: float = Field(2.0, description="Left out above this ratio; at least 1.")

    @model_validator(mode="after")
    def _keep_samples_that_agree(self) -> MaskingOptions:
        _require_order(self.low, self.high)
        return self


class GeometricOptions(Options):
    """Bounds of the geometric mean of a sequence's ratios, beyond which it is left out."""

    low: float = Field(0.99, ge=0.0, description="Left out below this mean ratio; below 1.")
    high: float = Field(1.01, description="Left out above this mean ratio; at least 1. Long answers bear 1.001.")
    truncate: float | None = Field(
        None, description="Weigh the tokens that are kept by their own ratio, cut here; none weighs them all 1."
    )

    @model_validator(mode="after")
    def _keep_samples_that_agree(self) -> GeometricOptions:
        _require_order(self.low, self.high)
        if self.truncate is not None:
            _require_at_least_one("truncate", self.truncate)
        return self


def _require_at_least_one(name: str, bound: float) -> None:
    # `not`, so that NaN is refused too.
    if not bound >= 1.0:
        raise ValueError(f"{name} = {bound:g} cuts even the weight of samples that agree (1). Set it to at least 1")


def _require_order(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low = {low:g} must be below high = {high:g}, or every token is masked")
    if not low < 1.0:
        raise ValueError(f"low = {low:g} masks even tokens that agree (weight 1). Set it below 1")
    _require_at_least_one("high", high)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@method(
    CORRECTIONS,
    "none",
    formula="w = 1",
    source="no correction",
    use_when="Generator and trainer agree to rounding and no sample is stale, or the loss holds its own correction.",
)
def none(log_ratio: Tensor, mask: Tensor, options: Options) -> CorrectionWeights:
    """w = 1: the samples are taken as the trainer's own.

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens.
    """
    return CorrectionWeights(torch.ones_like(log_ratio), torch.zeros_like(mask))


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
    use_when="Mixtures of experts, where a few tokens disagree so far that no weight makes them useful.",
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


@method(
    CORRECTIONS,
    "sequence_masked",
    options=MaskingOptions,
    formula="w = Πₜ rₜ if low ≤ Πₜ rₜ ≤ high, else 0, for the whole sequence",
    source="Liu, Li et al., When Speed Kills Stability, 2025 (masked importance sampling by sequence)",
    use_when="Short answers, where a sequence outside the bounds is probably faulty.",
)
def sequence_masked(log_ratio: Tensor, mask: Tensor, options: MaskingOptions) -> CorrectionWeights:
    """w = product of r over the sequence where low <= product <= high, 0 for the whole sequence elsewhere.

    Masked importance sampling of whole sequences (Liu, Li et al., "When Speed Kills Stability", 2025): what lies in
    the tail is taken for a fault of an engine and left out, where truncation would still learn from it. The product's
    spread grows with the length, so that long answers are left out first; `geometric_masked` is blind to length.

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens; a row is a whole sequence.
    """
    whole = _ratio(log_ratio.sum(-1, keepdim=True)).expand_as(log_ratio)
    is_out = (whole < options.low) | (whole > options.high)
    return CorrectionWeights(whole, is_out, is_out)


@method(
    CORRECTIONS,
    "geometric_masked",
    options=GeometricOptions,
    formula="w = 1 (or min(rₜ, truncate)) if low ≤ (Πₜ rₜ)^(1/|o|) ≤ high, else 0 for the whole sequence",
    source="Liu, Li et al., When Speed Kills Stability, part 3, 2025 (geometric rejection)",
    use_when="Long answers of mixtures of experts: leaves out sequences that drifted, whatever their length.",
)
def geometric_masked(log_ratio: Tensor, mask: Tensor, options: GeometricOptions) -> CorrectionWeights:
    """Sequences whose geometric mean ratio exp(mean of log r) lies outside [low, high] are left out whole.

    Liu, Li et al., "When Speed Kills Stability", part 3, 2025. The geometric mean says whether a sequence is to be
    trusted and is no importance weight, so the kept tokens weigh 1, or their own ratio cut at `truncate`.

    Args:
        log_ratio: [B, T] float, nats, log pi_trainer - log pi_behaviour, 0 outside the mask.
        mask: [B, T] bool, the trained tokens; a row is a whole sequence.
    """
    mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    is_out = ((_ratio(mean) < options.low) | (_ratio(mean) > options.high)).expand_as(mask)
    if options.truncate is None:
        return CorrectionWeights(torch.ones_like(log_ratio), is_out, is_out)
    ratio = _ratio(log_ratio)
    return CorrectionWeights(ratio.clamp(max=options.truncate), is_out | (ratio > options.truncate), is_out)
