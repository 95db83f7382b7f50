"""KL estimators against the exact divergence, the penalty in the reward, and the controllers."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.config import KLConfig
from algorithms.finite import NonFiniteError
from algorithms.kl import (
    AdaptiveKL,
    FixedKL,
    kl_estimate,
    kl_estimator,
    kl_token_rewards,
    make_kl_controller,
)
from algorithms.registry import KL_ESTIMATORS, RegistryError

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
EXACT = float((POLICY * (POLICY / REFERENCE).log()).sum())
SAMPLED = ("k1", "k2", "k3", "k3_unbiased", "abs")


def test_estimators_are_those_worked_by_hand() -> None:
    # log pi = log 1/2, log pi_reference = log 1/4: d = -log 2.
    log_probs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    log2 = math.log(2)
    values = {"k1": log2, "k2": log2**2 / 2, "k3": 0.5 - 1 + log2, "k3_unbiased": 0.5 - 1 + log2, "abs": log2}
    for estimator, expected in values.items():
        torch.testing.assert_close(kl_estimate(log_probs, reference, estimator), torch.tensor([expected]))


def test_the_full_kl_is_the_one_worked_by_hand() -> None:
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = 1/2 log(4/3).
    policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    torch.testing.assert_close(kl_estimate(policy, reference, "full"), torch.tensor([math.log(4 / 3) / 2]))


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_unbiased"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    # The expectation over the policy's own tokens, taken exactly.
    mean = (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), estimator)).sum()
    assert float(mean) == pytest.approx(EXACT, abs=1e-12)


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=20))
@settings(max_examples=50)
def test_all_but_k1_are_never_negative_and_zero_where_both_agree(pairs: list[tuple[float, float]]) -> None:
    log_probs, reference = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    for estimator in SAMPLED[1:]:
        assert (kl_estimate(log_probs, reference, estimator) >= 0).all()
        assert (kl_estimate(log_probs, log_probs, estimator) == 0).all()


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 9))
@settings(max_examples=50)
def test_the_full_kl_is_the_sum_written_out_and_never_negative(seed: int, tokens: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (
        torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)
    )
    expected = [
        sum(math.exp(p) * (p - q) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(policy.tolist(), reference.tolist(), strict=True)
    ]
    found = kl_estimate(policy, reference, "full")
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert (found > -1e-12).all()


def test_a_token_the_policy_cannot_sample_adds_nothing_to_the_full_kl_and_its_gradient() -> None:
    logits = torch.tensor([0.0, 1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.5, -math.inf], dtype=torch.float64).log_softmax(0)
    for third in (-math.inf, -1.0):
        logits.grad = None
        kl = kl_estimate(logits.log_softmax(0), torch.cat([reference[:2], torch.tensor([third])]), "full")
        kl.backward()
        assert logits.grad is not None
        p = 1 / (1 + math.e)
        assert float(kl.detach()) == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
        assert torch.isfinite(logits.grad).all()


def expected_gradient(estimator: str) -> Tensor:
    """Gradient of the estimator at sampled tokens, in expectation over the policy, by its logits."""
    logits = POLICY.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    (POLICY * kl_estimate(log_probs, REFERENCE.log(), estimator)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient(distance: str) -> Tensor:
    logits = POLICY.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    distances = {
        "kl": (log_probs.exp() * (log_probs - REFERENCE.log())).sum(),
        "reverse": (REFERENCE * (REFERENCE.log() - log_probs)).sum(),
        "l1": (log_probs.exp() - REFERENCE).abs().sum(),
        "full": kl_estimate(log_probs, REFERENCE.log(), "full"),
    }
    distances[distance].backward()
    assert logits.grad is not None
    return logits.grad


def test_in_a_loss_each_estimator_has_the_gradient_it_says() -> None:
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient("k2"), exact_gradient("kl"))
    torch.testing.assert_close(expected_gradient("k3"), exact_gradient("reverse"))
    torch.testing.assert_close(expected_gradient("k3_unbiased"), exact_gradient("kl"))
    torch.testing.assert_close(expected_gradient("abs"), exact_gradient("l1"))
    torch.testing.assert_close(exact_gradient("full"), exact_gradient("kl"))


def reward_gradient(estimator: str) -> Tensor:
    """Gradient of the policy's expected penalty by its score function: what the KL in the reward follows."""
    logits = POLICY.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    penalty = -kl_estimate(log_probs.detach(), REFERENCE.log(), estimator)
    (POLICY * -penalty * log_probs).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_in_the_reward_only_k1_follows_the_gradient_of_the_kl() -> None:
    torch.testing.assert_close(reward_gradient("k1"), exact_gradient("kl"))
    for estimator in SAMPLED[1:]:
        assert not torch.allclose(reward_gradient(estimator), exact_gradient("kl"), atol=1e-3)
        assert KL_ESTIMATORS.get(estimator).wrong_in_reward


