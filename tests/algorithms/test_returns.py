"""Advantages by token against hand figures, recursions written as loops, and the invariants that define them."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.estimation import estimate_advantages
from algorithms.finite import NonFiniteError
from algorithms.inputs import AdvantageInputs
from algorithms.returns import discounted_sums, generalised_advantages

TOKEN_LEVEL = ("gae", "reinforce_plus_plus", "optimal_token_baseline")
factors = st.sampled_from([0.0, 0.5, 0.95, 0.999, 1.0])


@st.composite
def batches(draw: st.DrawFn) -> AdvantageInputs:
    """Samples of up to nine tokens with holes in the action mask, some without an action."""
    lengths = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    samples, tokens = len(lengths), int(lengths.sum())

    def noise(size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    mask = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    probabilities = torch.rand(tokens, dtype=torch.float64, generator=generator) * 0.98 + 0.01
    rest = (1 - probabilities) * torch.rand(tokens, dtype=torch.float64, generator=generator)
    return AdvantageInputs(
        rewards=(noise(samples) * 4).round() / 4,
        group=torch.randint(0, 3, (samples,), generator=generator) * 100,
        lengths=lengths,
        mask=mask,
        token_rewards=draw(st.sampled_from([None, 1])) and noise(tokens),
        values=noise(tokens),
        log_probs=probabilities.log(),
        # One other token holds `rest` of what is left: p^2 + rest^2 is a possible sum of squares.
        collision=probabilities**2 + rest**2,
    )


def trajectories(inputs: AdvantageInputs) -> list[list[int]]:
    """The indices of each sample's actions."""
    ends = inputs.lengths.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [[t for t in range(s, e) if inputs.mask[t]] for s, e in zip(starts, ends, strict=True)]


def rewards_of(inputs: AdvantageInputs, sample: int, tokens: list[int]) -> list[float]:
    dense = [0.0 if inputs.token_rewards is None else float(inputs.token_rewards[t]) for t in tokens]
    return [r + (float(inputs.rewards[sample]) if t == tokens[-1] else 0.0) for r, t in zip(dense, tokens, strict=True)]


def gae_by_the_paper(inputs: AdvantageInputs, discount: float, trace_decay: float) -> Tensor:
    advantages = torch.zeros(len(inputs.mask), dtype=torch.float64)
    assert inputs.values is not None
    for sample, tokens in enumerate(trajectories(inputs)):
        rewards, following, advantage = rewards_of(inputs, sample, tokens), 0.0, 0.0
        for token, reward in zip(reversed(tokens), reversed(rewards), strict=True):
            value = float(inputs.values[token])
            advantage = reward + discount * following - value + discount * trace_decay * advantage
            advantages[token], following = advantage, value
    return advantages


def returns_by_loop(inputs: AdvantageInputs, discount: float) -> Tensor:
    returns = torch.zeros(len(inputs.mask), dtype=torch.float64)
    for sample, tokens in enumerate(trajectories(inputs)):
        running = 0.0
        for token, reward in zip(reversed(tokens), reversed(rewards_of(inputs, sample, tokens)), strict=True):
            running = reward + discount * running
            returns[token] = running
    return returns


def whiten_by_loop(values: Tensor, mask: Tensor) -> Tensor:
    inside = values[mask].tolist()
    if not inside:
        return torch.zeros_like(values)
    std = statistics.stdev(inside) if len(inside) > 1 else 0.0
    return torch.where(mask, (values - statistics.fmean(inside)) / (std + 1e-6), 0.0)


