"""Policy losses with a ratio for the whole sequence, against figures worked by hand."""

import pytest
import torch
from torch import Tensor

from algorithms.aggregation import Denominators
from algorithms.config import AlgorithmConfig, CorrectionConfig
from algorithms.inputs import LossInputs
from algorithms.losses_sequence import (
    GmpoOptions,
    GspoOptions,
    ToprOptions,
    gmpo,
    gspo,
    gspo_token,
    mean_log_ratio,
    topr,
)
from algorithms.total_loss import TokenBatch, total_loss

WIDE = GspoOptions(low=0.5, high=3.0)


def rows(ratios: list[list[float]], advantages: list[list[float]]) -> tuple[Tensor, LossInputs]:
    """Rows padded with 0 to one length; proximal and behaviour policy give every token probability 0.25."""
    width = max(len(row) for row in ratios)
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in ratios])

    def padded(values: list[list[float]], filling: float) -> Tensor:
        return torch.tensor([row + [filling] * (width - len(row)) for row in values], dtype=torch.float64)

    log_probs = torch.where(mask, (padded(ratios, 1.0) * 0.25).log(), 0.0).requires_grad_()
    old = torch.where(mask, torch.full_like(log_probs, 0.25).log(), 0.0).detach()
    return log_probs, LossInputs(log_probs, old, old, padded(advantages, 0.0), mask)


def gradient(values: Tensor, log_probs: Tensor) -> list[list[float]]:
    return torch.autograd.grad(values.sum(), log_probs)[0].tolist()


def test_gspo_is_that_worked_by_hand() -> None:
    # Ratios 4 and 1: geometric mean s = 2, A = 3: loss -6 on both tokens. d s / d log pi_t = s / 2 = 1, so each token
    # gets -3 from each of the two losses. The second row: s = 0.5, A = -1, one token, loss 0.5, gradient 0.5.
    log_probs, given = rows([[4.0, 1.0], [0.5]], [[3.0, 3.0], [-1.0]])
    loss = gspo(given, WIDE)
    torch.testing.assert_close(loss.values, torch.tensor([[-6.0, -6.0], [0.5, 0.0]], dtype=torch.float64))
    assert gradient(loss.values, log_probs)[0] == pytest.approx([-6.0, -6.0])
    assert gradient(gspo(given, WIDE).values, log_probs)[1] == pytest.approx([0.5, 0.0])


def test_gspo_clips_a_sequence_whole() -> None:
    # s = 2 is above 1.5 with A > 0; s = 0.25 is below 0.8 with A < 0; and s = 0.25 with A > 0 learns.
    log_probs, given = rows([[4.0, 1.0], [0.25, 0.25], [0.25, 0.25]], [[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]])
    loss = gspo(given, GspoOptions(low=0.2, high=0.5))
    assert loss.values.tolist() == [
        pytest.approx([-1.5, -1.5]),
        pytest.approx([0.8, 0.8]),
        pytest.approx([-0.25, -0.25]),
    ]
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high.tolist() == [[True, True], [False, False], [False, False]]
    assert loss.is_clipped_low.tolist() == [[False, False], [True, True], [False, False]]
    assert gradient(loss.values, log_probs) == [[0.0, 0.0], [0.0, 0.0], pytest.approx([-0.25, -0.25])]


def test_gspo_token_lets_each_token_have_its_own_advantage() -> None:
    # s = 2 on both tokens by value; the gradient of a token is its own: -s A_t = -2 and +6.
    log_probs, given = rows([[4.0, 1.0]], [[1.0, -3.0]])
    loss = gspo_token(given, WIDE)
    assert loss.values.tolist()[0] == pytest.approx([-2.0, 6.0])
    assert gradient(loss.values, log_probs)[0] == pytest.approx([-2.0, 6.0])


def test_gspo_token_with_one_advantage_a_sequence_is_gspo() -> None:
    log_probs, given = rows([[4.0, 1.0, 0.7], [0.9, 1.1]], [[2.0] * 3, [-1.0] * 2])
    weights = given.mask / given.mask.sum(-1, keepdim=True)
    for options in (WIDE, GspoOptions(low=0.1, high=0.1)):
        both = [function(given, options) for function in (gspo, gspo_token)]
        torch.testing.assert_close(both[0].values, both[1].values)
        torch.testing.assert_close(
            torch.autograd.grad((both[0].values * weights).sum(), log_probs)[0],
            torch.autograd.grad((both[1].values * weights).sum(), log_probs)[0],
        )


