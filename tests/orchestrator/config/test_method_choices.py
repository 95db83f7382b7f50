"""Choices that don't exist or don't go together, as `counterpoint check` refuses them: exit code, setting, reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from orchestrator.cli import app

CONSTRAINED = {"constraints": [{"component": "exact_match", "threshold": 0.5}]}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Asks for a recipe with an `algorithm` section, and other sections, whether it can run."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": np.zeros((10, 10), np.float32)}, model / "model.safetensors")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "target": "2"}))
    recipe: dict[str, Any] = {
        "model": {"path": "model", "max_length": 1024},
        "data": {"train": {"path": "data.jsonl"}},
        "reward": {"components": [{"function": "exact_match"}]},
        "generator": {"kv_cache_gib": 0.01},
    }

    def ask(algorithm: dict[str, Any], **sections: Any) -> Result:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(deepcopy(recipe) | sections | {"algorithm": algorithm}))
        return CliRunner().invoke(app, ["check", "mine.yaml"])

    return ask


def test_a_recipe_of_methods_that_go_together_is_ready_to_run(check: Callable[..., Result]) -> None:
    result = check({"advantage": "rloo", "loss": "cispo", "aggregation": "sequence_mean"})
    assert result.exit_code == 0, result.output
    assert "Ready to run." in result.stdout


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"advantage": "gropo"}, ["algorithm.advantage", "'gropo'", "Did you mean 'grpo'?", "Registered:"]),
        ({"loss": "clipp"}, ["algorithm.loss", "'clipp'", "Did you mean 'clip'?"]),
        ({"aggregation": "token_maen"}, ["algorithm.aggregation", "Did you mean 'token_mean'?"]),
        ({"kl": {"estimator": "k4"}}, ["algorithm.kl.estimator", "'k4'"]),
        ({"correction": {"method": "token_trunkated"}}, ["algorithm.correction.method", "'token_truncated'"]),
        ({"combination": "gate"}, ["algorithm.combination", "'gated'"]),
        ({"shaping": [{"name": "overlang"}]}, ["algorithm.shaping.0.name", "'overlong'"]),
        ({"gradient_combination": "mgdb"}, ["algorithm.gradient_combination", "'mgda'"]),
    ],
)
def test_a_name_that_is_not_registered_is_refused_with_the_nearest(
    check: Callable[..., Result], algorithm: dict[str, Any], said: list[str]
) -> None:
    result = check(algorithm)
    assert result.exit_code == 2, result.output
    for words in said:
        assert words in result.stderr
    assert "Ready to run." not in result.stdout


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"loss_options": {"hgih": 0.3}}, ["algorithm.loss_options.hgih is not an option", "Did you mean high?"]),
        ({"loss_options": {"high": -1.0}}, ["algorithm.loss_options.high = -1.0"]),
        ({"aggregation": "constant_length"}, ["algorithm.aggregation_options.length", "must be set"]),
        ({"advantage": "gae", "advantage_options": {"lambda": 0.9}}, ["algorithm.advantage_options.lambda is not"]),
        ({"correction": {"options": {"hihg": 2.0}}}, ["algorithm.correction.options.hihg"]),
        ({"shaping": [{"name": "overlong", "options": {"cache": 5}}]}, ["algorithm.shaping.0.options.cache"]),
        ({"combination": "constrained"}, ["algorithm.combination_options.constraints", "must be set"]),
    ],
)
def test_an_option_that_is_wrong_is_refused_by_its_place_in_the_recipe(
    check: Callable[..., Result], algorithm: dict[str, Any], said: list[str]
) -> None:
    result = check(algorithm)
    assert result.exit_code == 2, result.output
    for words in said:
        assert words in result.stderr


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"advantage": "gae", "loss": "gspo"}, ["algorithm.loss = gspo", "algorithm.advantage = gae", "one ratio"]),
        (
            {"loss": "m2po"},
            ["algorithm.loss = m2po", "algorithm.correction.method = token_truncated", "Set it to none"],
        ),
        ({"loss": "nll"}, ["algorithm.loss = nll", "counterpoint sft"]),
        ({"kl": {"coefficient": 0.1, "estimator": "k1"}}, ["algorithm.kl.estimator = k1", "k2 or k3"]),
        (
            {"kl": {"coefficient": 0.1, "estimator": "k3", "placement": "reward"}},
            ["algorithm.kl.estimator = k3", "in the reward", "k1"],
        ),
        ({"kl": {"controller": "adaptive"}}, ["algorithm.kl.controller = adaptive", "0 stays 0"]),
        (
            {"advantage": "gdpo", "combination": "constrained", "combination_options": CONSTRAINED},
            ["algorithm.combination = constrained", "algorithm.advantage = gdpo"],
        ),
        ({"gradient_combination": "mgda"}, ["algorithm.gradient_combination = mgda", "only one"]),
        ({"advantage": "gae", "credit": "turn"}, ["algorithm.credit = turn", "algorithm.advantage = gae"]),
        ({"loss": "gspo", "credit": "turn"}, ["algorithm.credit = turn", "algorithm.loss = gspo"]),
    ],
)
def test_methods_that_do_not_go_together_are_refused_with_the_reason(
    check: Callable[..., Result], algorithm: dict[str, Any], said: list[str]
) -> None:
    result = check(algorithm)
    assert result.exit_code == 2, result.output
    for words in said:
        assert words in result.stderr


def test_everything_wrong_with_the_choices_is_said_at_once(check: Callable[..., Result]) -> None:
    result = check({"advantage": "gropo", "loss_options": {"hgih": 1}, "kl": {"controller": "adaptive"}})
    assert result.exit_code == 2
    assert "gropo" in result.stderr
    assert "hgih" in result.stderr


def test_a_name_that_the_users_own_file_does_not_register_is_refused_once_it_was_imported(
    check: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "registers_nothing.py").write_text("")
    result = check({"modules": ["registers_nothing.py"], "advantage": "mine"})
    assert result.exit_code == 2
    assert "there is no advantage estimator 'mine'" in result.stderr


def test_a_file_of_methods_that_fails_is_named_with_the_line(check: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "broken_methods.py").write_text("\nraise KeyError('no such thing')\n")
    result = check({"modules": ["broken_methods.py"], "advantage": "mine"})
    assert result.exit_code == 2
    assert "algorithm.modules" in result.stderr
    assert "broken_methods.py:2" in result.stderr


def test_a_comparison_within_groups_of_one_is_refused(check: Callable[..., Result]) -> None:
    result = check({"advantage": "rloo"}, rollout={"group_size": 1})
    assert result.exit_code == 2
    assert "rollout.group_size = 1 with algorithm.advantage = rloo" in result.stderr


def test_a_loss_of_the_users_own_file_is_ready_to_run(check: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text(
        "from algorithms.losses import clip\n"
        "from algorithms.registry import POLICY_LOSSES, policy_loss\n\n"
        "policy_loss('loss_of_a_users_file', options=POLICY_LOSSES.get('clip').options)(clip)\n"
    )
    result = check({"modules": ["my_losses.py"], "loss": "loss_of_a_users_file"})
    assert result.exit_code == 0, result.output
