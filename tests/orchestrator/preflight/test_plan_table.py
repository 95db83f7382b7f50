"""The plan names every role of a run, with its actors, its resources and its main settings."""

from __future__ import annotations

from typing import Any

from orchestrator.config.schema import Config, SFTConfig
from orchestrator.preflight.plan_table import plan_rows

PLAIN: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": {"path": "train.jsonl"}},
    "reward": {"components": [{"function": "value", "weight": 2.0}]},
}


def test_each_role_has_a_row_and_one_that_is_not_needed_says_none() -> None:
    rows = dict(
        plan_rows(
            Config.model_validate(
                PLAIN
                | {
                    "trainer": {"ranks": 2},
                    "reference": {"replicas": 3},
                    "algorithm": {"kl": {"coefficient": 0.1}},
                    "cluster": {"policy": {"gpus": 1, "custom": {"big": 0.5}}},
                }
            )
        )
    )
    assert rows["policy"] == "2 ranks (1 GPU, 0.5 big each), ZeRO 0, learning rate 1e-06 constant"
    assert rows["critic"] == "none"
    assert rows["generator"].startswith("1 vLLM engine, ")
    assert rows["reference"].startswith("3 servers, KL 0.1 ")
    assert rows["reward"].endswith("2 x value")


def test_a_supervised_run_shows_the_policy_alone() -> None:
    rows = dict(plan_rows(SFTConfig.model_validate({name: PLAIN[name] for name in ("model", "data")})))
    assert rows["steps"] == "100, each of 32 samples"
    assert rows["policy"].startswith("1 rank, ")
    assert not {"critic", "generator", "reference", "reward"} & rows.keys()
