"""Canaries: sequences whose log-probabilities prove a weight update, because trainer and generator must agree on them.

A digest proves that the bytes arrived; a canary proves that the vLLM engine computes with them. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.prompts import Message, Prompt, TextPart

TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest mean gap over a canary's tokens, by the dtype that trainer and generator compute in."""
TEXT_CANARY = Prompt((Message("user", (TextPart("The five boxing wizards jump quickly."),)),))
"""The prompt of the text canary, the same in every run."""
MAX_TOKENS = 16


@dataclass(frozen=True, eq=False)
class CanarySequence:
    """One canary: a prompt and a completion made up for it.

    Attributes:
        prompt: the prompt, with its media.
        token_ids: [tokens] int32.
        log_probs: [tokens] float32, the trainer's, under the untruncated distribution at temperature 1, nats.
    """

    prompt: Prompt
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of one policy version, with the log-probabilities that a generator must reproduce.

    Attributes:
        version: the policy version.
        sequences: of text and of media.
        tolerance_nats: largest mean gap of a sequence.
    """

    version: int
    sequences: tuple[CanarySequence, ...]
    tolerance_nats: float


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """The gap between a generator's log-probabilities and the trainer's.

    Attributes:
        version: the policy version.
        mean_gap: of that sequence, nats a token.
        max_gap: largest gap of one of its tokens, nats.
        worst: index of the sequence with the largest mean gap.
        tolerance_nats: largest `mean_gap` that agrees.
        seconds: time of the comparison.
    """

    version: int
    mean_gap: float
    max_gap: float
    worst: int
    tolerance_nats: float
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether the mean gap is within the tolerance; False where the gap is NaN."""
        return self.mean_gap <= self.tolerance_nats

    @property
    def words(self) -> str:
        """The gap in a phrase for messages."""
        return (
            f"canary {self.worst} differs by {self.mean_gap:.3g} nats a token (largest: {self.max_gap:.3g}; "
            f"tolerance: {self.tolerance_nats:g})"
        )


def compare_canaries(canaries: Canaries, measured: Sequence[NDArray[np.float32]], seconds: float = 0.0) -> CanaryReport:
    """Compare a generator's log-probabilities with the trainer's.

    Args:
        measured: [tokens] of each sequence, nats.
    Raises:
        ValueError: the numbers of sequences or tokens differ.
    """
    gaps: list[Any] = []
    for sequence, own in zip(canaries.sequences, measured, strict=True):
        if own.shape != sequence.log_probs.shape:
            raise ValueError(f"a canary of {len(sequence.log_probs)} tokens got log-probabilities of shape {own.shape}")
        gaps.append(np.abs(own.astype(np.float64) - sequence.log_probs))
    means = [float(gap.mean()) for gap in gaps]
    worst = next((i for i, mean in enumerate(means) if not np.isfinite(mean)), int(np.argmax(means)))
    return CanaryReport(
        canaries.version,
        means[worst],
        float(np.max(gaps[worst])),
        worst,
        canaries.tolerance_nats,
        seconds,
    )
