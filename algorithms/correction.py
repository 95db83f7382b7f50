"""Importance weights for the gap between the distribution that sampled and the one that is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.config import CorrectionConfig
from algorithms.losses import MAX_LOG_RATIO


@dataclass(frozen=True)
class Correction:
    """Weights of the tokens' losses, and what they were made of. No gradient; 0 (False) outside the mask.

    Attributes:
        weights: [B, T] float, what each token's loss is multiplied with.
        is_touched: [B, T] bool, tokens whose weight was truncated or masked.
        kl: [B, T] float, nats: KL(behaviour || trainer) by token, by the k3 estimator, which is never negative.
        gap: [B, T] float, nats: |trainer - behaviour| log-probability.
    """

    weights: Tensor
    is_touched: Tensor
    kl: Tensor
    gap: Tensor


def effective_sample_share(weight_mean: float, weight_square_mean: float) -> float:
    """Kish's effective sample size as a share of the tokens, mean(w)^2 / mean(w^2): 1 when all weigh the same.

    0 when every weight is 0.
    """
    return weight_mean**2 / weight_square_mean if weight_square_mean > 0 else 0.0


@torch.no_grad()
def importance_correction(
    trainer_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, config: CorrectionConfig
) -> Correction:
    """Importance weights w from the ratio r = pi_trainer / pi_behaviour.

    none: w = 1.
    token_truncated: w = min(r, high) by token (truncated importance sampling; Espeholt et al., arXiv 1802.01561,
        section 4.1; for the generator's mismatch, Yao et al., 2025).
    sequence_truncated: w = min(product of r over the sequence, high), for each of its tokens.
    token_masked: w = r where low <= r <= high, 0 elsewhere (IcePop; Ling team, arXiv 2510.18855, section 3).

    Args:
        trainer_log_probs: [B, T] float, nats, finite inside the mask.
        behaviour_log_probs: [B, T] float, nats, finite inside the mask.
        mask: [B, T] bool, the trained tokens.
    """
    log_ratio = torch.where(mask, trainer_log_probs - behaviour_log_probs, 0.0)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = bounded.exp()
    match config.method:
        case "none":
            weights, is_touched = torch.ones_like(ratio), torch.zeros_like(mask)
        case "token_truncated":
            weights, is_touched = ratio.clamp(max=config.high), ratio > config.high
        case "sequence_truncated":
            whole = log_ratio.sum(-1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(ratio)
            weights, is_touched = whole.clamp(max=config.high), whole > config.high
        case "token_masked":
            is_touched = (ratio < config.low) | (ratio > config.high)
            weights = ratio.masked_fill(is_touched, 0.0)
    return Correction(
        weights=weights.masked_fill(~mask, 0.0),
        is_touched=is_touched & mask,
        kl=bounded.expm1() - bounded,
        gap=log_ratio.abs(),
    )
