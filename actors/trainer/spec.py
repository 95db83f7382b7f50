"""What the ranks of a model under training are made from: frozen, serialisable, and without Ray or torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from actors.config import DeadlineConfig, ModelConfig, TrainerConfig, WeightsConfig
from algorithms.config import AlgorithmConfig


@dataclass(frozen=True)
class LearnerSpec:
    """Everything a rank of a model under training is made from.

    Attributes:
        model: where it starts from, precision and what is frozen.
        trainer: optimiser, schedule, ranks and micro-batches.
        deadlines: of calls and collectives.
        media_folder: the media store, on a file system that every rank's node sees.
        seed: of dropout, if the model has any.
        total_updates: optimiser steps of the whole run, for the schedule.
    """

    model: ModelConfig
    trainer: TrainerConfig
    deadlines: DeadlineConfig
    media_folder: Path
    seed: int
    total_updates: int


@dataclass(frozen=True)
class PolicySpec(LearnerSpec):
    """Everything a rank of the policy trainer is made from; further attributes as :class:`LearnerSpec`.

    Attributes:
        algorithm: the loss.
        temperature: of sampling; log-probabilities are of the tempered distribution.
        reference: the reference's folder, whose output head the exact KL needs; None takes the model's own.
        weights: how new versions are handed to the generators.
    """

    algorithm: AlgorithmConfig
    temperature: float
    reference: Path | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)


@dataclass(frozen=True)
class CriticSpec(LearnerSpec):
    """Everything a rank of the critic is made from; further attributes as :class:`LearnerSpec`.

    Attributes:
        clip: how far a new value may be from the old one in the loss; None for no bound.
    """

    clip: float | None