def test_gmpo_clips_each_token_before_the_mean() -> None:
    # Bounds exp(-0.5) and exp(0.5). Ratios e, 1 and 1/e with A = 2: the first is cut to e^0.5, the others stay:
    # s = exp((0.5 + 0 - 1) / 3) = 0.846482, loss -1.692963 on each of 3 tokens.
    # Gradient: 3 * -A s / 3 = -1.692963 on the tokens not clipped, 0 on the first.
    e = 2.718281828459045
    log_probs, given = rows([[e, 1.0, 1 / e]], [[2.0] * 3])
    loss = gmpo(given, GmpoOptions(low=0.5, high=0.5))
    assert loss.values.tolist()[0] == pytest.approx([-1.692963] * 3, abs=1e-6)
    assert gradient(loss.values, log_probs)[0] == pytest.approx([0.0, -1.692963, -1.692963], abs=1e-6)
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_high.tolist() == [[True, False, False]]


def test_gmpo_clips_from_below_where_the_advantage_is_negative() -> None:
    # A = -1: the ratio 1/e is cut to e^-0.5, e stays: s = exp((1 - 0.5) / 2) = 1.284025, loss +1.284025.
    e = 2.718281828459045
    log_probs, given = rows([[e, 1 / e]], [[-1.0] * 2])
    loss = gmpo(given, GmpoOptions(low=0.5, high=0.5))
    assert loss.values.tolist()[0] == pytest.approx([1.284025] * 2, abs=1e-6)
    assert gradient(loss.values, log_probs)[0] == pytest.approx([1.284025, 0.0], abs=1e-6)
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_low.tolist() == [[False, True]]


def test_topr_imitates_the_good_and_tapers_the_bad() -> None:
    # Row 1: A = 2 weighs 1 whatever the ratio. Row 2: A = -1, product of ratios 0.5 * 0.5 = 0.25.
    # Row 3: A = -1, product 4 * 2 = 8, cut to 1. Gradients: -w A.
    log_probs, given = rows([[3.0, 3.0], [0.5, 0.5], [4.0, 2.0]], [[2.0] * 2, [-1.0] * 2, [-1.0] * 2])
    loss = topr(given, ToprOptions())
    assert gradient(loss.values, log_probs) == [[-2.0, -2.0], pytest.approx([0.25, 0.25]), [1.0, 1.0]]
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_high.tolist() == [[False, False], [False, False], [True, True]]


def test_topr_with_wide_bounds_is_importance_sampling() -> None:
    log_probs, given = rows([[3.0, 2.0], [0.5, 0.5]], [[2.0] * 2, [-1.0] * 2])
    options = ToprOptions(positive_low=0.0, positive_high=100.0, negative_high=100.0)
    assert gradient(topr(given, options).values, log_probs) == [
        pytest.approx([-12.0, -12.0]),
        pytest.approx([0.25, 0.25]),
    ]


def test_a_row_without_a_trained_token_has_a_ratio_of_one() -> None:
    assert mean_log_ratio(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0]]


def test_sequence_mean_of_gspo_is_the_mean_over_sequences_of_the_paper() -> None:
    # s = 2 with A = 3 over 2 tokens and s = 0.5 with A = -1 over 1 token: -(6 - 0.5) / 2 = -2.75.
    _, given = rows([[4.0, 1.0], [0.5]], [[3.0, 3.0], [-1.0]])
    config = AlgorithmConfig(
        loss="gspo",
        loss_options={"low": 0.9, "high": 3.0},
        aggregation="sequence_mean",
        correction=CorrectionConfig(method="none"),
    )
    batch = TokenBatch(given.mask, given.advantages, given.behaviour_log_probs, given.proximal_log_probs)
    loss, _ = total_loss(given.log_probs, None, batch, config, Denominators(3, 2), 0.0)
    assert float(loss.detach()) == pytest.approx(-2.75)
