"""From scored groups to training samples: worked examples by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.config import cross_checks
from orchestrator.config.schema import Config
from orchestrator.step.appraisal import Appraisal, Appraiser, as_samples, batch_metrics, with_proximal, with_reference
from rollout.samples import Completion, Generation, Score, ScoredGroup, TrainingSample
from tests.orchestrator.stand_ins import PROMPT_TOKENS, completion, prompt


def config(components: tuple[str, ...] = ("part",), **algorithm: Any) -> Config:
    made = Config.model_validate(
        {
            "model": {"path": "model", "precision": "float32"},
            "data": {"train": {"path": "train.jsonl"}},
            "reward": {"components": [{"function": name, "weight": 2.0 - i} for i, name in enumerate(components)]},
            "rollout": {"sampling": {"max_tokens": 4}},
            "algorithm": algorithm,
        }
    )
    assert cross_checks.problems(made) == []
    return made


def appraise(
    samples: list[TrainingSample], groups: list[ScoredGroup], kl_coefficient: float = 0.0, **algorithm: Any
) -> list[TrainingSample]:
    return appraisal(samples, groups, kl_coefficient, **algorithm).samples


def appraisal(
    samples: list[TrainingSample],
    groups: list[ScoredGroup],
    kl_coefficient: float = 0.0,
    components: tuple[str, ...] = ("part",),
    **algorithm: Any,
) -> Appraisal:
    return Appraiser(config(components, **algorithm)).appraise(samples, groups, kl_coefficient)


def group(name: str, values: list[float], completions: list[Completion]) -> ScoredGroup:
    """Scores whose one component has weight 2."""
    return scored(name, [{"part": v / 2} for v in values], completions)


def scored(name: str, components: list[dict[str, float]], completions: list[Completion]) -> ScoredGroup:
    generation = Generation(PROMPT_TOKENS, tuple(completions), "generator-0", 0.0)
    return ScoredGroup(name, prompt(name), generation, tuple(Score(2 * c.get("part", 0.0), c) for c in components))


def test_every_token_of_a_completion_carries_its_advantage_within_the_group() -> None:
    # Group a: rewards 1 and 3, mean 2, sample deviation sqrt(2): advantages -+ 1/sqrt(2). Group b: equal, so 0.
    groups = [
        group("a", [1.0, 3.0], [completion("x", tokens=2), completion("y", tokens=3)]),
        group("b", [5.0, 5.0], [completion("z", tokens=1), completion("w", tokens=1)]),
    ]
    samples = appraise(as_samples(groups), groups)
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
    kl = {"coefficient": 0.5, "placement": "reward", "estimator": "k1"}
    samples = with_reference(as_samples(groups), [np.float32([-1.5, -1.5]), np.float32([-1.0, -1.0])])
    for sample in appraise(samples, groups, 0.5, kl=kl):
        np.testing.assert_allclose(sample.advantages, 0.0, atol=1e-6)


def test_a_kl_in_the_loss_leaves_the_reward_alone() -> None:
    groups = [group("a", [1.0, 3.0], [completion("x"), completion("y")])]
    kl = {"coefficient": 0.5, "placement": "loss"}
    samples = with_reference(as_samples(groups), [np.float32([-9.0, -9.0]), np.float32([-1.0, -1.0])])
    without = appraise(as_samples(groups), groups)
    for sample, plain in zip(appraise(samples, groups, 0.5, kl=kl), without, strict=True):
        np.testing.assert_array_equal(sample.advantages, plain.advantages)


def test_a_kl_in_the_reward_without_a_reference_is_refused() -> None:
    groups = [group("a", [1.0, 3.0], [completion("x"), completion("y")])]
    kl = {"coefficient": 0.5, "placement": "reward", "estimator": "k1"}
    with pytest.raises(ValueError, match="needs the reference"):
        appraise(as_samples(groups), groups, 0.5, kl=kl)


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
    assert found["reward/component/part"] == 1.0
    assert found["reward/equal_groups_share"] == 0.5
    assert found["rollout/tokens"] == 12
    assert found["rollout/mean_tokens"] == 3
    assert found["rollout/max_staleness"] == 1
    assert found["rollout/staleness"] == 0.25
    assert found["rollout/min_staleness"] == 0


def test_a_shape_adjusts_the_combined_reward_before_advantages() -> None:
    # 4 of at most 4 tokens with a cache of 2: the overlong penalty takes 1 off. Rewards 1 and 1 - 1 = 0.
    groups = [group("a", [1.0, 1.0], [completion("x", tokens=2), completion("y", tokens=4)])]
    found = appraisal(
        as_samples(groups), groups, advantage="dr_grpo", shaping=[{"name": "overlong", "options": {"cache_tokens": 2}}]
    )
    assert [float(s.advantages[0]) for s in found.samples] == [0.5, -0.5]
    assert found.metrics["reward/combined_mean"] == 0.5


def test_a_combination_sees_every_component_with_its_weight() -> None:
    # minimum of (1, 0.25) and (0.5, 0.75), weights apart: 0.25 and 0.5, their mean 0.375.
    parts = [{"part": 1.0, "style": 0.25}, {"part": 0.5, "style": 0.75}]
    groups = [scored("a", parts, [completion("x"), completion("y")])]
    with pytest.raises(ValueError, match="takes no weights"):
        appraise(as_samples(groups), groups, components=("part", "style"), combination="minimum")
    parts = [{"part/a": 1.0, "part/b": 0.25}, {"part/a": 0.5, "part/b": 0.75}]  # one function's dict: one weight
    groups = [scored("a", parts, [completion("x"), completion("y")])]
    samples = appraise(
        as_samples(groups), groups, components=("other", "part"), advantage="dr_grpo", combination="minimum"
    )
    assert [float(s.advantages[0]) for s in samples] == [-0.125, 0.125]


def test_with_gradients_kept_apart_each_component_has_advantages_of_its_own() -> None:
    # Weights 2 and 1. part: 2 * (1, 0), mean 1; style: (0, 4), mean 2.
    parts = [{"part": 1.0, "style": 0.0}, {"part": 0.0, "style": 4.0}]
    groups = [scored("a", parts, [completion("x"), completion("y")])]
    first, second = appraise(
        as_samples(groups),
        groups,
        components=("part", "style"),
        advantage="dr_grpo",
        gradient_combination="mgda",
    )
    assert first.objective_advantages is not None
    assert second.objective_advantages is not None
    np.testing.assert_array_equal(first.objective_advantages, [[1.0, 1.0], [-2.0, -2.0]])
    np.testing.assert_array_equal(second.objective_advantages, [[-1.0, -1.0], [2.0, 2.0]])
    missing = [scored("a", [parts[0], {"part": 0.0}], [completion("x"), completion("y")])]
    with pytest.raises(ValueError, match="sample 1 has no style"):
        appraise(as_samples(missing), missing, components=("part", "style"), gradient_combination="mgda")


def test_completions_agree_by_their_final_answer_where_the_recipe_says_how_to_find_it() -> None:
    # By majority of 3 the answer "4" of two samples wins; the third differs. Rewards 1, 1, 0.
    texts = ("so <answer>4</answer>", "well <answer>4</answer>", "<answer>5</answer>")
    groups = [group("a", [1.0, 1.0, 0.0], [completion(text) for text in texts])]
    settings = {"advantage": "inference_aware", "answer_pattern": "<answer>(.*?)</answer>"}
    terms = {"terms": [{"transform": "majority", "n": 3}]}
    samples = appraise(as_samples(groups), groups, advantage_options=terms, **settings)
    assert samples[0].advantages[0] == samples[1].advantages[0] > samples[2].advantages[0]


def test_the_greedy_baseline_is_combined_and_shaped_as_the_samples_are() -> None:
    # The greedy completion has 4 of 4 tokens: reward 2 * 0.5 less a penalty of 1 is 0. The samples' are 1 and 0.
    shaping = [{"name": "overlong", "options": {"cache_tokens": 2}}]
    one = group("a", [1.0, 0.0], [completion("x"), completion("y")])
    greedy = replace(one, greedy=(completion("z", tokens=4), Score(1.0, {"part": 0.5})))
    samples = appraise(as_samples([greedy]), [greedy], advantage="remax", shaping=shaping)
    assert [float(s.advantages[0]) for s in samples] == [1.0, 0.0]
    with pytest.raises(ValueError, match="1 of 1 groups have no greedy completion"):
        appraise(as_samples([one]), [one], advantage="remax")


def test_a_reward_of_no_component_of_the_recipe_gets_no_weight_made_up_for_it() -> None:
    groups = [
        scored("a", [{"part": 1.0, "stray": 1.0}, {"part": 0.0, "stray": 2.0}], [completion("x"), completion("y")])
    ]
    with pytest.raises(ValueError, match=r"the reward 'stray' belongs to none of reward\.components: part"):
        appraise(as_samples(groups), groups)
