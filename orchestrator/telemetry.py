"""Where a run sends its metrics, samples and events: the run record, MLflow and the terminal, through one object.

It keeps nothing itself: `record/` writes the run record's files, `tracking/` sends to MLflow, and `report/` makes the
report from the run record. No call waits for a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.schema import TrackingConfig
from orchestrator.record.progress import Progress
from orchestrator.record.run_record import RunRecord, SampleRow
from orchestrator.step.evaluation import Evaluation
from orchestrator.tracking.tracker import MediaPaths, Tracker

EVENT_CHARACTERS = 300
"""Characters of an event's data that the terminal shows; the run record has all of them."""
RECORDED_ONLY = frozenset({"started", "resumed", "checkpoint", "finished"})
"""Kinds of event that the terminal doesn't print; it shows them in other ways."""


@dataclass
class Telemetry:
    """Run record, tracker and progress of one run.

    Attributes:
        config: how often tables of samples are made.
        record: the run record.
        tracker: MLflow.
        progress: the terminal.
        media: where the samples' images lie.
    """

    config: TrackingConfig
    record: RunRecord
    tracker: Tracker
    progress: Progress
    media: MediaPaths

    def wants_samples(self, step: int) -> bool:
        """Whether a table of samples is due after `step`."""
        every = self.config.samples_every_steps
        return bool(every) and (step == 1 or step % every == 0)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one training step."""
        self.record.metrics(step, metrics)
        self.tracker.metrics(step, metrics)
        self.progress.step(step, metrics)

    def further_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics that came after those of their step; the terminal doesn't show them."""
        if metrics:
            self.record.metrics(step, metrics)
            self.tracker.metrics(step, metrics)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Send completions of a training step."""
        self.record.samples(step, rows)
        self.tracker.samples(step, rows, self.media)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Send an evaluation in one mode, and its first completions."""
        self.record.evaluation(evaluation.version, evaluation.mode, evaluation.result, evaluation.rows)
        self.tracker.metrics(evaluation.version, evaluation.metrics())
        self.tracker.samples(evaluation.version, evaluation.rows, self.media, name=f"evaluation-{evaluation.mode}")

    def event(self, kind: str, **data: Any) -> None:
        """Record an event; the terminal prints it too, unless it shows events of this kind in another way."""
        self.record.event(kind, **data)
        if kind not in RECORDED_ONLY:
            self.progress.note(event_line(kind, data))


def event_line(kind: str, data: Mapping[str, Any]) -> str:
    """An event as one line for a person: its kind in words, then its data, cut after `EVENT_CHARACTERS`."""
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in data.items())
    return f"{kind.replace('_', ' ')}: {' '.join(words.split())[:EVENT_CHARACTERS]}"
