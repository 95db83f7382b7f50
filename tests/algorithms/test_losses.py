"""Policy losses by token, against figures worked by hand, loops from the papers and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from algorithms.config import AlgorithmConfig
from algorithms.losses import clip, nll, reinforce
from algorithms.registry import LossInputs

CONFIG = AlgorithmConfig(clip_low=0.2, clip_high=0.3)


def inputs(log_probs: Tensor, proximal: Tensor, advantages: Tensor) -> LossInputs:
    return LossInputs(log_probs, proximal, proximal, advantages, torch.ones_like(log_probs, dtype=torch.bool))


def test_clip_is_that_worked_by_hand() -> None:
    # ratio:      0.5    0.5    1.0   1.5   1.5   1.25
    # advantage:    1     -1      2     1    -1      1
    # min(rA, clip(r, 0.8, 1.3) A): 0.5, -0.8, 2, 1.3, -1.5, 1.25; the loss is its negative.
    ratio = torch.tensor([[0.5, 0.5, 1.0, 1.5, 1.5, 1.25]])
    advantages = torch.tensor([[1.0, -1.0, 2.0, 1.0, -1.0, 1.0]])
    loss = clip(inputs(ratio.log(), torch.zeros_like(ratio), advantages), CONFIG)
    torch.testing.assert_close(loss.values, torch.tensor([[-0.5, 0.8, -2.0, -1.3, 1.5, -1.25]]))
    assert loss.is_clipped_low is not None
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_low.tolist() == [[False, True, False, False, False, False]]
    assert loss.is_clipped_high.tolist() == [[False, False, False, True, False, False]]


def test_clip_agrees_with_the_paper_written_as_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, proximal, advantages = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    values = clip(inputs(log_probs, proximal, advantages), CONFIG).values
    for i in range(4):
        for t in range(7):
            ratio = math.exp(float(log_probs[i, t]) - float(proximal[i, t]))
            bounded = min(max(ratio, 1 - CONFIG.clip_low), 1 + CONFIG.clip_high)
            advantage = float(advantages[i, t])
            assert float(values[i, t]) == pytest.approx(-min(ratio * advantage, bounded * advantage), abs=1e-12)


def test_a_clipped_token_has_no_gradient_and_the_others_have() -> None:
    log_probs = torch.tensor([[0.5, 1.5, 1.25]]).log().requires_grad_()
    advantages = torch.tensor([[-1.0, 1.0, 1.0]])
    clip(inputs(log_probs, torch.zeros(1, 3), advantages), CONFIG).values.sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, 0.0, -1.25]]))


def test_on_policy_clip_and_reinforce_have_the_same_gradient() -> None:
    advantages = torch.tensor([[1.0, -2.0, 0.5]])
    gradients = []
    for function in (clip, reinforce):
        log_probs = torch.tensor([[-1.0, -2.0, -0.1]], requires_grad=True)
        function(inputs(log_probs, log_probs.detach(), advantages), CONFIG).values.sum().backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], -advantages)


@pytest.mark.parametrize("function", [clip, reinforce, nll])
def test_gradients_are_those_of_finite_differences(function) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    proximal, advantages = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: function(inputs(x, proximal, advantages), CONFIG).values, (log_probs,))


def test_nll_is_the_negative_log_likelihood_whatever_the_advantages() -> None:
    log_probs = torch.tensor([[-1.0, -2.0]])
    loss = nll(inputs(log_probs, torch.zeros(1, 2), torch.tensor([[5.0, -5.0]])), CONFIG)
    assert torch.equal(loss.values, torch.tensor([[1.0, 2.0]]))


def test_a_huge_ratio_gives_a_finite_loss() -> None:
    loss = clip(inputs(torch.tensor([[0.0]]), torch.tensor([[-800.0]]), torch.tensor([[-1.0]])), CONFIG)
    assert torch.isfinite(loss.values).all()
