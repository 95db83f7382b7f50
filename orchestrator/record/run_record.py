"""The run record: metrics, samples, evaluations and events of a run as JSON Lines files in the run folder.

It is complete without MLflow. `report/` makes the report from it alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.record.jsonl import JsonLines, finite, keep_only, read_lines, set_aside
from rollout.media import MediaRef
from rollout.prompts import Prompt, TextPart
from rollout.samples import ScoredGroup

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVALUATIONS = "evaluations.jsonl"
EVENTS = "events.jsonl"


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One completion with what a person wants to see of it.

    Attributes:
        prompt: the prompt's text; each medium stands as "[image]" where it was.
        media: the prompt's media, by reference.
        target: what the verifier compared with.
        completion: decoded text.
        reward: the combined reward.
        components: value by reward component.
        advantage: mean over the completion's tokens, or None in an evaluation.
        policy_version: the newest version that sampled a token of it.
        tokens: length of the completion.
        finish_reason: why it ended.
        group_id: the group it belongs to, or the prompt id in an evaluation.
    """

    prompt: str
    media: tuple[MediaRef, ...]
    target: Any
    completion: str
    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    advantage: float | None = None
    policy_version: int = 0
    tokens: int = 0
    finish_reason: str = "stop"
    group_id: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Mean reward on held-out prompts.

    Attributes:
        reward: mean.
        low: lower end of the 95% interval.
        high: upper end.
        n: prompts evaluated.
        mean_tokens: mean length of a completion.
        components: mean by reward component.
    """

    reward: float
    low: float
    high: float
    n: int
    mean_tokens: float = 0.0
    components: Mapping[str, float] = field(default_factory=dict)

    def metrics(self, mode: str) -> dict[str, float]:
        """The result under the metric names of `mode` ("eval/greedy/reward")."""
        values = {
            "reward": self.reward,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "mean_tokens": self.mean_tokens,
        }
        values |= {f"component/{name}": value for name, value in self.components.items()}
        return {f"eval/{mode}/{name}": float(value) for name, value in values.items()}


def prompt_text(prompt: Prompt) -> str:
    """A prompt as readable text: its messages one after another, media as "[image]"."""
    turns = []
    for message in prompt.messages:
        text = "".join(part.text if isinstance(part, TextPart) else f"[{part.media.kind}] " for part in message.parts)
        turns.append(text if message.role == "user" else f"{message.role}: {text}")
    return "\n".join(turns)


def sample_rows(group: ScoredGroup, advantages: Sequence[float] | None = None) -> list[SampleRow]:
    """Every completion of a group as a row, with its advantage where one is known."""
    text = prompt_text(group.prompt)
    rows = []
    for index, (completion, score) in enumerate(zip(group.generation.completions, group.scores, strict=True)):
        rows.append(
            SampleRow(
                prompt=text,
                media=group.prompt.media,
                target=group.prompt.target,
                completion=completion.text,
                reward=score.value,
                components=dict(score.components),
                advantage=float(advantages[index]) if advantages is not None else None,
                policy_version=int(completion.policy_versions.max(initial=0)),
                tokens=len(completion),
                finish_reason=completion.finish_reason.value,
                group_id=group.group_id,
            )
        )
    return rows


class RunRecord:
    """Writes the run record of one run. Not thread-safe; one thread owns it.

    With `resume_step`, rows of later steps are removed first (each file in one step), so that repeated steps appear
    once, and a "resumed" event is written. Events of the removed steps stay. Without `resume_step` the record starts
    empty, and an earlier run's files are moved to `previous/`.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        trimmed = {}
        if resume_step is None:
            set_aside(folder, (METRICS, SAMPLES, EVALUATIONS, EVENTS))
        else:
            names = (METRICS, SAMPLES, EVALUATIONS)
            trimmed = {n: keep_only(folder / n, lambda row: row.get("step", 0) <= resume_step) for n in names}
        self._files = {name: JsonLines(folder / name) for name in (METRICS, SAMPLES, EVALUATIONS, EVENTS)}
        if resume_step is not None:
            self.event("resumed", step=resume_step, trimmed=trimmed)

    @property
    def unwritten(self) -> int:
        """Rows that are in memory until the disk has room."""
        return sum(file.unwritten for file in self._files.values())

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of a step under their full names ("train/loss"). May be called more than once a step."""
        numbers = {name: float(value) for name, value in values.items()}
        self._write(METRICS, {"step": step, "time": time.time(), "values": numbers})

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Write completions of a training step."""
        for row in rows:
            self._write(SAMPLES, {"step": step, "source": "train", **asdict(row)})

    def evaluation(self, step: int, mode: str, result: EvaluationResult, rows: Sequence[SampleRow] = ()) -> None:
        """Write an evaluation with some of its completions; the report compares those of the same prompts."""
        for row in rows:
            self._write(SAMPLES, {"step": step, "source": f"eval/{mode}", **asdict(row)})
        self._write(EVALUATIONS, {"step": step, "mode": mode, "time": time.time(), **asdict(result)})

    def event(self, kind: str, **data: Any) -> None:
        """Write an event: started, resumed, finished, alarm, dropped, checkpoint, generator_died, ..."""
        self._write(EVENTS, {"time": time.time(), "kind": kind, **data})

    def close(self) -> None:
        """Write the rows in memory and close the files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        clean, count = finite(row)
        if count:
            clean["non_finite"] = count
        self._files[name].append(clean)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """One dict a step, in order of steps: "step", "time" (of its last row) and every metric (None where non-finite)."""
    steps: dict[int, dict[str, Any]] = {}
    for row in read_lines(folder / METRICS):
        step = int(row["step"])
        steps.setdefault(step, {}).update({**row.get("values", {}), "step": step, "time": row["time"]})
    return [steps[step] for step in sorted(steps)]


def read_samples(folder: Path, source: str | None = None) -> list[dict[str, Any]]:
    """Rows of samples in the order written, optionally of one source ("train", "eval/greedy")."""
    return [row for row in read_lines(folder / SAMPLES) if source is None or row.get("source") == source]


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in order of steps; where a step and mode were evaluated twice, the last."""
    rows = {(int(row["step"]), str(row["mode"])): row for row in read_lines(folder / EVALUATIONS)}
    return [rows[key] for key in sorted(rows)]


def read_events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Events in the order they happened, optionally of one kind."""
    return [row for row in read_lines(folder / EVENTS) if kind is None or row.get("kind") == kind]
