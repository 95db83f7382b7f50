"""KL estimators against the exact divergence, the penalty in the reward, and the controllers."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from algorithms.config import KLConfig
from algorithms.finite import NonFiniteError
from algorithms.kl import AdaptiveKL, FixedKL, kl_estimate, kl_penalised_rewards, make_kl_controller

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
EXACT = float((POLICY * (POLICY / REFERENCE).log()).sum())


def test_estimators_are_those_worked_by_hand() -> None:
    # log pi = log 1/2, log pi_reference = log 1/4: d = -log 2.
    log_probs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    log2 = math.log(2)
    for estimator, expected in (("k1", log2), ("k2", log2**2 / 2), ("k3", 0.5 - 1 + log2)):
        torch.testing.assert_close(kl_estimate(log_probs, reference, estimator), torch.tensor([expected]))  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    # The expectation over the policy's own tokens, taken exactly.
    mean = (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), estimator)).sum()  # type: ignore[arg-type]
    assert float(mean) == pytest.approx(EXACT, abs=1e-12)


def expected_gradient(estimator: str) -> torch.Tensor:
    """Gradient of the estimator at sampled tokens, in expectation over the policy, by its logits."""
    logits = POLICY.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    (POLICY * kl_estimate(log_probs, REFERENCE.log(), estimator)).sum().backward()  # type: ignore[arg-type]
    assert logits.grad is not None
    return logits.grad


def exact_gradient(forward: bool) -> torch.Tensor:
    logits = POLICY.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    if forward:
        (REFERENCE * (REFERENCE.log() - log_probs)).sum().backward()
    else:
        (log_probs.exp() * (log_probs - REFERENCE.log())).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_in_a_loss_k1_has_no_gradient_k2_that_of_the_kl_and_k3_that_of_the_reverse() -> None:
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient("k2"), exact_gradient(forward=False))
    torch.testing.assert_close(expected_gradient("k3"), exact_gradient(forward=True))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_estimators_are_right(estimator: str) -> None:
    log_probs = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, estimator), (log_probs,))  # type: ignore[arg-type]


def test_k3_of_distant_distributions_does_not_overflow() -> None:
    value = kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")
    assert torch.isfinite(value).all()
    assert value > 1e8


def test_the_penalty_takes_each_samples_summed_kl_off_its_reward() -> None:
    # Sample 0 has tokens with k1 = 0.5 and -0.1 (sum 0.4), sample 1 none, sample 2 one of 1.
    rewards, kl = kl_penalised_rewards(
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([-1.0, -2.0, -1.0]),
        torch.tensor([-1.5, -1.9, -2.0]),
        torch.tensor([0, 0, 2]),
        coefficient=0.5,
    )
    torch.testing.assert_close(kl, torch.tensor([0.4, 0.0, 1.0]))
    torch.testing.assert_close(rewards, torch.tensor([0.8, 2.0, 2.5]))


def test_the_penalty_refuses_a_log_probability_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="the reference log-probability of token 1"):
        kl_penalised_rewards(
            torch.zeros(1), torch.zeros(2), torch.tensor([0.0, math.nan]), torch.tensor([0, 0]), coefficient=0.1
        )


def test_the_fixed_controller_never_moves() -> None:
    assert FixedKL(0.1).update(5.0) == FixedKL(0.1)


def test_the_adaptive_controller_takes_the_steps_of_the_paper() -> None:
    controller = AdaptiveKL(0.1, target_nats=0.05, horizon=10)
    # Error 0.055 / 0.05 - 1 = 0.1; twice the target and half of it are cut at +-0.2.
    assert controller.update(0.055).coefficient == pytest.approx(0.1 * (1 + 0.1 / 10))
    assert controller.update(0.1).coefficient == pytest.approx(0.1 * (1 + 0.2 / 10))
    assert controller.update(0.025).coefficient == pytest.approx(0.1 * (1 - 0.2 / 10))
    assert controller.update(0.05) == controller


def test_the_adaptive_controller_refuses_a_kl_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="observed KL"):
        AdaptiveKL(0.1, 0.05, 10).update(math.nan)


def test_a_controller_goes_on_from_a_checkpoint_where_it_was() -> None:
    config = KLConfig(coefficient=0.1, controller="adaptive", target_nats=0.02, horizon=5)
    controller = make_kl_controller(config).update(1.0).update(1.0)
    restored = make_kl_controller(config, json.loads(json.dumps(controller.state())))
    assert restored == controller


def test_a_fixed_weight_is_the_recipes_even_after_a_checkpoint() -> None:
    assert make_kl_controller(KLConfig(coefficient=0.2), {"coefficient": 0.1}) == FixedKL(0.2)


@pytest.mark.parametrize(("placement", "estimator"), [("loss", "k1"), ("reward", "k2"), ("reward", "k3")])
def test_an_estimator_in_the_wrong_place_is_refused(placement: str, estimator: str) -> None:
    with pytest.raises(ValidationError, match=rf"algorithm\.kl\.estimator = {estimator}"):
        KLConfig.model_validate({"coefficient": 0.1, "placement": placement, "estimator": estimator})
