"""Clip-Cov and KL-Cov: which tokens are held back, and what their loss is."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.inputs import BatchTokens, LossInputs
from algorithms.losses import ClipOptions, clip
from algorithms.losses_covariance import (
    ClipCovOptions,
    KlCovOptions,
    clip_cov,
    clip_cov_marks,
    kl_cov,
    kl_cov_marks,
    token_covariances,
)


def tokens_of(log_probs: list[float], advantages: list[float], mask: list[bool] | None = None) -> BatchTokens:
    values = torch.tensor(log_probs)
    return BatchTokens(
        sample=torch.zeros(len(values), dtype=torch.int64),
        mask=torch.tensor(mask or [True] * len(values)),
        advantages=torch.tensor(advantages),
        behaviour_log_probs=values,
        proximal_log_probs=values,
    )


def random_tokens(count: int, seed: int = 0) -> BatchTokens:
    generator = torch.Generator().manual_seed(seed)
    return tokens_of(
        (-4 * torch.rand(count, generator=generator)).tolist(), (2 * torch.randn(count, generator=generator)).tolist()
    )


def row(ratios: list[float], advantages: list[float], marks: list[float]) -> tuple[Tensor, LossInputs]:
    log_probs = (torch.tensor([ratios], dtype=torch.float64) * 0.1).log().requires_grad_()
    proximal = torch.full_like(log_probs, 0.1).log().detach()
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    given = torch.tensor([advantages], dtype=torch.float64)
    return log_probs, LossInputs(log_probs, proximal, proximal, given, mask, torch.tensor([marks]))


def test_covariances_are_those_worked_by_hand() -> None:
    # Trained: log pi -1, -3, -2 (mean -2), A 2, -2, 3 (mean 1): (1)(1), (-1)(-3), (0)(2).
    tokens = tokens_of([-1.0, -3.0, math.nan, -2.0], [2.0, -2.0, math.nan, 3.0], [True, True, False, True])
    assert token_covariances(tokens).tolist() == [1.0, 3.0, 0.0]


def test_the_mean_of_the_covariances_is_the_covariance() -> None:
    tokens = random_tokens(50)
    both = torch.stack([tokens.proximal_log_probs, tokens.advantages]).double()
    expected = torch.cov(both, correction=0)[0, 1]
    torch.testing.assert_close(token_covariances(tokens).mean(), expected)


def test_kl_cov_marks_the_tokens_of_greatest_covariance() -> None:
    # Covariances 1, 3 and 0 as above; half of 3 tokens, rounded down, is one.
    tokens = tokens_of([-1.0, -3.0, math.nan, -2.0], [2.0, -2.0, math.nan, 3.0], [True, True, False, True])
    assert kl_cov_marks(tokens, KlCovOptions(share=0.5)).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert kl_cov_marks(tokens, KlCovOptions(share=0.7)).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_kl_cov_marks_one_token_of_a_small_batch_and_all_where_asked() -> None:
    tokens = random_tokens(20)
    assert int(kl_cov_marks(tokens, KlCovOptions()).sum()) == 1
    assert int(kl_cov_marks(tokens, KlCovOptions(share=1.0)).sum()) == 20


def test_clip_cov_marks_its_share_within_the_bounds() -> None:
    tokens = random_tokens(2000)
    options = ClipCovOptions(share=0.02, covariance_low=0.5, covariance_high=3.0)
    marked = clip_cov_marks(tokens, options) > 0
    covariances = token_covariances(tokens)
    assert int(marked.sum()) == 40
    assert bool(((covariances[marked] > 0.5) & (covariances[marked] < 3.0)).all())


def test_clip_cov_marks_all_that_qualify_where_they_are_fewer() -> None:
    tokens = random_tokens(50)
    covariances = token_covariances(tokens)
    options = ClipCovOptions(share=1.0, covariance_low=1.0, covariance_high=2.0)
    assert torch.equal(clip_cov_marks(tokens, options) > 0, (covariances > 1.0) & (covariances < 2.0))
    assert not clip_cov_marks(tokens, ClipCovOptions(covariance_low=1e6, covariance_high=1e7)).any()


def test_clip_cov_draws_the_same_tokens_on_every_rank_and_others_for_other_data() -> None:
    options = ClipCovOptions(share=0.05, covariance_low=-1.0, covariance_high=1.0)
    first = clip_cov_marks(random_tokens(400), options)
    torch.manual_seed(123)
    assert torch.equal(first, clip_cov_marks(random_tokens(400), options))
    other = random_tokens(400)
    other = dataclasses.replace(other, advantages=other.advantages + 0.5)
    assert not torch.equal(first, clip_cov_marks(other, options))


def test_clip_cov_takes_the_gradient_of_marked_tokens_and_leaves_their_value() -> None:
    log_probs, given = row([1.1, 1.1, 2.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0])
    loss = clip_cov(given, ClipCovOptions())
    torch.testing.assert_close(loss.values, clip(given, ClipOptions()).values)
    (gradient,) = torch.autograd.grad(loss.values.sum(), log_probs)
    assert gradient.tolist()[0] == pytest.approx([-1.1, 0.0, 0.0])
    assert loss.is_clipped_high is not None
    assert loss.is_clipped_high.tolist() == [[False, False, True]]


def test_kl_cov_is_that_worked_by_hand() -> None:
    # Ratio 2, A = 1, not marked: -2, gradient -2. Marked, beta = 0.5: KL = 2 - 1 - log 2 = 0.306853, so -2 + 0.153426;
    # gradient -2 + 0.5 (2 - 1) = -1.5. Ratio 0.5, A = -1, marked: 0.5 + 0.5 (0.5 - 1 + log 2) = 0.596574; gradient
    # 0.5 + 0.5 (0.5 - 1) = 0.25.
    log_probs, given = row([2.0, 2.0, 0.5], [1.0, 1.0, -1.0], [0.0, 1.0, 1.0])
    loss = kl_cov(given, KlCovOptions(coefficient=0.5))
    assert loss.values.tolist()[0] == pytest.approx([-2.0, -1.846574, 0.596574], abs=1e-6)
    (gradient,) = torch.autograd.grad(loss.values.sum(), log_probs)
    assert gradient.tolist()[0] == pytest.approx([-2.0, -1.5, 0.25])


def test_the_kl_of_kl_cov_is_that_of_the_distributions_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    mask = torch.ones(1, 6, dtype=torch.bool)
    zeros = torch.zeros(1, 6, dtype=torch.float64)
    loss = kl_cov(LossInputs(new[None], old[None], old[None], zeros, mask, mask.double()), KlCovOptions())
    expected = (old.exp() * (old - new)).sum()
    torch.testing.assert_close((old.exp() * loss.values[0]).sum(), expected)


@pytest.mark.parametrize(
    "prepare", [lambda t: clip_cov_marks(t, ClipCovOptions()), lambda t: kl_cov_marks(t, KlCovOptions())]
)
def test_a_log_probability_that_is_not_finite_is_named(prepare) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NonFiniteError, match="proximal_log_probs of token 1"):
        prepare(tokens_of([-1.0, math.inf], [1.0, 1.0]))
    with pytest.raises(NonFiniteError, match="advantages of token 0"):
        prepare(tokens_of([-1.0, -1.0], [math.nan, 1.0]))
