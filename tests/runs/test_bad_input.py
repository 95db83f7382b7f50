"""Bad data and bad rewards in a run that must go on; bad recipes and hopeless rewards in runs that must not."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.conftest import Command, overridden, rows, steps

pytestmark = pytest.mark.engine

STEPS = 4
GOOD = 12
TRAPS = {
    "raises": "reward_raised",
    "nan": "reward_nan",
    "hangs": "reward_timeout",
    "text": "reward_not_a_number",
    "none": "reward_missing",
    "count": "reward_wrong_count",
}
REWARDS = """
import time
from reward.registry import reward_function

@reward_function("trapped")
def trapped(request):
    trap = request.metadata.get("trap")
    if trap == "raises":
        return {}["no such key"]
    if trap == "hangs":
        time.sleep(600)
    if trap in ("nan", "text", "none"):
        return {"nan": float("nan"), "text": "1.0", "none": None}[trap]
    return sum(request.completion.count(vowel) for vowel in "aeiou") + 0.01 * len(request.completion)

@reward_function("of_the_group", batched=True)
def of_the_group(requests):
    return [0.0] * (len(requests) + (requests[0].metadata.get("trap") == "count"))

@reward_function("always_raises")
def always_raises(request):
    raise KeyError("the column that never was")
"""


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good questions, seven that trap a reward or the context, and six rows that can't even be read."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "rewards.py").write_text(REWARDS)
    Image.fromarray(np.full((56, 56, 3), 90, np.uint8)).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is not an image")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")

    def row(question: str, image: str = "good.png", **more: Any) -> dict[str, Any]:
        return {"prompt": f"<image>{question}", "images": [image], "target": question, "trap": None} | more

    lines = [row(f"good {index}") for index in range(GOOD)]
    lines += [row(f"trap {trap}", trap=trap) for trap in TRAPS]
    lines += [row("trap " + "long " * 60)]
    lines += [row(f"bad {name}", image=f"{name}.png") for name in ("truncated", "empty", "text", "huge", "missing")]
    lines += [row("bad target", target=None)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def bad_recipe(small_recipe: dict[str, Any], bad_data: Path) -> dict[str, Any]:
    recipe = overridden(
        small_recipe,
        data={"train": {"path": str(bad_data / "train.jsonl"), "images_column": "images"}},
        reward={
            "modules": [str(bad_data / "rewards.py")],
            "components": [{"function": "trapped"}, {"function": "of_the_group"}],
            "deadline_s": 1.0,
            "max_attempts": 2,
            "workers": 2,
        },
        algorithm={},
        rollout__max_staleness=1,
        rollout__max_dropped_share=0.9,
        trainer__steps=STEPS,
        generator__replicas=2,
        tracking__samples_every_steps=1,
        tracking__samples=8,
    )
    del recipe["evaluation"]
    return recipe


@pytest.fixture(scope="module")
def run(bad_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A finished run on the bad data, one version stale, with two generators."""
    folder = tmp_path_factory.mktemp("bad-run")
    command = Command.on(overridden(bad_recipe, run__folder=str(folder / "run")), folder)
    try:
        command.code = command.wait()
        yield command
    finally:
        command.clear_away()


def test_the_run_finishes_every_step(run: Command) -> None:
    assert run.code == 0, run.output
    assert list(steps(run.folder)) == list(range(1, STEPS + 1))
    assert run.left_behind() == []


def test_rows_that_cannot_be_used_are_set_aside_and_counted_by_reason(run: Command) -> None:
    (event,) = rows(run.folder, "events", "rows_quarantined")
    counted = {key: value for key, value in event.items() if key.startswith(("media_", "target_"))}
    assert counted == {
        "media_truncated": 1,
        "media_empty": 1,
        "media_not_an_image": 1,
        "media_too_large": 1,
        "media_missing": 1,
        "target_missing": 1,
    }


