"""Policy losses that weigh by the behaviour policy, against figures worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.inputs import BatchTokens, LossInputs
from algorithms.losses import clip
from algorithms.losses_behaviour import (
    DecoupledOptions,
    DppoKlOptions,
    DppoOptions,
    M2poOptions,
    decoupled,
    dppo_kl,
    dppo_tv,
    m2po,
    second_moment_marks,
)


def row(
    probabilities: list[float], behaviour: list[float], advantages: list[float], proximal: list[float] | None = None
) -> tuple[Tensor, LossInputs]:
    """One sequence of these probabilities under the policy, the behaviour policy and the proximal policy."""

    def logs(values: list[float]) -> Tensor:
        return torch.tensor([values], dtype=torch.float64).log()

    log_probs = logs(probabilities).requires_grad_()
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    old = logs(proximal or behaviour)
    return log_probs, LossInputs(log_probs, old, logs(behaviour), torch.tensor([advantages], dtype=torch.float64), mask)


def gradient(values: Tensor, log_probs: Tensor) -> list[float]:
    return torch.autograd.grad(values.sum(), log_probs)[0].squeeze(0).tolist()


def test_decoupled_weighs_by_the_behaviour_and_clips_around_the_proximal_policy() -> None:
    # behaviour 0.1, proximal 0.2: weight 2. pi = 0.22: r = 1.1, loss -2 * 1.1 * 1. pi = 0.3: r = 1.5, clipped at 1.2:
    # loss -2 * 1.2. The last: weight 0.5, r = 0.9, A = -1: loss 0.45.
    log_probs, given = row([0.22, 0.3, 0.18], [0.1, 0.1, 0.4], [1.0, 1.0, -1.0], proximal=[0.2, 0.2, 0.2])
    loss = decoupled(given, DecoupledOptions())
    assert loss.values.tolist()[0] == pytest.approx([-2.2, -2.4, 0.45])
    assert gradient(loss.values, log_probs) == pytest.approx([-2.2, 0.0, 0.45])
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_high.tolist() == [[False, True, False]]


def test_decoupled_bounds_its_weight_where_asked() -> None:
    _, given = row([0.2], [0.01], [1.0], proximal=[0.2])
    assert decoupled(given, DecoupledOptions()).values.tolist()[0] == pytest.approx([-20.0])
    assert decoupled(given, DecoupledOptions(max_weight=5.0)).values.tolist()[0] == pytest.approx([-5.0])


def test_decoupled_with_one_old_policy_is_clip() -> None:
    _, given = row([0.5, 0.1], [0.3, 0.3], [1.0, -1.0])
    torch.testing.assert_close(decoupled(given, DecoupledOptions()).values, clip(given, DecoupledOptions()).values)


def test_dppo_tv_masks_what_would_move_further_out() -> None:
    # |pi - mu|: 0.3, 0.3, 0.3, 0.001. Bound 0.2.
    # 0.8 / 0.5 = 1.6 with A = 1 is masked; with A = -1 it comes back and learns with 1.6.
    # 0.2 / 0.5 = 0.4 with A = -1 is masked. 0.0011 / 0.0001 = 11 moved by 0.001 only: it learns with 11.
    log_probs, given = row([0.8, 0.8, 0.2, 0.0011], [0.5, 0.5, 0.5, 0.0001], [1.0, -1.0, -1.0, 1.0])
    loss = dppo_tv(given, DppoOptions(max_divergence=0.2))
    assert loss.values.tolist()[0] == pytest.approx([0.0, 1.6, 0.0, -11.0])
    assert gradient(loss.values, log_probs) == pytest.approx([0.0, 1.6, 0.0, -11.0])
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high.tolist() == [[True, False, False, False]]
    assert loss.is_clipped_low.tolist() == [[False, False, True, False]]


def test_dppo_bounds_the_weight_and_leaves_the_gradient() -> None:
    log_probs, given = row([0.01], [0.0001], [1.0])
    bounded = dppo_tv(given, DppoOptions())
    assert gradient(bounded.values, log_probs) == pytest.approx([-20.0])
    free = dppo_tv(given, DppoOptions(max_ratio=None))
    assert gradient(free.values, log_probs) == pytest.approx([-100.0])


def test_dppo_kl_is_that_worked_by_hand() -> None:
    # mu = 0.5, pi = 0.8: 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = -0.235002 + 0.458145 = 0.223144 nats.
    # With A = 1 it is masked at a bound of 0.22 and learns with 1.6 at 0.23.
    log_probs, given = row([0.8], [0.5], [1.0])
    masked = dppo_kl(given, DppoKlOptions(max_divergence=0.22))
    assert masked.values.tolist() == [[0.0]]
    kept = dppo_kl(given, DppoKlOptions(max_divergence=0.23))
    assert gradient(kept.values, log_probs) == pytest.approx([-1.6])


@pytest.mark.parametrize("pair", [(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (1e-30, 1.0), (1.0, 1e-30)])
def test_dppo_kl_is_finite_where_a_token_is_certain(pair: tuple[float, float]) -> None:
    log_probs, given = row([pair[0]], [pair[1]], [-1.0])
    values = dppo_kl(given, DppoKlOptions()).values
    assert torch.isfinite(values).all()
    assert all(math.isfinite(value) for value in gradient(values, log_probs))


def tokens_of(log_ratio: list[float], advantages: list[float], mask: list[bool]) -> BatchTokens:
    ratio = torch.tensor(log_ratio)
    return BatchTokens(
        sample=torch.zeros(len(log_ratio), dtype=torch.int64),
        mask=torch.tensor(mask),
        advantages=torch.tensor(advantages),
        behaviour_log_probs=torch.full_like(ratio, -3.0),
        proximal_log_probs=ratio - 3.0,
    )


def test_m2po_masks_the_greatest_moves_until_the_second_moment_is_within_the_budget() -> None:
    # Moving away in the direction of A: 0.1, -0.2, 0.4, 1.0 (squares 0.01, 0.04, 0.16, 1.0; means 0.01, 0.025, 0.07,
    # 0.3025). Budget 0.04: the first two stay. The fifth (r > 1, A < 0) comes back and stays; the last isn't trained.
    tokens = tokens_of(
        [0.1, 1.0, -0.2, 0.4, 2.0, 0.0, 3.0], [1.0, 2.0, -1.0, 1.0, -1.0, 1.0, 1.0], [True] * 6 + [False]
    )
    assert second_moment_marks(tokens, M2poOptions()).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_m2po_within_the_budget_masks_nothing() -> None:
    tokens = tokens_of([0.1, -0.2, 0.1], [1.0, -1.0, 1.0], [True] * 3)
    assert not second_moment_marks(tokens, M2poOptions()).any()


def test_m2po_learns_from_what_is_not_masked_with_the_ratio_to_the_behaviour_policy() -> None:
    log_probs, given = row([0.4, 0.4, 0.1], [0.2, 0.2, 0.2], [1.0, 1.0, -1.0])
    given = LossInputs(
        given.log_probs,
        given.proximal_log_probs,
        given.behaviour_log_probs,
        given.advantages,
        given.mask,
        marks=torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64),
    )
    loss = m2po(given, M2poOptions())
    assert loss.values.tolist()[0] == pytest.approx([-2.0, 0.0, 0.0])
    assert gradient(loss.values, log_probs) == pytest.approx([-2.0, 0.0, 0.0])
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high.tolist() == [[False, True, False]]
    assert loss.is_clipped_low.tolist() == [[False, False, True]]


def test_m2po_names_a_log_probability_that_is_not_finite_unless_it_is_not_trained() -> None:
    broken = [0.1, math.nan]
    with pytest.raises(NonFiniteError, match="log-ratio of proximal and behaviour policy of token 1"):
        second_moment_marks(tokens_of(broken, [1.0, 1.0], [True, True]), M2poOptions())
    assert not second_moment_marks(tokens_of(broken, [1.0, 1.0], [True, False]), M2poOptions()).any()
