"""Advantages from several reward components: each normalised for itself, missing ones left out."""

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

rewards = st.integers(-16, 16).map(lambda n: n / 8)
rows = st.lists(st.tuples(st.integers(0, 3), st.none() | rewards, st.none() | rewards), min_size=2, max_size=20)


def inputs_of(table: list[tuple[int, float | None, float | None]], weights: tuple[float, float]) -> AdvantageInputs:
    """Rows of (group, first component, second component); what is missing stands as NaN."""
    values = torch.tensor([[math.nan if v is None else v for v in row[1:]] for row in table], dtype=torch.float64)
    group = torch.tensor([row[0] * 11 for row in table])
    ones = torch.ones_like(group)
    return AdvantageInputs(
        rewards=torch.zeros(len(table), dtype=torch.float64),
        group=group,
        lengths=ones,
        mask=ones.bool(),
        components=values,
        is_present=~values.isnan(),
        component_weights=torch.tensor(weights, dtype=torch.float64),
    )


def by_the_paper(table: list[tuple[int, float | None, float | None]], weights: tuple[float, float]) -> list[float]:
    sums = []
    for group, *values in table:
        total = 0.0
        for component, value in enumerate(values):
            peers = [row[1 + component] for row in table if row[0] == group and row[1 + component] is not None]
            if value is not None and len(peers) > 1:
                total += weights[component] * (value - statistics.fmean(peers)) / (statistics.stdev(peers) + 1e-6)
        sums.append(total)
    std = statistics.stdev(sums) if len(sums) > 1 else 0.0
    return [(each - statistics.fmean(sums)) / (std + 1e-6) for each in sums]


@given(rows, st.sampled_from([(1.0, 1.0), (0.25, 2.0), (1.0, -0.5)]))
@settings(max_examples=60)
def test_gdpo_agrees_with_the_paper_written_as_a_loop(
    table: list[tuple[int, float | None, float | None]], weights: tuple[float, float]
) -> None:
    found = estimate_advantages("gdpo", inputs_of(table, weights))
    torch.testing.assert_close(
        found, torch.tensor(by_the_paper(table, weights), dtype=torch.float64), atol=1e-7, rtol=0
    )


def test_gdpo_keeps_apart_what_one_sum_would_confuse() -> None:
    # Sums of the two rewards are 0, 1 and 0, 2 within the groups. Divided by the group's deviation, 1/sqrt(2) and
    # 2/sqrt(2), both give -1/sqrt(2), 1/sqrt(2). Here the second group's better sample is better in both components:
    # a = -+1/sqrt(2) and -+2/sqrt(2), with sum of squares 1/2 + 1/2 + 2 + 2 = 5 and a deviation of sqrt(5/3).
    found = estimate_advantages("gdpo", inputs_of([(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1)], (1.0, 1.0)))
    expected = torch.tensor([-1, 1, -2, 2], dtype=torch.float64) / math.sqrt(2) / math.sqrt(5 / 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@given(rows, st.sampled_from([0.125, 16.0]), st.sampled_from([-2.0, 100.0]))
@settings(max_examples=50)
def test_gdpo_does_not_change_with_the_shift_or_scale_of_one_component(
    table: list[tuple[int, float | None, float | None]], scale: float, shift: float
) -> None:
    changed = [(g, a, None if b is None else scale * b + shift) for g, a, b in table]
    torch.testing.assert_close(
        estimate_advantages("gdpo", inputs_of(changed, (1.0, 0.5))),
        estimate_advantages("gdpo", inputs_of(table, (1.0, 0.5))),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_sample_without_a_component_neither_gets_nor_changes_anything_by_it() -> None:
    without = estimate_advantages("gdpo", inputs_of([(0, 1, None), (0, 0, None), (0, 2, 7), (0, 1, 5)], (0.0, 1.0)))
    assert torch.equal(without[:2], torch.zeros(2, dtype=torch.float64))
    # The two that have it: -+1/sqrt(2) each, of deviation sqrt(1/3) over the four.
    torch.testing.assert_close(without[2], torch.tensor(math.sqrt(3 / 2), dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "table",
    [
        [(0, 0.1, 7.3), (0, 0.1, 7.3), (0, 0.1, 7.3)],
        [(0, 1, None), (1, 0, None), (2, 5, None)],
        [(0, None, None), (0, None, None)],
    ],
    ids=["equal", "groups of one", "nothing present"],
)
def test_gdpo_gives_exactly_zero_where_nothing_differs(table: list[tuple[int, float | None, float | None]]) -> None:
    found = estimate_advantages("gdpo", inputs_of(table, (1.0, 1.0)))
    assert torch.equal(found, torch.zeros(len(table), dtype=torch.float64))


def test_a_component_that_is_present_but_not_finite_is_refused() -> None:
    inputs = inputs_of([(0, 1, 2), (0, 0, 1)], (1.0, 1.0))
    components: Tensor = inputs.components.clone()
    components[1, 0] = math.nan
    bad = AdvantageInputs(
        **{**inputs.__dict__, "components": components, "is_present": torch.ones(2, 2, dtype=torch.bool)}
    )
    with pytest.raises(NonFiniteError, match=r"the reward component of \(sample, component\) \(1, 0\) is nan"):
        estimate_advantages("gdpo", bad)


def test_component_shapes_that_differ_are_refused() -> None:
    inputs = inputs_of([(0, 1, 2), (0, 0, 1)], (1.0, 1.0))
    with pytest.raises(ValueError, match=r"component_weights must be \[2\], got \[3\]"):
        estimate_advantages("gdpo", AdvantageInputs(**{**inputs.__dict__, "component_weights": torch.ones(3)}))
