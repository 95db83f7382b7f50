"""Reward combinations against figures worked by hand, loops by their definitions, and their invariants."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.constraints import ConstrainedOptions, LagrangeMultipliers
from algorithms.finite import NonFiniteError
from algorithms.registry import REWARD_COMBINATIONS, RegistryError
from algorithms.reward_combination import CombinationInputs, combine_rewards, component_means

Rows = list[list[float | None]]
NAMES = ("correct", "format", "style")
SIMPLE = ("weighted_sum", "normalised", "minimum", "tchebycheff", "smooth_tchebycheff")


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs_of(
    rows: Rows,
    weights: list[float] | None = None,
    group: list[int] | None = None,
    multipliers: LagrangeMultipliers | None = None,
) -> CombinationInputs:
    # What isn't there is NaN: a combination that looked at it would show it.
    components = float64([[math.nan if value is None else value for value in row] for row in rows])
    count = len(rows[0])
    return CombinationInputs(
        components,
        ~components.isnan(),
        float64(weights or [1.0] * count),
        NAMES[:count],
        torch.tensor(group or [0] * len(rows)),
        multipliers,
    )


def test_the_weighted_sum_by_hand_leaves_out_what_a_sample_does_not_have() -> None:
    # 1 * 1 + 0.5 * 0 - 2 * 0.25 = 0.5; 0.5 * 1 = 0.5.
    batch = inputs_of([[1.0, 0.0, 0.25], [None, 1.0, None]], [1.0, 0.5, -2.0])
    assert combine_rewards("weighted_sum", batch).tolist() == [0.5, 0.5]


def test_normalised_by_hand_over_the_group_and_over_the_batch() -> None:
    # Group 0: "correct" 0, 1 has mean 1/2 and deviation sqrt(1/2): -+0.7071. "format" 30, 10: +-0.7071, weight 2.
    # Group 1: equal, so 0. Over the batch, "correct" 0, 1, 1, 1: mean 3/4, deviation 1/2: -1.5, 0.5, 0.5, 0.5.
    batch = inputs_of([[0.0, 30.0], [1.0, 10.0], [1.0, 5.0], [1.0, 5.0]], [1.0, 2.0], [4, 4, 2, 2])
    half = math.sqrt(0.5)
    torch.testing.assert_close(
        combine_rewards("normalised", batch), float64([half, -half, 0.0, 0.0]), rtol=1e-5, atol=1e-9
    )
    one = inputs_of([[0.0], [1.0], [1.0], [1.0]], None, [4, 4, 2, 2])
    torch.testing.assert_close(
        combine_rewards("normalised", one, {"over": "batch"}), float64([-1.5, 0.5, 0.5, 0.5]), rtol=1e-5, atol=0
    )


def test_the_minimum_by_hand() -> None:
    batch = inputs_of([[0.5, 0.25, -3.0], [None, 1.0, -9.0]], [1.0, 1.0, 0.0])
    assert combine_rewards("minimum", batch).tolist() == [0.25, 1.0]


def test_tchebycheff_by_hand() -> None:
    # Ideal 1: 2 * (1 - 0.75) = 0.5 and 1 * (1 - 0.2) = 0.8; then only 2 * (1 - 0) = 2.
    batch = inputs_of([[0.75, 0.2], [0.0, None]], [2.0, 1.0])
    torch.testing.assert_close(combine_rewards("tchebycheff", batch), float64([-0.8, -2.0]))
    # Ideal 0.75 and 3: 0 and 2.8.
    by_name = combine_rewards("tchebycheff", batch, {"ideal": {"correct": 0.75, "format": 3.0}})
    torch.testing.assert_close(by_name, float64([-2.8, -1.5]))


def test_smooth_tchebycheff_by_hand() -> None:
    # mu = 0.5, distances 0.5 and 0.8: -0.5 log(e^1 + e^1.6); one distance of 2 is itself.
    batch = inputs_of([[0.75, 0.2], [0.0, None]], [2.0, 1.0])
    rewards = combine_rewards("smooth_tchebycheff", batch, {"smoothness": 0.5})
    torch.testing.assert_close(rewards, float64([-0.5 * math.log(math.e + math.exp(1.6)), -2.0]))


def test_gated_by_hand() -> None:
    # Sample 0 passes "format" at its threshold: 2 * 1 + 0.5. Sample 1 doesn't.
    batch = inputs_of([[1.0, 0.5, 0.5], [1.0, 0.4, 0.5]], [2.0, 7.0, 1.0])
    assert combine_rewards("gated", batch, {"gates": {"format": 0.5}, "floor": -1.0}).tolist() == [2.5, -1.0]
    assert combine_rewards("gated", batch, {"gates": {"format": 0.0, "correct": 2.0}}).tolist() == [0.0, 0.0]


def test_constrained_by_hand() -> None:
    # lambda = 1 for "format" >= 0.5 and "style" <= 0.1:
    # (2 * 1 + (0.75 - 0.5) - (0.3 - 0.1)) / 3 = 2.05 / 3; without the style (2 * 0 - 0.5) / 3.
    values = {
        "constraints": [
            {"component": "format", "threshold": 0.5},
            {"component": "style", "threshold": 0.1, "direction": "at_most"},
        ]
    }
    multipliers = LagrangeMultipliers.of(ConstrainedOptions.model_validate(values))
    batch = inputs_of([[1.0, 0.75, 0.3], [0.0, 0.0, None]], [2.0, 5.0, 5.0], multipliers=multipliers)
    torch.testing.assert_close(combine_rewards("constrained", batch, values), float64([2.05 / 3, -0.5 / 3]))
    plain = {**values, "is_rescaled": False}
    multipliers = LagrangeMultipliers.of(ConstrainedOptions.model_validate(plain))
    batch = inputs_of([[1.0, 0.75, 0.3], [0.0, 0.0, None]], [2.0, 5.0, 5.0], multipliers=multipliers)
    torch.testing.assert_close(combine_rewards("constrained", batch, plain), float64([2.05, -0.5]))


def test_the_means_that_multipliers_follow_leave_out_what_is_not_there() -> None:
    assert component_means(inputs_of([[1.0, None, None], [0.0, 0.5, None]])) == {"correct": 0.5, "format": 0.5}


def by_definition(name: str, rows: Rows, weights: list[float], group: list[int]) -> list[float]:
    """Each combination a sample at a time, as its definition reads."""
    rewards = []
    for row, own in zip(rows, group, strict=True):
        present = [(k, w, c) for k, (w, c) in enumerate(zip(weights, row, strict=True)) if c is not None and w]
        distances = [w * (1 - c) for _, w, c in present]
        if name == "weighted_sum":
            rewards.append(sum(w * c for _, w, c in present))
        elif name == "minimum":
            rewards.append(min(c for _, _, c in present))
        elif name == "tchebycheff":
            rewards.append(-max(distances))
        elif name == "smooth_tchebycheff":
            rewards.append(-0.1 * math.log(sum(math.exp(d / 0.1) for d in distances)))
        else:
            total = 0.0
            for k, w, c in present:
                column = [r[k] for r, g in zip(rows, group, strict=True) if g == own and r[k] is not None]
                std = statistics.stdev(column) if len(column) > 1 else 0.0
                total += w * (c - statistics.fmean(column)) / (std + 1e-6)
            rewards.append(total)
    return rewards


value = st.one_of(st.none(), st.integers(-8, 8).map(lambda n: n / 8))
samples = st.tuples(st.tuples(st.integers(-8, 8).map(lambda n: n / 8), value, value).map(list), st.integers(0, 3))


@pytest.mark.parametrize("name", SIMPLE)
@given(data=st.lists(samples, min_size=1, max_size=25), weights=st.sampled_from([[1.0, 0.5, 2.0], [1.0, 0.0, 3.0]]))
@settings(max_examples=50, deadline=None)
def test_combinations_agree_with_their_definitions(
    name: str, data: list[tuple[list[float | None], int]], weights: list[float]
) -> None:
    rows, group = [row for row, _ in data], [g for _, g in data]
    if name == "minimum":
        weights = [float(w > 0) for w in weights]
    batch = inputs_of(rows, weights, [g * 1000 - 3 for g in group])
    torch.testing.assert_close(
        combine_rewards(name, batch), float64(by_definition(name, rows, weights, group)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", SIMPLE)
@given(data=st.lists(samples, min_size=1, max_size=25), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_order_of_samples_and_of_components_does_not_matter(
    name: str, data: list[tuple[list[float | None], int]], seed: int
) -> None:
    rows, group = [row for row, _ in data], [g for _, g in data]
    plain = combine_rewards(name, inputs_of(rows, None, group))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    turned = inputs_of([rows[i][::-1] for i in order], None, [group[i] for i in order])
    torch.testing.assert_close(combine_rewards(name, turned), plain[order], rtol=1e-6, atol=1e-9)


@given(data=st.lists(samples, min_size=1, max_size=25), scale=st.sampled_from([0.5, 64.0]))
@settings(max_examples=50, deadline=None)
def test_normalised_forgets_each_components_scale_and_offset(
    data: list[tuple[list[float | None], int]], scale: float
) -> None:
    rows, group = [row for row, _ in data], [g for _, g in data]
    moved = [[None if v is None else scale * v + 3 * k for k, v in enumerate(row)] for row in rows]
    torch.testing.assert_close(
        combine_rewards("normalised", inputs_of(moved, None, group)),
        combine_rewards("normalised", inputs_of(rows, None, group)),
        rtol=1e-3,
        atol=5e-3,  # the 1e-6 in the denominator, against deviations of down to 1/80
    )


@pytest.mark.parametrize("equal", [0.1, 1e7 + 0.3])
def test_components_that_are_equal_normalise_to_exactly_zero(equal: float) -> None:
    batch = inputs_of([[equal, 1.0]] * 3 + [[equal, None]] * 4, None, [0] * 3 + [1] * 4)
    assert torch.equal(combine_rewards("normalised", batch), torch.zeros(7, dtype=torch.float64))


@given(data=st.lists(samples, min_size=1, max_size=10), smoothness=st.floats(0.01, 2.0))
@settings(max_examples=50, deadline=None)
def test_smooth_tchebycheff_lies_below_tchebycheff_by_at_most_its_bound(
    data: list[tuple[list[float | None], int]], smoothness: float
) -> None:
    batch = inputs_of([row for row, _ in data])
    gap = combine_rewards("tchebycheff", batch) - combine_rewards(
        "smooth_tchebycheff", batch, {"smoothness": smoothness}
    )
    assert bool(((gap >= -1e-12) & (gap <= smoothness * math.log(3) + 1e-12)).all())


@pytest.mark.parametrize("name", SIMPLE)
def test_a_component_that_is_not_finite_is_refused_naming_the_place(name: str) -> None:
    batch = inputs_of([[1.0, 0.0], [1.0, math.inf]])
    with pytest.raises(NonFiniteError, match=r"reward component of \(sample, component\) \(1, 1\) is inf"):
        combine_rewards(name, batch)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_sample_without_any_component_is_refused_rather_than_given_a_number(name: str) -> None:
    with pytest.raises(ValueError, match="sample 1 has no reward component"):
        combine_rewards(name, inputs_of([[1.0, 0.0], [None, None]]))


@pytest.mark.parametrize("name", ["minimum", "tchebycheff", "smooth_tchebycheff"])
def test_a_sample_whose_components_are_only_recorded_has_no_smallest_one(name: str) -> None:
    with pytest.raises(ValueError, match="sample 1 has no reward component of a weight other than 0"):
        combine_rewards(name, inputs_of([[1.0, 0.0], [None, 1.0]], [1.0, 0.0]))


def test_a_gate_that_is_missing_is_refused_naming_the_sample() -> None:
    with pytest.raises(ValueError, match="'format' is a gate, but sample 1 has no value"):
        combine_rewards("gated", inputs_of([[1.0, 1.0], [1.0, None]]), {"gates": {"format": 0.5}})


def test_a_sample_that_passes_the_gates_needs_something_to_be_rewarded_by() -> None:
    with pytest.raises(ValueError, match="sample 1 has no reward component that isn't a gate"):
        combine_rewards("gated", inputs_of([[None, 0.0], [None, 1.0]]), {"gates": {"format": 0.5}})
    stopped = combine_rewards("gated", inputs_of([[None, 0.0], [3.0, 1.0]]), {"gates": {"format": 0.5}})
    assert stopped.tolist() == [0.0, 3.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gated", {"gates": {"formt": 1.0}}),
        ("tchebycheff", {"ideal": {"correct": 1.0, "formt": 1.0}}),
    ],
)
def test_an_unknown_component_is_refused_naming_those_there_are(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="'formt', but there is correct, format"):
        combine_rewards(name, inputs_of([[1.0, 1.0]]), options)


def test_an_ideal_that_lacks_a_component_is_refused() -> None:
    with pytest.raises(ValueError, match="ideal has no value for format"):
        combine_rewards("tchebycheff", inputs_of([[1.0, 1.0]]), {"ideal": {"correct": 1.0}})


def test_weights_that_a_combination_has_no_place_for_are_refused() -> None:
    with pytest.raises(ValueError, match="minimum takes no weights"):
        combine_rewards("minimum", inputs_of([[1.0, 1.0]], [1.0, 2.0]))
    with pytest.raises(ValueError, match="weights of at least 0"):
        combine_rewards("tchebycheff", inputs_of([[1.0, 1.0]], [1.0, -2.0]))


def test_constrained_without_its_multipliers_is_refused() -> None:
    values = {"constraints": [{"component": "format", "threshold": 0.5}]}
    with pytest.raises(ValueError, match="needs multipliers"):
        combine_rewards("constrained", inputs_of([[1.0, 1.0]]), values)
    other = LagrangeMultipliers.of(ConstrainedOptions.model_validate({**values, "ceiling": 3.0}))
    with pytest.raises(ValueError, match="made with other options"):
        combine_rewards("constrained", inputs_of([[1.0, 1.0]], multipliers=other), values)


def test_shapes_that_differ_are_refused() -> None:
    batch = inputs_of([[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[3\]"):
        combine_rewards(
            "weighted_sum",
            CombinationInputs(batch.components, batch.is_present, torch.ones(3), batch.names, batch.group),
        )


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(RegistryError, match="Did you mean smoothness"):
        combine_rewards("smooth_tchebycheff", inputs_of([[1.0]]), {"smothness": 1.0})


def test_every_combination_says_what_it_is() -> None:
    assert set(REWARD_COMBINATIONS) >= {*SIMPLE, "gated", "constrained"}
    for name in (*SIMPLE, "gated", "constrained"):
        entry = REWARD_COMBINATIONS.get(name)
        assert all((entry.formula, entry.source, entry.use_when))
        assert all(field.description for field in entry.options.model_fields.values())
