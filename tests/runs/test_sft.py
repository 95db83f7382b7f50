"""Supervised fine-tuning through the command line with the real trainer: interrupted, resumed and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from orchestrator.checkpoints import Checkpoints, read_state
from tests.conftest import Command, overridden, rows, steps

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS = 80


def sft_recipe(small_recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Imitate the answers of the small recipe's questions, 7 of 24 a step: epochs end within batches."""
    return {
        "run": {"folder": str(folder), "seed": 3},
        "model": small_recipe["model"],
        "data": {"train": small_recipe["data"]["train"]},
        "sft": {"batch_size": 7},
        "trainer": overridden(small_recipe["trainer"], steps=STEPS),
        "checkpoint": {"every_steps": 1000},
        "tracking": {"system_metrics": False},
    }


def test_an_interrupted_run_resumes_with_the_losses_of_one_that_was_never_interrupted(
    small_recipe: dict[str, Any], start: Callable[..., Command], tmp_path: Path
) -> None:
    straight = start(sft_recipe(small_recipe, tmp_path / "straight"), command="sft")
    assert straight.wait() == 0, straight.output

    recipe = sft_recipe(small_recipe, tmp_path / "cut")
    cut = start(recipe, command="sft")
    cut.until_step(5)
    cut.interrupt()
    assert cut.wait(30.0) == 130, cut.output
    assert "stopping after the current update and a checkpoint; press Ctrl-C again to stop now" in cut.output
    assert "Traceback" not in cut.output
    assert cut.left_behind() == []
    latest = Checkpoints(cut.folder, keep=2).latest()
    assert latest is not None
    assert 5 <= read_state(latest).version == max(steps(cut.folder)) < STEPS
    assert not (cut.folder / "model").exists()

    refused = start(recipe, command="sft")
    assert refused.wait(60.0) == 2
    assert "already holds a run" in refused.output
    resumed = start(recipe, "--resume", command="sft")
    assert resumed.wait() == 0, resumed.output
    assert resumed.left_behind() == []
    told, expected = steps(resumed.folder), steps(straight.folder)
    assert list(told) == list(expected) == list(range(1, STEPS + 1))
    for step in told:
        for name in ("train/loss", "train/learning_rate", "train/grad_norm"):
            assert told[step][name] == pytest.approx(expected[step][name], rel=1e-4, abs=1e-7), f"{name} at {step}"

    models = [AutoModelForImageTextToText.from_pretrained(f / "model") for f in (resumed.folder, straight.folder)]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    summary = json.loads((resumed.folder / "summary.json").read_text())
    assert (summary["state"], summary["steps"], summary["resumes"]) == ("finished", STEPS, 1)
    assert summary["loss"]["last"]["value"] < summary["loss"]["first"]["value"]
    kinds = [event["kind"] for event in rows(resumed.folder, "events")]
    assert (kinds.count("started"), kinds.count("resumed"), kinds.count("finished")) == (1, 1, 2)
