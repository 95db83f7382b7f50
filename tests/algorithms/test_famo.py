"""FAMO against its paper's algorithm written as a loop, and what its weights are for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.finite import NonFiniteError
from algorithms.gradients.famo import LOSS_FLOOR, FAMOOptions, FAMOState, famo_update, famo_weights
from algorithms.gradients.gradient_weights import GradientInputs, gradient_weights


def by_the_paper(
    logits: list[float], before: list[float], after: list[float], rate: float, decay: float
) -> tuple[list[float], list[float]]:
    """Algorithm 1 of arXiv 2306.03792, an objective at a time: the weights of the step, and the logits after it."""
    total = sum(math.exp(x) for x in logits)
    z = [math.exp(x) / total for x in logits]
    c = 1 / sum(share / loss for share, loss in zip(z, before, strict=True))
    weights = [c * share / loss for share, loss in zip(z, before, strict=True)]
    updated = []
    for i, logit in enumerate(logits):
        delta = 0.0
        for j in range(len(logits)):
            derivative = z[j] * ((1.0 if i == j else 0.0) - z[i])
            delta += derivative * (math.log(before[j]) - math.log(after[j]))
        updated.append(logit - rate * (delta + decay * logit))
    return weights, updated


def losses(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_step_is_the_one_worked_by_hand() -> None:
    # Equal shares 1/2 of losses 1 and 4: w ∝ 1 : 1/4 = 0.8, 0.2. Then the first halves and the second stays:
    # the log-losses fell by ln 2 and 0, mean ln 2 / 2, so δ = ±ln 2 / 4 and ξ = ∓0.1 · ln 2 / 4.
    options, state = FAMOOptions(rate=0.1, decay=0.0), FAMOState.initial(2)
    torch.testing.assert_close(famo_weights(losses([1.0, 4.0]), state, options), losses([0.8, 0.2]))
    after = famo_update(state, losses([1.0, 4.0]), losses([0.5, 4.0]), options)
    assert after.logits == pytest.approx((-0.025 * math.log(2), 0.025 * math.log(2)))


@given(
    rows=st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=6),
    rate=st.sampled_from([0.025, 1.0]),
    decay=st.sampled_from([0.0, 0.01]),
)
@settings(max_examples=50, deadline=None)
def test_weights_and_logits_are_the_papers(rows: list[tuple[float, float, float]], rate: float, decay: float) -> None:
    logits, before, after = (list(column) for column in zip(*rows, strict=True))
    options, state = FAMOOptions(rate=rate, decay=decay), FAMOState(tuple(logits))
    weights, updated = by_the_paper(logits, before, after, rate, decay)
    torch.testing.assert_close(famo_weights(losses(before), state, options), losses(weights))
    result = famo_update(state, losses(before), losses(after), options)
    assert result.logits == pytest.approx(tuple(updated), rel=1e-9, abs=1e-12)


def test_scaling_a_loss_changes_its_weight_and_not_the_state() -> None:
    options, state = FAMOOptions(), FAMOState((0.3, -0.2))
    before, after = losses([2.0, 3.0]), losses([1.5, 2.9])
    factor = losses([1e4, 1.0])
    plain, scaled = (
        famo_update(state, before, after, options),
        famo_update(state, before * factor, after * factor, options),
    )
    assert scaled.logits == pytest.approx(plain.logits)
    weights, moved = famo_weights(before, state, options), famo_weights(before * factor, state, options)
    torch.testing.assert_close((moved * factor)[0] / moved[1], weights[0] / weights[1])


def test_without_decay_the_logits_keep_their_sum() -> None:
    after = famo_update(
        FAMOState((0.5, -1.0, 0.2)), losses([1.0, 2.0, 3.0]), losses([0.9, 2.5, 1.0]), FAMOOptions(decay=0.0)
    )
    assert sum(after.logits) == pytest.approx(-0.3)


def test_the_objective_that_falls_slowest_gains_weight() -> None:
    after = famo_update(FAMOState.initial(2), losses([1.0, 1.0]), losses([0.9, 0.5]), FAMOOptions())
    assert after.logits[0] > 0 > after.logits[1]


def test_two_losses_of_unlike_slopes_come_to_fall_alike() -> None:
    # ℓ1 = 1000 e^x, ℓ2 = e^(y/5): along the combination log ℓ1 falls by z1 and log ℓ2 by z2 / 25, alike at z1 = 1/26.
    options, state = FAMOOptions(rate=20.0, decay=0.0), FAMOState.initial(2)
    point, slopes, scales = losses([0.0, 0.0]), losses([1.0, 0.2]), losses([1000.0, 1.0])
    for _ in range(1000):
        before = scales * (slopes * point).exp()
        gradient = famo_weights(before, state, options) * before * slopes
        point = point - 0.05 * gradient / gradient.norm()
        state = famo_update(state, before, scales * (slopes * point).exp(), options)
    assert float(losses(list(state.logits)).softmax(0)[0]) == pytest.approx(1 / 26, rel=0.02)


def test_losses_count_from_their_lower_bound() -> None:
    shifted = famo_weights(losses([-1.0, 2.0]), FAMOState.initial(2), FAMOOptions(lower_bound=-2.0))
    torch.testing.assert_close(shifted, famo_weights(losses([1.0, 4.0]), FAMOState.initial(2), FAMOOptions()))
    with pytest.raises(ValueError, match=r"loss of objective 1 is -0\.5, below .*lower_bound = 0"):
        famo_weights(losses([1.0, -0.5]), FAMOState.initial(2), FAMOOptions())


def test_a_loss_at_its_bound_keeps_weights_finite() -> None:
    weights = famo_weights(losses([0.0, 1.0]), FAMOState.initial(2), FAMOOptions())
    assert weights.tolist() == pytest.approx([1.0 / (1 + LOSS_FLOOR), LOSS_FLOOR / (1 + LOSS_FLOOR)])
    after = famo_update(FAMOState.initial(2), losses([0.0, 1.0]), losses([0.0, 0.5]), FAMOOptions())
    assert all(map(math.isfinite, after.logits))


def test_it_is_picked_by_name_and_starts_from_equal_shares() -> None:
    inputs = GradientInputs(torch.eye(2), losses=losses([1.0, 4.0]))
    assert gradient_weights("famo", inputs).tolist() == pytest.approx([0.8, 0.2])
    with pytest.raises(ValueError, match=r"pass inputs\.losses"):
        gradient_weights("famo", GradientInputs(torch.eye(2)))
    with pytest.raises(ValueError, match=r"losses must be \[2\]"):
        GradientInputs(torch.eye(2), losses=losses([1.0]))
    with pytest.raises(ValueError, match=r"losses must be \[3\], as FAMO's state is"):
        famo_weights(losses([1.0]), FAMOState.initial(3), FAMOOptions())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_objective(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="loss of objective 1"):
        famo_update(FAMOState.initial(2), losses([1.0, 1.0]), losses([1.0, bad]), FAMOOptions())
