"""Metrics of an objective over a micro-batch, in a form that adds up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ObjectiveMetrics:
    """Detached scalars on the device of the loss, under the same keys in every micro-batch and rank of a batch.

    Attributes:
        sums: parts that add up over micro-batches and ranks to the batch's figure.
        maxima: combined by the maximum.
    """

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]
