"""Every kind of method once in a short training through the real engines: what it leaves in the record, held against
what its formula says of the other figures there."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints import Checkpoints
from tests.conftest import Command, overridden, rows, steps

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Steps = dict[int, dict[str, float]]

MAX_TOKENS = 12
STOPS = list(range(40, 60))
"""Characters that end a completion, so that a random policy's have many lengths and some reach the limit."""
VOWELS, SHORT = "share_of_vowels", "short"
SHORT_WEIGHT = 0.1

USERS_METHODS = """
import torch
from pydantic import Field

from algorithms.correction import CorrectionWeights
from algorithms.inputs import TokenLoss
from algorithms.kl import kl_estimator
from algorithms.registry import AGGREGATIONS, CORRECTIONS, Options, advantage_estimator, method, policy_loss


class Level(Options):
    value: float = Field(1.0, description="What it is.")


@advantage_estimator("level", options=Level)
def level(inputs, options):
    return torch.full_like(inputs.rewards, options.value)


def share_of_batch(tokens, options):
    return tokens.mask.float() / tokens.mask.sum()


@policy_loss("shared_out", prepare=share_of_batch)
def shared_out(inputs, options):
    ratio = (inputs.log_probs - inputs.proximal_log_probs).exp()
    return TokenLoss(-ratio * inputs.advantages * inputs.marks)


@kl_estimator("one_more")
def one_more(log_probs, reference_log_probs):
    return (log_probs - reference_log_probs).square() / 2 + 1


@method(CORRECTIONS, "halved")
def halved(log_ratio, mask, options):
    return CorrectionWeights(torch.full_like(log_ratio, 0.5), torch.zeros_like(mask))


@method(AGGREGATIONS, "scaled_sum", options=Level)
def scaled_sum(mask, denominators, options):
    return mask * options.value
"""


@pytest.fixture
def train(
    small_recipe: dict[str, Any], start: Callable[..., Command], tmp_path: Path
) -> Callable[..., tuple[Steps, Command]]:
    """Trains with an `algorithm` section and other settings, and returns what each step told and the command."""
    recipe = overridden(
        small_recipe,
        rollout__sampling={"max_tokens": MAX_TOKENS, "stop_token_ids": STOPS},
        checkpoint={"every_steps": 1, "export": False},
        tracking={"enabled": False, "samples_every_steps": 0},
        run__folder=str(tmp_path / "run"),
    )
    del recipe["data"]["evaluation"], recipe["evaluation"]

    def run(algorithm: dict[str, Any], *arguments: str, **overrides: Any) -> tuple[Steps, Command]:
        command = start(overridden(recipe, algorithm=algorithm, **overrides), *arguments)
        assert command.wait() == 0, command.output
        assert "Traceback" not in command.output
        told = steps(command.folder)
        assert list(told) == list(range(1, overrides.get("trainer__steps", recipe["trainer"]["steps"]) + 1))
        for step, metrics in told.items():
            bad = [name for name, value in metrics.items() if value is None or not math.isfinite(value)]
            assert not bad, f"step {step} has no figure for {bad}"
            assert metrics["rollout/dropped"] == 0
            assert metrics.get("train/skipped_updates", 0) == 0
        with closing(sqlite3.connect(command.folder / "ledger.db")) as ledger:
            dropped = ledger.execute("SELECT count(*) FROM transitions WHERE to_state = 'dropped'").fetchone()
        assert dropped == (0,)
        return told, command

    return run


def component(metrics: dict[str, float], name: str) -> float:
    return metrics[f"reward/component/{name}"]


