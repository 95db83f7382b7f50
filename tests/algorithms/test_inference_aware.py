"""Inference-aware advantages against finite differences of each objective, the paper's toy, and their invariants."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.inference_aware import InferenceAwareOptions, Term, first_variation, inference_aware
from algorithms.inputs import AdvantageInputs
from algorithms.registry import ADVANTAGE_ESTIMATORS, RegistryError

TRANSFORMS: list[dict[str, Any]] = [
    {"transform": "identity"},
    {"transform": "best_of_n", "n": 1},
    {"transform": "best_of_n", "n": 4},
    {"transform": "soft_best_of_n", "temperature": 0.7},
    {"transform": "tempered", "temperature": 0.5},
    {"transform": "tempered", "temperature": 3.0},
    {"transform": "pass_at_k", "n": 3},
    {"transform": "majority", "n": 1},
    {"transform": "majority", "n": 4},
    {"transform": "majority", "n": 5},
]
GROUP_OF_SIX = ([0.25, 1.0, 0.25, -0.5, 0.75, 1.0], [0, 1, 0, 2, 2, -1])


def name_of(transform: dict[str, Any]) -> str:
    return "_".join(str(value) for value in transform.values())


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs_of(
    rewards: list[float],
    group: list[int],
    answers: list[int] | None = None,
    components: dict[str, list[float | None]] | None = None,
) -> AdvantageInputs:
    index = torch.tensor(group)
    ones = torch.ones_like(index)
    if components is None:
        return AdvantageInputs(
            float64(rewards), index, ones, ones.bool(), answers=None if answers is None else torch.tensor(answers)
        )
    columns = [[math.nan if value is None else value for value in column] for column in components.values()]
    return AdvantageInputs(
        float64(rewards),
        index,
        ones,
        ones.bool(),
        components=float64(columns).T,
        is_present=~float64(columns).T.isnan(),
        component_names=tuple(components),
        answers=None if answers is None else torch.tensor(answers),
    )


def options(*terms: dict[str, Any], **others: Any) -> InferenceAwareOptions:
    return InferenceAwareOptions(terms=[Term(**term) for term in terms], **others)


def expected(term: Term, p: list[float], rewards: list[float], answers: list[int]) -> float:
    """The expected reward under a transform of the distribution p over samples, as its definition says it."""
    if term.transform == "identity":
        return sum(a * r for a, r in zip(p, rewards, strict=True))
    if term.transform == "best_of_n":
        total = 0.0
        for value in set(rewards):
            upto = sum(a for a, r in zip(p, rewards, strict=True) if r <= value)
            below = sum(a for a, r in zip(p, rewards, strict=True) if r < value)
            total += value * (upto**term.n - below**term.n)
        return total
    if term.transform == "soft_best_of_n":
        tilted = [a * math.exp(r / term.temperature) for a, r in zip(p, rewards, strict=True)]
        return sum(a * r for a, r in zip(tilted, rewards, strict=True)) / sum(tilted)
    if term.transform == "pass_at_k":
        solved = sum(a for a, r in zip(p, rewards, strict=True) if r >= term.threshold)
        return 1 - (1 - solved) ** term.n
    by_answer: dict[object, list[int]] = {}
    for i, answer in enumerate(answers):
        by_answer.setdefault(answer if answer >= 0 else f"none {i}", []).append(i)
    shares = [sum(p[i] for i in members) for members in by_answer.values()]
    means = [
        sum(p[i] * rewards[i] for i in members) / share
        for members, share in zip(by_answer.values(), shares, strict=True)
    ]
    if term.transform == "tempered":
        sharpened = [share ** (1 / term.temperature) for share in shares]
        return sum(s * m for s, m in zip(sharpened, means, strict=True)) / sum(sharpened)
    total = 0.0
    for votes in itertools.product(range(len(shares)), repeat=term.n):
        counts = [votes.count(a) for a in range(len(shares))]
        winners = [a for a, count in enumerate(counts) if count == max(counts)]
        total += math.prod(shares[a] for a in votes) * sum(means[a] for a in winners) / len(winners)
    return total


def slopes_towards_each_sample(objective: Callable[[list[float]], float], size: int, step: float = 1e-5) -> Tensor:
    """d objective(p + eps (delta_j - p)) / d eps at the uniform p, for every j, by central differences."""

    def moved(j: int, eps: float) -> list[float]:
        return [(1 - eps) / size + (eps if i == j else 0.0) for i in range(size)]

    return float64([(objective(moved(j, step)) - objective(moved(j, -step))) / (2 * step) for j in range(size)])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_the_advantage_is_the_slope_of_the_expected_reward_towards_a_sample(transform: dict[str, Any]) -> None:
    rewards, answers = GROUP_OF_SIX
    term = Term(**transform)
    slopes = slopes_towards_each_sample(lambda p: expected(term, p, rewards, answers), 6)
    advantages = inference_aware(inputs_of(rewards, [7] * 6, answers), options(transform))
    torch.testing.assert_close(advantages, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_the_value_is_the_expected_reward_by_its_definition(transform: dict[str, Any]) -> None:
    rewards, answers = GROUP_OF_SIX
    term = Term(**transform)
    found = first_variation(float64(rewards), torch.zeros(6, dtype=torch.long), term, torch.tensor(answers))
    assert float(found.value[0]) == pytest.approx(expected(term, [1 / 6] * 6, rewards, answers), rel=1e-12)


@given(
    data=st.lists(st.tuples(st.integers(-8, 8).map(lambda n: n / 4), st.integers(-1, 2)), min_size=1, max_size=7),
    transform=st.sampled_from(TRANSFORMS),
)
@settings(max_examples=50, deadline=None)
def test_the_slope_is_right_for_any_group(data: list[tuple[float, int]], transform: dict[str, Any]) -> None:
    rewards, answers = [r for r, _ in data], [a for _, a in data]
    term = Term(**transform)
    slopes = slopes_towards_each_sample(lambda p: expected(term, p, rewards, answers), len(data))
    advantages = inference_aware(inputs_of(rewards, [0] * len(data), answers), options(transform))
    torch.testing.assert_close(advantages, slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combine", ["weighted_sum", "minimum", "soft_minimum"])
def test_the_slope_is_right_through_every_combination_with_a_component_a_term(combine: str) -> None:
    accuracy, style = [0.0, 1.0, 1.0, 0.0, 1.0], [0.9, 0.1, 0.4, 0.35, 0.2]
    answers = [0, 1, 1, 2, 0]
    weights = [1.0, 1.0, 1.0] if combine == "minimum" else [0.5, 2.0, 0.3]
    described: list[dict[str, Any]] = [
        {"transform": "majority", "n": 3, "component": "accuracy", "weight": weights[0]},
        {"transform": "best_of_n", "n": 4, "component": "style", "weight": weights[1]},
        {"transform": "soft_best_of_n", "temperature": 0.5, "component": "style", "weight": weights[2]},
    ]
    others = {"combine": combine, "gamma": 3.0} if combine == "soft_minimum" else {"combine": combine}

    def objective(p: list[float]) -> float:
        values = [
            expected(Term(**term), p, accuracy if term["component"] == "accuracy" else style, answers)
            for term in described
        ]
        if combine == "weighted_sum":
            return sum(w * v for w, v in zip(weights, values, strict=True))
        if combine == "minimum":
            return min(values)
        return -math.log(sum(w * math.exp(-3.0 * v) for w, v in zip(weights, values, strict=True))) / 3.0

    batch = inputs_of([9.0, 8.0, 7.0, 6.0, 5.0], [3] * 5, answers, {"style": style, "accuracy": accuracy})
    advantages = inference_aware(batch, options(*described, **others))
    torch.testing.assert_close(advantages, slopes_towards_each_sample(objective, 5), rtol=1e-6, atol=1e-8)


def test_best_of_two_of_three_rewards_by_hand() -> None:
    # Rewards 0, 1, 3: F = 1/3, 2/3, 1 and gaps 1, 2.
    # d_1 = -(1 * 2 * 1/3 + 2 * 2 * 2/3) = -10/3, d_2 = -(2 * 2 * 2/3) = -8/3, d_3 = 0; their mean is -2.
    # R = 0 * 1/9 + 1 * (4/9 - 1/9) + 3 * (1 - 4/9) = 2.
    found = first_variation(
        float64([3.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.long), Term(transform="best_of_n", n=2)
    )
    torch.testing.assert_close(found.variation, float64([0.0, -10 / 3, -8 / 3]))
    assert float(found.value[0]) == pytest.approx(2.0)
    advantages = inference_aware(inputs_of([3.0, 0.0, 1.0], [0, 0, 0]), options({"transform": "best_of_n", "n": 2}))
    torch.testing.assert_close(advantages, float64([2.0, -4 / 3, -2 / 3]))


def test_a_majority_of_three_over_two_answers_by_hand() -> None:
    # Shares p = 3/4 (reward 1) and 1/4: R = p^3 + 3 p^2 (1 - p) = 27/64 + 27/64. Towards a right sample,
    # dR/deps = dR/dp * (1 - p) = 6 p (1 - p) * (1 - p) = 9/8 * 1/4; towards a wrong one 9/8 * -3/4.
    batch = inputs_of([1.0, 1.0, 0.0, 1.0], [0] * 4, [5, 5, 2, 5])
    found = first_variation(batch.rewards, batch.group, Term(transform="majority", n=3), batch.answers)
    assert float(found.value[0]) == pytest.approx(54 / 64)
    advantages = inference_aware(batch, options({"transform": "majority", "n": 3}))
    torch.testing.assert_close(advantages, float64([9 / 32, 9 / 32, -27 / 32, 9 / 32]))


def test_best_of_one_a_try_at_one_and_a_vote_of_two_are_the_plain_reward() -> None:
    rewards, answers = [1.0, 0.0, 0.0, 1.0, 1.0], [0, 1, 2, 0, 3]
    plain = inference_aware(inputs_of(rewards, [0] * 5), options({"transform": "identity"}))
    torch.testing.assert_close(plain, float64(rewards) - 0.6)
    for transform in ({"transform": "best_of_n", "n": 1}, {"transform": "pass_at_k", "n": 1}):
        torch.testing.assert_close(inference_aware(inputs_of(rewards, [0] * 5), options(transform)), plain)
    votes = inference_aware(inputs_of(rewards, [0] * 5, answers), options({"transform": "majority", "n": 2}))
    torch.testing.assert_close(votes, plain)


def test_for_a_binary_reward_best_of_n_is_pass_at_n() -> None:
    batch = inputs_of([1.0, 0.0, 0.0, 1.0, 0.0], [0] * 5)
    torch.testing.assert_close(
        inference_aware(batch, options({"transform": "best_of_n", "n": 6})),
        inference_aware(batch, options({"transform": "pass_at_k", "n": 6})),
    )


def test_the_standard_deviation_cancels_best_of_n_for_a_binary_reward_and_the_mean_does_not() -> None:
    easy, hard = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]
    batch = inputs_of(easy + hard, [0] * 4 + [1] * 4)
    best, plain = {"transform": "best_of_n", "n": 4}, {"transform": "identity"}
    torch.testing.assert_close(
        inference_aware(batch, options(best, normalise="std")),
        inference_aware(batch, options(plain, normalise="std")),
        rtol=1e-4,
        atol=1e-6,
    )
    # 4 (1 - p)^3 times the plain one: 1/16 at p = 3/4, 27/16 at p = 1/4.
    ratio = inference_aware(batch, options(best)) / inference_aware(batch, options(plain))
    torch.testing.assert_close(ratio, float64([1 / 16] * 4 + [27 / 16] * 4))
    assert InferenceAwareOptions().normalise == "mean"


@pytest.mark.parametrize("combine", ["weighted_sum", "minimum"])
def test_the_papers_toy_collapses_on_the_middle_plainly_and_is_uniform_for_best_of_two(combine: str) -> None:
    # r1 = 1 - y^2 and r2 = 1 - (1 - y)^2 on a grid of [0, 1]: one sample serves both best at y = 1/2. With best of two
    # E r1 = 1 - int 2y (1 - F)^2 and E r2 = 1 - int 2(1 - y) F^2, whose sum and minimum are largest at F(y) = y.
    plain = optimised_on_a_grid("identity", combine)
    assert int(plain.argmax()) == len(plain) // 2
    assert float(plain.max()) > 0.95
    best_of_two = optimised_on_a_grid("best_of_n", combine)
    torch.testing.assert_close(best_of_two, torch.full_like(best_of_two, 1 / len(best_of_two)), rtol=0.0, atol=0.02)


def optimised_on_a_grid(transform: str, combine: str, cells: int = 9, copies: int = 1800) -> Tensor:
    """A softmax over the grid after exact policy-gradient steps, its group the cells in proportion to their share."""
    y = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    described = [{"transform": transform, "component": name} for name in ("low", "high")]
    if transform == "best_of_n":
        described = [{**term, "n": 2} for term in described]
    chosen = options(*described, combine=combine)
    logits = 0.4 * torch.cos(5 * y)
    generator = torch.Generator().manual_seed(0)
    for step in range(1200):
        shares = logits.softmax(0)
        # Systematic sampling: each cell is drawn its share of times, to within one.
        places = (torch.arange(copies) + torch.rand((), generator=generator, dtype=torch.float64)) / copies
        cell = torch.searchsorted(shares.cumsum(0), places).clamp(max=cells - 1)
        components = torch.stack([1 - y[cell] ** 2, 1 - (1 - y[cell]) ** 2], -1)
        ones = torch.ones_like(cell)
        batch = AdvantageInputs(
            components.sum(-1),
            torch.zeros_like(cell),
            ones,
            ones.bool(),
            components=components,
            is_present=torch.ones_like(components, dtype=torch.bool),
            component_names=("low", "high"),
        )
        advantages = inference_aware(batch, chosen)
        # Shorter steps as it goes: the minimum has a kink at its optimum.
        rate = 12.0 / (1 + step / 100)
        logits = logits + rate * torch.zeros_like(logits).index_add_(0, cell, advantages) / copies
    return logits.softmax(0)


batches = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 8), st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=30
)


@given(data=batches, transform=st.sampled_from(TRANSFORMS))
@settings(max_examples=60, deadline=None)
def test_groups_do_not_touch_each_other_and_the_order_of_samples_does_not_matter(
    data: list[tuple[float, int, int]], transform: dict[str, Any]
) -> None:
    rewards, group, answers = ([row[i] for row in data] for i in range(3))
    together = inference_aware(inputs_of(rewards, [7 * g % 5 * 1000 for g in group], answers), options(transform))
    for one in set(group):
        members = [i for i, g in enumerate(group) if g == one][::-1]
        alone = inference_aware(
            inputs_of([rewards[i] for i in members], [0] * len(members), [answers[i] for i in members]),
            options(transform),
        )
        torch.testing.assert_close(together[members], alone, rtol=1e-9, atol=1e-9)
        assert abs(float(alone.sum())) < 1e-9


@given(
    data=batches,
    transform=st.sampled_from([t for t in TRANSFORMS if t["transform"] not in ("pass_at_k", "soft_best_of_n")]),
    scale=st.sampled_from([0.25, 4.0]),
    shift=st.sampled_from([-2.0, 100.0]),
)
@settings(max_examples=50, deadline=None)
def test_a_constant_added_to_rewards_changes_nothing_and_a_factor_comes_through(
    data: list[tuple[float, int, int]], transform: dict[str, Any], scale: float, shift: float
) -> None:
    rewards, group, answers = ([row[i] for row in data] for i in range(3))
    plain = inference_aware(inputs_of(rewards, group, answers), options(transform))
    moved = inference_aware(inputs_of([scale * r + shift for r in rewards], group, answers), options(transform))
    torch.testing.assert_close(moved, scale * plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
@pytest.mark.parametrize("value", [0.1, -3.7, 1e6])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(transform: dict[str, Any], value: float) -> None:
    batch = inputs_of([value] * 5 + [1.0], [0] * 5 + [4], [0, 1, 0, -1, 2, 0])
    for normalise in ("mean", "std"):
        assert torch.equal(inference_aware(batch, options(transform, normalise=normalise)), float64([0.0] * 6))


@given(data=st.lists(st.integers(0, 3).map(lambda n: n / 3), min_size=2, max_size=20))
@settings(max_examples=50, deadline=None)
def test_equal_rewards_of_a_group_get_equal_advantages(data: list[float]) -> None:
    for transform in TRANSFORMS[:4]:
        advantages = inference_aware(inputs_of(data, [0] * len(data)), options(transform)).tolist()
        assert len(set(zip(data, advantages, strict=True))) == len(set(data))


def test_a_large_reward_elsewhere_in_the_batch_costs_no_precision() -> None:
    rewards = [0.1, 0.7, 0.3]
    alone = inference_aware(inputs_of(rewards, [1] * 3), options({"transform": "best_of_n", "n": 3}))
    beside = inference_aware(
        inputs_of([1e14, -1e14, 0.0, *rewards], [0] * 3 + [1] * 3), options({"transform": "best_of_n", "n": 3})
    )
    assert torch.equal(beside[3:], alone)


def test_a_cold_temperature_neither_overflows_nor_underflows() -> None:
    batch = inputs_of([1.0, 0.0, 1000.0], [0] * 3, [0, 0, 1])
    for transform in ("soft_best_of_n", "tempered"):
        advantages = inference_aware(batch, options({"transform": transform, "temperature": 1e-3}))
        assert bool(advantages.isfinite().all())


def test_samples_without_a_component_get_nothing_from_its_term() -> None:
    # Of the group, samples 0 and 2 have "style": 1 and 0, mean 1/2.
    batch = inputs_of([0.0] * 4, [0] * 4, None, {"style": [1.0, None, 0.0, None]})
    advantages = inference_aware(batch, options({"transform": "identity", "component": "style"}))
    torch.testing.assert_close(advantages, float64([0.5, 0.0, -0.5, 0.0]))


def test_a_term_that_no_sample_of_a_group_has_is_left_out_of_the_minimum() -> None:
    batch = inputs_of([0.0] * 4, [0, 0, 1, 1], None, {"low": [None, None, -5.0, -7.0], "high": [1.0, 3.0, 1.0, 3.0]})
    terms = [{"transform": "identity", "component": name} for name in ("low", "high")]
    # Group 0 has only "high": -1, 1. In group 1 "low" is smaller: 1, -1.
    for others in ({"combine": "minimum"}, {"combine": "soft_minimum", "gamma": 50.0}):
        torch.testing.assert_close(
            inference_aware(batch, options(*terms, **others)), float64([-1.0, 1.0, 1.0, -1.0]), rtol=1e-6, atol=1e-6
        )
    nobody = inputs_of([0.0] * 2, [0, 1], None, {"low": [None, None]})
    assert torch.equal(inference_aware(nobody, options(terms[0])), float64([0.0, 0.0]))


def test_equal_smallest_terms_share_the_slope_of_the_minimum() -> None:
    batch = inputs_of([0.0] * 2, [0, 0], None, {"a": [1.0, 0.0], "b": [0.0, 1.0]})
    terms = [{"transform": "identity", "component": name} for name in ("a", "b")]
    assert torch.equal(inference_aware(batch, options(*terms, combine="minimum")), float64([0.0, 0.0]))


@pytest.mark.parametrize(
    "transform", [{"transform": "majority", "n": 3}, {"transform": "tempered", "temperature": 0.5}]
)
def test_a_vote_without_answers_is_refused_with_the_reason(transform: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs to know which samples give the same answer"):
        inference_aware(inputs_of([1.0, 0.0], [0, 0]), options(transform))


def test_a_component_that_is_not_there_is_refused_naming_those_that_are() -> None:
    batch = inputs_of([0.0], [0], None, {"style": [1.0]})
    with pytest.raises(ValueError, match="'styel', but the batch has style"):
        inference_aware(batch, options({"transform": "identity", "component": "styel"}))


def test_a_component_that_is_not_finite_is_refused_naming_the_sample() -> None:
    batch = inputs_of([0.0, 0.0], [0, 0], None, {"style": [1.0, math.inf]})
    with pytest.raises(NonFiniteError, match="'style' of sample 1 is inf"):
        inference_aware(batch, options({"transform": "identity", "component": "style"}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"terms": [{"transform": "best_of_n"}]}, "best_of_n needs n"),
        ({"terms": [{"transform": "identity", "n": 2}]}, "identity has no n"),
        ({"terms": [{"transform": "best_of_n", "n": 2, "temperature": 1.0}]}, "best_of_n has no temperature"),
        ({"terms": [{"transform": "majority", "n": 65}]}, "set n to at most 64"),
        ({"combine": "soft_minimum"}, "needs gamma"),
        ({"gamma": 1.0}, "has no gamma"),
        ({"combine": "minimum", "terms": [{"transform": "identity", "weight": 2.0}]}, "takes no weights"),
        ({"terms": []}, "at least 1 item"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RegistryError, match=reason):
        ADVANTAGE_ESTIMATORS.get("inference_aware").read_options(values)
