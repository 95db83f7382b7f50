"""Advantages of a group as a whole against the papers' closed forms and against every subset written out."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.estimation import estimate_advantages
from algorithms.inputs import AdvantageInputs
from algorithms.registry import RegistryError

groups_of_rewards = st.lists(
    st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=1, max_size=7), min_size=1, max_size=4
)


def estimate(name: str, groups: list[list[float]], **options: object) -> list[list[float]]:
    """Advantages of groups that are dealt into the batch in turns, so that none stands together."""
    order = [(place, g) for g, rewards in enumerate(groups) for place in range(len(rewards))]
    order.sort()
    rewards = torch.tensor([groups[g][place] for place, g in order], dtype=torch.float64)
    group, ones = torch.tensor([g * 17 + 4 for _, g in order]), torch.ones(len(order), dtype=torch.long)
    inputs = AdvantageInputs(rewards, group, ones, ones.bool())
    values = dict(zip(order, estimate_advantages(name, inputs, options).tolist(), strict=True))
    return [[values[place, g] for place in range(len(rewards))] for g, rewards in enumerate(groups)]


def by_subsets(rewards: list[float], k: int) -> list[float]:
    """Every subset of k, its reward the largest in it; a sample's value is the mean over the subsets it is in."""
    if len(rewards) <= k:
        return [0.0] * len(rewards)
    subsets = {each: max(rewards[i] for i in each) for each in combinations(range(len(rewards)), k)}
    mean = math.fsum(subsets.values()) / len(subsets)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in subsets.values()) / len(subsets))
    own = [[r for each, r in subsets.items() if i in each] for i in range(len(rewards))]
    return [(math.fsum(mine) / len(mine) - mean) / (std + 1e-6) for mine in own]


@given(groups_of_rewards, st.integers(1, 5))
@settings(max_examples=80)
def test_pass_at_k_agrees_with_every_subset_written_out(groups: list[list[float]], k: int) -> None:
    for found, rewards in zip(estimate("grpo_pass_at_k", groups, k=k), groups, strict=True):
        assert found == pytest.approx(by_subsets(rewards, k), abs=1e-7)


def test_pass_at_k_of_rewards_of_0_and_1_is_the_papers_closed_form() -> None:
    # n = 5 samples, m = 3 failures, k = 2: R = 1 - C(3, 2)/C(5, 2) = 1 - 3/10 = 0.7, sigma = sqrt(0.21).
    # A success: (1 - 0.7)/sigma. A failure: (1 - 0.7 - C(2, 1)/C(4, 1))/sigma = (0.3 - 0.5)/sigma.
    sigma = math.sqrt(0.21)
    (found,) = estimate("grpo_pass_at_k", [[0, 1, 0, 1, 0]], k=2)
    assert found == pytest.approx([-0.2 / sigma, 0.3 / sigma, -0.2 / sigma, 0.3 / sigma, -0.2 / sigma], rel=1e-5)


@given(st.integers(2, 40), st.data())
@settings(max_examples=50)
def test_pass_at_k_is_the_closed_form_for_any_number_of_successes(size: int, data: st.DataObject) -> None:
    failures, k = data.draw(st.integers(1, size - 1)), data.draw(st.integers(1, size - 1))
    (found,) = estimate("grpo_pass_at_k", [[0.0] * failures + [1.0] * (size - failures)], k=k)
    passed = 1 - math.comb(failures, k) / math.comb(size, k)
    sigma = math.sqrt(passed * (1 - passed)) + 1e-6
    assert found[-1] == pytest.approx((1 - passed) / sigma, abs=1e-8)
    alone = math.comb(failures - 1, k - 1) / math.comb(size - 1, k - 1)
    assert found[0] == pytest.approx((1 - passed - alone) / sigma, abs=1e-8)


