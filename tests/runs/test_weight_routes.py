"""Every way a version can take to the generators, each in a short training through the real engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Command, overridden, rows, steps

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LORA = {"rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(
    ("overrides", "route"),
    [
        pytest.param({"weights__backend": "nccl", "weights__stage_from_mib": 0}, "push", id="pushed into the engine"),
        pytest.param({"model__lora": {**LORA, "sync": "adapter"}}, "memory", id="an adapter"),
        pytest.param({"model__lora": {**LORA, "sync": "merged"}, "generator__sleep_level": 2}, "memory", id="merged"),
        pytest.param(
            {
                "generator__replicas": 2,
                "weights__shared_memory": False,
                "trainer__learning_rate": 1e-6,
                "model__precision": "bfloat16",  # in which so small a step leaves most words as they are
            },
            "delta",
            id="changes over the network, from one generator to the next",
        ),
        pytest.param(
            {
                "trainer__ranks": 2,
                "trainer__zero_stage": 3,
                "weights__encryption": False,
                "weights__in_flight": "abort",
            },
            "memory",
            id="gathered from shards",
        ),
    ],
)
def test_each_version_is_proven_whatever_its_way(
    start: Callable[..., Command], small_recipe: dict[str, Any], overrides: dict[str, Any], route: str
) -> None:
    recipe = overridden(small_recipe, trainer__steps=4, checkpoint__export=False, **overrides)
    run = start(recipe)
    assert run.wait() == 0, run.output
    replicas = recipe["generator"].get("replicas", 1)
    is_exact = recipe["model"]["precision"] == "float32"
    told = steps(run.folder)
    for step in (1, 2, 3, 4):
        metrics = told[step]
        assert metrics["weights/delivered"] == replicas
        assert metrics["weights/verified_version"] == metrics["weights/version"] == step
        assert metrics["weights/canary_gap"] < (1e-4 if is_exact else 0.05)
        assert metrics["rollout/max_logprob_gap"] < (1e-3 if is_exact else 0.5)
    assert told[4][f"weights/route_{route}"] == replicas, told[4]
    if route == "delta":
        assert 0 < told[4]["weights/changed_share"] < 0.2
        assert 0 < told[4]["weights/received_bytes"] < 0.5 * replicas * told[4]["weights/bytes"]
    for kind in ("update_failed", "weights_disagree", "push_failed", "generator_died"):
        assert not rows(run.folder, "events", kind), rows(run.folder, "events", kind)
    assert not run.left_behind()