def test_a_critic_learns_beside_constrained_rewards_and_both_go_on_as_they_were(
    train: Callable[..., tuple[Steps, Command]],
) -> None:
    """PPO whose KL is in the reward, adaptive; the critic alone learns in the first step. Then again from step 2."""
    steps_made, threshold, step_size = 4, -0.03, 5.0
    recipe: dict[str, Any] = {
        "trainer__steps": steps_made,
        "trainer__updates_per_step": 2,
        "critic": {"learning_rate": 3.0e-3, "clip": None, "warmup_steps": 1},
        "checkpoint": {"every_steps": 2, "export": False},
    }
    constraint = {"component": SHORT, "threshold": threshold}
    algorithm = {
        "advantage": "gae",
        "advantage_options": {"trace_decay": 0.9},
        "loss": "dual_clip",
        "combination": "constrained",
        "combination_options": {"constraints": [constraint], "step_size": step_size},
        "kl": {"coefficient": 0.05, "estimator": "k1", "placement": "reward", "controller": "adaptive", "horizon": 2},
    }
    straight, command = train(algorithm, **recipe)

    assert not any(name.startswith("train/loss") for name in straight[1]), "the policy rests while the critic warms up"
    assert straight[1]["critic/explained_variance"] == pytest.approx(0.0, abs=1e-5), "a new critic says 0 everywhere"
    assert straight[1]["critic/return_mean"] > 0
    assert straight[steps_made]["critic/loss"] < straight[1]["critic/loss"]
    assert straight[steps_made]["critic/value_mean"] != 0
    assert straight[2]["train/advantage_abs"] > 0

    multiplier = 1.0
    for metrics in straight.values():
        assert metrics[f"reward/multiplier/{SHORT}"] == pytest.approx(multiplier)
        mean = component(metrics, SHORT)
        combined = (component(metrics, VOWELS) + multiplier * (mean - threshold)) / (1 + multiplier)
        assert metrics["reward/combined_mean"] == pytest.approx(combined)
        multiplier = min(max(multiplier + step_size * (threshold - mean), 0.0), 10.0)
    assert multiplier != 1.0

    coefficients = [metrics["train/kl_coefficient"] for metrics in straight.values()]
    assert coefficients[:2] == [0.05, 0.05], "no KL was seen yet"
    assert len({round(each, 9) for each in coefficients}) > 1

    checkpoints = Checkpoints(command.folder, keep=2)
    newest = checkpoints.latest()
    assert newest is not None
    shutil.rmtree(newest)
    again, _ = train(algorithm, "--resume", **recipe)
    exact = ("critic/loss", "critic/value_mean", "critic/grad_norm", "train/grad_norm", "train/loss", "reward/mean")
    for step in (3, 4):
        for name in (*exact, "train/kl_coefficient", f"reward/multiplier/{SHORT}"):
            assert again[step][name] == pytest.approx(straight[step][name], rel=1e-3, abs=1e-5), f"{name} at {step}"


def test_remax_takes_off_what_a_greedy_answer_of_the_same_version_earned(
    train: Callable[..., tuple[Steps, Command]], small_recipe: dict[str, Any]
) -> None:
    """One sample a prompt, cispo, a constant length; the greedy evaluation of version 0 has the same prompts."""
    told, command = train(
        {
            "advantage": "remax",
            "loss": "cispo",
            "aggregation": "constant_length",
            "aggregation_options": {"length": MAX_TOKENS},
            "entropy_coefficient": 0.01,
        },
        rollout__group_size=1,
        rollout__prompts_per_step=8,
        trainer__steps=2,
        tracking={"enabled": False, "samples_every_steps": 1, "samples": 24},
        data__evaluation=small_recipe["data"]["train"],
        evaluation={"modes": ["greedy"], "sampling": {"max_tokens": MAX_TOKENS, "stop_token_ids": STOPS}},
    )
    samples = rows(command.folder, "samples")
    greedy = {row["prompt"]: row["reward"] for row in samples if row["source"] == "eval/greedy" and row["step"] == 0}
    trained = [row for row in samples if row["source"] == "train" and row["step"] == 1]
    assert len(greedy) == 24
    assert len(trained) == 8
    for row in trained:
        assert row["reward"] - row["advantage"] == pytest.approx(greedy[row["prompt"]], abs=1e-6)
    assert any(row["advantage"] != 0 for row in trained)
    for metrics in told.values():
        assert metrics["rollout/completions"] == 8
        assert metrics["train/entropy"] > 0


