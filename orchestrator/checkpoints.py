"""Checkpoints of a run: written to a temporary folder, renamed when whole; older ones are deleted after that."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollout.failures import Failure, FailureError, FailureKind

STATE = "state.json"
POLICY = "policy"
CRITIC = "critic"
NAME = re.compile(r"step-(\d{6,})")


FULL_BELOW_BYTES = 1 << 20
"""A write that failed while the disk had less free space than this counts as a full disk."""


class CheckpointError(FailureError):
    """A checkpoint can't be written or read; the message says which and what to do."""

    def __init__(self, reason: str | Failure, message: str = "") -> None:
        failure = reason if isinstance(reason, Failure) else Failure(FailureKind.INFRASTRUCTURE, reason, message)
        super().__init__(failure)


class BestMetric(BaseModel):
    """The best evaluation so far and the step whose checkpoint holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    step: int


class RunState(BaseModel):
    """What the driver needs to continue a run of any kind; the trainer's ranks save their own state beside it.

    Attributes:
        version: the policy version, which is the number of training steps done.
        cursor: state of the prompt cursor, to which the prompts of open groups were given back.
        kl_controller: state of the KL controller; empty for supervised runs, as are multipliers and best.
        multipliers: state of the multipliers of constrained rewards.
        best: the best evaluation so far.
        evaluated: the version last evaluated; -1 for none.
        mlflow_run_id: MLflow run to continue; None where the server was not reached yet.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = Field(0, ge=0)
    cursor: dict[str, Any] = Field(default_factory=dict)
    kl_controller: dict[str, float] = Field(default_factory=dict)
    multipliers: dict[str, float] = Field(default_factory=dict)
    best: BestMetric | None = None
    evaluated: int = -1
    mlflow_run_id: str | None = None


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep: int) -> None:
        self.folder = run_folder / "checkpoints"
        self.keep = keep

    def whole(self) -> list[Path]:
        """Every whole checkpoint, oldest step first. A checkpoint is whole once its state file is there."""
        found = [p for p in self.folder.glob("step-*") if NAME.fullmatch(p.name) and (p / STATE).is_file()]
        return sorted(found, key=step_of)

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(self.whole()), None)

    def best(self) -> Path | None:
        """The whole checkpoint of the best evaluation; the newest one where there is no such checkpoint."""
        latest = self.latest()
        if latest is None:
            return None
        found = read_state(latest).best
        by_step = {step_of(path): path for path in self.whole()}
        return by_step.get(found.step, latest) if found is not None else latest

    def holds(self, version: int) -> bool:
        """Whether there is a whole checkpoint of this version."""
        return (self._path(version) / STATE).is_file()

    async def write(
        self,
        state: RunState,
        save_policy: Callable[[Path], Awaitable[None]],
        save_critic: Callable[[Path], Awaitable[None]] | None = None,
    ) -> Path:
        """Write a checkpoint: policy and critic first, state last, then one rename.

        Raises:
            CheckpointError: the disk refused (`checkpoint_disk_full`, `checkpoint_write_failed`).
            FailureError: policy or critic couldn't save its state.
        Whatever is raised, the half-written folder is removed and older checkpoints stay as they are.
        """
        final = self._path(state.version)
        if self.holds(state.version):
            return final
        temporary = self.folder / f".writing-{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            await save_policy(temporary / POLICY)
            if save_critic is not None:
                await save_critic(temporary / CRITIC)
            _write_durably(temporary / STATE, state.model_dump_json(indent=2))
            _sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync_entry(self.folder)
        except (OSError, FailureError) as error:
            refusal = _refusal(final, error)
            shutil.rmtree(temporary, ignore_errors=True)
            if refusal is None:
                raise
            raise refusal from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune(best=state.best.step if state.best else None)
        return final

    def _path(self, version: int) -> Path:
        return self.folder / f"step-{version:06d}"

    def _prune(self, best: int | None) -> None:
        """Delete older checkpoints and half-written folders. The run goes on where a deletion fails."""
        for path in self.whole()[: -self.keep]:
            if step_of(path) != best:
                with suppress(OSError):
                    (path / STATE).unlink()  # first, so that a half-deleted one is never taken for whole
                    shutil.rmtree(path)
        for path in self._left_over():
            shutil.rmtree(path, ignore_errors=True)

    def _left_over(self) -> Iterator[Path]:
        yield from self.folder.glob(".writing-*")
        yield from (p for p in self.folder.glob("step-*") if not (p / STATE).exists())


def step_of(checkpoint: Path) -> int:
    """The training step a checkpoint's folder is named for."""
    match = NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(
            "checkpoint_unknown", f"{checkpoint} is not the folder of a checkpoint. Their names are like step-000123."
        )
    return int(match.group(1))


def read_state(checkpoint: Path) -> RunState:
    """The driver's state in a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return RunState.model_validate_json((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        message = (
            f"{checkpoint / STATE}: can't be read ({why}). Remove {checkpoint} to continue from an older checkpoint."
        )
        raise CheckpointError("checkpoint_damaged", message) from error


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Write a folder's files through to the disk, so that a renamed checkpoint survives a power cut."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(final: Path, error: Exception) -> CheckpointError | None:
    """The error that says what the disk refused, or None. A policy in another process passes the reason on as text."""
    stands = "The checkpoints before it are whole. Free space there and continue with --resume."
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    is_full = is_full or any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
    if is_full or _room(final.parent) < FULL_BELOW_BYTES:
        return CheckpointError("checkpoint_disk_full", f"{final}: the disk is full. {stands}")
    if isinstance(error, OSError):
        return CheckpointError("checkpoint_write_failed", f"{final}: can't be written ({error}). {stands}")
    return None


def _room(folder: Path) -> int:
    """Free bytes on the folder's disk; `FULL_BELOW_BYTES` where they can't be read."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return FULL_BELOW_BYTES
