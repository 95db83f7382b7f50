"""Checkpoints: whole or not there, whatever cuts the writing; and words for a full disk or a file that broke."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from orchestrator import checkpoints as module
from orchestrator.checkpoints import POLICY, STATE, BestMetric, CheckpointError, Checkpoints, RunState, read_state
from rollout.failures import Failure, FailureError, FailureKind

POINTS_AT_MOST = 500


async def save(folder: Path) -> None:
    """A policy of two files."""
    folder.mkdir()
    (folder / "weights.pt").write_bytes(b"w" * 5000)
    (folder / "random.pt").write_bytes(b"r" * 50)


def write(folder: Path, version: int, *, keep: int = 2, best: int | None = None) -> Path:
    state = RunState(version=version, best=BestMetric(value=1.0, step=best) if best is not None else None)
    return asyncio.run(Checkpoints(folder, keep=keep).write(state, save))


def assert_whole(path: Path, version: int) -> None:
    assert read_state(path).version == version
    assert (path / POLICY / "weights.pt").stat().st_size == 5000
    assert (path / POLICY / "random.pt").stat().st_size == 50


def test_everything_the_driver_needs_comes_back(tmp_path: Path) -> None:
    state = RunState(
        version=7,
        cursor={"epoch": 2, "given_back": ["a"]},
        kl_controller={"coefficient": 0.3},
        best=BestMetric(value=0.5, step=4),
        evaluated=6,
        mlflow_run_id="abc",
    )
    path = asyncio.run(Checkpoints(tmp_path, keep=1).write(state, save))
    assert path.name == "step-000007"
    assert read_state(path) == state


def test_the_newest_is_gone_on_from_and_only_so_many_are_kept(tmp_path: Path) -> None:
    for version in range(1, 5):
        write(tmp_path, version, keep=2)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert [path.name for path in checkpoints.whole()] == ["step-000003", "step-000004"]
    assert checkpoints.latest() == checkpoints.whole()[-1]


def test_the_best_is_kept_besides_the_newest(tmp_path: Path) -> None:
    for version in range(1, 6):
        write(tmp_path, version, keep=1, best=2 if version >= 2 else 1)
    assert [path.name for path in Checkpoints(tmp_path, keep=1).whole()] == ["step-000002", "step-000005"]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    before = (path / STATE).stat().st_mtime_ns
    assert write(tmp_path, 1) == path
    assert (path / STATE).stat().st_mtime_ns == before


def _die_at(point: int, folder: Path) -> int:
    """In a child: write step 2 after step 1, and end without clean-up at this line of the writing. Its exit code."""
    child = os.fork()
    if child == 0:
        left = point

        def count(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in (module.__file__, __file__) and "shutil" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os._exit(9)
            return count

        sys.settrace(count)
        write(folder, 2, keep=1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_death_at_any_point_of_writing_leaves_a_whole_checkpoint_and_the_next_write_succeeds(tmp_path: Path) -> None:
    # Every line of the writing and of the deletion of the older one is cut once: after each, the newest whole
    # checkpoint is either the old one or the new one, with every byte of it.
    seen = set()
    for point in range(1, POINTS_AT_MOST):
        folder = tmp_path / str(point)
        write(folder, 1, keep=1)
        ended = _die_at(point, folder)
        latest = Checkpoints(folder, keep=1).latest()
        assert latest is not None, f"cut at line {point}: no checkpoint is left"
        assert_whole(latest, module.step_of(latest))
        seen.add(module.step_of(latest))
        assert_whole(write(folder, 3, keep=1), 3)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
        if ended == 0:
            break
    else:
        pytest.fail(f"writing takes more than {POINTS_AT_MOST} lines")
    assert seen == {1, 2}
    assert point > 30


def test_a_policy_that_cannot_save_leaves_the_older_checkpoint_and_nothing_half_written(tmp_path: Path) -> None:
    older = write(tmp_path, 1)

    async def refuse(folder: Path) -> None:
        folder.mkdir()
        raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "policy_died", "rank 0 was lost"))

    with pytest.raises(FailureError, match="rank 0 was lost"):
        asyncio.run(Checkpoints(tmp_path, keep=2).write(RunState(version=2), refuse))
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_cancelled_write_leaves_nothing_half_written(tmp_path: Path) -> None:
    async def slow(folder: Path) -> None:
        folder.mkdir()
        await asyncio.sleep(60)

    async def cut() -> None:
        task = asyncio.ensure_future(Checkpoints(tmp_path, keep=2).write(RunState(version=2), slow))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cut())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_damaged_state_says_which_file_and_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / STATE).write_text((path / STATE).read_text()[:20])
    with pytest.raises(CheckpointError, match=r"step-000001/state.json: can't be read .* Remove .*step-000001"):
        read_state(path)


def test_a_state_of_an_unknown_shape_is_damaged_too(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / STATE).write_text(json.dumps({"version": -1}))
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert caught.value.failure.reason == "checkpoint_damaged"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_the_older_checkpoint_whole(small_disk: Path) -> None:
    older = write(small_disk, 1)

    async def big(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights.pt").write_bytes(b"w" * (4 << 20))

    with pytest.raises(CheckpointError, match=r"step-000002: the disk is full.* --resume") as caught:
        asyncio.run(Checkpoints(small_disk, keep=2).write(RunState(version=2), big))
    assert caught.value.failure.reason == "checkpoint_disk_full"
    assert_whole(older, 1)
    assert list((small_disk / "checkpoints").iterdir()) == [older]


def test_a_full_disk_that_another_process_ran_into_is_recognised(small_disk: Path) -> None:
    async def big(folder: Path) -> None:
        folder.mkdir()
        with pytest.raises(OSError, match="No space"):
            (folder / "weights.pt").write_bytes(b"w" * (4 << 20))
        message = "rank 0 raised when asked to save: RuntimeError: PytorchStreamWriter failed"
        raise FailureError(Failure(FailureKind.BUG, "policy_raised", message))

    with pytest.raises(CheckpointError) as caught:
        asyncio.run(Checkpoints(small_disk, keep=2).write(RunState(version=2), big))
    assert caught.value.failure.reason == "checkpoint_disk_full"
