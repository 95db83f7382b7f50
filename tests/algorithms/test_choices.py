"""A recipe's choices: every built-in name is found, what doesn't go together is said, their document is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from algorithms import choices
from algorithms.config import AlgorithmConfig
from algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, Need

ISSUED = {
    "advantage": "gae grpo dr_grpo rloo reinforce reinforce_plus_plus reinforce_plus_plus_baseline remax opo gpg "
    "grpo_pass_at_k gdpo maxrl optimal_token_baseline inference_aware",
    "loss": "clip dual_clip gspo gspo_token cispo sapo gmpo gpg clip_cov kl_cov dppo_tv dppo_kl topr m2po decoupled "
    "reinforce",
    "aggregation": "token_mean sequence_mean sequence_sum",
}


@pytest.mark.parametrize(("setting", "name"), [(key, name) for key, names in ISSUED.items() for name in names.split()])
def test_every_method_is_picked_by_its_name_alone(setting: str, name: str) -> None:
    settings: dict[str, Any] = {setting: name}
    if setting == "loss" and POLICY_LOSSES.get(name).corrects_mismatch:
        settings["correction"] = {"method": "none"}
    assert choices.problems(AlgorithmConfig.model_validate(settings)) == []


def test_a_name_that_files_of_the_users_may_yet_register_is_left_to_be_checked_later() -> None:
    config = AlgorithmConfig(advantage="mine", modules=(Path("mine.py"),))
    assert choices.problems(config, modules_imported=False) == []
    assert "there is no advantage estimator 'mine'" in choices.problems(config)[0]


def test_all_problems_are_told_at_once() -> None:
    config = AlgorithmConfig.model_validate(
        {"advantage": "grppo", "loss_options": {"hihg": 1}, "shaping": [{"name": "over", "options": {}}]}
    )
    found = choices.problems(config)
    assert len(found) == 3
    assert "algorithm.shaping.0.name" in found[2]


def test_what_methods_need_is_known_before_a_run() -> None:
    config = AlgorithmConfig(advantage="optimal_token_baseline", loss="decoupled")
    assert choices.needs(config) >= {Need.PROXIMAL_LOG_PROBS, Need.COLLISION}
    assert choices.needs(AlgorithmConfig(advantage="gae")) == {Need.VALUES}


def test_every_estimator_that_compares_a_group_gives_a_group_of_one_nothing() -> None:
    import torch

    from algorithms.estimation import estimate_advantages
    from algorithms.inputs import AdvantageInputs

    one = torch.ones(1, dtype=torch.long)
    inputs = AdvantageInputs(torch.tensor([3.0], dtype=torch.float64), torch.tensor([0]), one, one.bool())
    for name in ADVANTAGE_ESTIMATORS:
        entry = ADVANTAGE_ESTIMATORS.get(name)
        if entry.compares_group and not entry.needs:
            assert float(estimate_advantages(name, inputs)) == 0.0, name


def test_the_document_of_all_methods_is_current_and_says_something_of_each() -> None:
    script = Path(__file__).parents[2] / "scripts" / "write_algorithms_doc.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
