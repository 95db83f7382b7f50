"""Advantages by sample against figures worked by hand, loops written from the papers, and their invariants."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.estimation import estimate_advantages
from algorithms.finite import NonFiniteError
from algorithms.inputs import AdvantageInputs
from algorithms.registry import ADVANTAGE_ESTIMATORS, RegistryError

GROUPED = ("grpo", "dr_grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline")
ALL = (*GROUPED, "reinforce")
"""What needs rewards alone and doesn't change when all of them are shifted."""
SCALE_FREE = {"grpo", "reinforce_plus_plus_baseline"}

rewards_and_groups = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 8), st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=30
)


def tensors(triples: list[tuple[float, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    rewards, groups, lengths = zip(*triples, strict=True)
    # Ids far apart and out of order, as hashes would be.
    group = torch.tensor([(7 * g) % 5 * 1000 + 3 for g in groups])
    return torch.tensor(rewards, dtype=torch.float64), group, torch.tensor(lengths)


def estimate(name: str, rewards: Tensor, group: Tensor, lengths: Tensor | None = None, **options: object) -> Tensor:
    """The advantage of each sample, which must stand on all its tokens."""
    if lengths is None:
        lengths = torch.ones_like(group)
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
    tokens = estimate_advantages(name, AdvantageInputs(rewards, group, lengths, mask), options)
    samples = tokens[lengths.cumsum(0) - 1]
    assert torch.equal(tokens, samples.repeat_interleave(lengths))
    return samples


def by_the_paper(name: str, rewards: list[float], groups: list[int], lengths: list[int]) -> list[float]:
    """Each estimator as its paper writes it, a sample at a time in float64."""
    members = {g: [i for i, other in enumerate(groups) if other == g] for g in groups}
    centred = [r - statistics.fmean(rewards[j] for j in members[g]) for r, g in zip(rewards, groups, strict=True)]
    advantages = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        mine = [rewards[j] for j in members[group]]
        others = [rewards[j] for j in members[group] if j != i]
        if name == "reinforce":
            advantages.append(reward - statistics.fmean(rewards))
        elif len(mine) == 1:
            advantages.append(0.0)
        elif name == "grpo":
            advantages.append(centred[i] / (statistics.stdev(mine) + 1e-6))
        elif name == "dr_grpo":
            advantages.append(centred[i])
        elif name == "rloo":
            advantages.append(reward - statistics.fmean(others))
        elif name == "opo":
            weighted = sum(lengths[j] * rewards[j] for j in members[group])
            advantages.append(reward - weighted / sum(lengths[j] for j in members[group]))
        elif name == "gpg":
            silent = sum(len({rewards[j] for j in members[g]}) == 1 for g in groups)
            advantages.append(centred[i] * len(rewards) / max(1, len(rewards) - silent))
        elif name == "reinforce_plus_plus_baseline":
            advantages.append((centred[i] - statistics.fmean(centred)) / (statistics.stdev(centred) + 1e-6))
        else:
            raise AssertionError(f"write {name} from its paper here")
    return advantages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Group 5 has rewards 1, 0, 0 (mean 1/3, sample deviation 1/sqrt(3)), group 9 has 2, 4 (mean 3, sqrt(2)).
        ("grpo", [2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(2), 1 / math.sqrt(2)]),
        ("dr_grpo", [2 / 3, -1 / 3, -1 / 3, -1.0, 1.0]),
        # Others' means: 0, 1/2, 1/2; 4, 2.
        ("rloo", [1.0, -0.5, -0.5, -2.0, 2.0]),
        # The batch's mean is 7/5.
        ("reinforce", [-0.4, -1.4, -1.4, 0.6, 2.6]),
        # Lengths 1, 2, 5 and 1, 3: baselines (1*1)/8 and (1*2 + 3*4)/4 = 3.5.
        ("opo", [7 / 8, -1 / 8, -1 / 8, -1.5, 0.5]),
        # Both groups teach, so alpha is 1.
        ("gpg", [2 / 3, -1 / 3, -1 / 3, -1.0, 1.0]),
        # The mean over each group: (1 - 1/3) / (1/3), (2 - 3) / 3.
        ("maxrl", [2.0, -1.0, -1.0, -1 / 3, 1 / 3]),
        # Sum of squared differences 4/9 + 1/9 + 1/9 + 1 + 1 = 8/3, over n - 1 = 4: a deviation of sqrt(2/3).
        ("reinforce_plus_plus_baseline", [x / math.sqrt(2 / 3) for x in (2 / 3, -1 / 3, -1 / 3, -1.0, 1.0)]),
    ],
)
def test_advantages_are_those_worked_by_hand(name: str, expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    group, lengths = torch.tensor([5, 5, 5, 9, 9]), torch.tensor([1, 2, 5, 1, 3])
    torch.testing.assert_close(
        estimate(name, rewards, group, lengths), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("name", ALL)
@given(triples=rewards_and_groups)
@settings(max_examples=50)
def test_advantages_agree_with_the_paper_written_as_a_loop(name: str, triples: list[tuple[float, int, int]]) -> None:
    rewards, group, lengths = tensors(triples)
    expected = by_the_paper(name, rewards.tolist(), group.tolist(), lengths.tolist())
    torch.testing.assert_close(
        estimate(name, rewards, group, lengths), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ALL)
@given(triples=rewards_and_groups, shift=st.sampled_from([-3.0, 0.5, 1000.0]))
@settings(max_examples=50)
def test_adding_a_constant_to_every_reward_changes_nothing(
    name: str, triples: list[tuple[float, int, int]], shift: float
) -> None:
    rewards, group, lengths = tensors(triples)
    torch.testing.assert_close(
        estimate(name, rewards + shift, group, lengths), estimate(name, rewards, group, lengths), rtol=1e-6, atol=1e-9
    )


@given(triples=rewards_and_groups, scale=st.sampled_from([0.25, 2.0, 64.0]))
@settings(max_examples=50)
def test_scaling_rewards_leaves_normalised_advantages_alone_and_scales_the_others(
    triples: list[tuple[float, int, int]], scale: float
) -> None:
    rewards, group, lengths = tensors(triples)
    for name in ALL:
        factor = 1.0 if name in SCALE_FREE else scale
        torch.testing.assert_close(
            estimate(name, rewards * scale, group, lengths),
            estimate(name, rewards, group, lengths) * factor,
            rtol=1e-4,
            atol=1e-9,
        )


@pytest.mark.parametrize("name", [*ALL, "grpo_winner", "grpo_pass_at_k"])
@given(triples=rewards_and_groups, seed=st.integers(0, 99))
@settings(max_examples=50)
def test_the_order_of_samples_does_not_matter(name: str, triples: list[tuple[float, int, int]], seed: int) -> None:
    rewards, group, lengths = tensors(triples)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        estimate(name, rewards[order], group[order], lengths[order]),
        estimate(name, rewards, group, lengths)[order],
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", GROUPED)
@given(triples=rewards_and_groups)
@settings(max_examples=50)
def test_advantages_of_a_group_sum_to_zero(name: str, triples: list[tuple[float, int, int]]) -> None:
    rewards, group, lengths = tensors(triples)
    advantages = estimate(name, rewards, group, lengths)
    # The baseline of least variance weighs by length, and so do its advantages.
    weighted = advantages * lengths if name == "opo" else advantages
    for one in group.unique():
        assert abs(float(weighted[group == one].sum())) < 1e-8


@pytest.mark.parametrize("name", [*ALL, "maxrl", "grpo_winner", "grpo_pass_at_k", "reinforce_plus_plus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(value=st.floats(0, 1e6, width=32), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(max_examples=30)
def test_equal_rewards_give_exactly_zero(name: str, dtype: torch.dtype, value: float, lengths: list[int]) -> None:
    size = len(lengths)
    advantages = estimate(
        name, torch.full((size,), value, dtype=dtype), torch.zeros(size, dtype=torch.long), torch.tensor(lengths)
    )
    assert torch.equal(advantages, torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("name", [*GROUPED, "maxrl", "grpo_winner"])
def test_a_group_of_one_and_a_group_of_equal_rewards_get_exactly_zero(name: str) -> None:
    # Lengths go with rewards, so that the batch's mean over tokens isn't 0.
    rewards, lengths = torch.tensor([1.0, 0.0, 5.0, 0.1, 0.1, 0.1]), torch.tensor([9, 1, 3, 1, 7, 2])
    advantages = estimate(name, rewards, torch.tensor([0, 0, 1, 2, 2, 2]), lengths)
    assert torch.equal(advantages[2:], torch.zeros(4))
    assert advantages[0] > 0


def test_rounding_noise_between_equal_rewards_is_not_blown_up() -> None:
    rewards = torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64)
    for name in ("grpo", "reinforce_plus_plus_baseline", "grpo_pass_at_k", "grpo_winner"):
        assert estimate(name, rewards, torch.tensor([0, 0])).abs().max() < 1e-9


def test_nearby_rewards_on_a_large_offset_are_told_apart() -> None:
    advantages = estimate("grpo", torch.tensor([1e4, 1e4 + 1.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]) / math.sqrt(2), rtol=1e-5, atol=0)


def test_gpg_makes_up_for_groups_that_teach_nothing() -> None:
    # Six samples, two of them in a group of equal rewards: alpha = 6/4. The other group's mean is 1/4.
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 1, 1])
    expected = torch.tensor([0, 0, 0.75, -0.25, -0.25, -0.25], dtype=torch.float64) * 1.5
    torch.testing.assert_close(estimate("gpg", rewards, group), expected)
    # Divided by the group's deviation of 1/2 as well.
    torch.testing.assert_close(estimate("gpg", rewards, group, divide_by="std"), expected * 2, rtol=1e-5, atol=0)


def test_gpg_gives_the_mean_gradient_of_the_groups_that_teach() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    slopes = torch.arange(1.0, 8.0, dtype=torch.float64)
    alone = (estimate("gpg", rewards[:3], group[:3]) * slopes[:3]).mean()
    torch.testing.assert_close((estimate("gpg", rewards, group) * slopes).mean(), alone)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=12))
@settings(max_examples=50)
def test_maxrl_weighs_a_success_by_how_rare_it_is(successes: list[int]) -> None:
    rewards = torch.tensor(successes, dtype=torch.float64)
    advantages = estimate("maxrl", rewards, torch.zeros(len(successes), dtype=torch.long))
    count, size = sum(successes), len(successes)
    for success, advantage in zip(successes, advantages.tolist(), strict=True):
        # K successes of n: (1 - K/n) / (K/n) = (n - K)/K for a success, -1 for a failure, 0 without any success.
        expected = 0.0 if count in (0, size) else (size - count) / count if success else -1.0
        assert advantage == pytest.approx(expected, abs=1e-12)


def test_maxrl_is_the_gradient_of_the_logarithm_of_the_expected_reward() -> None:
    # Four outcomes with rewards 0, 1, 2, 1, each sampled in proportion to a softmax at equal logits.
    rewards = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    logits = torch.zeros(4, dtype=torch.float64)

    def goal(shifted: Tensor) -> float:
        return float((shifted.softmax(0) * rewards).sum().log())

    advantages = estimate("maxrl", rewards, torch.zeros(4, dtype=torch.long))
    for arm in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[arm] = 1e-5
        slope = (goal(logits + step) - goal(logits - step)) / 2e-5
        # The score of a softmax is one-hot minus 1/4, and these advantages sum to 0.
        assert float(advantages[arm]) / 4 == pytest.approx(slope, abs=1e-9)


def test_maxrl_refuses_rewards_below_zero_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"that of sample 1 is -0\.5.*Shift the rewards"):
        estimate("maxrl", torch.tensor([1.0, -0.5]), torch.tensor([0, 0]))