def test_a_token_baseline_and_an_off_policy_loss_learn_from_stale_samples(
    train: Callable[..., tuple[Steps, Command]],
) -> None:
    """Both need passes of their own: the policy's log-probabilities at the start, and squared probabilities."""
    told, _ = train(
        {
            "advantage": "optimal_token_baseline",
            "loss": "m2po",
            "loss_options": {"max_second_moment": 1.0e-4},
            "correction": {"method": "none"},
            "kl": {"coefficient": 0.02, "estimator": "k3_unbiased"},
        },
        rollout__max_staleness=1,
        trainer__updates_per_step=2,
        trainer__steps=4,
    )
    staleness = [metrics["rollout/max_staleness"] for metrics in told.values()]
    assert max(staleness) == 1
    left_out = [metrics["train/clip_low_share"] + metrics["train/clip_high_share"] for metrics in told.values()]
    assert left_out[0] == 0, "the first batch is on policy"
    assert max(left_out) > 0, "a stale one has outliers"
    for metrics in told.values():
        assert metrics["train/advantage_abs"] > 0
        assert metrics["train/importance_weight_mean"] == pytest.approx(1.0)


def test_decoupled_components_have_no_loss_on_policy_by_the_sequence(
    train: Callable[..., tuple[Steps, Command]],
) -> None:
    """GDPO's advantages add up to 0 over the batch's sequences and GSPO's ratios are 1, so the loss is 0, not so its
    gradient. The KL, beside it, is exact, over whole distributions."""
    told, _ = train(
        {
            "advantage": "gdpo",
            "loss": "gspo",
            "aggregation": "sequence_mean",
            "correction": {"method": "sequence_truncated"},
            "kl": {"coefficient": 0.05, "estimator": "full"},
        }
    )
    assert told[1]["train/kl_reference"] == pytest.approx(0.0, abs=1e-5)
    assert told[3]["train/kl_reference"] > 1e-4
    for metrics in told.values():
        assert metrics["train/kl_loss"] == pytest.approx(0.05 * metrics["train/kl_reference"], rel=0.5, abs=1e-6)
        assert metrics["train/policy_loss"] == pytest.approx(0.0, abs=1e-4)
        assert metrics["train/grad_norm"] > 1e-3
        assert metrics["train/advantage_abs"] > 0.1
        assert metrics["train/importance_weight_mean"] == pytest.approx(1.0, abs=1e-3)


def test_mgda_steps_where_both_components_gain(train: Callable[..., tuple[Steps, Command]]) -> None:
    told, _ = train({"gradient_combination": "mgda", "advantage": "dr_grpo"})
    for metrics in told.values():
        weights = [metrics[f"train/objective_{k}/weight"] for k in range(2)]
        norms = [metrics[f"train/objective_{k}/grad_norm"] for k in range(2)]
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) >= 0
        assert min(norms) > 0
        between = metrics["train/objective_0/cosine_1"] * norms[0] * norms[1]
        gains = [
            weights[0] * norms[0] ** 2 + weights[1] * between,
            weights[0] * between + weights[1] * norms[1] ** 2,
        ]
        length = weights[0] * gains[0] + weights[1] * gains[1]
        assert min(gains) >= length * (1 - 1e-4)
        assert metrics["train/grad_norm"] == pytest.approx(math.sqrt(length), rel=1e-3)


