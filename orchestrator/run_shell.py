"""A run from start to end: opens the run folder, starts the roles, trains, and leaves everything in order.

The functions named like the commands (`train`, `sft`, `evaluate`, `export`) return the command's exit code: 0 for done,
1 for a run that failed with a verdict, 130 for one that was stopped by Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoints import POLICY, CheckpointError, Checkpoints, RunState, read_state, step_of
from orchestrator.cluster import ray_cluster
from orchestrator.config.loading import load_config, save_config
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.record.progress import Progress
from orchestrator.record.run_record import Record
from orchestrator.roles.start import CANARIES, load_data, start_policy, start_roles, start_training
from orchestrator.step.evaluation import evaluate as evaluate_prompts
from orchestrator.step.publish import proof_prompts, publish
from orchestrator.telemetry import Telemetry
from orchestrator.tracking.tracker import RunStatus, Tracker
from rollout.failures import Failure, FailureError, FailureKind
from rollout.media import MediaStore

if TYPE_CHECKING:
    from orchestrator.loop import Training

logger = logging.getLogger(__name__)

DONE, FAILED, INTERRUPTED = 0, 1, 130
STATUS: dict[int, RunStatus] = {DONE: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}
CHECKPOINT_S = 20.0
"""What a last checkpoint may take on top of `deadlines.stop_s` when a run is cut short."""


def train(config: Config, *, resume: bool) -> int:
    """`counterpoint train`."""
    return _supervised_by_signals(_train(config, resume=resume))


def evaluate(config: Config, checkpoint: Path | None) -> int:
    """`counterpoint evaluate`: the recipe's model, or one of its checkpoints, on the held-out prompts."""
    return _supervised_by_signals(_evaluate(config, checkpoint))


def export(run_folder: Path, out: Path) -> int:
    """`counterpoint export`: the best checkpoint of a run as a Hugging Face folder."""
    return _supervised_by_signals(_export(run_folder, out))


def sft(config: SFTConfig) -> int:
    """`counterpoint sft`."""
    from orchestrator.sft import fine_tune

    return _supervised_by_signals(fine_tune(config))


def _supervised_by_signals(run: Coroutine[Any, Any, int]) -> int:
    """Run to the end. The first Ctrl-C (or SIGTERM) cancels the run, which then leaves a checkpoint."""

    async def main() -> int:
        task = asyncio.ensure_future(run)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            logger.warning("stopping: what must not be cut is finished first; once more, and it is cut")
            task.cancel()

        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, stop)
        try:
            return await task
        except asyncio.CancelledError:
            return INTERRUPTED

    return asyncio.run(main())


async def _train(config: Config, *, resume: bool) -> int:
    checkpoints = Checkpoints(config.run.folder, keep=config.checkpoint.keep)
    checkpoint = checkpoints.latest() if resume else None
    state = read_state(checkpoint) if checkpoint else RunState()
    with open_telemetry(config, state, is_resumed=resume) as telemetry:
        outcome, verdict = FAILED, "failed"
        try:
            async with start_training(config, state, checkpoints, telemetry, checkpoint) as training:
                await _to_the_end(training)
            outcome, verdict = DONE, "done"
        except FailureError as error:
            verdict = f"stopped at version {state.version}: {error}"
        except asyncio.CancelledError:
            outcome, verdict = INTERRUPTED, f"interrupted at version {state.version}; go on with --resume"
        except Exception as error:
            verdict = f"stopped at version {state.version} by a defect: {type(error).__name__}: {error}"
            raise
        finally:
            await asyncio.to_thread(finish_records, config, telemetry, state, outcome, verdict)
    return outcome


async def _to_the_end(training: Training) -> None:
    """Train; whatever ends it, leave a whole checkpoint of the last whole step."""
    config, telemetry, state = training.config, training.telemetry, training.state
    try:
        await training.train()
    except (Exception, asyncio.CancelledError) as error:
        telemetry.record.event("stopped", step=state.version, why=str(error) or "interrupted")
        await _last_checkpoint(training)
        raise
    if config.checkpoint.export:
        telemetry.progress.phase("exporting the policy")
        await training.policy.export(config.run.folder / "export")


async def _last_checkpoint(training: Training) -> None:
    """Write one if the trainer can; it may be what was lost, and then the last checkpoint stands."""
    if not training.is_whole:
        training.telemetry.event("no_last_checkpoint", why="the policy was cut in the middle of an update")
        return
    try:
        async with asyncio.timeout(training.config.deadlines.stop_s + CHECKPOINT_S):
            await training.checkpoint()
    except (FailureError, TimeoutError) as error:
        training.telemetry.event("no_last_checkpoint", why=str(error) or "the trainer took too long to save")


