"""The exact expected reward of a majority vote against every possible vote, and what must hold for many votes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.majority import MOST_VOTES, majority_gradients, majority_reward


@given(
    parts=st.lists(st.tuples(st.integers(1, 9), st.integers(-4, 4)), min_size=1, max_size=4), votes=st.integers(1, 6)
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_sum_over_every_possible_vote(parts: list[tuple[int, int]], votes: int) -> None:
    whole = sum(part for part, _ in parts)
    shares, rewards = [part / whole for part, _ in parts], [float(reward) for _, reward in parts]
    expected = 0.0
    for vote in itertools.product(range(len(parts)), repeat=votes):
        counts = [vote.count(answer) for answer in range(len(parts))]
        winners = [answer for answer, count in enumerate(counts) if count == max(counts)]
        expected += math.prod(shares[answer] for answer in vote) * sum(rewards[w] for w in winners) / len(winners)
    # A slot that a group doesn't use changes nothing.
    found = majority_reward(
        torch.tensor([[*shares, 0.0]], dtype=torch.float64), torch.tensor([[*rewards, 5.0]], dtype=torch.float64), votes
    )
    assert float(found[0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("votes", [7, 16, 33, MOST_VOTES])
def test_some_answer_always_wins_and_the_gradients_are_those_of_the_value(votes: int) -> None:
    generator = torch.Generator().manual_seed(votes)
    shares = torch.rand(3, 5, dtype=torch.float64, generator=generator)
    shares /= shares.sum(-1, keepdim=True)
    value, _, wins = majority_gradients(shares, torch.ones_like(shares), votes)
    torch.testing.assert_close(value, torch.ones_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(wins.sum(-1), torch.ones_like(value), rtol=0, atol=1e-12)
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    _, by_share, _ = majority_gradients(shares, rewards, votes)
    nudge = torch.zeros_like(shares)
    nudge[:, 2] = 1e-6
    slope = (majority_reward(shares + nudge, rewards, votes) - majority_reward(shares - nudge, rewards, votes)) / 2e-6
    torch.testing.assert_close(by_share[:, 2], slope, rtol=1e-6, atol=1e-6)


def test_a_vote_of_two_answers_is_a_binomial_tail() -> None:
    # 33 votes at 0.6: the sum over 17 and more.
    tail = sum(math.comb(33, k) * 0.6**k * 0.4 ** (33 - k) for k in range(17, 34))
    exact = majority_reward(
        torch.tensor([[0.6, 0.4]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64), 33
    )
    assert float(exact[0]) == pytest.approx(tail, rel=1e-12)


def test_groups_done_in_parts_are_the_groups_done_at_once() -> None:
    # 64 votes of 8 answers: more groups than one part holds.
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(130, 8, dtype=torch.float64, generator=generator)
    shares /= shares.sum(-1, keepdim=True)
    rewards = torch.randn(130, 8, dtype=torch.float64, generator=generator)
    value, by_share, by_reward = majority_gradients(shares, rewards, MOST_VOTES)
    assert value.shape == (130,)
    last = majority_gradients(shares[-1:], rewards[-1:], MOST_VOTES)
    torch.testing.assert_close((value[-1:], by_share[-1:], by_reward[-1:]), last, rtol=1e-9, atol=1e-12)
