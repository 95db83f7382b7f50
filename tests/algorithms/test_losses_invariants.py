"""What every policy loss has in common: padding, order and micro-batches change nothing, and on policy its gradient is
the policy gradient."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from algorithms import losses_behaviour, losses_covariance, losses_sequence  # noqa: F401  registered by being imported
from algorithms.aggregation import Denominators, count
from algorithms.config import AlgorithmConfig, CorrectionConfig
from algorithms.finite import NonFiniteError
from algorithms.inputs import BatchTokens, LossInputs
from algorithms.registry import POLICY_LOSSES
from algorithms.total_loss import TokenBatch, total_loss

LOSSES = sorted(
    name for name in POLICY_LOSSES if POLICY_LOSSES.get(name).function.__module__.startswith("algorithms.losses")
)
LEARNING = [name for name in LOSSES if POLICY_LOSSES.get(name).uses_rollouts]
SWITCHES = {
    "gspo": {"low": 0.2, "high": 0.3},
    "gspo_token": {"low": 0.2, "high": 0.3},
    "clip_cov": {"share": 0.2, "covariance_low": -1.0, "covariance_high": 1.0},
    "kl_cov": {"share": 0.2},
}


def random_batch(rows: int = 6, width: int = 7, spread: float = 0.6) -> tuple[Tensor, TokenBatch]:
    generator = torch.Generator().manual_seed(3)
    behaviour = -0.1 - 2 * torch.rand(rows, width, generator=generator)
    proximal = behaviour + spread * (torch.rand(rows, width, generator=generator) - 0.5)
    current = proximal + spread * (torch.rand(rows, width, generator=generator) - 0.5)
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, width)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    return current.requires_grad_(), TokenBatch(mask, advantages, behaviour, proximal)


def config_of(name: str, aggregation: str = "token_mean") -> AlgorithmConfig:
    return AlgorithmConfig(
        loss=name,
        loss_options=SWITCHES.get(name, {}),
        aggregation=aggregation,
        correction=CorrectionConfig(method="none"),
    )


def prepared(name: str, batch: TokenBatch) -> TokenBatch:
    """With the marks of the whole batch, made as the trainer does: from the trained and other tokens, end to end."""
    entry = POLICY_LOSSES.get(name)
    if entry.prepare is None:
        return batch
    rows, width = batch.mask.shape
    assert batch.proximal_log_probs is not None
    sample = torch.arange(rows).repeat_interleave(width)
    parts = (batch.mask, batch.advantages, batch.behaviour_log_probs, batch.proximal_log_probs)
    tokens = BatchTokens(sample, *(part.flatten() for part in parts))
    marks = entry.prepare(tokens, entry.read_options(SWITCHES.get(name, {})))
    return dataclasses.replace(batch, marks=marks.view(rows, width))


def rows_of(batch: TokenBatch, index: Tensor | slice) -> TokenBatch:
    parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return TokenBatch(**{name: part[index] if isinstance(part, Tensor) else part for name, part in parts.items()})


def gradient(name: str, log_probs: Tensor, batch: TokenBatch, aggregation: str = "token_mean") -> tuple[float, Tensor]:
    loss, _ = total_loss(
        log_probs, None, batch, config_of(name, aggregation), Denominators(*count(batch.mask)), kl_coefficient=0.0
    )
    return float(loss.detach()), torch.autograd.grad(loss, log_probs)[0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_whole(name: str, aggregation: str) -> None:
    log_probs, batch = random_batch()
    batch = prepared(name, batch)
    whole, expected = gradient(name, log_probs, batch, aggregation)
    denominators = Denominators(*count(batch.mask))
    parts = [
        total_loss(log_probs[rows], None, rows_of(batch, rows), config_of(name, aggregation), denominators, 0.0)[0]
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    total = torch.stack(parts).sum()
    assert float(total.detach()) == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(total, log_probs)[0], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing_even_if_it_holds_nan(name: str) -> None:
    log_probs, batch = random_batch()
    batch = prepared(name, batch)
    value, expected = gradient(name, log_probs, batch)

    def widened(values: Tensor) -> Tensor:
        return torch.cat([values, torch.full((len(values), 3), math.nan)], dim=1)

    assert batch.proximal_log_probs is not None
    wide = TokenBatch(
        torch.cat([batch.mask, torch.zeros(len(batch.mask), 3, dtype=torch.bool)], dim=1),
        widened(batch.advantages),
        widened(batch.behaviour_log_probs),
        widened(batch.proximal_log_probs),
        marks=None if batch.marks is None else widened(batch.marks),
    )
    padded = widened(log_probs.detach()).requires_grad_()
    found_value, found = gradient(name, padded, wide)
    assert found_value == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(found[:, :-3], expected)
    assert torch.equal(found[:, -3:], torch.zeros_like(found[:, -3:]))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_sequences_changes_nothing(name: str) -> None:
    log_probs, batch = random_batch()
    batch = prepared(name, batch)
    value, expected = gradient(name, log_probs, batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = log_probs.detach()[order].requires_grad_()
    found_value, found = gradient(name, shuffled, rows_of(batch, order))
    assert found_value == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(found, expected[order])


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_on_policy_the_gradient_is_the_policy_gradient(name: str, aggregation: str) -> None:
    log_probs, batch = random_batch()
    same = log_probs.detach()
    batch = dataclasses.replace(batch, behaviour_log_probs=same, proximal_log_probs=same)
    _, expected = gradient("reinforce", log_probs, batch, aggregation)
    marked = prepared(name, batch)
    _, found = gradient(name, log_probs, marked, aggregation)
    if name == "clip_cov":
        assert marked.marks is not None
        expected = torch.where(marked.marks > 0, torch.zeros_like(expected), expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LEARNING)
def test_a_zero_advantage_teaches_nothing_on_policy(name: str) -> None:
    log_probs, batch = random_batch()
    same = log_probs.detach()
    batch = TokenBatch(batch.mask, torch.zeros_like(batch.advantages), same, same)
    _, found = gradient(name, log_probs, prepared(name, batch))
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("current", "old"), [(-1e-4, -800.0), (-800.0, -1e-4), (-800.0, -800.0)])
def test_a_huge_or_tiny_ratio_gives_a_finite_loss_and_gradient(
    name: str, advantage: float, current: float, old: float
) -> None:
    log_probs = torch.full((2, 3), current, requires_grad=True)
    given = torch.full((2, 3), old)
    batch = TokenBatch(torch.ones(2, 3, dtype=torch.bool), torch.full((2, 3), advantage), given, given)
    value, found = gradient(name, log_probs, prepared(name, batch))
    assert math.isfinite(value)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_inside_the_mask_is_named(name: str) -> None:
    log_probs, batch = random_batch()
    batch = prepared(name, batch)
    broken = log_probs.detach().clone()
    broken[2, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"log_probs of \(sequence, token\) \(2, 0\)"):
        gradient(name, broken.requires_grad_(), batch)


@pytest.mark.parametrize("name", LEARNING)
def test_clipped_tokens_lie_inside_the_mask(name: str) -> None:
    log_probs, batch = random_batch(spread=3.0)
    batch = prepared(name, batch)
    assert batch.proximal_log_probs is not None
    zero = torch.zeros_like(batch.advantages)
    parts = (log_probs, batch.proximal_log_probs, batch.behaviour_log_probs, batch.advantages)
    current, proximal, behaviour, advantages = (torch.where(batch.mask, part, zero) for part in parts)
    marks = None if batch.marks is None else torch.where(batch.mask, batch.marks, zero)
    entry = POLICY_LOSSES.get(name)
    loss = entry.function(
        LossInputs(current, proximal, behaviour, advantages, batch.mask, marks),
        entry.read_options(SWITCHES.get(name, {})),
    )
    for is_clipped in (loss.is_clipped_low, loss.is_clipped_high):
        assert is_clipped is None or not bool((is_clipped & ~batch.mask).any())
    if loss.is_clipped_low is not None and loss.is_clipped_high is not None:
        assert not bool((loss.is_clipped_low & loss.is_clipped_high).any())
