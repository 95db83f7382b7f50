"""The run shell: what every kind of run shares, from the run folder to the report. `run_kinds.py` has the kinds.

It saves the resolved configuration, opens the telemetry, continues from a checkpoint, writes a last checkpoint when a
run is cut short, and ends with a verdict, a report and an exit code: 0 for done, 1 for a run that failed with a
verdict, 130 for one that Ctrl-C stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Iterator
from typing import Any

from orchestrator.checkpoints import Checkpoints, RunState, read_state
from orchestrator.config.loading import save_config
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.interruption import INTERRUPTED, Interruption, run_until_interrupted, uninterrupted
from orchestrator.record.progress import Progress
from orchestrator.record.run_record import RunRecord
from orchestrator.run_kinds import Loop, RunKind
from orchestrator.telemetry import Telemetry
from orchestrator.tracking.tracker import RunStatus, Tracker
from rollout.failures import Failure, FailureError, FailureKind
from rollout.media import MediaStore

DONE, FAILED = 0, 1
STATUS: dict[int, RunStatus] = {DONE: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}
STOPPING = "stopping after the current update and a checkpoint; press Ctrl-C again to stop now"
CHECKPOINT_S = 20.0
"""What a last checkpoint may take on top of `deadlines.stop_s` when a run is cut short."""
LAST_SENDING_S = 1.0
"""How long MLflow is waited for after the second Ctrl-C."""


def run(kind: RunKind, config: Config | SFTConfig, *, resume: bool) -> int:
    """Run `kind` from its beginning, or from the run folder's latest checkpoint. Returns the exit code."""
    return run_until_interrupted(lambda interruption: _run(kind, config, resume, interruption), STOPPING)


async def _run(kind: RunKind, config: Config | SFTConfig, resume: bool, interruption: Interruption) -> int:
    checkpoints = Checkpoints(config.run.folder, keep=config.checkpoint.keep)
    checkpoint = checkpoints.latest() if resume else None
    state = read_state(checkpoint) if checkpoint else RunState()
    start = kind.body()
    with open_telemetry(config, state, is_resumed=resume) as telemetry:
        outcome, verdict = FAILED, "failed"
        interruption.on_second = lambda: _record_stop(telemetry, state)
        try:
            async with start(config, state, checkpoints, telemetry, checkpoint) as loop:
                await _to_the_end(loop, config, state, telemetry, interruption)
            outcome, verdict = DONE, "done"
        except FailureError as error:
            verdict = f"stopped at step {state.version}: {error}"
        except asyncio.CancelledError:
            outcome, verdict = INTERRUPTED, f"interrupted at step {state.version}; continue with --resume"
        except Exception as error:
            verdict = f"stopped at step {state.version} by a defect: {type(error).__name__}: {error}"
            raise
        finally:
            if interruption.stops_now:
                _finish_now(telemetry, state)
            else:
                interruption.on_second = None  # the last event is written by what follows
                await uninterrupted(_in_thread(finish, config, telemetry, state, outcome, verdict))
    return outcome


async def _to_the_end(
    loop: Loop, config: Config | SFTConfig, state: RunState, telemetry: Telemetry, interruption: Interruption
) -> None:
    """Train; whatever ends it, leave a whole checkpoint of the last whole step."""
    try:
        await loop.train()
    except (Exception, asyncio.CancelledError) as error:
        telemetry.record.event("stopped", step=state.version, why=str(error) or "interrupted")
        await _last_checkpoint(loop, telemetry, config.deadlines.stop_s + CHECKPOINT_S, interruption)
        raise
    if config.export_folder is not None:
        telemetry.progress.phase("exporting the policy")
        await loop.policy.export(config.export_folder)


async def _last_checkpoint(loop: Loop, telemetry: Telemetry, within_s: float, interruption: Interruption) -> None:
    """Write a checkpoint if the trainer can; where the trainer was lost, the checkpoint before it counts."""
    if interruption.stops_now:
        telemetry.event("no_last_checkpoint", why="the second Ctrl-C stopped the run at once")
        return
    if not loop.is_whole:
        telemetry.event("no_last_checkpoint", why="an update was cut off, so the trainer's step is not whole")
        return
    try:
        await uninterrupted(_within(within_s, loop.checkpoint()))
    except (FailureError, TimeoutError) as error:
        telemetry.event("no_last_checkpoint", why=str(error) or f"the trainer did not save within {within_s:g} s")


