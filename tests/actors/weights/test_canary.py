"""Canaries: the arithmetic of the gap, and what never counts as agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.weights.canary import TEXT_CANARY, Canaries, CanarySequence, compare_canaries


def canaries_of(*log_probs: list[float], tolerance_nats: float = 0.1) -> Canaries:
    sequences = tuple(
        CanarySequence(TEXT_CANARY, np.zeros(len(values), np.int32), np.asarray(values, np.float32))
        for values in log_probs
    )
    return Canaries(3, sequences, tolerance_nats)


def measured(*log_probs: list[float]) -> list[np.ndarray]:
    return [np.asarray(values, np.float32) for values in log_probs]


def test_the_gap_is_the_mean_distance_of_the_worst_sequences_tokens():
    # Sequence 0 is off by 0.5 and 0, 0.25 a token; sequence 1 by 0.25, 0.5 and 0.75, 0.5 a token and 0.75 at most.
    report = compare_canaries(
        canaries_of([-1.0, -2.0], [-1.0, -1.0, -1.0]), measured([-1.5, -2.0], [-0.75, -1.5, -1.75]), seconds=2.0
    )
    assert (report.version, report.worst, report.mean_gap, report.max_gap, report.seconds) == (3, 1, 0.5, 0.75, 2.0)
    assert not report.agrees
    assert report.words == "canary 1 differs by 0.5 nats a token (largest: 0.75; tolerance: 0.1)"


def test_sequences_are_judged_one_by_one_so_that_a_good_one_doesnt_hide_a_bad_one():
    # 0.15 a token in sequence 1 is too much, though the mean of all tokens is 0.05.
    report = compare_canaries(canaries_of([-1.0, -1.0], [-1.0]), measured([-1.0, -1.0], [-1.15]))
    assert report.worst == 1
    assert not report.agrees


@pytest.mark.parametrize(("gap", "agrees"), [(0.0, True), (0.125, True), (0.25, True), (0.2500001, False)])
def test_up_to_the_tolerance_they_agree(gap, agrees):
    canaries = canaries_of([0.0, 0.0], tolerance_nats=0.25)
    assert compare_canaries(canaries, measured([-gap, gap])).agrees == agrees


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sequence", [0, 1])
def test_what_is_no_number_never_agrees(value, sequence):
    values = [[-1.0, -1.0], [-1.0, -1.0]]
    values[sequence][1] = value
    report = compare_canaries(canaries_of([-1.0, -1.0], [-1.0, -1.0], tolerance_nats=1e30), measured(*values))
    assert not report.agrees
    assert report.worst == sequence


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_on_both_sides_never_agrees_either(value):
    report = compare_canaries(canaries_of([value], tolerance_nats=1e30), measured([value]))
    assert not report.agrees


@pytest.mark.parametrize(
    "values",
    [
        [],
        [[-1.0, -1.0]],
        [[-1.0, -1.0], [-1.0], [-1.0]],
        [[-1.0], [-1.0]],
        [[-1.0, -1.0], [-1.0, -1.0]],
        [[-1.0, -1.0], []],
    ],
)
def test_another_number_of_sequences_or_tokens_is_refused(values):
    with pytest.raises(ValueError, match=r"argument|log-probabilities"):
        compare_canaries(canaries_of([-1.0, -1.0], [-1.0]), measured(*values))


LOG_PROBS = st.floats(-30, 0, width=32)


@given(st.lists(st.lists(st.tuples(LOG_PROBS, LOG_PROBS), min_size=1, max_size=8), min_size=1, max_size=5))
def test_the_report_is_that_of_the_worst_sequence_whatever_the_order(pairs):
    theirs, own = ([[pair[side] for pair in sequence] for sequence in pairs] for side in (0, 1))
    report = compare_canaries(canaries_of(*theirs), measured(*own))
    means = [sum(abs(a - b) for a, b in sequence) / len(sequence) for sequence in pairs]
    assert report.mean_gap == pytest.approx(max(means))
    assert report.max_gap == max(abs(a - b) for a, b in pairs[report.worst])
    backwards = compare_canaries(canaries_of(*theirs[::-1]), measured(*own[::-1]))
    assert backwards.mean_gap == report.mean_gap