@given(groups_of_rewards, st.integers(1, 5))
@settings(max_examples=50)
def test_pass_at_k_of_a_group_sums_to_zero_and_a_better_sample_never_gets_less(
    groups: list[list[float]], k: int
) -> None:
    for found, rewards in zip(estimate("grpo_pass_at_k", groups, k=k), groups, strict=True):
        assert abs(sum(found)) < 1e-7
        ranked = [advantage for _, advantage in sorted(zip(rewards, found, strict=True))]
        # Where all subsets have the same best, rounding of 1e-15 is divided by the epsilon of 1e-6.
        assert all(low <= high + 1e-8 for low, high in pairwise(ranked))


@given(groups_of_rewards, st.sampled_from([-5.0, 0.5, 1e3]), st.sampled_from([0.5, 8.0]))
@settings(max_examples=50)
def test_pass_at_k_does_not_change_with_a_shift_or_scale_of_the_rewards(
    groups: list[list[float]], shift: float, scale: float
) -> None:
    changed = [[scale * r + shift for r in rewards] for rewards in groups]
    for left, right in zip(
        estimate("grpo_pass_at_k", groups, k=2), estimate("grpo_pass_at_k", changed, k=2), strict=True
    ):
        assert left == pytest.approx(right, abs=1e-4)


def test_pass_at_1_is_grpo_with_the_population_deviation() -> None:
    # Rewards 1, 0, 0, 3: mean 1, population variance (0 + 1 + 1 + 4)/4 = 1.5.
    (found,) = estimate("grpo_pass_at_k", [[1, 0, 0, 3]], k=1)
    assert found == pytest.approx([x / math.sqrt(1.5) for x in (0, -1, -1, 2)], abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_group_of_k_samples_or_fewer_gets_exactly_zero(size: int) -> None:
    found, other = estimate("grpo_pass_at_k", [[float(i) for i in range(size)], [0, 1, 0, 0]], k=3)
    assert found == [0.0] * size
    assert other[1] > 0


def test_k_below_one_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"algorithm\.advantage_options\.k = 0 of 'grpo_pass_at_k'"):
        estimate("grpo_pass_at_k", [[0, 1]], k=0)


def test_only_the_winner_is_rewarded_by_its_lead() -> None:
    # The best leads by 3 - 1; a shared first place leads by nothing; a group of one has nobody to lead.
    assert estimate("grpo_winner", [[1, 3, 0], [2, 2, 0], [5]]) == [[0, 2, 0], [0, 0, 0], [0]]
    # Rewards 1, 3, 0 have a deviation of sqrt(7/3).
    (found,) = estimate("grpo_winner", [[1, 3, 0]], divide_by="std")
    assert found == pytest.approx([0, 2 / math.sqrt(7 / 3), 0], rel=1e-5)


@given(groups_of_rewards)
@settings(max_examples=50)
def test_the_winners_lead_is_the_groups_best_with_and_without_each_sample(groups: list[list[float]]) -> None:
    for found, rewards in zip(estimate("grpo_winner", groups), groups, strict=True):
        for i, advantage in enumerate(found):
            others = rewards[:i] + rewards[i + 1 :]
            assert advantage == pytest.approx(max(rewards) - max(others) if others else 0.0, abs=1e-12)


def test_the_winners_lead_is_an_unbiased_gradient_of_the_expected_best() -> None:
    # Three arms with rewards 0, 1, 3 and groups of two: the expectation over all nine groups, against finite
    # differences of E[max of two] in the logits.
    rewards = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)

    def goal(shifted: Tensor) -> float:
        p = shifted.softmax(0)
        return float((p[:, None] * p[None, :] * torch.maximum(rewards[:, None], rewards[None, :])).sum())

    p = logits.softmax(0)
    gradient = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            (found,) = estimate("grpo_winner", [[float(rewards[a]), float(rewards[b])]])
            for arm, advantage in ((a, found[0]), (b, found[1])):
                score = -p.clone()
                score[arm] += 1
                gradient += p[a] * p[b] * advantage * score
    for arm in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[arm] = 1e-5
        assert float(gradient[arm]) == pytest.approx((goal(logits + step) - goal(logits - step)) / 2e-5, abs=1e-8)
