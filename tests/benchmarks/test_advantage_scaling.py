"""The benchmark's batch is what it says, every estimator goes through it, and its rows hold what was packed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import advantage_scaling

from algorithms.registry import ADVANTAGE_ESTIMATORS


@pytest.fixture(scope="module")
def case() -> advantage_scaling.Case:
    return advantage_scaling.make_case(tokens=2400, groups=40, group_size=6)


def test_the_batch_has_exactly_the_tokens_groups_and_lengths_asked_for(case: advantage_scaling.Case) -> None:
    assert case.tokens == 2400
    assert len(case.lengths) == 240
    assert case.inputs["group"].unique().numel() == 40
    # Lengths lie between a half and one and a half times their mean of 10, give or take rounding and the whole's share.
    assert int(case.lengths.min()) >= 4
    assert int(case.lengths.max()) <= 17
    assert all(len(row) == n for row, n in zip(case.rows["mask"], case.lengths.tolist(), strict=True))
    assert all(row[-1] for row in case.rows["mask"])


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS.names())
def test_every_estimator_goes_through_a_step(case: advantage_scaling.Case, name: str) -> None:
    rows, correction, seconds = advantage_scaling.one_step(case, name)
    assert rows["advantages"].shape == correction.weights.shape == (240, int(case.lengths.max()))
    assert bool((rows["advantages"] != 0).any())
    assert bool((rows["advantages"][~rows["mask"]] == 0).all())
    for field, each in case.rows.items():
        assert np.array_equal(rows[field][7, : len(each[7])].numpy(), each[7])
    assert set(seconds) == {"advantages", "preparation", "correction", "all", "clock"}


def test_the_bytes_of_a_step_are_those_worked_by_hand(case: advantage_scaling.Case) -> None:
    rows, correction, _ = advantage_scaling.one_step(case, "grpo")
    cells = 240 * int(case.lengths.max())
    # Arrays: a byte for the mask and 4 for each of two log-probabilities a token. Inputs: 8 each for reward and group.
    # Rows: mask and three floats. The correction's floats and flags a cell are whatever it reports.
    expected = 2400 * 9 + 240 * 16 + cells * 13
    reported = sum(value.nbytes for value in vars(correction).values())
    assert advantage_scaling.bytes_of(case, "grpo", rows, correction) == expected + reported


def test_it_prints_a_line_for_each_estimator_and_fails_over_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", "400", "--groups", "5", "--group-size", "4", "--repeats", "1"]
    threads = torch.get_num_threads()
    try:
        assert advantage_scaling.main([*words, "--limit-s", "1000"]) == 0
        printed = capsys.readouterr().out
        assert all(f" {name} " in printed for name in ADVANTAGE_ESTIMATORS)
        assert "missed" not in printed
        assert advantage_scaling.main([*words, "--limit-s", "0"]) == 1
        assert "missed: grpo took" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(SystemExit, match="30 tokens are too few for 20 completions"):
        advantage_scaling.make_case(tokens=30, groups=5, group_size=4)
