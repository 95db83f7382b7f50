"""Losses on single answers, KTO's baseline and BCO's reward shift, against hand, loop, finite differences and parts."""

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.preferences.inputs import AnswerLogProbs, UnpairedInputs, add_sums, means
from algorithms.preferences.text import preference_outcome
from algorithms.preferences.unpaired import (
    BCOOptions,
    KTOOptions,
    RewardShift,
    bco,
    kl_baseline,
    kto,
    mismatched_answers,
    mismatched_sum,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def answers(log_ratios: Tensor, is_desirable: list[bool], **more: object) -> UnpairedInputs:
    tokens = torch.ones(len(log_ratios), dtype=torch.int64)
    return UnpairedInputs(
        AnswerLogProbs(log_ratios - 3.0, tokens, torch.full_like(log_ratios.detach(), -3.0)),
        torch.tensor(is_desirable),
        **more,  # type: ignore[arg-type]
    )


def test_kto_is_that_worked_by_hand() -> None:
    # beta 0.5, z_0 = 0.5 * 2 = 1. Desirable, log-ratio 4: 1.5 sigmoid(1 - 2) = 1.5 * 0.2689414 = 0.4034121.
    # Undesirable, log-ratio 2: 0.5 sigmoid(1 - 1) = 0.25.
    inputs = answers(tensor(4.0, 2.0), [True, False], kl_baseline=tensor(2.0).squeeze())
    outcome = kto(inputs, KTOOptions(beta=0.5, desirable_weight=1.5, undesirable_weight=0.5))
    torch.testing.assert_close(outcome.values, tensor(0.4034121321, 0.25))
    assert means(outcome.sums) == pytest.approx(
        {"desirable_reward": 2.0, "undesirable_reward": 1.0, "kl_baseline": 2.0}
    )


def test_kto_without_a_baseline_compares_with_zero() -> None:
    inputs = answers(tensor(4.0, 2.0), [True, False])
    torch.testing.assert_close(
        kto(inputs, KTOOptions(beta=0.5, has_baseline=False)).values, tensor(2.0, -1.0).neg().sigmoid()
    )


def test_ktos_baseline_is_the_batchs_mean_cut_at_zero() -> None:
    # Log-ratios 1 and -4 in one part, 6 in another: mean 1; each cut by itself would be 7 / 3.
    parts = [
        mismatched_sum(tensor(-2.0, -6.0), tensor(-3.0, -2.0)),
        mismatched_sum(tensor(0.0, 9.0), tensor(-6.0, 0.0), tensor(1.0, 0.0)),
    ]
    torch.testing.assert_close(kl_baseline(parts[0] + parts[1]), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(kl_baseline(parts[0]), torch.tensor(0.0, dtype=torch.float64))


def test_no_gradient_flows_through_ktos_baseline() -> None:
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not kl_baseline(mismatched_sum(policy, torch.tensor([-3.0, -3.0]))).requires_grad
    baseline = torch.tensor(1.0, requires_grad=True)
    ratio = torch.tensor([1.0, 2.0], requires_grad=True)
    kto(answers(ratio, [True, False], kl_baseline=baseline), KTOOptions()).values.sum().backward()
    assert baseline.grad is None


@pytest.mark.parametrize("name", ["kto", "bco"])
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_each_loss_is_its_papers_loop(name: str, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratios = 8 * torch.rand(count, generator=generator, dtype=torch.float64) - 4
    labels = (torch.rand(count, generator=generator) < 0.5).tolist()
    chances = 0.98 * torch.rand(count, generator=generator, dtype=torch.float64) + 0.01
    inputs = answers(
        ratios,
        labels,
        kl_baseline=torch.tensor(0.7),
        desirability=chances,
        state=RewardShift(0.9, 2.0, 1.0, -3.0, 2.0),
    )
    expected = []
    for ratio, good, chance in zip(ratios.tolist(), labels, chances.tolist(), strict=True):
        if name == "kto":
            value = 1 / (1 + math.exp(-0.1 * (ratio - 0.7) if good else 0.1 * (ratio - 0.7)))
            expected.append(1 - value)
        else:
            # delta = (2 / 1 + -3 / 2) / 2 = 0.25.
            above = 0.1 * ratio - 0.25
            weight = 1.0 if good else min(max(chance / (1 - chance), 0.5), 10.0)
            expected.append(weight * math.log1p(math.exp(-above if good else above)))
    torch.testing.assert_close(preference_outcome(name, inputs, {}).values, tensor(*expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    def of(ratios: Tensor) -> Tensor:
        inputs = answers(ratios, [True, False, False], kl_baseline=torch.tensor(0.3), state=RewardShift(0.9, 1.0, 2.0))
        return preference_outcome(name, inputs, {"beta": 0.7}).values

    assert torch.autograd.gradcheck(of, (tensor(0.5, -1.0, 2.0).requires_grad_(),))


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_extreme_ratios_do_not_overflow(name: str) -> None:
    ratios = torch.tensor([1e8, -1e8, 1e8, -1e8], requires_grad=True)
    values = preference_outcome(
        name, answers(ratios, [True, True, False, False], kl_baseline=torch.tensor(0.0)), {}
    ).values
    values.sum().backward()
    assert ratios.grad is not None
    assert torch.isfinite(values).all()
    assert torch.isfinite(ratios.grad).all()


def test_turning_the_label_turns_bcos_gradient_round() -> None:
    # -log sigmoid(x) and -log sigmoid(-x) differ by x, so their gradients differ by beta everywhere.
    ratios = tensor(0.3, -2.0)
    gradients = []
    for label in (True, False):
        leaf = ratios.clone().requires_grad_()
        bco(answers(leaf, [label, label]), BCOOptions(beta=0.5)).values.sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], tensor(0.5, 0.5))


def test_bcos_shift_is_the_mean_of_both_kinds_means() -> None:
    # Three desirable answers of reward 2, one undesirable of -1: (2 - 1) / 2, not 5 / 4.
    inputs = answers(tensor(4.0, 4.0, 4.0, -2.0), [True, True, True, False])
    sums = bco(inputs, BCOOptions(beta=0.5)).sums
    assert RewardShift(0.9).after(sums).value == pytest.approx(0.5)


def test_the_first_step_of_bco_has_no_shift() -> None:
    inputs = answers(tensor(0.0, 0.0), [True, False])
    outcome = preference_outcome("bco", inputs, {})
    torch.testing.assert_close(outcome.values, tensor(math.log(2), math.log(2)))
    assert means(outcome.sums)["reward_shift"] == 0.0


def shift_sums(desirable: list[float], undesirable: list[float]) -> dict[str, Tensor]:
    return {
        "desirable_reward": tensor(sum(desirable), len(desirable)),
        "undesirable_reward": tensor(sum(undesirable), len(undesirable)),
    }


def test_the_shift_forgets_at_the_rate_of_its_decay() -> None:
    # Desirable means 4, then 1: (0.5 * 4 + 1) / (0.5 + 1) = 2. Undesirable 0, then -1: -1 / 1.5 = -2 / 3.
    shift = RewardShift(0.5).after(shift_sums([4.0], [0.0])).after(shift_sums([1.0], [-1.0]))
    assert shift.value == pytest.approx((2 - 2 / 3) / 2)
    everything = RewardShift(1.0).after(shift_sums([4.0], [0.0])).after(shift_sums([1.0], [-1.0]))
    assert everything.value == pytest.approx((2.5 - 0.5) / 2)
    last = RewardShift(0.0).after(shift_sums([4.0], [0.0])).after(shift_sums([1.0], [-1.0]))
    assert last.value == pytest.approx(0.0)


def test_a_step_without_one_kind_keeps_what_was_known_of_it() -> None:
    shift = RewardShift(0.5).after(shift_sums([4.0], [2.0])).after(shift_sums([4.0], []))
    assert shift.value == pytest.approx(3.0)
    assert RewardShift(0.5).after(shift_sums([4.0], [])).value == pytest.approx(4.0)


def test_the_shift_is_immutable_and_survives_a_checkpoint() -> None:
    shift = RewardShift(0.9).after(shift_sums([1.0, 2.0], [-1.0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        shift.desirable = 0.0  # type: ignore[misc]
    assert RewardShift(**json.loads(json.dumps(dataclasses.asdict(shift)))) == shift


def test_the_shift_refuses_rewards_that_are_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="sum of desirable"):
        RewardShift(0.9).after(shift_sums([math.nan], [0.0]))


@pytest.mark.parametrize("at", [1, 2, 4])
def test_micro_batches_give_the_loss_and_the_next_shift_of_the_whole_batch(at: int) -> None:
    ratios, labels = tensor(1.0, -2.0, 3.0, 0.5, 2.0), [True, False, True, False, False]
    state = RewardShift(0.9, 1.0, 2.0, -1.0, 4.0)
    whole = bco(answers(ratios, labels, state=state), BCOOptions())
    pieces = [
        bco(answers(ratios[where], labels[where], state=state), BCOOptions())
        for where in (slice(None, at), slice(at, None))
    ]
    torch.testing.assert_close(sum(piece.loss(5.0) for piece in pieces), whole.loss(5.0))
    sums = add_sums([piece.sums for piece in pieces])
    torch.testing.assert_close(sums, whole.sums)
    assert state.after(sums).value == pytest.approx(state.after(whole.sums).value)


def test_bco_weighs_undesirable_answers_by_the_density_ratio_within_its_bounds() -> None:
    # p / (1 - p) of 0.75 is 3; of 0.01 about 0.01, cut to 0.5; desirable answers keep 1.
    inputs = answers(tensor(0.0, 0.0, 0.0), [True, False, False], desirability=tensor(0.9, 0.75, 0.01))
    expected = math.log(2) * tensor(1.0, 3.0, 0.5)
    torch.testing.assert_close(bco(inputs, BCOOptions()).values, expected)


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=8), seed=st.integers(0, 1000))
def test_a_mismatched_answer_is_always_to_another_prompt(sizes: list[int], seed: int) -> None:
    prompt = torch.tensor([group * 7 for group, size in enumerate(sizes) for _ in range(size)])
    prompt = prompt[torch.randperm(len(prompt), generator=torch.Generator().manual_seed(seed))]
    partner = mismatched_answers(prompt)
    assert (prompt[partner] != prompt).all()
    if len(set(sizes)) == 1:
        assert sorted(partner.tolist()) == list(range(len(prompt)))


def test_answers_to_one_prompt_have_no_mismatch() -> None:
    with pytest.raises(ValueError, match="at least two prompts, got 3 to one"):
        mismatched_answers(torch.tensor([4, 4, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"desirability": tensor(0.5, 1.0)}, "above 0 and below 1"),
        ({"is_desirable": torch.tensor([1, 0])}, r"is_desirable is \[2\] torch\.int64; it should be \[2\] bool"),
        ({"weights": tensor(1.0)}, r"weights has the shape \[1\]"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(answers(tensor(1.0, 2.0), [True, False]), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"kl_baseline": torch.tensor(math.nan)}, {"desirability": tensor(0.5, math.nan)}])
def test_inputs_that_are_not_finite_are_refused(change: dict[str, Tensor]) -> None:
    with pytest.raises(NonFiniteError, match=next(iter(change)).replace("kl_", "KL ")):
        replace(answers(tensor(1.0, 2.0), [True, False]), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_each_loss_learns_from_single_labels(name: str) -> None:
    # Three answers: the first is good, the second bad, the third unseen.
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    tokens, reference = torch.ones(2, dtype=torch.int64), torch.full((2,), -math.log(3), dtype=torch.float64)
    for _ in range(200):
        inputs = UnpairedInputs(
            AnswerLogProbs(logits.log_softmax(0)[:2], tokens, reference),
            torch.tensor([True, False]),
            kl_baseline=torch.tensor(0.0),
        )
        (gradient,) = torch.autograd.grad(preference_outcome(name, inputs, {}).values.sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()
    chances = logits.softmax(0)
    assert chances[0] > chances[2] > chances[1]