def token_baseline_by_the_paper(inputs: AdvantageInputs) -> Tensor:
    assert inputs.log_probs is not None
    assert inputs.collision is not None
    returns, advantages = returns_by_loop(inputs, 1.0), torch.zeros(len(inputs.mask), dtype=torch.float64)
    tracks = trajectories(inputs)
    energy = [
        [1 - 2 * math.exp(float(inputs.log_probs[t])) + float(inputs.collision[t]) for t in tokens] for tokens in tracks
    ]
    for sample, tokens in enumerate(tracks):
        for place, token in enumerate(tokens):
            alive = [
                other
                for other, track in enumerate(tracks)
                if inputs.group[other] == inputs.group[sample] and len(track) > place
            ]
            if len(alive) == 1:
                continue
            weights = [sum(energy[other][: place + 1]) + 1e-8 for other in alive]
            weighted = sum(w * float(returns[tracks[o][place]]) for w, o in zip(weights, alive, strict=True))
            advantages[token] = returns[token] - weighted / sum(weights)
    return advantages


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), factors, st.integers(0, 999))
@settings(max_examples=60)
def test_discounted_sums_agree_with_a_loop_for_any_lengths(lengths: list[int], factor: float, seed: int) -> None:
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    last = torch.repeat_interleave(torch.tensor(lengths).cumsum(0) - 1, torch.tensor(lengths))
    expected, running = values.clone(), 0.0
    for t in reversed(range(len(values))):
        running = float(values[t]) + (0.0 if t == last[t] else factor * running)
        expected[t] = running
    torch.testing.assert_close(discounted_sums(values, last, factor), expected, rtol=1e-12, atol=1e-12)


def test_discounted_sums_of_a_long_sample_are_a_geometric_series() -> None:
    sums = discounted_sums(torch.ones(5000, dtype=torch.float64), torch.full((5000,), 4999), 0.99)
    expected = (1 - 0.99 ** torch.arange(5000, 0, -1, dtype=torch.float64)) / 0.01
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    # A factor so small that its powers leave the range of numbers.
    tiny = discounted_sums(torch.ones(5000, dtype=torch.float64), torch.full((5000,), 4999), 1e-200)
    assert torch.equal(tiny, torch.ones(5000, dtype=torch.float64))


def test_gae_is_the_one_worked_by_hand() -> None:
    # One sample: an action, two tokens of a tool, two actions. Values 0.5, 0.25, 1 at the actions, token reward 0.125
    # at the second, reward 1 at the end; discount 1/2, trace decay 1/2.
    # delta = 0 + 0.125 - 0.5, 0.125 + 0.5 - 0.25, 1 - 1 = -0.375, 0.375, 0.
    # A = -0.375 + 0.25 * 0.375, 0.375 + 0.25 * 0, 0.
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0], dtype=torch.float64),
        group=torch.tensor([0]),
        lengths=torch.tensor([5]),
        mask=torch.tensor([True, False, False, True, True]),
        token_rewards=torch.tensor([0, 9, 9, 0.125, 0], dtype=torch.float64),
        values=torch.tensor([0.5, 7, 7, 0.25, 1], dtype=torch.float64),
    )
    options = {"discount": 0.5, "trace_decay": 0.5, "whiten": False}
    expected = torch.tensor([-0.28125, 0, 0, 0.375, 0], dtype=torch.float64)
    torch.testing.assert_close(estimate_advantages("gae", inputs, options), expected, rtol=0, atol=1e-15)


@given(batches(), factors, factors)
@settings(max_examples=60)
def test_gae_agrees_with_the_recursion_written_as_a_loop(
    inputs: AdvantageInputs, discount: float, trace_decay: float
) -> None:
    expected = gae_by_the_paper(inputs, discount, trace_decay)
    options = {"discount": discount, "trace_decay": trace_decay}
    plain = estimate_advantages("gae", inputs, {**options, "whiten": False})
    torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        estimate_advantages("gae", inputs, options), whiten_by_loop(expected, inputs.mask), rtol=1e-6, atol=1e-9
    )


@given(batches(), factors)
@settings(max_examples=50)
def test_gae_without_decay_is_the_return_minus_the_value(inputs: AdvantageInputs, discount: float) -> None:
    assert inputs.values is not None
    expected = torch.where(inputs.mask, returns_by_loop(inputs, discount) - inputs.values, 0.0)
    torch.testing.assert_close(generalised_advantages(inputs, discount, 1.0), expected, rtol=1e-9, atol=1e-9)