def test_on_policy_k3_unbiased_is_the_importance_weighted_form_token_by_token() -> None:
    # grad(r k3) with r = pi / pi_behaviour, at r = 1 (DeepSeek-V3.2); off policy, r times as much.
    reference = torch.randn(6, dtype=torch.float64)
    for shift in (0.0, 0.4):
        leaf, other = (torch.linspace(-3, -0.1, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
        ratio = (leaf - (leaf.detach() - shift)).exp()
        (ratio * kl_estimate(leaf, reference, "k3")).sum().backward()
        (ratio.detach() * kl_estimate(other, reference, "k3_unbiased")).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_gradients_of_estimators_are_those_of_finite_differences(estimator: str) -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, estimator), (log_probs.requires_grad_(),))


def test_the_gradient_of_the_full_kl_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, reference = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)

    def kl(x: Tensor) -> Tensor:
        return kl_estimate(x.log_softmax(-1), reference.log_softmax(-1), "full")

    assert torch.autograd.gradcheck(kl, (logits.requires_grad_(),))


def test_k3_of_distant_distributions_does_not_overflow() -> None:
    value = kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")
    assert torch.isfinite(value).all()
    assert value > 1e8


def test_k3_of_engines_that_agree_is_not_rounding_noise() -> None:
    # d = 1e-4: exp(d) - 1 - d = 5e-9, which float32 loses if it takes exp(d) first.
    value = kl_estimate(torch.tensor([-1e-4]), torch.tensor([0.0]), "k3")
    assert float(value) == pytest.approx(5e-9, rel=0.1)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"log_probs is \[2\], but reference_log_probs is \[1\]"):
        kl_estimate(torch.zeros(2), torch.zeros(1), "k1")


def test_an_unknown_estimator_is_refused_and_a_users_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        KL_ESTIMATORS, "_entries", dict(KL_ESTIMATORS._entries)
    )  # what is added here goes with the test
    with pytest.raises(RegistryError, match=r"Registered: .*k3_unbiased"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k9")

    @kl_estimator("half")
    def half(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        return (log_probs - reference_log_probs) / 2

    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "half").tolist() == [0.5]


def test_the_token_rewards_are_the_penalty_of_each_token_the_policy_chose() -> None:
    # k1 of 0.5 and -0.25 at a coefficient of 2; the third token was written by a tool.
    rewards = kl_token_rewards(
        torch.tensor([-1.0, -2.0, math.nan]),
        torch.tensor([-1.5, -1.75, -9.0]),
        2.0,
        mask=torch.tensor([True, True, False]),
    )
    torch.testing.assert_close(rewards, torch.tensor([-1.0, 0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_unbiased", "abs", "full"])
def test_token_rewards_by_an_estimator_that_misleads_there_are_refused_with_the_reason(estimator: str) -> None:
    with pytest.raises(ValueError, match=rf"algorithm\.kl\.estimator = {estimator} in the reward doesn't follow"):
        kl_token_rewards(torch.zeros(2), torch.zeros(2), 0.1, estimator)


def test_token_rewards_refuse_a_log_probability_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="the sampled log-probability of token 1"):
        kl_token_rewards(torch.tensor([0.0, math.inf]), torch.zeros(2), 0.1)


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


def test_the_reasons_against_a_place_are_told_in_an_errors_words() -> None:
    assert KL_ESTIMATORS.get("k1").wrong_in_loss.startswith("does nothing in the loss")
    assert not KL_ESTIMATORS.get("k1").wrong_in_reward
    for name in ("k2", "k3", "k3_unbiased", "abs", "full"):
        assert not KL_ESTIMATORS.get(name).wrong_in_loss
        assert "Set algorithm.kl.estimator to k1" in KL_ESTIMATORS.get(name).wrong_in_reward
    assert [n for n in ("full", *SAMPLED) if KL_ESTIMATORS.get(n).needs_distributions] == ["full"]
