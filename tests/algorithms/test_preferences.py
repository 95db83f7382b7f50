"""Losses on pairs against closed forms, float64 loops from the papers, finite differences and their invariants."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.preferences import unpaired  # noqa: F401  registers its losses
from algorithms.preferences.inputs import (
    AnswerLogProbs,
    AnswerTokens,
    PreferenceInputs,
    PreferenceOutcome,
    add_sums,
    means,
)
from algorithms.preferences.text import preference_outcome
from algorithms.registry import PREFERENCE_LOSSES, RegistryError

PAIRED = ["dpo", "cdpo", "robust_dpo", "ipo", "simpo", "orpo"]
WITH_REFERENCE = ["dpo", "cdpo", "robust_dpo", "ipo"]
UNPAIRED_BY_PAIRS = ["bco"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(
    chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor] | None = None, tokens: tuple[int, int] = (4, 2)
) -> PreferenceInputs:
    chosen_reference, rejected_reference = reference or (None, None)
    chosen_tokens, rejected_tokens = (torch.full(chosen.shape, count, dtype=torch.int64) for count in tokens)
    return PreferenceInputs(
        AnswerLogProbs(chosen, chosen_tokens, chosen_reference),
        AnswerLogProbs(rejected, rejected_tokens, rejected_reference),
    )


def random_pairs(count: int, seed: int, scale: float = 5.0) -> PreferenceInputs:
    generator = torch.Generator().manual_seed(seed)

    def side() -> AnswerLogProbs:
        tokens = torch.randint(1, 9, (count,), generator=generator)
        policy = -scale * torch.rand(count, generator=generator, dtype=torch.float64) - 0.1
        reference = -scale * torch.rand(count, generator=generator, dtype=torch.float64) - 0.1
        return AnswerLogProbs(policy, tokens, reference)

    return PreferenceInputs(side(), side(), torch.rand(count, generator=generator, dtype=torch.float64) + 0.1)


def with_margin(h: float) -> PreferenceInputs:
    """One pair with h = `h`."""
    return pairs(tensor(h - 3.0), tensor(-4.0), (tensor(-3.0), tensor(-4.0)))


def values(name: str, inputs: PreferenceInputs, **options: object) -> Tensor:
    return preference_outcome(name, inputs, options).values


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop(name: str, inputs: PreferenceInputs) -> list[float]:
    """Each loss with its default switches, written from its paper pair by pair."""
    results = []
    for i in range(len(inputs.chosen.policy)):
        w, l_ = float(inputs.chosen.policy[i]), float(inputs.rejected.policy[i])
        nw, nl = int(inputs.chosen.tokens[i]), int(inputs.rejected.tokens[i])
        assert inputs.chosen.reference is not None
        assert inputs.rejected.reference is not None
        h = (w - float(inputs.chosen.reference[i])) - (l_ - float(inputs.rejected.reference[i]))
        pw, pl = math.exp(w / nw), math.exp(l_ / nl)
        ratio = (pw / (1 - pw)) / (pl / (1 - pl))
        right, wrong = -math.log(sigmoid(0.1 * h)), -math.log(sigmoid(-0.1 * h))
        results.append(
            {
                "dpo": right,
                "cdpo": 0.9 * right + 0.1 * wrong,
                "robust_dpo": (0.9 * right - 0.1 * wrong) / 0.8,
                "ipo": (h - 5.0) ** 2,
                "simpo": -math.log(sigmoid(2.0 * w / nw - 2.0 * l_ / nl - 1.0)),
                "orpo": -w / nw - 0.1 * math.log(sigmoid(math.log(ratio))),
            }[name]
        )
    return results


def test_each_loss_is_that_worked_by_hand() -> None:
    # log pi: chosen -2 over 4 tokens, rejected -3 over 2; reference -4 and -1: h = (-2 + 4) - (-3 + 1) = 4.
    inputs = pairs(tensor(-2.0), tensor(-3.0), (tensor(-4.0), tensor(-1.0)))
    # beta h = 2: log(1 + e^-2) = 0.1269280, log(1 + e^2) = 2.1269280.
    torch.testing.assert_close(values("dpo", inputs, beta=0.5), tensor(0.1269280110))
    # 0.75 * 0.1269280 + 0.25 * 2.1269280 = 0.6269280.
    torch.testing.assert_close(values("cdpo", inputs, beta=0.5, flip_rate=0.25), tensor(0.6269280110))
    # (0.75 * 0.1269280 - 0.25 * 2.1269280) / 0.5 = -0.8730720.
    torch.testing.assert_close(values("robust_dpo", inputs, beta=0.5, flip_rate=0.25), tensor(-0.8730719890))
    # (4 - 1 / (2 * 0.5))^2 = 9; by token (2 / 4 - (-2) / 2 - 1)^2 = 0.25.
    torch.testing.assert_close(values("ipo", inputs, beta=0.5), tensor(9.0))
    torch.testing.assert_close(values("ipo", inputs, beta=0.5, is_length_averaged=True), tensor(0.25))
    # 2 * (-2 / 4) - 2 * (-3 / 2) - 1 = 1: log(1 + e^-1) = 0.3132617.
    torch.testing.assert_close(values("simpo", inputs, beta=2.0, gamma=1.0), tensor(0.3132616875))
    # p_w = e^-0.5, p_l = e^-1.5: odds 1.5414941 and 0.2872169, their ratio 5.3670031;
    # 0.5 + 0.2 * log(1 + 1 / 5.3670031) = 0.5 + 0.2 * 0.1708592 = 0.5341718.
    torch.testing.assert_close(values("orpo", inputs, odds_weight=0.2), tensor(0.5341718434))


@pytest.mark.parametrize("name", PAIRED)
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_each_loss_is_its_papers_loop(name: str, count: int, seed: int) -> None:
    inputs = random_pairs(count, seed)
    torch.testing.assert_close(values(name, inputs), tensor(*loop(name, inputs)))


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = random_pairs(4, seed=3)

    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return values(
            name,
            replace(
                inputs,
                chosen=replace(inputs.chosen, policy=chosen),
                rejected=replace(inputs.rejected, policy=rejected),
            ),
        )

    leaves = [answers.policy.clone().requires_grad_() for answers in (inputs.chosen, inputs.rejected)]
    assert torch.autograd.gradcheck(of, leaves)


def test_dpos_gradient_is_the_one_in_its_paper() -> None:
    # -beta sigmoid(-beta h) on the chosen answer and its opposite on the rejected one (section 4 of 2305.18290).
    chosen, rejected = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-2.0, -3.0))
    values("dpo", pairs(chosen, rejected, (tensor(-4.0), tensor(-1.0))), beta=0.5).sum().backward()
    torch.testing.assert_close(chosen.grad, tensor(-0.5 * sigmoid(-2.0)))
    torch.testing.assert_close(rejected.grad, tensor(0.5 * sigmoid(-2.0)))


@pytest.mark.parametrize("name", ["dpo", "cdpo"])
def test_a_policy_that_is_its_reference_loses_log_two_and_is_right_by_half(name: str) -> None:
    outcome = preference_outcome(name, with_margin(0.0), {})
    torch.testing.assert_close(outcome.values, tensor(math.log(2)))
    assert means(outcome.sums)["accuracy"] == 0.5
    assert means(outcome.sums)["margin"] == 0.0


@pytest.mark.parametrize("name", WITH_REFERENCE)
@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 2**31))
def test_what_both_answers_of_a_prompt_share_changes_nothing(name: str, shift: float, seed: int) -> None:
    inputs = random_pairs(5, seed)
    moved = replace(
        inputs,
        chosen=replace(inputs.chosen, policy=inputs.chosen.policy + shift),
        rejected=replace(inputs.rejected, policy=inputs.rejected.policy + shift),
    )
    torch.testing.assert_close(values(name, moved), values(name, inputs))


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_only_the_ratio_to_the_reference_counts(name: str) -> None:
    inputs = random_pairs(5, seed=1)
    moved = {}
    for side, shift in (("chosen", 2.5), ("rejected", -1.5)):
        answers = getattr(inputs, side)
        moved[side] = replace(answers, policy=answers.policy + shift, reference=answers.reference + shift)
    torch.testing.assert_close(values(name, replace(inputs, **moved)), values(name, inputs))


@pytest.mark.parametrize("name", ["cdpo", "robust_dpo"])
def test_without_flips_it_is_dpo(name: str) -> None:
    inputs = random_pairs(6, seed=2)
    torch.testing.assert_close(values(name, inputs, flip_rate=0.0), values("dpo", inputs))


def swapped(inputs: PreferenceInputs) -> PreferenceInputs:
    return replace(inputs, chosen=inputs.rejected, rejected=inputs.chosen)


def test_swapping_a_pair_turns_its_metrics_round() -> None:
    inputs = random_pairs(6, seed=4)
    there, back = (means(preference_outcome("dpo", each, {}).sums) for each in (inputs, swapped(inputs)))
    assert there["margin"] == pytest.approx(-back["margin"])
    assert there["accuracy"] == pytest.approx(1 - back["accuracy"])
    assert there["chosen_reward"] == pytest.approx(back["rejected_reward"])


@settings(max_examples=50, deadline=None)
@given(flip_rate=st.floats(0, 0.45), seed=st.integers(0, 2**31))
def test_robust_dpo_is_unbiased_under_flips(flip_rate: float, seed: int) -> None:
    # The expectation over labels flipped with that chance is DPO's loss on clean labels, exactly.
    inputs = random_pairs(4, seed)
    straight, flipped = (values("robust_dpo", each, flip_rate=flip_rate) for each in (inputs, swapped(inputs)))
    torch.testing.assert_close((1 - flip_rate) * straight + flip_rate * flipped, values("dpo", inputs))


def descend(name: str, start: float, rate: float, **options: object) -> float:
    """The margin h at which gradient descent on one pair ends."""
    h = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = values(name, pairs(h - 3.0, tensor(-4.0), (tensor(-3.0), tensor(-4.0))), **options).sum()
        (gradient,) = torch.autograd.grad(loss, h)
        h = (h - rate * gradient).detach().requires_grad_()
    return float(h.detach())


@pytest.mark.parametrize("start", [-20.0, 40.0])
def test_the_optimum_of_ipo_is_a_margin_of_one_over_two_beta(start: float) -> None:
    assert descend("ipo", start, 0.1, beta=0.05) == pytest.approx(10.0)


def test_the_optimum_of_cdpo_is_where_the_model_is_as_sure_as_the_labels() -> None:
    assert descend("cdpo", 0.0, 2.0, beta=0.5, flip_rate=0.2) == pytest.approx(math.log(0.8 / 0.2) / 0.5)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_extreme_margins_neither_overflow_nor_lose_their_gradient_s_finiteness(name: str, size: float) -> None:
    chosen = torch.tensor([-size, -1e-9, -size, -1e-9], requires_grad=True)
    rejected = torch.tensor([-1e-9, -size, -size, -1e-9], requires_grad=True)
    reference = torch.full((4,), -size / 2)
    loss = values(name, pairs(chosen, rejected, (reference, reference), tokens=(3, 2)))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


def test_dpo_of_a_hopeless_pair_is_linear_in_its_margin() -> None:
    torch.testing.assert_close(values("dpo", with_margin(-1e6), beta=0.1), tensor(1e5))
    torch.testing.assert_close(values("dpo", with_margin(1e6), beta=0.1), tensor(0.0))


def test_orpo_of_an_answer_that_is_certain_is_finite() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    loss = values("orpo", pairs(chosen, torch.tensor([-2.0])))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.25]))  # of -log p_w / 4 tokens alone


def parts(inputs: PreferenceInputs, at: int) -> list[PreferenceInputs]:
    def cut(answers: AnswerLogProbs, where: slice) -> AnswerLogProbs:
        reference = None if answers.reference is None else answers.reference[where]
        return AnswerLogProbs(answers.policy[where], answers.tokens[where], reference)

    return [
        replace(
            inputs,
            chosen=cut(inputs.chosen, where),
            rejected=cut(inputs.rejected, where),
            weights=inputs.pair_weights[where],
        )
        for where in (slice(None, at), slice(at, None))
    ]


@pytest.mark.parametrize("name", [*PAIRED, *UNPAIRED_BY_PAIRS])
@pytest.mark.parametrize("at", [1, 3])
def test_micro_batches_add_up_to_the_whole_batch(name: str, at: int) -> None:
    inputs = random_pairs(5, seed=7)
    whole = preference_outcome(name, inputs, {})
    pieces = [preference_outcome(name, part, {}) for part in parts(inputs, at)]
    total = whole.weights.sum()
    torch.testing.assert_close(sum(piece.loss(total) for piece in pieces), whole.loss(total))
    torch.testing.assert_close(add_sums([piece.sums for piece in pieces]), whole.sums)
    torch.testing.assert_close(whole.loss(total), (whole.weights * whole.values).sum() / total)


@pytest.mark.parametrize("name", PAIRED)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_pairs_changes_nothing(name: str, seed: int) -> None:
    inputs = random_pairs(7, seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))

    def ordered(answers: AnswerLogProbs) -> AnswerLogProbs:
        assert answers.reference is not None
        return AnswerLogProbs(answers.policy[order], answers.tokens[order], answers.reference[order])

    moved = PreferenceInputs(ordered(inputs.chosen), ordered(inputs.rejected), inputs.pair_weights[order])
    torch.testing.assert_close(values(name, moved), values(name, inputs)[order])


@pytest.mark.parametrize("name", PAIRED)
def test_padding_of_weight_zero_changes_nothing(name: str) -> None:
    inputs = random_pairs(4, seed=9)
    padded = replace(inputs, weights=torch.cat([inputs.pair_weights[:3], tensor(0.0)]))
    (kept, _) = parts(inputs, 3)
    outcomes = [preference_outcome(name, each, {}) for each in (padded, kept)]
    total = kept.pair_weights.sum()
    torch.testing.assert_close(outcomes[0].loss(total), outcomes[1].loss(total))
    torch.testing.assert_close(outcomes[0].sums, outcomes[1].sums)


@pytest.mark.parametrize("name", [*PAIRED, "kto", "bco"])
def test_metrics_carry_no_gradient(name: str) -> None:
    inputs = random_pairs(3, seed=5)
    leaf = inputs.chosen.policy.clone().requires_grad_()
    inputs = replace(inputs, chosen=replace(inputs.chosen, policy=leaf))
    outcome = preference_outcome(name, inputs, {"has_baseline": False} if name == "kto" else {})
    assert outcome.values.requires_grad
    assert not any(pair.requires_grad for pair in outcome.sums.values())


def test_the_sums_over_tokens_of_padded_rows_are_those_of_the_answers() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    log_probs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.25, -0.25]])
    answers = AnswerLogProbs.of_tokens(AnswerTokens(log_probs, mask, 2 * log_probs))
    torch.testing.assert_close(answers.policy, torch.tensor([-3.0, -1.0]))
    torch.testing.assert_close(answers.log_ratio, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(answers.token_mean, torch.tensor([-1.5, -1.0 / 3]))
    assert answers.tokens.tolist() == [2, 3]


@pytest.mark.parametrize("field", ["policy", "reference"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_probability_that_is_not_finite_is_refused_by_name(side: str, field: str, value: float) -> None:
    inputs = random_pairs(3, seed=0)
    answers = getattr(inputs, side)
    spoilt = getattr(answers, field).clone()
    spoilt[1] = value
    with pytest.raises(NonFiniteError, match=rf"the {field}'s log-probability \({side}\) of pair 1"):
        replace(inputs, **{side: replace(answers, **{field: spoilt})})


def bad_weights(inputs: PreferenceInputs) -> PreferenceInputs:
    return replace(inputs, weights=tensor(1.0, -0.5, 1.0))


def bad_shape(inputs: PreferenceInputs) -> PreferenceInputs:
    return replace(inputs, rejected=AnswerLogProbs(tensor(-1.0), torch.ones(1, dtype=torch.int64)))


def empty_answer(inputs: PreferenceInputs) -> PreferenceInputs:
    return replace(inputs, chosen=replace(inputs.chosen, tokens=torch.tensor([1, 0, 2])))


def coarse(inputs: PreferenceInputs) -> PreferenceInputs:
    return replace(inputs, chosen=replace(inputs.chosen, policy=inputs.chosen.policy.bfloat16()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_weights, r"weights of pair 1 is -0\.5; a weight is at least 0"),
        (bad_shape, r"rejected\.policy has the shape \[1\]; with 3 pairs it should be \[3\]"),
        (empty_answer, r"chosen\.tokens of pair 1 is 0"),
        (coarse, r"chosen\.policy is torch\.bfloat16.*float32"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(
    spoil: Callable[[PreferenceInputs], PreferenceInputs], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spoil(random_pairs(3, seed=0))


def test_a_loss_that_compares_with_a_reference_asks_for_it() -> None:
    with pytest.raises(ValueError, match="give `reference` log-probabilities"):
        values("dpo", pairs(tensor(-1.0), tensor(-2.0)))


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_a_loss_without_a_reference_does_without(name: str) -> None:
    assert torch.isfinite(values(name, pairs(tensor(-1.0), tensor(-2.0)))).all()
    assert not PREFERENCE_LOSSES.get(name).needs_reference


def test_what_a_loss_needs_and_was_not_given_is_named() -> None:
    with pytest.raises(ValueError, match="the loss kto needs kl_baseline"):
        values("kto", random_pairs(2, seed=0))


def test_a_paired_loss_takes_no_single_answers() -> None:
    with pytest.raises(ValueError, match="the loss dpo compares answers in pairs"):
        preference_outcome("dpo", random_pairs(2, seed=0).answers(), {})


@pytest.mark.parametrize(
    ("name", "options"),
    [("dpo", {"beta": 0.0}), ("cdpo", {"flip_rate": 0.5}), ("robust_dpo", {"flip_rate": -0.1}), ("ipo", {"tau": 1.0})],
)
def test_options_out_of_bounds_or_unknown_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(RegistryError, match=next(iter(options))):
        preference_outcome(name, random_pairs(2, seed=0), options)


def test_a_batch_without_weight_has_no_loss() -> None:
    outcome = PreferenceOutcome(tensor(1.0), tensor(0.0), {})
    with pytest.raises(ValueError, match="total_weight must be above 0, got 0"):
        outcome.loss(0.0)


@pytest.mark.parametrize("name", PAIRED)
def test_every_loss_learns_to_prefer_the_chosen_answer(name: str) -> None:
    # A policy over three answers by logits; the first is preferred to the second. The reference is uniform.
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = tensor(-math.log(3)), tensor(-math.log(3))
    for _ in range(200):
        log_probs = logits.log_softmax(0)
        loss = values(name, pairs(log_probs[:1], log_probs[1:2], reference, tokens=(1, 1))).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.1 * gradient).detach().requires_grad_()
    chances = logits.softmax(0)
    assert chances[0] > 1 / 3 > chances[1]


def test_every_preference_loss_tells_its_formula_source_and_use() -> None:
    for name in [*PAIRED, "kto", "bco"]:
        entry = PREFERENCE_LOSSES.get(name)
        assert entry.formula
        assert entry.source
        assert entry.use_when
        assert all(field.description for field in entry.options.model_fields.values())