def test_famo_weighs_components_by_how_their_losses_fell(train: Callable[..., tuple[Steps, Command]]) -> None:
    """ξ ← ξ − β (Jᵀ(log ℓ_t − log ℓ_t+1) + γ ξ), w ∝ softmax(ξ) / ℓ, with ℓ the distance of −reward from −1."""
    rate, decay = 0.5, 0.01
    told, _ = train(
        {
            "gradient_combination": "famo",
            "gradient_options": {"lower_bound": -1.0, "rate": rate, "decay": decay},
            "kl": {"coefficient": 0.02},
        }
    )
    logits, before = [0.0, 0.0], None
    for metrics in told.values():
        losses = [1 - component(metrics, VOWELS), 1 - SHORT_WEIGHT * component(metrics, SHORT)]
        shares = softmax(logits)
        if before is not None:
            falls = [math.log(old) - math.log(new) for old, new in zip(before, losses, strict=True)]
            mean = sum(share * fall for share, fall in zip(shares, falls, strict=True))
            logits = [
                x - rate * (share * (fall - mean) + decay * x)
                for x, share, fall in zip(logits, shares, falls, strict=True)
            ]
        parts = [share / loss for share, loss in zip(softmax(logits), losses, strict=True)]
        for k, part in enumerate(parts):
            assert metrics[f"train/objective_{k}/weight"] == pytest.approx(part / sum(parts), rel=1e-4)
        before = losses
    assert logits[0] != 0


def softmax(logits: list[float]) -> list[float]:
    parts = [math.exp(x) for x in logits]
    return [part / sum(parts) for part in parts]


def test_a_vote_on_answers_is_learned_from_shaped_rewards_without_what_was_cut_off(
    train: Callable[..., tuple[Steps, Command]],
) -> None:
    told, _ = train(
        {
            "advantage": "inference_aware",
            "advantage_options": {
                "terms": [
                    {"transform": "majority", "n": 3},
                    {"transform": "best_of_n", "n": 2, "component": VOWELS, "weight": 0.5},
                ]
            },
            "answer_pattern": "[a-zA-Z]",
            "shaping": [
                {"name": "overlong", "options": {"cache_tokens": 6}},
                {"name": "repetition", "options": {"ngram_tokens": 1, "penalty": 0.5}},
            ],
            "train_on_truncated": False,
        },
        rollout__group_size=6,
        trainer__steps=2,
    )
    cut_off = 0.0
    for metrics in told.values():
        truncated = metrics["rollout/truncated_share"] * metrics["rollout/completions"]
        assert metrics["train/trained_tokens"] == pytest.approx(metrics["rollout/tokens"] - MAX_TOKENS * truncated)
        assert metrics["reward/combined_mean"] < metrics["reward/mean"], "both shapes take something off"
        assert metrics["train/advantage_abs"] > 0
        cut_off += truncated
    assert cut_off > 0


def test_methods_of_ones_own_are_what_the_loss_is_made_of(
    train: Callable[..., tuple[Steps, Command]], tmp_path: Path
) -> None:
    """Where the policy still is the reference, every token's loss is −1 (ratio) · 3 (advantage) · 1/N (mark) · ½
    (correction) · ¼ (aggregation), which add up to −0.375 over all N; its KL is 1 nat, at a weight of 0.1 · ¼."""
    (tmp_path / "methods.py").write_text(USERS_METHODS)
    told, _ = train(
        {
            "modules": ["methods.py"],
            "advantage": "level",
            "advantage_options": {"value": 3.0},
            "loss": "shared_out",
            "aggregation": "scaled_sum",
            "aggregation_options": {"value": 0.25},
            "kl": {"coefficient": 0.1, "estimator": "one_more"},
            "correction": {"method": "halved"},
        },
        trainer__micro_batch_tokens=160,
        trainer__steps=2,
    )
    first = told[1]
    assert first["train/policy_loss"] == pytest.approx(-0.375, rel=1e-5)
    assert first["train/kl_reference"] == pytest.approx(1.0, abs=1e-4)
    assert first["train/kl_loss"] == pytest.approx(0.1 * 0.25 * first["train/trained_tokens"], rel=1e-4)
    assert told[2]["train/kl_reference"] > 1.0 + 1e-5
    for metrics in told.values():
        assert metrics["train/advantage_mean"] == pytest.approx(3.0)
        assert metrics["train/importance_weight_mean"] == pytest.approx(0.5)