@given(batches(), factors, factors)
@settings(max_examples=50)
def test_gae_is_zero_where_the_critic_knows_the_return(
    inputs: AdvantageInputs, discount: float, trace_decay: float
) -> None:
    known = replace(inputs, values=returns_by_loop(inputs, discount))
    found = generalised_advantages(known, discount, trace_decay)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)


@given(batches(), factors)
@settings(max_examples=60)
def test_reinforce_plus_plus_agrees_with_returns_written_as_a_loop(inputs: AdvantageInputs, discount: float) -> None:
    expected = whiten_by_loop(returns_by_loop(inputs, discount), inputs.mask)
    found = estimate_advantages("reinforce_plus_plus", inputs, {"discount": discount})
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_reinforce_plus_plus_is_the_one_worked_by_hand() -> None:
    # Returns with discount 1/2: 1/4 * 2, 1/2 * 2, 2 and 0: mean 3.5/4, squared differences 9/64 + 1/64 + 81/64 + 49/64.
    inputs = AdvantageInputs(
        rewards=torch.tensor([2.0, 0.0], dtype=torch.float64),
        group=torch.tensor([0, 1]),
        lengths=torch.tensor([3, 1]),
        mask=torch.ones(4, dtype=torch.bool),
    )
    std = math.sqrt((9 + 1 + 81 + 49) / 64 / 3) + 1e-6
    expected = torch.tensor([-0.375, 0.125, 1.125, -0.875], dtype=torch.float64) / std
    torch.testing.assert_close(estimate_advantages("reinforce_plus_plus", inputs, {"discount": 0.5}), expected)


@given(batches())
@settings(max_examples=60)
def test_the_optimal_token_baseline_agrees_with_the_paper_written_as_a_loop(inputs: AdvantageInputs) -> None:
    found = estimate_advantages("optimal_token_baseline", inputs)
    torch.testing.assert_close(found, token_baseline_by_the_paper(inputs), rtol=1e-6, atol=1e-7)


def test_the_optimal_token_baseline_is_the_one_worked_by_hand() -> None:
    # Two samples of a prompt with rewards 1 and 0 and two tokens each; the second has a third token, where it is alone.
    # Energies 1 - 2 pi + collision: first 1 - 1 + 0.5 = 0.5 and 0.5; second 1 - 0.5 + 0.75 = 1.25 and 0.25, summed up
    # 0.5, 1 and 1.25, 1.5. Baselines 0.5/1.75 = 2/7 and 1/2.5 = 0.4.
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0], dtype=torch.float64),
        group=torch.tensor([3, 3]),
        lengths=torch.tensor([2, 3]),
        mask=torch.ones(5, dtype=torch.bool),
        log_probs=torch.tensor([0.5, 0.5, 0.25, 0.5, 0.5], dtype=torch.float64).log(),
        collision=torch.tensor([0.5, 0.5, 0.75, 0.25, 0.5], dtype=torch.float64),
    )
    expected = torch.tensor([5 / 7, 0.6, -2 / 7, -0.4, 0], dtype=torch.float64)
    torch.testing.assert_close(estimate_advantages("optimal_token_baseline", inputs), expected, rtol=1e-6, atol=1e-7)


def test_the_optimal_token_baseline_has_the_least_weighted_spread() -> None:
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.rand(8, dtype=torch.float64, generator=generator)
    inputs = AdvantageInputs(
        rewards=torch.randn(4, dtype=torch.float64, generator=generator),
        group=torch.zeros(4, dtype=torch.long),
        lengths=torch.full((4,), 2),
        mask=torch.ones(8, dtype=torch.bool),
        log_probs=probabilities.log(),
        collision=probabilities**2,
    )
    energy = (1 - probabilities).square().view(4, 2).cumsum(1)
    advantages = estimate_advantages("optimal_token_baseline", inputs).view(4, 2)
    # The spread sum of W (G - b)^2 is flat at its least, and there the weighted advantages sum to 0.
    torch.testing.assert_close((energy * advantages).sum(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_where_nothing_is_uncertain_the_token_baseline_is_the_mean() -> None:
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64),
        group=torch.zeros(3, dtype=torch.long),
        lengths=torch.ones(3, dtype=torch.long),
        mask=torch.ones(3, dtype=torch.bool),
        log_probs=torch.zeros(3, dtype=torch.float64),
        collision=torch.ones(3, dtype=torch.float64),
    )
    expected = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(estimate_advantages("optimal_token_baseline", inputs), expected)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
