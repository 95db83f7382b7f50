"""Policy losses with a ratio for each token, against figures worked by hand and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from algorithms import losses_covariance, losses_sequence  # noqa: F401  registered by being imported
from algorithms.inputs import LossInputs
from algorithms.losses import (
    CispoOptions,
    ClipOptions,
    DualClipOptions,
    SapoOptions,
    cispo,
    clip,
    dual_clip,
    gpg,
    marks_of,
    nll,
    reinforce,
    sapo,
)
from algorithms.registry import POLICY_LOSSES, Options, RegistryError

OPTIONS = ClipOptions(low=0.2, high=0.3)


def inputs(log_probs: Tensor, proximal: Tensor, advantages: Tensor) -> LossInputs:
    return LossInputs(log_probs, proximal, proximal, advantages, torch.ones_like(log_probs, dtype=torch.bool))


def at_ratio(ratios: list[float], advantages: list[float]) -> tuple[Tensor, LossInputs]:
    """Log-probabilities that carry a gradient, with these ratios to a proximal policy of probability 0.5."""
    log_probs = (torch.tensor([ratios], dtype=torch.float64) * 0.5).log().requires_grad_()
    proximal = torch.full_like(log_probs, 0.5).log().detach()
    return log_probs, inputs(log_probs, proximal, torch.tensor([advantages], dtype=torch.float64))


def gradient(values: Tensor, log_probs: Tensor) -> list[float]:
    return torch.autograd.grad(values.sum(), log_probs)[0].squeeze(0).tolist()


def test_clip_is_that_worked_by_hand() -> None:
    # ratio:      0.5    0.5    1.0   1.5   1.5   1.25
    # advantage:    1     -1      2     1    -1      1
    # min(rA, clip(r, 0.8, 1.3) A): 0.5, -0.8, 2, 1.3, -1.5, 1.25; the loss is its negative.
    _, given = at_ratio([0.5, 0.5, 1.0, 1.5, 1.5, 1.25], [1.0, -1.0, 2.0, 1.0, -1.0, 1.0])
    loss = clip(given, OPTIONS)
    assert loss.values.tolist()[0] == pytest.approx([-0.5, 0.8, -2.0, -1.3, 1.5, -1.25])
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low.tolist() == [[False, True, False, False, False, False]]
    assert loss.is_clipped_high.tolist() == [[False, False, False, True, False, False]]


def test_clip_agrees_with_the_paper_written_as_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, proximal, advantages = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    values = clip(inputs(log_probs, proximal, advantages), OPTIONS).values
    for i in range(4):
        for t in range(7):
            ratio = math.exp(float(log_probs[i, t]) - float(proximal[i, t]))
            bounded = min(max(ratio, 1 - OPTIONS.low), 1 + OPTIONS.high)
            advantage = float(advantages[i, t])
            assert float(values[i, t]) == pytest.approx(-min(ratio * advantage, bounded * advantage), abs=1e-12)


def test_a_clipped_token_has_no_gradient_and_the_others_have() -> None:
    log_probs, given = at_ratio([0.5, 1.5, 1.25], [-1.0, 1.0, 1.0])
    assert gradient(clip(given, OPTIONS).values, log_probs) == pytest.approx([0.0, 0.0, -1.25])


def test_dual_clip_bounds_the_loss_of_bad_actions_that_became_likely() -> None:
    # ratio:       0.5    2      5      5
    # advantage:    -1   -1     -1      1
    # clip's loss: 0.8    2      5   -1.3
    # bound c = 3:   3    3      3     no bound where A > 0
    log_probs, given = at_ratio([0.5, 2.0, 5.0, 5.0], [-1.0, -1.0, -1.0, 1.0])
    loss = dual_clip(given, DualClipOptions(low=0.2, high=0.3, dual=3.0))
    assert loss.values.tolist()[0] == pytest.approx([0.8, 2.0, 3.0, -1.3])
    assert gradient(loss.values, log_probs) == pytest.approx([0.0, 2.0, 0.0, 0.0])
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low.tolist() == [[True, False, False, False]]
    assert loss.is_clipped_high.tolist() == [[False, False, True, True]]


def test_cispo_bounds_the_weight_and_keeps_every_gradient() -> None:
    # ratio 0.1, 1, 6 and 6; weights within [0, 1.5]: 0.1, 1, 1.5 and 1.5. Gradient: -weight * A.
    log_probs, given = at_ratio([0.1, 1.0, 6.0, 6.0], [1.0, 1.0, 1.0, -2.0])
    loss = cispo(given, CispoOptions(high=0.5))
    assert gradient(loss.values, log_probs) == pytest.approx([-0.1, -1.0, -1.5, 3.0])
    # Values: -weight * A * log pi, with log pi = log(ratio / 2).
    assert loss.values.tolist()[0] == pytest.approx(
        [-0.1 * math.log(0.05), -math.log(0.5), -1.5 * math.log(3.0), 3.0 * math.log(3.0)]
    )
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low.tolist() == [[False] * 4]
    assert loss.is_clipped_high.tolist() == [[False, False, True, True]]


def test_cispo_has_a_lower_bound_where_asked() -> None:
    log_probs, given = at_ratio([0.1], [1.0])
    loss = cispo(given, CispoOptions(low=0.6))
    assert gradient(loss.values, log_probs) == pytest.approx([-0.4])
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_low.tolist() == [[True]]


def test_sapo_is_that_worked_by_hand() -> None:
    # A > 0, temperature 2, ratio 1.5: p = sigmoid(1) = 0.731059, gate = 4/2 p = 1.462117, loss -1.462117 * 3.
    # Its gradient in log pi: -A r 4 p (1 - p) = -3 * 1.5 * 4 * 0.731059 * 0.268941 = -3.539023.
    # A < 0, temperature 4, ratio 0.5: p = sigmoid(-2) = 0.119203, gate = p = 0.119203, loss +0.119203.
    # Its gradient: 0.5 * 4 * 0.119203 * 0.880797 = 0.209987.
    log_probs, given = at_ratio([1.5, 0.5], [3.0, -1.0])
    values = sapo(given, SapoOptions(positive=2.0, negative=4.0)).values
    assert values.tolist()[0] == pytest.approx([-4.386352, 0.119203], abs=1e-5)
    assert gradient(values, log_probs) == pytest.approx([-3.539023, 0.209987], abs=1e-5)


def test_sapo_fades_on_both_sides_of_the_ratio_one() -> None:
    ratios = [0.01, 0.5, 1.0, 2.0, 8.0]
    log_probs, given = at_ratio(ratios, [1.0] * 5)
    found = gradient(sapo(given, SapoOptions(positive=3.0)).values, log_probs)
    per_ratio = [-value / ratio for value, ratio in zip(found, ratios, strict=True)]
    assert max(per_ratio) == per_ratio[2] == pytest.approx(1.0)
    assert per_ratio[0] < per_ratio[1] < per_ratio[2] > per_ratio[3] > per_ratio[4]


def test_gpg_is_the_policy_gradient_itself() -> None:
    log_probs, given = at_ratio([0.3, 1.7], [2.0, -0.5])
    assert gradient(gpg(given, Options()).values, log_probs) == [-2.0, 0.5]


def test_on_policy_clip_and_reinforce_have_the_same_gradient() -> None:
    log_probs, given = at_ratio([1.0, 1.0, 1.0], [1.0, -2.0, 0.5])
    assert gradient(clip(given, OPTIONS).values, log_probs) == pytest.approx([-1.0, 2.0, -0.5])
    assert gradient(reinforce(given, Options()).values, log_probs) == pytest.approx([-1.0, 2.0, -0.5])


def test_nll_is_the_negative_log_likelihood_whatever_the_advantages() -> None:
    log_probs = torch.tensor([[-1.0, -2.0]])
    loss = nll(inputs(log_probs, torch.zeros(1, 2), torch.tensor([[5.0, -5.0]])), Options())
    assert torch.equal(loss.values, torch.tensor([[1.0, 2.0]]))


def test_marks_that_were_not_made_are_asked_for() -> None:
    _, given = at_ratio([1.0], [1.0])
    with pytest.raises(ValueError, match="Call its prepare on all tokens"):
        marks_of(given)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("clip", {"low": 1.2}, "loss_options.low = 1.2 of 'clip'"),
        ("dual_clip", {"dual": 0.9}, "loss_options.dual = 0.9 of 'dual_clip'"),
        ("topr", {"negative_low": 2.0}, "negative_low = 2 is above negative_high = 1"),
        ("clip_cov", {"covariance_low": 6.0}, "covariance_low = 6 isn't below covariance_high = 5"),
        ("sapo", {"postive": 1.0}, "Did you mean positive"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(loss: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        POLICY_LOSSES.get(loss).read_options(options, "loss_options")