def test_remax_compares_with_the_greedy_completion_of_the_same_prompt() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    inputs = AdvantageInputs(
        rewards,
        torch.tensor([0, 0, 1, 1]),
        torch.ones(4, dtype=torch.long),
        torch.ones(4, dtype=torch.bool),
        greedy_rewards=torch.tensor([0.25, 0.25, 0.5, 0.5], dtype=torch.float64),
    )
    expected = torch.tensor([0.75, -0.25, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(estimate_advantages("remax", inputs), expected)


def test_opo_has_the_least_variance_when_gradients_grow_with_length() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    lengths = torch.tensor([2, 8, 5, 1])
    advantages = estimate("opo", rewards, torch.zeros(4, dtype=torch.long), lengths)
    baseline = rewards[0] - advantages[0]

    def spread(b: Tensor) -> float:
        return float((lengths * (rewards - b).square()).sum())

    for shift in (-1e-3, 1e-3):
        assert spread(baseline) < spread(baseline + shift)


@pytest.mark.parametrize("name", [*ALL, "maxrl", "grpo_winner", "grpo_pass_at_k", "reinforce_plus_plus"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_naming_the_sample(name: str, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="the reward of sample 2 is"):
        estimate(name, torch.tensor([1.0, 0.0, bad, 0.0]), torch.tensor([0, 0, 1, 1]))


def test_every_estimator_says_what_it_is_where_it_is_from_and_when_to_use_it() -> None:
    for name in ADVANTAGE_ESTIMATORS:
        entry = ADVANTAGE_ESTIMATORS.get(name)
        assert entry.formula, name
        assert entry.source, name
        assert entry.use_when, name
        assert all(field.description for field in entry.options.model_fields.values()), name


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(RegistryError, match="Did you mean 'grpo'"):
        estimate("grppo", torch.zeros(1), torch.tensor([0]))
