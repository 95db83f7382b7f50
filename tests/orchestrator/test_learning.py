"""From scored groups to training samples: worked examples by hand."""

from __future__ import annotations

import numpy as np
import pytest

from algorithms.config import AlgorithmConfig, KLConfig
from orchestrator.learning import as_samples, batch_metrics, with_advantages, with_proximal, with_reference
from rollout.samples import Completion, Generation, Score, ScoredGroup
from tests.orchestrator.stand_ins import PROMPT_TOKENS, completion, prompt

GRPO = AlgorithmConfig()


def group(name: str, values: list[float], completions: list[Completion]) -> ScoredGroup:
    generation = Generation(PROMPT_TOKENS, tuple(completions), "generator-0", 0.0)
    return ScoredGroup(name, prompt(name), generation, tuple(Score(v, {"part": 2 * v}) for v in values))


def test_every_token_of_a_completion_carries_its_advantage_within_the_group() -> None:
    # Group a: rewards 1 and 3, mean 2, sample deviation sqrt(2): advantages -+ 1/sqrt(2). Group b: equal, so 0.
    groups = [
        group("a", [1.0, 3.0], [completion("x", tokens=2), completion("y", tokens=3)]),
        group("b", [5.0, 5.0], [completion("z", tokens=1), completion("w", tokens=1)]),
    ]
    samples = with_advantages(as_samples(groups), groups, GRPO, 0.0)
    assert [s.advantages.shape for s in samples] == [(2,), (3,), (1,), (1,)]
    np.testing.assert_allclose(samples[0].advantages, -(0.5**0.5), atol=1e-5)
    np.testing.assert_allclose(samples[1].advantages, 0.5**0.5, atol=1e-5)
    np.testing.assert_array_equal(samples[2].advantages, 0.0)


def test_samples_keep_what_the_generator_saw_and_said() -> None:
    one = completion("x", version=4, tokens=3, log_prob=-0.25)
    (sample,) = as_samples([group("a", [1.0], [one])])
    assert sample.token_ids is one.token_ids
    assert sample.prompt_token_ids is PROMPT_TOKENS
    np.testing.assert_array_equal(sample.policy_versions, [4, 4, 4])
    np.testing.assert_array_equal(sample.behaviour_log_probs, np.float32([-0.25] * 3))
    assert sample.loss_mask.all()


def test_a_kl_in_the_reward_lowers_it_by_the_completions_own_divergence_before_advantages() -> None:
    # Coefficient 0.5. x: 2 tokens at -1, reference -1.5: k1 sums to 2 * 0.5 = 1, reward 1 - 0.5 * 1 = 0.5.
    # y: 2 tokens at -1, reference -1: k1 is 0, reward 0.5. Both are 0.5, so nothing is left to learn.
    groups = [group("a", [1.0, 0.5], [completion("x"), completion("y")])]
    config = AlgorithmConfig(kl=KLConfig(coefficient=0.5, placement="reward", estimator="k1"))
    samples = with_reference(as_samples(groups), [np.float32([-1.5, -1.5]), np.float32([-1.0, -1.0])])
    for sample in with_advantages(samples, groups, config, 0.5):
        np.testing.assert_allclose(sample.advantages, 0.0, atol=1e-6)


def test_a_kl_in_the_loss_leaves_the_reward_alone() -> None:
    groups = [group("a", [1.0, 3.0], [completion("x"), completion("y")])]
    config = AlgorithmConfig(kl=KLConfig(coefficient=0.5, placement="loss"))
    samples = with_reference(as_samples(groups), [np.float32([-9.0, -9.0]), np.float32([-1.0, -1.0])])
    without = with_advantages(as_samples(groups), groups, GRPO, 0.0)
    for sample, plain in zip(with_advantages(samples, groups, config, 0.5), without, strict=True):
        np.testing.assert_array_equal(sample.advantages, plain.advantages)


def test_a_kl_in_the_reward_without_a_reference_is_refused() -> None:
    groups = [group("a", [1.0, 3.0], [completion("x"), completion("y")])]
    config = AlgorithmConfig(kl=KLConfig(coefficient=0.5, placement="reward", estimator="k1"))
    with pytest.raises(ValueError, match="needs the reference"):
        with_advantages(as_samples(groups), groups, config, 0.5)


def test_log_probabilities_at_the_start_of_the_update_stand_beside_their_samples() -> None:
    groups = [group("a", [1.0, 3.0], [completion("x"), completion("y")])]
    first, second = with_proximal(as_samples(groups), [np.float32([-2, -2]), np.float32([-3, -3])])
    assert first.proximal_log_probs is not None
    assert second.proximal_log_probs is not None
    assert (first.proximal_log_probs[0], second.proximal_log_probs[0]) == (-2.0, -3.0)


def test_a_batch_is_described_by_its_rewards_lengths_and_staleness() -> None:
    groups = [
        group("a", [1.0, 3.0], [completion("x", version=5, tokens=2), completion("y", version=4, tokens=4)]),
        group("b", [2.0, 2.0], [completion("z", version=5, tokens=2), completion("w", version=5, tokens=4)]),
    ]
    found = batch_metrics(groups, version=5)
    assert found["reward/mean"] == 2.0
    assert found["reward/component/part"] == 4.0
    assert found["reward/equal_groups_share"] == 0.5
    assert found["rollout/tokens"] == 12
    assert found["rollout/mean_tokens"] == 3
    assert found["rollout/max_staleness"] == 1
    assert found["rollout/staleness"] == 0.25
    assert found["rollout/min_staleness"] == 0
