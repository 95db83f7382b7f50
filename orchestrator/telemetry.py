"""Everything a run tells people, in one place: the local record, MLflow and the terminal. Never blocks the loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.schema import TrackingConfig
from orchestrator.record.progress import Progress
from orchestrator.record.run_record import Record, SampleRow
from orchestrator.step.evaluation import Evaluation
from orchestrator.tracking.tracker import MediaPaths, Tracker

logger = logging.getLogger(__name__)

NOTE_CHARACTERS = 300
"""Of an event on the terminal; the record has all of it."""


@dataclass
class Telemetry:
    """Record, tracker and progress of one run.

    Attributes:
        config: how often tables of samples are made.
        record: the local record.
        tracker: MLflow.
        progress: the terminal.
        media: where the samples' images lie.
    """

    config: TrackingConfig
    record: Record
    tracker: Tracker
    progress: Progress
    media: MediaPaths

    def wants_samples(self, step: int) -> bool:
        """Whether a table of samples is due after `step`."""
        every = self.config.samples_every_steps
        return bool(every) and (step == 1 or step % every == 0)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one training step."""
        self.record.metrics(step, metrics)
        self.tracker.metrics(step, metrics)
        self.progress.step(step, metrics)

    def more(self, step: int, metrics: Mapping[str, float]) -> None:
        """Further metrics of a step that was told already."""
        if metrics:
            self.record.metrics(step, metrics)
            self.tracker.metrics(step, metrics)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Completions of a training step."""
        self.record.samples(step, rows)
        self.tracker.samples(step, rows, self.media)

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation in one mode, and its first completions."""
        self.record.evaluation(evaluation.version, evaluation.mode, evaluation.result, evaluation.rows)
        self.tracker.metrics(evaluation.version, evaluation.metrics())
        self.tracker.samples(evaluation.version, evaluation.rows, self.media, name=f"evaluation-{evaluation.mode}")

    def event(self, kind: str, **data: Any) -> None:
        """Something that happened, for the record and, where it matters at once, for the terminal."""
        self.record.event(kind, **data)
        if kind not in QUIET:
            told = ", ".join(f"{key} {value}" for key, value in data.items())
            self.progress.note(f"{kind.replace('_', ' ')}: {' '.join(told.split())[:NOTE_CHARACTERS]}")


QUIET = frozenset({"started", "resumed", "checkpoint", "finished"})
"""Kinds of event that are recorded and not printed; the terminal shows them in its own way, or needn't."""
