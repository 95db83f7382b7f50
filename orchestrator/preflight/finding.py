"""The finding that a check of preflight returns, and the planned run that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.preflight.model_folder import ModelFolder
from orchestrator.roles.table import AnyConfig


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem that a check found: an error stops the run, a warning is only printed."""

    severity: Literal["error", "warning"]
    message: str


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run that is about to start.

    Attributes:
        config: its configuration.
        model: what its model folder holds.
        resume: whether it continues from the run folder's latest checkpoint.
        starts_run: False where nothing is trained (evaluation), so that the run folder is left alone.
    """

    config: AnyConfig
    model: ModelFolder
    resume: bool = False
    starts_run: bool = True


def errors(messages: Iterable[str]) -> list[Finding]:
    """Messages as errors."""
    return [Finding("error", message) for message in messages]
