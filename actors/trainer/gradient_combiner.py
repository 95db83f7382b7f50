"""Combines the gradients of several objectives into the one that an optimiser step applies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from algorithms.config import AlgorithmConfig
from algorithms.gradients.famo import FAMOOptions, FAMOState, famo_update
from algorithms.gradients.gradient_weights import GradientInputs, gradient_weights
from algorithms.gradients.shards import combine, gram_matrix
from algorithms.registry import GRADIENT_COMBINATIONS


class GradientCombiner:
    """Weighs the gradients of the objectives as the recipe says. The same on every rank."""

    def __init__(self, config: AlgorithmConfig) -> None:
        assert config.gradient_combination is not None
        self._name = config.gradient_combination
        self._values = config.gradient_options
        self._options = GRADIENT_COMBINATIONS.get(self._name).read_options(self._values, "algorithm.gradient_options")
        self._famo: FAMOState | None = None
        self._losses: Tensor | None = None

    def combine(
        self, gradients: Sequence[Sequence[Tensor]], rewards: Tensor, step: int, *, is_sharded: bool
    ) -> dict[str, float]:
        """Write the combination over the first objective's gradient.

        Args:
            gradients: this rank's shard of each objective's gradient.
            rewards: [objectives] the batch's mean reward by objective; their negatives are FAMO's losses.
            step: optimiser steps so far, from which seeded orders are drawn.
            is_sharded: whether the ranks hold disjoint shards; otherwise each holds the whole.
        Returns:
            Weight and norm of each objective's gradient, and the cosine of each pair.
        Raises:
            NonFiniteError: a gradient isn't finite; on all ranks alike.
        """
        gram = gram_matrix(gradients, group=distributed.group.WORLD if is_sharded else None)
        losses = -rewards.double()
        if isinstance(self._options, FAMOOptions):
            self._update_famo(losses, self._options)
        weights = gradient_weights(self._name, GradientInputs(gram, step, losses, self._famo), self._values)
        combine(gradients, weights)
        return _described(gram, weights)

    def _update_famo(self, losses: Tensor, options: FAMOOptions) -> None:
        """Update FAMO's state with the change of the losses since the last step, as this batch shows it."""
        if self._famo is None:
            self._famo = FAMOState.initial(len(losses))
        if self._losses is not None:
            self._famo = famo_update(self._famo, self._losses, losses, options)
        self._losses = losses

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps; empty for a combination without memory."""
        if self._famo is None or self._losses is None:
            return {}
        return {"logits": list(self._famo.logits), "losses": self._losses.tolist()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Go on from :meth:`state`."""
        if state:
            self._famo = FAMOState(tuple(state["logits"]))
            self._losses = torch.tensor(state["losses"], dtype=torch.float64)


def _described(gram: Tensor, weights: Tensor) -> dict[str, float]:
    norms = gram.diagonal().clamp(min=0).sqrt()
    found = {f"objective_{k}/weight": float(weight) for k, weight in enumerate(weights)}
    found |= {f"objective_{k}/grad_norm": float(norm) for k, norm in enumerate(norms)}
    for i in range(len(gram)):
        for j in range(i + 1, len(gram)):
            scale = float(norms[i] * norms[j])
            found[f"objective_{i}/cosine_{j}"] = float(gram[i, j]) / scale if scale > 0 else 0.0
    return found
