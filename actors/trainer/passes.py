"""Forward and backward passes of one rank over the micro-batches of a plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from actors.trainer.deepspeed_engine import DeepSpeedEngine
from actors.trainer.micro_batch import MicroBatch, MicroBatchMaker
from actors.trainer.planning import Plan
from algorithms.finite import NonFiniteError
from algorithms.objective_metrics import ObjectiveMetrics

logger = logging.getLogger(__name__)

PartialLoss = tuple[Tensor, ObjectiveMetrics]
"""A micro-batch's part of a loss and of its metrics."""
Forward = Callable[[Any, MicroBatch], Tensor]
"""Takes the model and a micro-batch, and returns [..., B, T]."""


class UnusableOutputError(Exception):
    """The model's output isn't finite.

    Attributes:
        outputs: float, carrying the graph: every rank must run its backward pass.
    """

    def __init__(self, outputs: Tensor, error: NonFiniteError) -> None:
        super().__init__(str(error))
        self.outputs = outputs


class Passes:
    """The passes over one plan. All ranks make them together, as many each.

    Attributes:
        plan: the optimiser batch.
        deepspeed: holds the gradient that the backward passes add up.
        step: optimiser steps applied before this one.
    """

    def __init__(self, plan: Plan, deepspeed: DeepSpeedEngine, maker: MicroBatchMaker, step: int) -> None:
        self.plan = plan
        self.deepspeed = deepspeed
        self.step = step
        self._maker = maker

    def each_token(self, forward: Forward) -> dict[int, NDArray[np.float32]]:
        """What a forward pass gives each completion token: [..., tokens] float32, by index of this rank's samples."""
        self.deepspeed.module.eval()
        result: dict[int, NDArray[np.float32]] = {}
        with torch.no_grad():
            for turn in range(self.plan.rounds):
                micro_batch = self._maker.make(self.plan, turn)
                values = forward(self.deepspeed.model, micro_batch).float().cpu().numpy()
                for place, index in enumerate(micro_batch.indices):
                    result[index] = values[..., place, : len(micro_batch.samples[place].token_ids)].copy()
        return result

    def backward(self, loss: Callable[[Any, MicroBatch], PartialLoss]) -> list[ObjectiveMetrics]:
        """Add the gradient of a loss over all micro-batches; the metrics of those whose loss was finite.

        Args:
            loss: takes the model and a micro-batch; raises :class:`UnusableOutputError`.
        """
        parts = []
        for turn in range(self.plan.rounds):
            self.deepspeed.begin_micro_batch(is_last=turn == self.plan.rounds - 1)
            value, metrics = self._finite(turn, loss)
            self.deepspeed.backward(value)
            if metrics is not None:
                parts.append(metrics)
        return parts

    def _finite(
        self, turn: int, loss: Callable[[Any, MicroBatch], PartialLoss]
    ) -> tuple[Tensor, ObjectiveMetrics | None]:
        """A micro-batch's part of the loss. NaN, without metrics, where the model's output isn't finite."""
        try:
            return loss(self.deepspeed.model, self._maker.make(self.plan, turn))
        except UnusableOutputError as error:
            logger.warning("rank %d, micro-batch %d: %s", distributed.get_rank(), turn, error)
            # NaN gradients spread to every rank in the reduction, so that all skip the step together.
            return error.outputs.sum() * math.nan, None
