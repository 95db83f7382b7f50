"""The table of roles: complete, light to import, and a role that isn't needed is nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import ClusterConfig, Config, RoleResources, SFTConfig
from orchestrator.roles.table import ROLES, needed_roles

PLAIN: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": {"path": "train.jsonl"}},
    "reward": {"components": [{"function": "value"}]},
}
GAE: dict[str, Any] = {"advantage": "gae"}


def names(config: Config | SFTConfig) -> list[str]:
    return [role.name for role in needed_roles(config)]


def test_each_role_of_the_cluster_section_has_a_row_and_each_row_its_resources() -> None:
    sections = [name for name, field in ClusterConfig.model_fields.items() if field.annotation is RoleResources]
    assert sorted(role.name for role in ROLES) == sorted(sections)
    cluster = ClusterConfig.model_validate({name: {"cpus": index} for index, name in enumerate(sections)})
    for role in ROLES:
        assert role.resources(cluster).cpus == sections.index(role.name)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"kl": {"coefficient": 0.0}}, ["policy", "generator", "reward"]),
        ({"kl": {"coefficient": 0.1}}, ["policy", "generator", "reference", "reward"]),
        (GAE | {"kl": {"coefficient": 0.0}}, ["policy", "critic", "generator", "reward"]),
        (GAE | {"kl": {"coefficient": 0.1}}, ["policy", "critic", "generator", "reference", "reward"]),
    ],
)
def test_the_method_decides_whether_there_are_critic_and_reference(
    algorithm: dict[str, Any], expected: list[str]
) -> None:
    assert names(Config.model_validate({**PLAIN, "algorithm": algorithm})) == expected


def test_supervised_fine_tuning_needs_the_policy_alone() -> None:
    assert names(SFTConfig.model_validate({name: PLAIN[name] for name in ("model", "data")})) == ["policy"]


def test_every_role_counts_its_actors() -> None:
    sizes = {"trainer": {"ranks": 4}, "generator": {"replicas": 3}, "reference": {"replicas": 2}}
    config = Config.model_validate({**PLAIN, "algorithm": GAE | {"kl": {"coefficient": 0.1}}, **sizes})
    counts = {role.name: role.replicas(config) for role in needed_roles(config)}
    assert counts == {"policy": 4, "critic": 4, "generator": 3, "reference": 2, "reward": 1}


def test_the_table_imports_no_engine() -> None:
    program = (
        "import sys, orchestrator.config.schema; before = set(sys.modules); import orchestrator.roles.table;"
        "print(sorted({'ray', 'torch', 'vllm', 'deepspeed'} & (set(sys.modules) - before)))"
    )
    root = Path(__file__).parents[3]
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout == "[]\n"


def test_the_loop_imports_no_ray() -> None:
    program = "import sys, orchestrator.loop; print(sorted({'ray', 'vllm', 'deepspeed'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout == "[]\n"
