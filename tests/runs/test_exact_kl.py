"""A whole run held back by the exact KL to its reference, with every engine real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Command, overridden, rows, steps

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS = 3


def test_a_run_with_the_exact_kl_starts_at_its_reference_and_measures_how_far_it_goes(
    small_recipe: dict[str, Any], start: Callable[..., Command]
) -> None:
    recipe = overridden(
        small_recipe,
        algorithm={"kl": {"coefficient": 0.02, "estimator": "full"}},
        trainer__steps=STEPS,
        checkpoint__every_steps=STEPS,
        checkpoint__export=False,
        tracking__samples_every_steps=0,
    )
    del recipe["data"]["evaluation"], recipe["evaluation"]
    run = start(recipe)
    assert run.wait() == 0, run.output
    assert "Traceback" not in run.output
    told = steps(run.folder)
    distances = [told[step]["train/kl_reference"] for step in range(1, STEPS + 1)]
    assert abs(distances[0]) < 1e-6  # untrained, the policy is the reference
    assert 1e-6 < distances[1] < distances[2] < 1.0
    for metrics in told.values():
        assert metrics["train/kl_coefficient"] == 0.02
        assert metrics["train/skipped_updates"] == 0
        assert metrics["rollout/dropped"] == 0
        assert metrics["time/reference_s"] > 0
    assert rows(run.folder, "events", "reference_died") == []
    assert run.left_behind() == []