async def _within(seconds: float, act: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(seconds):
        await act


async def _in_thread(work: Any, *arguments: Any) -> None:
    await asyncio.to_thread(work, *arguments)


@contextlib.contextmanager
def open_telemetry(config: Config | SFTConfig, state: RunState, *, is_resumed: bool) -> Iterator[Telemetry]:
    """Run record, MLflow and terminal of a run, closed at the end whatever happens.

    Raises:
        FailureError: the run folder can't be written.
    """
    folder = config.run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    except OSError as error:
        message = f"run.folder = {folder} can't be written: {error}. Free space there, or choose another folder."
        raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "run_folder_unwritable", message)) from error
    tracker = Tracker.start(
        config.tracking,
        folder,
        config.run.name,
        config.model_dump(mode="json"),
        state.mlflow_run_id,
        is_resumed=is_resumed,
    )
    record = RunRecord(folder, resume_step=state.version if is_resumed else None)
    with tracker, record, Progress(config.trainer.steps, first_step=state.version) as progress:
        if not is_resumed:
            record.event("started", step=state.version, seed=config.run.seed)
        tracker.artifact(folder / "config.yaml")
        yield Telemetry(config.tracking, record, tracker, progress, MediaStore(folder / "media"))


def finish(config: Config | SFTConfig, telemetry: Telemetry, state: RunState, outcome: int, verdict: str) -> None:
    """End a run's telemetry: the last event, the report, MLflow's status, and the summary on the terminal."""
    from orchestrator.report.page import write_report

    folder = config.run.folder
    telemetry.event("finished", status=STATUS[outcome], step=state.version, verdict=verdict)
    words = {"verdict": verdict}
    try:
        report = write_report(folder)
        words |= summary_words(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        words["report"] = str(report)
    except OSError as error:
        words["report"] = f"can't be written ({error}). Write it later with: counterpoint report {folder}"
    if outcome == DONE and config.export_folder is not None:
        words["model"] = str(config.export_folder)
    for path in (folder / "report.html", folder / "summary.json", folder / "plots"):
        if path.exists():
            telemetry.tracker.artifact(path)
    status = telemetry.tracker.finish(STATUS[outcome])
    if status.run_id is not None:
        words["MLflow run"] = status.run_id
    telemetry.progress.finish(words)


def _stop_verdict(state: RunState) -> str:
    return f"stopped at once at step {state.version}; continue from the latest checkpoint with --resume"


def _record_stop(telemetry: Telemetry, state: RunState) -> None:
    """Write the last event of a run that the second Ctrl-C stops."""
    telemetry.event("finished", status=STATUS[INTERRUPTED], step=state.version, verdict=_stop_verdict(state))


def _finish_now(telemetry: Telemetry, state: RunState) -> None:
    """End a run's telemetry after the second Ctrl-C, in about a second and without a report."""
    telemetry.progress.finish({"verdict": _stop_verdict(state)})
    telemetry.tracker.finish(STATUS[INTERRUPTED], LAST_SENDING_S)


def summary_words(summary: dict[str, Any]) -> dict[str, str]:
    """The lines of the terminal's summary that say what was learned, from `summary.json`."""
    words = {}
    for mode, before in summary["eval"]["before"].items():
        after = summary["eval"]["after"].get(mode)
        if after is not None:
            words[f"{mode} evaluation"] = f"{_interval(before)} → {_interval(after)} of {after['n']} held-out prompts"
    if first_and_last := summary["loss"]:
        words["loss"] = " → ".join(f"{point['value']:.4f} at step {point['step']}" for point in first_and_last.values())
    groups = summary["groups"]
    if groups:
        dropped = sum(groups["dropped"].values())
        words["groups"] = f"{groups['admitted']} admitted = {groups['consumed']} learned from + {dropped} dropped"
        words["groups"] += f" + {groups['open']} open"
    words["training"] = f"{summary['steps']} steps in {summary['training_seconds']:.0f} s"
    return words


def _interval(found: dict[str, Any]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
