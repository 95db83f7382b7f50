"""From losses by token to one number. Denominators are global and passed in, so that sums over parts are exact."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from algorithms.config import AlgorithmConfig


@dataclass(frozen=True)
class Denominators:
    """Sizes of the whole optimiser batch, over all micro-batches and ranks.

    Attributes:
        tokens: trained tokens.
        sequences: sequences with at least one trained token.
    """

    tokens: float
    sequences: float

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.sequences <= 0:
            raise ValueError(
                f"denominators must be above 0, got {self.tokens} tokens and {self.sequences} sequences: "
                "a batch without a trained token has no loss; skip it"
            )


def count(mask: Tensor) -> tuple[int, int]:
    """Trained tokens, and sequences with at least one, of a part of the batch; add up over parts for Denominators.

    Args:
        mask: [B, T] bool, the trained tokens.
    """
    return int(mask.sum()), int(mask.any(-1).sum())


def token_weights(mask: Tensor, config: AlgorithmConfig, denominators: Denominators, like: Tensor) -> Tensor:
    """Weight of each token's loss in the batch's loss; the loss is then the plain sum of weight times value.

    token_mean: 1 / tokens (DAPO, arXiv 2503.14476, eq. 8).
    sequence_mean: 1 / (tokens of its sequence * sequences) (GRPO, arXiv 2402.03300, eq. 3).
    sequence_sum: 1 / sequences (the policy gradient's own; Dr. GRPO, arXiv 2503.20783, up to a constant).

    Args:
        mask: [B, T] bool, the trained tokens.
        denominators: of the whole batch.
        like: a tensor of the dtype and device wanted.
    Returns:
        [B, T] float, 0 outside the mask.
    """
    weights = mask.to(like)
    match config.aggregation:
        case "token_mean":
            return weights / denominators.tokens
        case "sequence_mean":
            return weights / weights.sum(-1, keepdim=True).clamp(min=1) / denominators.sequences
        case "sequence_sum":
            return weights / denominators.sequences
