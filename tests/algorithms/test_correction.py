"""Importance weights for the gap between generator and trainer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from algorithms.config import CorrectionConfig
from algorithms.correction import effective_sample_share, importance_correction

# Two sequences of three tokens, the last of the second is padding. Ratios 4, 1, 1/4 and 2, 1.5.
RATIOS = torch.tensor([[4.0, 1.0, 0.25], [2.0, 1.5, 1.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
BEHAVIOUR = torch.full((2, 3), -1.0)
TRAINER = (BEHAVIOUR + RATIOS.log()).masked_fill(~MASK, math.nan)


@pytest.mark.parametrize(
    ("method", "weights", "touched"),
    [
        ("none", [[1, 1, 1], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]),
        ("token_truncated", [[1.8, 1, 0.25], [1.8, 1.5, 0]], [[1, 0, 0], [1, 0, 0]]),
        # Products 1 and 3.
        ("sequence_truncated", [[1, 1, 1], [1.8, 1.8, 0]], [[0, 0, 0], [1, 1, 0]]),
        ("token_masked", [[0, 1, 0], [0, 1.5, 0]], [[1, 0, 1], [1, 0, 0]]),
    ],
)
def test_weights_are_those_worked_by_hand(method: str, weights: list[list[float]], touched: list[list[int]]) -> None:
    config = CorrectionConfig.model_validate({"method": method, "high": 1.8, "low": 0.5})
    correction = importance_correction(TRAINER, BEHAVIOUR, MASK, config)
    torch.testing.assert_close(correction.weights, torch.tensor(weights, dtype=torch.float32))
    assert torch.equal(correction.is_touched, torch.tensor(touched, dtype=torch.bool))


def test_the_kl_seen_is_that_of_generator_and_trainer() -> None:
    behaviour = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    trainer = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    kl = importance_correction(trainer.log()[None], behaviour.log()[None], mask, CorrectionConfig()).kl
    exact = (behaviour * (behaviour / trainer).log()).sum()
    torch.testing.assert_close((behaviour * kl[0]).sum(), exact)


def test_the_gap_is_the_distance_of_log_probabilities_and_zero_on_padding() -> None:
    gap = importance_correction(TRAINER, BEHAVIOUR, MASK, CorrectionConfig()).gap
    torch.testing.assert_close(gap, RATIOS.log().abs().masked_fill(~MASK, 0.0))


@pytest.mark.parametrize("method", ["none", "token_truncated", "sequence_truncated", "token_masked"])
def test_weights_carry_no_gradient_and_equal_policies_weigh_one(method: str) -> None:
    log_probs = torch.randn(2, 3, requires_grad=True)
    correction = importance_correction(log_probs, log_probs, MASK, CorrectionConfig.model_validate({"method": method}))
    assert not correction.weights.requires_grad
    assert torch.equal(correction.weights, MASK.float())


@pytest.mark.parametrize("method", ["token_truncated", "sequence_truncated", "token_masked"])
@given(
    log_ratios=st.lists(st.lists(st.floats(-300, 300), min_size=4, max_size=4), min_size=1, max_size=4),
    high=st.floats(1.0, 10.0),
)
def test_weights_stay_within_bounds_however_large_the_gap(
    method: str, log_ratios: list[list[float]], high: float
) -> None:
    trainer = torch.tensor(log_ratios)
    mask = torch.ones_like(trainer, dtype=torch.bool)
    config = CorrectionConfig.model_validate({"method": method, "high": high})
    correction = importance_correction(trainer, torch.zeros_like(trainer), mask, config)
    assert (correction.weights >= 0).all()
    assert (correction.weights <= high * (1 + 1e-6)).all()
    assert torch.isfinite(correction.kl).all()


def test_effective_sample_share_is_that_worked_by_hand() -> None:
    # Weights 1, 1, 1, 5: (8 / 4)^2 / (28 / 4) = 4 / 7.
    assert effective_sample_share(2.0, 7.0) == pytest.approx(4 / 7)
    assert effective_sample_share(1.0, 1.0) == 1.0
    assert effective_sample_share(0.0, 0.0) == 0.0


def test_bounds_that_mask_every_token_are_refused() -> None:
    with pytest.raises(ValidationError, match="every token is masked"):
        CorrectionConfig(method="token_masked", low=2.0, high=2.0)
