"""Pairs from groups of scored answers, against a loop over groups."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.preferences.pairs import PairOptions, pair_weights, pairs_from_groups

REWARDS = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0, 3.0, 1.0])
GROUP = torch.tensor([7, 2, 7, 2, 7, 9, 2])
"""Group 2: samples 1, 3, 6 with 1, 2, 1. Group 7: samples 0, 2, 4 with 0.5, 0, 1. Group 9: sample 5 alone."""


def pairs(options: PairOptions, rewards: Tensor = REWARDS, group: Tensor = GROUP, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(pairs_from_groups(rewards, group, options, generator), 1).tolist()


def test_best_and_worst_of_each_group_make_a_pair() -> None:
    assert pairs(PairOptions()) == [[3, 1], [4, 2]]


def test_all_pairs_are_those_of_different_rewards() -> None:
    assert sorted(pairs(PairOptions(choice="all"))) == [[0, 2], [3, 1], [3, 6], [4, 0], [4, 2]]


def test_pairs_within_the_margin_are_left_out() -> None:
    assert sorted(pairs(PairOptions(choice="all", min_margin=0.5))) == [[3, 1], [3, 6], [4, 2]]
    assert pairs(PairOptions(min_margin=1.0)) == []


def test_a_random_other_is_any_that_is_worse_enough() -> None:
    seen = {tuple(pair) for seed in range(40) for pair in pairs(PairOptions(choice="best_random"), seed=seed)}
    assert seen == {(3, 1), (3, 6), (4, 0), (4, 2)}
    seen = {
        tuple(pair)
        for seed in range(20)
        for pair in pairs(PairOptions(choice="best_random", min_margin=0.5), seed=seed)
    }
    assert seen == {(3, 1), (3, 6), (4, 2)}


def test_a_random_other_is_the_same_for_the_same_seed() -> None:
    options = PairOptions(choice="best_random")
    assert pairs(options, seed=5) == pairs(options, seed=5)


def loop(rewards: list[float], group: list[int], choice: str, margin: float) -> list[list[int]]:
    found = []
    for prompt in sorted(set(group)):
        members = [i for i in range(len(group)) if group[i] == prompt]
        if choice == "all":
            found += [[i, j] for i, j in itertools.permutations(members, 2) if rewards[i] - rewards[j] > margin]
        else:
            best, worst = max(members, key=lambda i: rewards[i]), min(members, key=lambda i: rewards[i])
            if rewards[best] - rewards[worst] > margin:
                found.append([best, worst])
    return found


@pytest.mark.parametrize("choice", ["best_worst", "all"])
@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=0, max_size=16),
    margin=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_pairs_are_those_of_a_loop_over_groups(choice: str, samples: list[tuple[int, int]], margin: float) -> None:
    rewards, group = [float(reward) for reward, _ in samples], [prompt for _, prompt in samples]
    options = PairOptions.model_validate({"choice": choice, "min_margin": margin})
    found = pairs(options, torch.tensor(rewards, dtype=torch.float64), torch.tensor(group, dtype=torch.int64))
    expected = loop(rewards, group, choice, margin)
    assert sorted(found) == sorted(expected)
    assert [group[i] for i, _ in found] == sorted(group[i] for i, _ in expected)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=16),
    seed=st.integers(0, 100),
)
def test_best_and_random_is_one_pair_of_each_group_with_a_difference(samples: list[tuple[int, int]], seed: int) -> None:
    rewards, group = [float(reward) for reward, _ in samples], [prompt for _, prompt in samples]
    found = pairs(
        PairOptions(choice="best_random"), torch.tensor(rewards), torch.tensor(group, dtype=torch.int64), seed
    )
    best = loop(rewards, group, "best_worst", 0.0)
    assert [i for i, _ in found] == [i for i, _ in best]
    assert all(group[i] == group[j] and rewards[i] > rewards[j] for i, j in found)


def test_every_group_weighs_the_same_however_many_pairs_it_gives() -> None:
    chosen, _ = pairs_from_groups(REWARDS, GROUP, PairOptions(choice="all"))
    weights = pair_weights(GROUP, chosen)
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])


def test_many_groups_need_no_loop() -> None:
    rewards = torch.rand(65_536, generator=torch.Generator().manual_seed(0))
    chosen, rejected = pairs_from_groups(rewards, torch.arange(65_536) % 4096, PairOptions())
    assert len(chosen) == 4096
    assert (rewards[chosen] > rewards[rejected]).all()


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="the reward of sample 1"):
        pairs_from_groups(torch.tensor([0.0, math.nan]), torch.tensor([0, 0]), PairOptions())


def test_rewards_and_groups_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards \[3\] and group \[2\]"):
        pairs_from_groups(torch.zeros(3), torch.tensor([0, 0]), PairOptions())


def test_a_random_choice_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give a seeded torch\.Generator"):
        pairs_from_groups(torch.zeros(2), torch.tensor([0, 0]), PairOptions(choice="best_random"))