def test_every_failure_of_a_reward_is_dropped_and_counted_by_its_reason(run: Command) -> None:
    events = Counter(event["reason"] for event in rows(run.folder, "events", "group_dropped"))
    summary = json.loads((run.folder / "summary.json").read_text())
    with closing(sqlite3.connect(run.folder / "ledger.db")) as ledger:
        query = "SELECT reason, count(*) FROM transitions WHERE to_state = 'dropped' GROUP BY reason"
        ledger_counts = Counter(dict(ledger.execute(query)))
        admitted, consumed = (
            ledger.execute("SELECT count(*) FROM transitions WHERE to_state = ?", (state,)).fetchone()[0]
            for state in ("admitted", "consumed")
        )
    for reason in (*TRAPS.values(), "prompt_too_long"):
        assert events[reason] >= 1, f"{reason}: {events}"
        assert ledger_counts[reason] == summary["groups"]["dropped"][reason] == events[reason]
    assert admitted == consumed + ledger_counts.total()
    assert consumed == 4 * STEPS


def test_a_prompt_too_long_is_met_once_and_quarantined(run: Command) -> None:
    (event,) = [e for e in rows(run.folder, "events", "group_dropped") if e["reason"] == "prompt_too_long"]
    assert "model.max_length = 128" in event["why"]


def test_no_failure_became_a_reward(run: Command) -> None:
    learned_from = {row["target"] for row in rows(run.folder, "samples") if row["source"] == "train"}
    assert len(learned_from) >= GOOD // 2
    assert all(target.startswith("good") for target in learned_from)


def test_the_dropped_are_in_the_metrics_of_their_steps(run: Command) -> None:
    told = steps(run.folder).values()
    by_reason = sum(v for metrics in told for k, v in metrics.items() if k.startswith("rollout/dropped/"))
    assert by_reason == sum(metrics["rollout/dropped"] for metrics in told) >= len(TRAPS)


def test_the_next_batch_was_generated_while_the_policy_learned(run: Command) -> None:
    told = steps(run.folder)
    assert max(metrics["rollout/max_staleness"] for metrics in told.values()) == 1
    assert told[1]["rollout/max_staleness"] == 0


def test_trainer_and_both_generators_agree_at_every_step(run: Command) -> None:
    for metrics in steps(run.folder).values():
        assert abs(metrics["rollout/mismatch_kl"]) < 1e-5
        assert metrics["rollout/max_logprob_gap"] < 1e-4
        assert metrics["weights/delivered"] == 2


def test_both_generators_took_part(run: Command) -> None:
    with closing(sqlite3.connect(run.folder / "ledger.db")) as ledger:
        query = "SELECT DISTINCT generator FROM transitions WHERE generator IS NOT NULL"
        assert {name for (name,) in ledger.execute(query)} == {"generator-0", "generator-1"}


def test_without_evaluation_the_last_words_still_come(run: Command) -> None:
    assert "verdict" in run.output
    assert "admitted =" in run.output


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__train__path": "nowhere/train.jsonl"}, ["data file", "nowhere/train.jsonl", "does not exist"]),
        ({"model__path": "nowhere/model"}, ["model.path", "nowhere/model"]),
        ({"data__train__prompt_column": "promt"}, ["'promt'", "prompt_column", "Did you mean 'prompt'"]),
        ({"reward__components": [{"function": "traped"}]}, ["traped", "trapped"]),
        ({"reward__modules": ["nowhere/rewards.py"]}, ["nowhere/rewards.py"]),
        ({"model__max_length": 4096}, ["model.max_length", "4096"]),
        ({"cluster__address": "127.0.0.1:9"}, ["cluster.address", "127.0.0.1:9"]),
    ],
    ids=["file", "model", "column", "function", "module", "context", "cluster"],
)
def test_a_recipe_that_cannot_run_is_refused_in_words_before_anything_starts(
    bad_recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    recipe = overridden(bad_recipe, run__folder=str(tmp_path / "run"), **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2, result.output
    for words in expected:
        assert words in result.output.replace("\n", ""), result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reward_that_always_raises_ends_the_run_with_the_users_traceback(
    bad_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = overridden(
        bad_recipe,
        run__folder=str(tmp_path / "run"),
        generator__replicas=1,
        reward__components=[{"function": "always_raises"}],
    )
    command = Command.on(recipe, tmp_path)
    try:
        assert command.wait() == 1, command.output
        assert "max_dropped_share" in command.output
        assert "KeyError" in command.output
        assert 'raise KeyError("the column that never was")' in command.output
        assert "defect of counterpoint" not in command.output
        assert command.left_behind() == []
        (finished,) = rows(command.folder, "events", "finished")
        assert finished["status"] == "FAILED"
    finally:
        command.clear_away()
