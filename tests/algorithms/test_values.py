"""The critic's returns and loss against hand figures, finite differences and their invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.estimation import estimate_advantages
from algorithms.inputs import AdvantageInputs
from algorithms.values import lambda_returns, value_loss

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))
clips = st.sampled_from([None, 0.1, 0.5])


def noise(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    return values, old, returns, torch.rand(shape, generator=generator) < 0.7


def one_sample(values: list[float], rewards: list[float], reward: float) -> AdvantageInputs:
    return AdvantageInputs(
        rewards=torch.tensor([reward], dtype=torch.float64),
        group=torch.tensor([0]),
        lengths=torch.tensor([len(values)]),
        mask=torch.ones(len(values), dtype=torch.bool),
        token_rewards=torch.tensor(rewards, dtype=torch.float64),
        values=torch.tensor(values, dtype=torch.float64),
    )


def test_the_value_loss_is_the_one_worked_by_hand() -> None:
    # Old value 0, bound 0.5, return 2 everywhere.
    # V = 0.25: within the bound, 1/2 (1.75)^2. V = 1: 1/2 max(1, 1.5^2). V = -1: 1/2 max(9, 2.5^2).
    values = torch.tensor([[0.25, 1.0, -1.0]], dtype=torch.float64)
    old, returns = torch.zeros_like(values), torch.full_like(values, 2.0)
    found = value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), clip=0.5)
    expected = torch.tensor([[1.75**2 / 2, 1.5**2 / 2, 9 / 2]], dtype=torch.float64)
    torch.testing.assert_close(found.values, expected)
    assert found.is_clipped.tolist() == [[False, True, False]]


def test_without_a_bound_it_is_half_the_squared_error() -> None:
    values, old, returns, mask = noise((3, 4), 1)
    found = value_loss(values, old, returns, mask)
    torch.testing.assert_close(found.values, torch.where(mask, (values - returns) ** 2 / 2, 0.0))
    assert not found.is_clipped.any()


@given(shapes, clips, st.integers(0, 999))
@settings(max_examples=50)
def test_the_gradient_agrees_with_finite_differences_and_vanishes_where_it_is_clipped(
    shape: tuple[int, int], clip: float | None, seed: int
) -> None:
    values, old, returns, mask = noise(shape, seed)
    leaf = values.clone().requires_grad_()
    outcome = value_loss(leaf, old, returns, mask, clip=clip)
    (gradient,) = torch.autograd.grad(outcome.values.sum(), leaf)
    up = value_loss(values + 1e-6, old, returns, mask, clip=clip).values
    down = value_loss(values - 1e-6, old, returns, mask, clip=clip).values
    torch.testing.assert_close(gradient, (up - down) / 2e-6, rtol=1e-5, atol=1e-6)
    assert torch.equal(gradient[outcome.is_clipped], torch.zeros(int(outcome.is_clipped.sum()), dtype=torch.float64))
    moves = mask & ~outcome.is_clipped & ((values - returns).abs() > 1e-6)
    assert bool((gradient[moves] != 0).all())


@given(shapes, clips, st.integers(0, 999))
@settings(max_examples=50)
def test_padding_and_what_stands_there_change_nothing(shape: tuple[int, int], clip: float | None, seed: int) -> None:
    values, old, returns, mask = noise(shape, seed)
    found = value_loss(values, old, returns, mask, clip=clip)

    def padded(matrix: Tensor, filler: float) -> Tensor:
        spoilt = torch.where(mask, matrix, filler)
        return torch.cat([spoilt, torch.full((shape[0], 2), filler, dtype=matrix.dtype)], dim=1)

    wide = torch.cat([mask, torch.zeros(shape[0], 2, dtype=torch.bool)], dim=1)
    leaf = padded(values, math.nan).requires_grad_()
    other = value_loss(leaf, padded(old, math.nan), padded(returns, math.nan), wide, clip=clip)
    assert torch.equal(other.values[:, : shape[1]], found.values)
    assert torch.equal(other.is_clipped[:, : shape[1]], found.is_clipped)
    (gradient,) = torch.autograd.grad(other.values.sum(), leaf)
    assert torch.equal(gradient[~wide], torch.zeros(int((~wide).sum()), dtype=torch.float64))


def test_a_bound_that_lets_nothing_move_is_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"clip = 0 keeps every value where it is"):
        value_loss(one, one, one, one.bool(), clip=0.0)


def test_lambda_returns_are_those_worked_by_hand() -> None:
    # Values 1, 2; token rewards 0.5, 0; reward 4 at the end; discount 1/2, trace decay 1/2.
    # Last: 4. First: 0.5 + 1/2 * (1/2 * 2 + 1/2 * 4) = 2.
    found = lambda_returns(one_sample([1.0, 2.0], [0.5, 0.0], 4.0), 0.5, 0.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 4.0], dtype=torch.float64))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50)
def test_lambda_returns_agree_with_their_own_recursion(
    values: list[float], discount: float, trace_decay: float, seed: int
) -> None:
    rewards = torch.randn(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs = one_sample(values, rewards, 1.5)
    found = lambda_returns(inputs, discount, trace_decay).tolist()
    target, following = 0.0, 0.0
    for t in reversed(range(len(values))):
        reward = rewards[t] + (1.5 if t == len(values) - 1 else 0.0)
        target = reward + discount * ((1 - trace_decay) * following + trace_decay * target)
        following = values[t]
        assert found[t] == pytest.approx(target, abs=1e-9)


def test_the_critics_returns_are_its_values_and_the_advantages_before_whitening() -> None:
    inputs = one_sample([0.5, -1.0, 2.0], [0.25, 0.0, -0.5], 1.0)
    options = {"discount": 0.9, "trace_decay": 0.8}
    plain = estimate_advantages("gae", inputs, {**options, "whiten": False})
    assert inputs.values is not None
    torch.testing.assert_close(lambda_returns(inputs, 0.9, 0.8), plain + inputs.values)
    # Without decay: the sum of rewards still to come, whatever the values.
    expected = torch.tensor([0.25 + 0.5, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(lambda_returns(inputs), expected)


def test_returns_without_values_are_refused() -> None:
    inputs = one_sample([0.0], [0.0], 1.0)
    bare = AdvantageInputs(inputs.rewards, inputs.group, inputs.lengths, inputs.mask)
    with pytest.raises(ValueError, match=r"AdvantageInputs\.values is None"):
        lambda_returns(bare)


def test_regressing_on_returns_finds_the_expected_return() -> None:
    # Returns 1, -1, 1 and 0 from both states: the best value of each is their mean, 0.25.
    returns = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    level = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        old = level.detach().expand(4, 2)
        loss = value_loss(level.expand(4, 2), old, returns, mask, clip=0.2).values.mean()
        (gradient,) = torch.autograd.grad(loss, level)
        level = (level - 0.5 * gradient).detach().requires_grad_()
    torch.testing.assert_close(level.detach(), torch.full((2,), 0.25, dtype=torch.float64), rtol=0, atol=1e-6)
