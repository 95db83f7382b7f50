"""The interface between a learner and what its model learns: preference, reward, value and policy training alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from actors.trainer.micro_batch import MicroBatch
from actors.trainer.passes import PartialLoss, Passes
from actors.trainer.planning import Together
from actors.trainer.sample_checks import Columns
from algorithms.aggregation import Denominators
from algorithms.objective_metrics import ObjectiveMetrics
from rollout.samples import TokenSequence

Batch = TypeVar("Batch")
"""What an objective knows of a whole optimiser batch: its denominators, and whatever else its loss needs."""


class Objective(ABC, Generic[Batch]):
    """What a model learns. A learner calls it on all ranks alike, in the order of the methods below.

    Attributes:
        prefix: of the metrics' names.
        together: which sequences its loss compares, so that they must be in one micro-batch.
        columns: which columns of the samples it reads. :class:`TokenSequence` has none.
    """

    prefix: ClassVar[str]
    together: Together = Together.SEQUENCE
    columns: Columns = Columns()

    @abstractmethod
    def load_module(self) -> Any:
        """The Hugging Face model on the CPU, with what isn't trained frozen. Called once, before all else."""

    @abstractmethod
    def prepare(self, samples: Sequence[TokenSequence]) -> Batch | None:
        """What the loss needs of a whole optimiser batch; None where it has nothing to learn, which skips the step.

        Called on every rank with the samples of all ranks.
        """

    @abstractmethod
    def loss(self, model: Any, micro_batch: MicroBatch, batch: Batch) -> PartialLoss:
        """A micro-batch's part of the loss, divided by denominators of the whole batch: parts add up to the batch's.

        Args:
            model: to be called for the forward pass, exactly once, also for a micro-batch that has only a filler.
            micro_batch: with a filler perhaps, whose part must be 0.
            batch: of :meth:`prepare`.
        Raises:
            UnusableOutputError: the model's output isn't finite; the step is then skipped on all ranks.
        """

    def gradient(self, passes: Passes, batch: Batch) -> tuple[list[ObjectiveMetrics], dict[str, float]]:
        """Leave the gradient of one optimiser step in the DeepSpeed engine: by default that of :meth:`loss`.

        Returns:
            The metrics of each micro-batch; fewer than the plan has rounds where something wasn't finite. And metrics
            of the whole step, the same on every rank.
        """
        return passes.backward(lambda model, micro_batch: self.loss(model, micro_batch, batch)), {}

    def after_step(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """The metrics of a step that was applied, of what its parts add up to over all micro-batches and ranks.

        An objective with a memory moves it here.
        """
        return sums | maxima

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights, optimiser and random states."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`.

        Args:
            state: may hold more than that.
        """


def token_denominators(samples: Sequence[TokenSequence]) -> Denominators | None:
    """Trained tokens of an optimiser batch, and sequences that have one; None where it has no trained token."""
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    if tokens == 0:
        return None
    return Denominators(tokens, sum(bool(sample.loss_mask.any()) for sample in samples))
