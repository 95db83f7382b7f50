"""The memory and the GPUs that all roles take together: by hand, role by role, and against the machine."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.schema import Config, SFTConfig
from orchestrator.preflight.finding import Finding, PlannedRun
from orchestrator.preflight.memory_and_gpus import asked_gpus, check_gpus, check_memory, needed_memory
from orchestrator.preflight.model_folder import ModelFolder
from orchestrator.roles.table import PROCESS_BYTES

GIB = 1 << 30
PLAIN: dict[str, Any] = {
    "model": {"path": "model", "precision": "float32"},
    "data": {"train": {"path": "train.jsonl"}},
    "reward": {"components": [{"function": "value"}]},
    "generator": {"kv_cache_gib": 0.5},
}
KL: dict[str, Any] = {"kl": {"coefficient": 0.1}}
NO_KL: dict[str, Any] = {"kl": {"coefficient": 0.0}}


def config(**sections: Any) -> Config:
    return Config.model_validate({**PLAIN, "algorithm": NO_KL, **sections})


def found(check: Any, config: Config, parameters: int = 1000) -> list[Finding]:
    return list(check(PlannedRun(config, ModelFolder((), parameters))))


def by_parameters(config: Config | SFTConfig, parameters: int = 1000) -> int:
    """Memory that grows with the model."""
    return needed_memory(config, parameters) - needed_memory(config, 0)


def test_the_sum_of_all_roles_is_what_a_hand_computes() -> None:
    # 1e6 parameters in bfloat16: 2 MB of weights, too few to be staged. Policy: 2 ranks, each with 16 bytes a parameter
    # and the weights in bfloat16 (ZeRO 0), and the published version. Critic: the same without the version. Three
    # generators that share the published version's memory, with 0.5 GiB of cache each. Two reference servers.
    weights = 2_000_000
    policy = 2 * PROCESS_BYTES + 2 * (16_000_000 + weights) + weights
    critic = 2 * PROCESS_BYTES + 2 * (16_000_000 + weights)
    generators = 3 * (PROCESS_BYTES + weights + GIB // 2)
    reference = 2 * (PROCESS_BYTES + weights)
    whole = config(
        model={"path": "model", "precision": "bfloat16"},
        algorithm={"advantage": "gae"} | KL,
        trainer={"ranks": 2},
        generator={"replicas": 3, "kv_cache_gib": 0.5},
        reference={"replicas": 2},
    )
    assert needed_memory(whole, 1_000_000) == policy + critic + generators + reference


def test_a_supervised_run_takes_the_memory_of_its_trainer_alone() -> None:
    supervised = SFTConfig.model_validate({name: PLAIN[name] for name in ("model", "data")})
    assert needed_memory(supervised, 1000) == PROCESS_BYTES + 16 * 1000


def test_memory_of_the_trainer_is_sixteen_bytes_a_parameter_in_float32() -> None:
    # Parameters, gradients and AdamW's two moments at 4 bytes, the published version and the generator's weights at 4.
    assert by_parameters(config()) == 1000 * (16 + 4 + 4)


def test_generators_without_shared_memory_hold_the_version_that_they_receive() -> None:
    shared, alone = ({"shared_memory": is_shared} for is_shared in (True, False))
    generators = {"replicas": 3}
    difference = by_parameters(config(generator=generators, weights=alone)) - by_parameters(
        config(generator=generators, weights=shared)
    )
    assert difference == 3 * 4 * 1000


@pytest.mark.parametrize(("lora", "copies"), [(None, 3), ({"sync": "merged"}, 3), ({"sync": "adapter"}, 0)])
def test_versions_that_are_staged_take_a_second_copy_in_each_generator(
    lora: dict[str, Any] | None, copies: int
) -> None:
    def of(stage_from_mib: int | None) -> Config:
        model = {"path": "model", "lora": lora}
        return config(model=model, generator={"replicas": 3}, weights={"stage_from_mib": stage_from_mib})

    staged, in_place, parameters = of(64), of(None), (64 << 20) // 2
    assert needed_memory(staged, parameters) - needed_memory(in_place, parameters) == copies * (64 << 20)
    assert needed_memory(staged, parameters - 1) == needed_memory(in_place, parameters - 1)


@pytest.mark.parametrize(("zero_stage", "copies"), [(0, 2), (2, 2), (3, 1)])
def test_memory_of_a_trainer_of_adapters_is_its_weights_on_each_rank_or_sharded_with_zero_3(
    zero_stage: int, copies: int
) -> None:
    adapters = config(
        model={"path": "model", "precision": "float32", "lora": {}}, trainer={"ranks": 2, "zero_stage": zero_stage}
    )
    assert by_parameters(adapters) == 1000 * (4 * copies + 4 + 4)


def test_too_little_memory_is_a_warning_that_names_the_share_of_each_role() -> None:
    (finding,) = found(check_memory, config(generator={"kv_cache_gib": 1e6}))
    assert finding.severity == "warning"
    assert "generator 1000001.0" in finding.message
    assert "policy 1.0" in finding.message
    assert "reference" not in finding.message


@pytest.mark.parametrize("cluster", [{"address": "10.0.0.1:10001"}, {"generator": {"gpus": 1}}])
def test_memory_of_a_cluster_or_of_gpus_is_not_checked(cluster: dict[str, Any]) -> None:
    assert found(check_memory, config(generator={"kv_cache_gib": 1e6}, cluster=cluster)) == []


def test_gpus_are_asked_for_by_each_actor_of_each_role_that_is_needed() -> None:
    one = {"gpus": 1}
    cluster = dict.fromkeys(("policy", "critic", "generator", "reference", "reward"), one)
    sizes: dict[str, Any] = {"trainer": {"ranks": 4}, "generator": {"replicas": 3}, "reference": {"replicas": 2}}
    assert asked_gpus(config(cluster=cluster, **sizes)) == 4 + 3 + 1
    assert asked_gpus(config(cluster=cluster, algorithm={"advantage": "gae"} | KL, **sizes)) == 4 + 4 + 3 + 2 + 1


def test_gpus_that_are_not_there_are_an_error() -> None:
    (finding,) = found(check_gpus, config(cluster={"generator": {"gpus": 500}}))
    assert finding.severity == "error"
    assert "ask for 500 GPUs" in finding.message
    assert found(check_gpus, config(cluster={"address": "10.0.0.1:10001", "generator": {"gpus": 500}})) == []


def test_flash_attention_needs_a_gpu() -> None:
    model = {"path": "model", "attention": "flash_attention_2"}
    (finding,) = found(check_gpus, config(model=model))
    assert "flash_attention_2 needs a GPU" in finding.message
