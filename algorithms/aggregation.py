"""Aggregations of token losses to one loss. Denominators are of the whole batch, so that sums over parts are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from algorithms.config import AlgorithmConfig
from algorithms.registry import AGGREGATIONS, Options, method


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
                "a batch without a trained token has no loss. Skip it"
            )


class ConstantLengthOptions(Options):
    """The constant that every sequence's sum is divided by."""

    length: int = Field(ge=1, description="Divide each sequence's sum by this; rollout.sampling.max_tokens is usual.")


def count(mask: Tensor) -> tuple[int, int]:
    """Trained tokens, and sequences with at least one, of a part of the batch; add up over parts for Denominators.

    Args:
        mask: [B, T] bool, the trained tokens.
    """
    return int(mask.sum()), int(mask.any(-1).sum())


def token_weights(mask: Tensor, config: AlgorithmConfig, denominators: Denominators, like: Tensor) -> Tensor:
    """Weight of each token's loss in the batch's loss; the loss is then the plain sum of weight times value.

    Args:
        mask: [B, T] bool, the trained tokens; a row is a whole sequence.
        config: names the aggregation and its options.
        denominators: of the whole batch.
        like: a tensor of the dtype and device wanted.
    Returns:
        [B, T] float, 0 outside the mask.
    Raises:
        RegistryError: no such aggregation, or no such option.
        ValueError: a registered aggregation returned another shape.
    """
    entry = AGGREGATIONS.get(config.aggregation)
    options = entry.read_options(config.aggregation_options, "algorithm.aggregation_options")
    weights = entry.function(mask.to(like), denominators, options)
    if weights.shape != mask.shape:
        raise ValueError(
            f"the aggregation {entry.name!r} returned weights of {list(weights.shape)} for a mask of "
            f"{list(mask.shape)}; return one for each token"
        )
    return torch.where(mask, weights, torch.zeros_like(weights))


@method(
    AGGREGATIONS,
    "token_mean",
    formula="Σᵢ Σₜ lᵢₜ / Σᵢ |oᵢ|",
    source="DAPO, arXiv 2503.14476, eq. 8",
    use_when="The usual choice: every token counts the same, so long answers count by their length.",
)
def token_mean(mask: Tensor, denominators: Denominators, options: Options) -> Tensor:
    """1 / tokens of the batch (DAPO, arXiv 2503.14476, eq. 8).

    Args:
        mask: [B, T] float, 1 for trained tokens, 0 elsewhere.
        denominators: of the whole batch.
    Returns:
        [B, T] float, the weight of each token's loss.
    """
    return mask / denominators.tokens


@method(
    AGGREGATIONS,
    "sequence_mean",
    formula="(1/n) Σᵢ (1/|oᵢ|) Σₜ lᵢₜ",
    source="GRPO, arXiv 2402.03300, eq. 3; GSPO, arXiv 2507.18071, eq. 5",
    use_when="Every answer counts the same whatever its length, as sequence-level losses expect.",
)
def sequence_mean(mask: Tensor, denominators: Denominators, options: Options) -> Tensor:
    """1 / (tokens of its sequence x sequences of the batch): mean of token means (GRPO, arXiv 2402.03300, eq. 3).

    Args:
        mask: [B, T] float, 1 for trained tokens, 0 elsewhere.
        denominators: of the whole batch.
    Returns:
        [B, T] float, the weight of each token's loss; a sequence without trained tokens has none.
    """
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / denominators.sequences


@method(
    AGGREGATIONS,
    "sequence_sum",
    formula="(1/n) Σᵢ Σₜ lᵢₜ",
    source="the policy gradient's own; Sutton et al., NeurIPS 1999",
    use_when="The unbiased policy gradient; its size grows with the answers' length, so mind the learning rate.",
)
def sequence_sum(mask: Tensor, denominators: Denominators, options: Options) -> Tensor:
    """1 / sequences of the batch: mean over sequences of token sums, the policy gradient's own weighting.

    Args:
        mask: [B, T] float, 1 for trained tokens, 0 elsewhere.
        denominators: of the whole batch.
    Returns:
        [B, T] float, the weight of each token's loss.
    """
    return mask / denominators.sequences


@method(
    AGGREGATIONS,
    "constant_length",
    options=ConstantLengthOptions,
    formula="(1/n) Σᵢ (1/L) Σₜ lᵢₜ, L constant",
    source="Dr. GRPO, arXiv 2503.20783, section 3.2 and listing 1",
    use_when="As sequence_sum, unbiased by length, at the scale of a token mean; pairs with dr_grpo.",
)
def constant_length(mask: Tensor, denominators: Denominators, options: ConstantLengthOptions) -> Tensor:
    """1 / (sequences of the batch x length): sums over a constant, so that no answer's length changes a token's weight.

    Dr. GRPO (arXiv 2503.20783, section 3.2) removes 1 / |o| from GRPO's objective; its code divides by the generation
    budget instead. The two differ by a constant factor, which this has as the code does.

    Args:
        mask: [B, T] float, 1 for trained tokens, 0 elsewhere.
        denominators: of the whole batch.
    Returns:
        [B, T] float, the weight of each token's loss.
    """
    return mask / (denominators.sequences * options.length)
