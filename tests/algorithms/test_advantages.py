"""Advantages against figures worked by hand, loops written from the papers, and the invariants that define them."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.advantages import estimate_advantages
from algorithms.finite import NonFiniteError
from algorithms.registry import ADVANTAGE_ESTIMATORS, RegistryError

GROUPED = ("grpo", "dr_grpo", "rloo")
ALL = tuple(ADVANTAGE_ESTIMATORS)

rewards_and_groups = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 8), st.integers(0, 4)), min_size=1, max_size=40
)


def tensors(pairs: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    rewards, groups = zip(*pairs, strict=True)
    # Ids far apart and out of order, as hashes would be.
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor([(7 * g) % 5 * 1000 + 3 for g in groups])


def by_the_paper(name: str, rewards: list[float], groups: list[int]) -> list[float]:
    """Each estimator as its paper writes it, a sample at a time in float64."""
    advantages = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i]
        if name == "reinforce":
            advantages.append(reward - statistics.fmean(rewards))
        elif len(mine) == 1:
            advantages.append(0.0)
        elif name == "grpo":
            advantages.append((reward - statistics.fmean(mine)) / (statistics.stdev(mine) + 1e-6))
        elif name == "dr_grpo":
            advantages.append(reward - statistics.fmean(mine))
        elif name == "rloo":
            advantages.append(reward - statistics.fmean(others))
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
    ],
)
def test_advantages_are_those_worked_by_hand(name: str, expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    group = torch.tensor([5, 5, 5, 9, 9])
    torch.testing.assert_close(
        estimate_advantages(name, rewards, group), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("name", ALL)
@given(pairs=rewards_and_groups)
def test_advantages_agree_with_the_paper_written_as_a_loop(name: str, pairs: list[tuple[float, int]]) -> None:
    rewards, group = tensors(pairs)
    expected = by_the_paper(name, rewards.tolist(), group.tolist())
    torch.testing.assert_close(
        estimate_advantages(name, rewards, group), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ALL)
@given(pairs=rewards_and_groups, shift=st.sampled_from([-3.0, 0.5, 1000.0]))
def test_adding_a_constant_to_every_reward_changes_nothing(
    name: str, pairs: list[tuple[float, int]], shift: float
) -> None:
    rewards, group = tensors(pairs)
    torch.testing.assert_close(
        estimate_advantages(name, rewards + shift, group), estimate_advantages(name, rewards, group)
    )


@given(pairs=rewards_and_groups, scale=st.sampled_from([0.25, 2.0, 64.0]))
def test_scaling_rewards_leaves_grpo_alone_and_scales_the_others(pairs: list[tuple[float, int]], scale: float) -> None:
    rewards, group = tensors(pairs)
    for name in ALL:
        factor = 1.0 if name == "grpo" else scale
        torch.testing.assert_close(
            estimate_advantages(name, rewards * scale, group),
            estimate_advantages(name, rewards, group) * factor,
            rtol=1e-4,
            atol=1e-9,
        )


@pytest.mark.parametrize("name", ALL)
@given(pairs=rewards_and_groups, seed=st.integers(0, 99))
def test_the_order_of_samples_does_not_matter(name: str, pairs: list[tuple[float, int]], seed: int) -> None:
    rewards, group = tensors(pairs)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        estimate_advantages(name, rewards[order], group[order]), estimate_advantages(name, rewards, group)[order]
    )


@pytest.mark.parametrize("name", GROUPED)
@given(pairs=rewards_and_groups)
def test_advantages_of_a_group_sum_to_zero(name: str, pairs: list[tuple[float, int]]) -> None:
    rewards, group = tensors(pairs)
    advantages = estimate_advantages(name, rewards, group)
    for one in group.unique():
        assert abs(float(advantages[group == one].sum())) < 1e-9


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(value=st.floats(-1e6, 1e6, width=32), size=st.integers(1, 9))
@settings(max_examples=50)
def test_equal_rewards_give_exactly_zero(name: str, dtype: torch.dtype, value: float, size: int) -> None:
    advantages = estimate_advantages(name, torch.full((size,), value, dtype=dtype), torch.zeros(size, dtype=torch.long))
    assert torch.equal(advantages, torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_one_gets_exactly_zero(name: str) -> None:
    advantages = estimate_advantages(name, torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]))
    assert advantages[2] == 0
    assert advantages[0] > 0


def test_rounding_noise_between_equal_rewards_is_not_blown_up() -> None:
    rewards = torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64)
    assert estimate_advantages("grpo", rewards, torch.tensor([0, 0])).abs().max() < 1e-9


def test_nearby_rewards_on_a_large_offset_are_told_apart() -> None:
    advantages = estimate_advantages("grpo", torch.tensor([1e4, 1e4 + 1.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]) / math.sqrt(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_naming_the_sample(name: str, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="the reward of sample 2 is"):
        estimate_advantages(name, torch.tensor([1.0, 0.0, bad, 0.0]), torch.tensor([0, 0, 1, 1]))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        estimate_advantages("grpo", torch.zeros(3), torch.tensor([0, 0]))


def test_whole_number_rewards_are_refused_rather_than_rounded() -> None:
    with pytest.raises(ValueError, match="floating point"):
        estimate_advantages("grpo", torch.tensor([1, 0]), torch.tensor([0, 0]))


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(RegistryError, match="Did you mean 'grpo'"):
        estimate_advantages("grppo", torch.zeros(1), torch.tensor([0]))


def test_no_samples_give_no_advantages() -> None:
    assert estimate_advantages("grpo", torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