@contextlib.contextmanager
def open_telemetry(config: Config, state: RunState, *, is_resumed: bool) -> Iterator[Telemetry]:
    """Record, MLflow and terminal of a run, closed at the end whatever happens.

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
    record = Record(folder, resume_step=state.version if is_resumed else None)
    with tracker, record, Progress(config.trainer.steps, first_step=state.version) as progress:
        if not is_resumed:
            record.event("started", step=state.version, seed=config.run.seed)
        tracker.artifact(folder / "config.yaml")
        yield Telemetry(config.tracking, record, tracker, progress, MediaStore(folder / "media"))


def finish_records(config: Config, telemetry: Telemetry, state: RunState, outcome: int, verdict: str) -> None:
    """Close the account of a run: the last event, the report, MLflow's status, and the last words on the terminal."""
    from orchestrator.report.page import write_report

    folder = config.run.folder
    telemetry.event("finished", status=STATUS[outcome], step=state.version, verdict=verdict)
    words = {"verdict": verdict}
    try:
        report = write_report(folder)
        words |= last_words(json.loads((folder / "summary.json").read_text(encoding="utf-8")), report)
    except OSError as error:
        words["report"] = f"can't be written ({error}); make it later with: counterpoint report {folder}"
    for path in (folder / "report.html", folder / "summary.json", folder / "plots"):
        if path.exists():
            telemetry.tracker.artifact(path)
    status = telemetry.tracker.finish(STATUS[outcome])
    if status.run_id is not None:
        words["MLflow run"] = status.run_id
    telemetry.progress.finish(words)


def last_words(summary: dict[str, Any], report: Path) -> dict[str, str]:
    """What the terminal says at the end of what was learned."""
    words = {}
    for mode, before in summary["eval"]["before"].items():
        after = summary["eval"]["after"].get(mode)
        if after is not None:
            words[f"{mode} evaluation"] = f"{_interval(before)} → {_interval(after)} of {after['n']} held-out prompts"
    groups = summary["groups"]
    if groups:
        dropped = sum(groups["dropped"].values())
        words["groups"] = f"{groups['admitted']} admitted = {groups['consumed']} learned from + {dropped} dropped"
        words["groups"] += f" + {groups['open']} open"
    words["training"] = f"{summary['steps']} steps in {summary['rl_seconds']:.0f} s"
    words["report"] = str(report)
    return words


def _interval(found: dict[str, Any]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


async def _evaluate(config: Config, checkpoint: Path | None) -> int:
    """Every mode of the recipe on every held-out prompt, printed as a table."""
    from rich.console import Console
    from rich.table import Table

    media = MediaStore(config.run.folder / "media")
    data = load_data(config, media)
    if data.held_out is None:
        message = "the recipe has no data.evaluation, so there is nothing to evaluate on"
        raise FailureError(Failure(FailureKind.DATA, "no_held_out_prompts", message))
    table = Table("mode", "reward", "95% interval", "prompts", "failed", "tokens")
    log = logging.getLogger("counterpoint.evaluate")
    async with (
        ray_cluster(config.cluster, config.deadlines),
        start_roles(config, media.folder, lambda kind, **facts: log.warning("%s %s", kind, facts)) as roles,
    ):
        version = 0
        if checkpoint is not None:
            await roles.policy.load(checkpoint / POLICY)
            version = step_of(checkpoint)
        prompts = proof_prompts(data.train.prompts[:CANARIES], config.weights.canaries)
        await publish(roles.policy, roles.fleet, version, prompts)
        for mode in config.evaluation.modes:
            found = await evaluate_prompts(
                roles.fleet,
                roles.rewards,
                data.held_out.prompts,
                config.evaluation.sampling,
                mode,
                version=version,
                seed=config.run.seed,
                shown=0,
            )
            result, failed = found.result, sum(found.failed.values())
            interval = f"{result.low:.3f} to {result.high:.3f}"
            table.add_row(
                mode, f"{result.reward:.3f}", interval, str(result.n), str(failed), f"{result.mean_tokens:.1f}"
            )
    Console().print(table)
    return DONE


async def _export(run_folder: Path, out: Path) -> int:
    config: Config = load_config(run_folder / "config.yaml", ())
    checkpoint = Checkpoints(run_folder, keep=config.checkpoint.keep).best()
    if checkpoint is None:
        raise CheckpointError("checkpoint_missing", f"{run_folder} has no whole checkpoint to export")
    async with ray_cluster(config.cluster, config.deadlines):
        policy = await start_policy(config, run_folder / "media")
        try:
            await policy.load(checkpoint / POLICY)
            await policy.export(out)
        finally:
            await policy.stop()
    return DONE