@given(inputs=batches(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_the_order_of_samples_does_not_matter(name: str, inputs: AdvantageInputs, seed: int) -> None:
    order = torch.randperm(len(inputs.lengths), generator=torch.Generator().manual_seed(seed))
    bounds = zip(inputs.starts[order].tolist(), inputs.lengths[order].tolist(), strict=True)
    tokens = torch.cat([torch.arange(start, start + length) for start, length in bounds])
    of_samples = {name: getattr(inputs, name)[order] for name in ("rewards", "group", "lengths")}
    of_tokens = {
        name: None if getattr(inputs, name) is None else getattr(inputs, name)[tokens]
        for name in ("mask", "token_rewards", "values", "log_probs", "collision")
    }
    shuffled = estimate_advantages(name, AdvantageInputs(**of_samples, **of_tokens))
    torch.testing.assert_close(shuffled, estimate_advantages(name, inputs)[tokens], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
@given(inputs=batches())
@settings(max_examples=40)
def test_what_stands_outside_the_action_mask_counts_for_nothing(name: str, inputs: AdvantageInputs) -> None:
    def spoilt(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(inputs.mask, values, math.nan)

    other = replace(
        inputs,
        token_rewards=spoilt(inputs.token_rewards),
        values=spoilt(inputs.values),
        log_probs=spoilt(inputs.log_probs),
        collision=spoilt(inputs.collision),
    )
    found = estimate_advantages(name, other)
    assert torch.equal(found, estimate_advantages(name, inputs))
    assert torch.equal(found[~inputs.mask], torch.zeros(int((~inputs.mask).sum()), dtype=torch.float64))


@given(inputs=batches(), shift=st.sampled_from([-3.0, 0.5, 1000.0]))
@settings(max_examples=40)
def test_adding_a_constant_to_every_reward_changes_nothing_without_a_critic(
    inputs: AdvantageInputs, shift: float
) -> None:
    for name in ("reinforce_plus_plus", "optimal_token_baseline"):
        moved = replace(inputs, rewards=inputs.rewards + shift)
        torch.testing.assert_close(
            estimate_advantages(name, moved), estimate_advantages(name, inputs), rtol=1e-5, atol=1e-6
        )


@given(inputs=batches(), value=st.floats(-1e6, 1e6))
@settings(max_examples=40)
def test_equal_rewards_give_exactly_zero_without_a_critic(inputs: AdvantageInputs, value: float) -> None:
    equal = replace(inputs, rewards=torch.full_like(inputs.rewards, value), token_rewards=None)
    for name in ("reinforce_plus_plus", "optimal_token_baseline"):
        assert torch.equal(estimate_advantages(name, equal), torch.zeros(len(inputs.mask), dtype=torch.float64))


@pytest.mark.parametrize("name", TOKEN_LEVEL)
@pytest.mark.parametrize("field", ["token_rewards", "values", "log_probs", "collision"])
def test_an_action_whose_input_is_not_finite_is_refused_naming_tensor_and_token(name: str, field: str) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    inputs = AdvantageInputs(
        rewards=ones[:2],
        group=torch.tensor([0, 0]),
        lengths=torch.tensor([1, 2]),
        mask=torch.ones(3, dtype=torch.bool),
        token_rewards=ones,
        values=ones,
        log_probs=-ones,
        collision=ones,
    )
    bad = replace(inputs, **{field: torch.tensor([1.0, math.inf, 1.0], dtype=torch.float64)})
    with pytest.raises(NonFiniteError, match=f"the {field.replace('_', ' ')} of token 1 is inf"):
        estimate_advantages(name, bad)
