"""kill -9 of the driver in the middle of a step, then --resume: what is lost, what goes on, and whether it is equal."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.checkpoints import Checkpoints, read_state
from tests.conftest import Command, overridden, rows, steps

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.chaos]

EXACT = ("reward/mean", "rollout/tokens", "train/loss", "train/grad_norm", "weights/version")


def mlflow_steps(folder: Path) -> tuple[str, list[int]]:
    """The only MLflow run of a folder, and the steps of its loss in the order they were sent."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "counterpoint"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.run_id, sorted(point.step for point in history)


def account(folder: Path) -> tuple[int, int, dict[str, int]]:
    """Groups admitted and consumed, and dropped by reason."""
    with closing(sqlite3.connect(folder / "ledger.db")) as ledger:
        query = "SELECT to_state, reason, count(*) FROM transitions GROUP BY to_state, reason"
        counts = {(state, reason): count for state, reason, count in ledger.execute(query)}
    dropped = {reason: count for (state, reason), count in counts.items() if state == "dropped"}
    return counts["admitted", None], counts["consumed", None], dropped


def test_a_killed_run_goes_on_and_equals_one_that_was_never_cut(
    slow_recipe: dict[str, Any], start: Callable[..., Command], tmp_path: Path
) -> None:
    straight = start(overridden(slow_recipe, run__folder=str(tmp_path / "straight")))
    assert straight.wait() == 0, straight.output

    killed = start(overridden(slow_recipe, run__folder=str(tmp_path / "cut")))
    killed.until_step(5)
    assert killed.processes("EngineCore")
    killed.kill()
    assert killed.left_behind() == []
    latest = Checkpoints(killed.folder, keep=2).latest()
    assert latest is not None
    assert read_state(latest).version == 4, "at most the steps since the last checkpoint are lost"
    first_id = read_state(latest).mlflow_run_id or mlflow_steps(killed.folder)[0]

    resumed = start(overridden(slow_recipe, run__folder=str(tmp_path / "cut")), "--resume")
    assert resumed.wait() == 0, resumed.output
    assert resumed.left_behind() == []

    told, expected = steps(resumed.folder), steps(straight.folder)
    assert list(told) == list(expected) == list(range(1, 9))
    for step in told:
        for name in EXACT:
            assert told[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-5), f"{name} at {step}"

    assert mlflow_steps(resumed.folder) == (first_id, list(range(1, 9)))
    assert [event["kind"] for event in rows(resumed.folder, "events") if event["kind"] in ("started", "resumed")] == [
        "started",
        "resumed",
    ]
    admitted, consumed, dropped = account(resumed.folder)
    assert admitted == consumed + sum(dropped.values())
    assert set(dropped) <= {"run_interrupted"}
    assert json.loads((resumed.folder / "summary.json").read_text())["steps"] == 8


def test_a_damaged_checkpoint_is_named_with_what_to_do_and_the_older_one_then_works(
    slow_recipe: dict[str, Any], start: Callable[..., Command]
) -> None:
    recipe = overridden(slow_recipe, trainer__steps=4)
    first = start(recipe)
    assert first.wait() == 0, first.output
    newest = Checkpoints(first.folder, keep=2).latest()
    assert newest is not None
    (newest / "state.json").write_text('{"version": 4, "cur')
    refused = start(overridden(recipe, trainer__steps=6), "--resume")
    assert refused.wait(60) == 1
    assert "state.json: can't be read" in refused.output
    assert "Traceback" not in refused.output
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    resumed = start(overridden(recipe, trainer__steps=6), "--resume")
    assert resumed.wait() == 0, resumed.output
    assert list(steps(resumed.folder)) == list(range(1, 7))
