"""Canaries: a few fixed sequences whose log-probabilities trainer and generator must agree on after each update.

A digest proves that the bytes arrived; a canary proves that the engine computes with them. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.prompts import Message, Prompt, TextPart

TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 0.05}
"""Mean gap of a canary's tokens, by the dtype that trainer and generator compute in."""
TEXT_CANARY = Prompt((Message("user", (TextPart("The five boxing wizards jump quickly."),)),))
"""A canary without media, in any run."""
MAX_TOKENS = 16


@dataclass(frozen=True, eq=False)
class CanarySequence:
    """A prompt and a completion that nobody sampled.

    Attributes:
        prompt: with its media.
        token_ids: [tokens] int32.
        log_probs: [tokens] float32, the trainer's, under the whole distribution at temperature 1, nats.
    """

    prompt: Prompt
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Canaries:
    """What a generator of one policy version must reproduce.

    Attributes:
        version: the policy version.
        sequences: text and media.
        tolerance_nats: mean gap that a sequence may have.
    """

    version: int
    sequences: tuple[CanarySequence, ...]
    tolerance_nats: float


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How far a generator's log-probabilities are from the trainer's.

    Attributes:
        version: the policy version.
        mean_gap: of the worst sequence, nats.
        max_gap: of that sequence's worst token, nats.
        worst: number of the worst sequence.
        tolerance_nats: what `mean_gap` may be.
        seconds: it took.
    """

    version: int
    mean_gap: float
    max_gap: float
    worst: int
    tolerance_nats: float
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether the generator computes what the trainer does; never where a gap isn't a number."""
        return self.mean_gap <= self.tolerance_nats

    @property
    def words(self) -> str:
        """For a message."""
        return (
            f"canary {self.worst} is off by {self.mean_gap:.3g} nats a token (at most {self.max_gap:.3g}), and "
            f"{self.tolerance_nats:g} is allowed"
        )


def compare_canaries(canaries: Canaries, measured: Sequence[NDArray[np.float32]], seconds: float = 0.0) -> CanaryReport:
    """Hold a generator's log-probabilities against the trainer's.

    Args:
        measured: [tokens] of each sequence, nats.
    Raises:
        ValueError: another number of sequences or tokens.
    """
    gaps: list[Any] = []
    for sequence, own in zip(canaries.sequences, measured, strict=True):
        if own.shape != sequence.log_probs.shape:
            raise ValueError(f"{own.shape} log-probabilities for a canary of {sequence.log_probs.shape}")
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
