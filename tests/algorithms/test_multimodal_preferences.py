"""The multimodal preference family against figures worked by hand, float64 loops from the papers, finite differences,
and what it becomes when its extra weights are 0."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.preferences import dynamic, multimodal, spans  # noqa: F401  registers its losses
from algorithms.preferences.dynamic import Hardness
from algorithms.preferences.inputs import AnswerLogProbs, AnswerTokens, PreferenceInputs, add_sums, means
from algorithms.preferences.text import preference_outcome
from algorithms.preferences.unpaired import RewardShift
from algorithms.registry import PREFERENCE_LOSSES, RegistryError

FAMILY = ("image_dpo", "mdpo", "adpo", "ha_dpo", "mia_dpo", "mpo", "mm_dpo", "dama", "ddpo", "chip")

AS_DPO: dict[str, dict[str, Any]] = {
    "image_dpo": {"image_weight": 0.0, "answer_weight": 1.0},
    "mdpo": {"image_weight": 0.0, "anchor_weight": 0.0},
    "ha_dpo": {"nll_weight": 0.0},
    "mia_dpo": {"nll_weight": 0.0},
    "mpo": {"preference_weight": 1.0, "quality_weight": 0.0, "generation_weight": 0.0},
    "mm_dpo": {"strength": 0.0, "nll_weight": 0.0},
    "dama": {"is_data_aware": False, "is_model_aware": False},
    "ddpo": {"corrected_weight": 1.0, "is_length_averaged": False},
    "chip": {"image_weight": 0.0, "segment_weight": 0.0, "token_weight": 0.0},
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def answer(log_ratio: float, tokens: int = 2, policy: float = -3.0) -> AnswerLogProbs:
    """One answer with the given log-ratio to the reference."""
    return AnswerLogProbs(tensor(policy), torch.tensor([tokens]), tensor(policy - log_ratio))


def tokens_of(log_probs: list[float], ratios: list[float], corrected: list[int], kl: list[float]) -> AnswerLogProbs:
    """One answer token by token, padded by one token full of rubbish outside the mask."""
    policy = tensor(*log_probs, 0.0)[None]
    return AnswerLogProbs.of_tokens(
        AnswerTokens(
            policy,
            torch.tensor([[True] * len(log_probs) + [False]]),
            policy - tensor(*ratios, 0.0)[None],
            tensor(*kl, 9 * sum(kl))[None],
            torch.tensor([[*corrected, 1]]).bool(),
        )
    )


def random_answers(count: int, generator: torch.Generator, width: int = 6) -> AnswerLogProbs:
    mask = torch.arange(width) < torch.randint(1, width + 1, (count, 1), generator=generator)

    def draws(scale: float) -> Tensor:
        return torch.rand(count, width, generator=generator, dtype=torch.float64) * scale * mask

    corrected = (torch.rand(count, width, generator=generator) < 0.4) & mask
    return AnswerLogProbs.of_tokens(AnswerTokens(-draws(3.0), mask, -draws(3.0), draws(0.5), corrected))


def random_inputs(count: int, seed: int = 0) -> PreferenceInputs:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, chosen_negative, rejected_negative = (random_answers(count, generator) for _ in range(4))
    return PreferenceInputs(
        chosen,
        rejected,
        torch.rand(count, generator=generator, dtype=torch.float64) + 0.1,
        torch.randn(count, generator=generator, dtype=torch.float64),
        chosen_negative,
        rejected_negative,
    )


def rows(inputs: PreferenceInputs, part: Any) -> PreferenceInputs:
    """The pairs `part` of the inputs."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[part]
        if isinstance(value, AnswerLogProbs | AnswerTokens):
            return type(value)(**{name: of(each) for name, each in vars(value).items()})
        return value

    return PreferenceInputs(**{name: of(value) for name, value in vars(inputs).items()})


def with_tokens(inputs: PreferenceInputs, log_probs: tuple[Tensor, ...], kl: tuple[Tensor, ...]) -> PreferenceInputs:
    """The inputs with other token log-probabilities (chosen, rejected, both under the worse image) and KLs."""
    names = ("chosen", "rejected", "chosen_negative_image", "rejected_negative_image")
    made = {}
    for name, policy, divergence in zip(names, log_probs, kl, strict=True):
        by_token = getattr(inputs, name).by_token
        made[name] = AnswerLogProbs.of_tokens(replace(by_token, log_probs=policy, reference_kl=divergence))
    return replace(inputs, **made)


def test_the_whole_family_is_registered_with_formula_source_and_use() -> None:
    for name in FAMILY:
        entry = PREFERENCE_LOSSES.get(name)
        assert entry.formula
        assert entry.source
        assert entry.use_when
        assert all(field.description for field in entry.options.model_fields.values())


def test_image_dpo_is_that_worked_by_hand() -> None:
    # Log-ratios 1 under the image and -2 under the worse one: h = 3, times beta 0.5 is 1.5.
    # -log sigmoid(1.5) = log(1 + e^-1.5) = log(1.22313) = 0.20141.
    inputs = PreferenceInputs(answer(1.0), answer(5.0), chosen_negative_image=answer(-2.0))
    outcome = preference_outcome("image_dpo", inputs, {"beta": 0.5})
    assert outcome.values.item() == pytest.approx(0.20141, abs=1e-5)
    assert means(outcome.sums)["image_margin"] == pytest.approx(1.5)


def test_image_dpo_without_its_answer_term_never_looks_at_the_rejected_answer() -> None:
    rejected = replace(answer(5.0), policy=tensor(-3.0).requires_grad_())
    inputs = PreferenceInputs(answer(1.0), rejected, chosen_negative_image=answer(-2.0))
    inputs.chosen.policy.requires_grad_()
    preference_outcome("image_dpo", inputs, {}).values.sum().backward()
    assert rejected.policy.grad is None


def test_mdpo_is_that_worked_by_hand() -> None:
    # beta 0.5; log-ratios: chosen 1, rejected -1, chosen under the worse image -3.
    # Answers: 0.5 * 2 = 1, image: 0.5 * 4 = 2, anchor: 0.5 * 1 - 0.25 = 0.25.
    # log(1 + e^-1) = 0.313262, log(1 + e^-2) = 0.126928, log(1 + e^-0.25) = 0.575939.
    # 0.313262 + 2 * 0.126928 + 3 * 0.575939 = 2.294935.
    inputs = PreferenceInputs(answer(1.0), answer(-1.0), chosen_negative_image=answer(-3.0))
    options = {"beta": 0.5, "image_weight": 2.0, "anchor_weight": 3.0, "anchor": 0.25}
    assert preference_outcome("mdpo", inputs, options).values.item() == pytest.approx(2.294935, abs=2e-6)


def test_mdpos_anchor_alone_raises_a_chosen_answer_that_became_unlikely() -> None:
    policy = tensor(-9.0).requires_grad_()
    chosen = AnswerLogProbs(policy, torch.tensor([3]), tensor(-2.0))
    inputs = PreferenceInputs(chosen, answer(-60.0), chosen_negative_image=answer(-60.0))
    preference_outcome("mdpo", inputs, {"beta": 1.0}).values.sum().backward()
    # The margins are 53 and 53, whose gradients vanish; the anchor's is -sigmoid(7).
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(-1 / (1 + math.exp(-7.0)), abs=1e-6)


def test_adpo_is_that_worked_by_hand() -> None:
    # Chosen under the clean image 1, rejected under the adversarial one -1: -log sigmoid(0.5 * 2) = 0.313262.
    # Chosen under the adversarial image: token probabilities 1/2 and 1/4, weighted by themselves:
    # 0.5 * log 2 + 0.25 * log 4 = 0.346574 + 0.346574 = 0.693147. Twice that: 1.386294. Together 1.699556.
    adversarial = tokens_of([math.log(0.5), math.log(0.25)], [0.0, 0.0], [0, 0], [0.0, 0.0])
    inputs = PreferenceInputs(
        answer(1.0), answer(9.0), chosen_negative_image=adversarial, rejected_negative_image=answer(-1.0)
    )
    options = {"beta": 0.5, "adversarial_weight": 2.0}
    assert preference_outcome("adpo", inputs, options).values.item() == pytest.approx(1.699556, abs=2e-6)
    # Plain NLL: log 2 + log 4 = 2.079442, its mean over two tokens 1.039721; 0.313262 + 2 * 1.039721 = 2.392704.
    options |= {"has_confidence_weights": False, "is_length_averaged": True}
    assert preference_outcome("adpo", inputs, options).values.item() == pytest.approx(2.392704, abs=2e-6)


def test_adpos_confidence_weights_carry_no_gradient() -> None:
    policy = torch.tensor([[math.log(0.5), math.log(0.25)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    adversarial = AnswerLogProbs.of_tokens(AnswerTokens(policy, mask, policy.detach()))
    inputs = PreferenceInputs(
        answer(1.0), answer(9.0), chosen_negative_image=adversarial, rejected_negative_image=answer(-1.0)
    )
    preference_outcome("adpo", inputs, {}).values.sum().backward()
    # d/dx of -p(x) x with p held fixed is -p.
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.5, -0.25]], dtype=torch.float64))


def test_adpo_without_its_adversarial_term_is_dpo_across_the_two_images() -> None:
    inputs = random_inputs(7)
    assert inputs.rejected_negative_image is not None
    across = replace(inputs, rejected=inputs.rejected_negative_image)
    torch.testing.assert_close(
        preference_outcome("adpo", inputs, {"adversarial_weight": 0.0}).values,
        preference_outcome("dpo", across, {}).values,
    )


def test_dpo_with_nll_is_that_worked_by_hand() -> None:
    # -log sigmoid(0.5 * 2) = 0.313262; NLL a token 3 / 2 = 1.5. HA-DPO at 0.5: 1.063262, MIA-DPO at 0.1: 0.463262.
    inputs = PreferenceInputs(answer(1.0), answer(-1.0))
    for name, expected in (("ha_dpo", 1.063262), ("mia_dpo", 0.463262)):
        assert preference_outcome(name, inputs, {"beta": 0.5}).values.item() == pytest.approx(expected, abs=1e-6)


def test_mpo_is_that_worked_by_hand() -> None:
    # Rewards at beta 0.5: 1 and -0.5, shift 0.25 (means 0.75 and -0.25 of the steps before).
    # Preference: log(1 + e^-1.5) = 0.201413. Quality: log(1 + e^-0.75) + log(1 + e^-0.75) = 2 * 0.386871 = 0.773742.
    # Generation: 3 / 2. 0.8 * 0.201413 + 0.2 * 0.773742 + 1.5 = 1.815879.
    inputs = PreferenceInputs(answer(2.0), answer(-1.0), state=RewardShift(0.9, 1.5, 2.0, -0.5, 2.0))
    outcome = preference_outcome("mpo", inputs, {"beta": 0.5})
    assert outcome.values.item() == pytest.approx(1.815879, abs=2e-6)
    assert means(outcome.sums)["reward_shift"] == pytest.approx(0.25)


def test_mpos_shift_is_the_mean_of_both_kinds_rewards_of_the_steps_before() -> None:
    # Step 1: rewards 1 and 0 give the shift 1/2. Step 2 with decay 0.5: (0.5 * 1 + 3) / 1.5 = 7/3 and
    # (0.5 * 0 - 1) / 1.5 = -2/3, so the shift is 5/6.
    shift = RewardShift(0.5)
    for chosen, rejected, expected in ((1.0, 0.0, 0.5), (3.0, -1.0, 5 / 6)):
        inputs = PreferenceInputs(answer(chosen), answer(rejected), state=shift)
        outcome = preference_outcome("mpo", inputs, {"beta": 1.0, "decay": 0.5})
        assert means(outcome.sums)["reward_shift"] == pytest.approx(shift.value)
        shift = shift.after(outcome.sums)
        assert shift.value == pytest.approx(expected)


def test_mm_dpo_is_that_worked_by_hand() -> None:
    # Margin 2, k = 0.5: 1 - e^-1 = 0.632121; beta = 0.5 (1 + 0.5 * 0.632121) = 0.658030; h = 2: 1.316060.
    # log(1 + e^-1.316060) = 0.237591. A margin of 0 is DPO: log(1 + e^-1) = 0.313262.
    # Margin -20: 1 + 0.5 (1 - e^10) is far below 0, so beta is 0.1 * 0.5: log(1 + e^-0.1) = 0.644397.
    both = [AnswerLogProbs(tensor(*[-3.0] * 3), torch.tensor([2] * 3), tensor(*[-3 - r] * 3)) for r in (1.0, -1.0)]
    inputs = PreferenceInputs(*both, reward_margins=tensor(2.0, 0.0, -20.0))
    outcome = preference_outcome("mm_dpo", inputs, {"beta": 0.5})
    torch.testing.assert_close(outcome.values, tensor(0.237591, 0.313262, 0.644397), atol=1e-6, rtol=0)


@given(margin=st.floats(-1e30, 1e30), strength=st.floats(0, 5), rate=st.floats(1e-3, 10))
@settings(max_examples=50)
def test_mm_dpos_beta_stays_within_its_bounds_whatever_the_margin(margin: float, strength: float, rate: float) -> None:
    inputs = PreferenceInputs(answer(1.0), answer(-1.0), reward_margins=tensor(margin))
    beta = means(preference_outcome("mm_dpo", inputs, {"strength": strength, "rate": rate, "beta": 1.0}).sums)["beta"]
    assert 0.1 <= beta <= 10.0
    if margin >= 0:
        assert 1.0 - 1e-9 <= beta <= 1 + strength + 1e-9


def test_ddpo_is_that_worked_by_hand() -> None:
    # gamma 5. Chosen: log-ratios 1, 2 (corrected), 3: (1 + 10 + 3) / (2 + 5) = 2. Rejected: -1 (corrected), 0:
    # (-5 + 0) / (1 + 5) = -5/6. beta 0.6: 0.6 * 17/6 = 1.7; log(1 + e^-1.7) = 0.167786.
    inputs = PreferenceInputs(
        tokens_of([-1.0, -2.0, -1.0], [1.0, 2.0, 3.0], [0, 1, 0], [0.0] * 3),
        tokens_of([-1.0, -2.0], [-1.0, 0.0], [1, 0], [0.0] * 2),
    )
    outcome = preference_outcome("ddpo", inputs, {"beta": 0.6, "corrected_weight": 5.0})
    assert outcome.values.item() == pytest.approx(0.167786, abs=1e-6)


def test_ddpo_with_weight_on_corrected_spans_alone_and_none_there_says_nothing() -> None:
    inputs = PreferenceInputs(tokens_of([-1.0], [1.0], [0], [0.0]), tokens_of([-1.0], [-1.0], [0], [0.0]))
    inputs = replace(
        inputs,
        **{
            name: replace(each, by_token=replace(each.by_token, is_corrected=torch.zeros(1, 2, dtype=torch.bool)))
            for name, each in (("chosen", inputs.chosen), ("rejected", inputs.rejected))
        },
    )
    assert torch.isfinite(preference_outcome("ddpo", inputs, {"corrected_weight": 0.0}).values).all()


def test_chip_is_that_worked_by_hand() -> None:
    # beta 0.5. Chosen log-ratios 1, 2 (corrected): sum 3, gamma 3: (1 + 6) / 4 = 1.75; KL 0.2 + 0.2 = 0.4.
    # Rejected 0, -1 (corrected): sum -1, (0 - 3) / 4 = -0.75; KL 0.5 + 0.3 = 0.8. Worse image: -1.
    # Response and token: 0.5 * 4 - 0.5 * 0.5 (0.8 - 0.4) = 1.9; log(1 + e^-1.9) = 0.139387.
    # Segment: 0.5 * 2.5 = 1.25; log(1 + e^-1.25) = 0.251929. Image: 0.5 * 4 = 2; 0.126928.
    # 0.139387 + 2 * 0.251929 + 3 * 0.126928 = 1.024029.
    inputs = PreferenceInputs(
        tokens_of([-1.0, -2.0], [1.0, 2.0], [0, 1], [0.2, 0.2]),
        tokens_of([-1.0, -2.0], [0.0, -1.0], [0, 1], [0.5, 0.3]),
        chosen_negative_image=answer(-1.0),
    )
    options = {
        "beta": 0.5,
        "image_weight": 3.0,
        "segment_weight": 2.0,
        "token_weight": 0.5,
        "corrected_weight": 3.0,
    }
    assert preference_outcome("chip", inputs, options).values.item() == pytest.approx(1.024029, abs=2e-6)


def test_chips_token_level_lowers_the_rejected_answers_kl_and_leaves_the_chosen_ones() -> None:
    inputs = random_inputs(5)
    kl = tuple(
        each.by_token.reference_kl.clone().requires_grad_()  # type: ignore[union-attr]
        for each in (inputs.chosen, inputs.rejected, inputs.chosen_negative_image, inputs.rejected_negative_image)
        if each is not None
    )
    log_probs = tuple(
        each.by_token.log_probs  # type: ignore[union-attr]
        for each in (inputs.chosen, inputs.rejected, inputs.chosen_negative_image, inputs.rejected_negative_image)
        if each is not None
    )
    preference_outcome("chip", with_tokens(inputs, log_probs, kl), {}).values.sum().backward()
    assert kl[0].grad is None
    assert kl[1].grad is not None
    assert bool((kl[1].grad[inputs.rejected.by_token.mask] > 0).all())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", AS_DPO)
@given(count=st.integers(1, 9), seed=st.integers(0, 2**16), beta=st.floats(0.01, 2))
@settings(max_examples=15)
def test_each_loss_is_dpo_when_its_extra_weights_are_0(name: str, count: int, seed: int, beta: float) -> None:
    inputs = random_inputs(count, seed)
    outcome = preference_outcome(name, inputs, {"beta": beta, **AS_DPO[name]})
    torch.testing.assert_close(outcome.values, preference_outcome("dpo", inputs, {"beta": beta}).values)


def by_the_paper(name: str, inputs: PreferenceInputs, i: int) -> float:
    """Each loss with its default switches as its paper writes it, a pair and a token at a time in float64."""

    def tokens(answers: AnswerLogProbs | None) -> list[tuple[float, float, float, bool]]:
        assert answers is not None
        by = answers.by_token
        assert by is not None
        assert by.reference_log_probs is not None
        assert by.reference_kl is not None
        assert by.is_corrected is not None
        columns = (by.log_probs[i], by.reference_log_probs[i], by.reference_kl[i], by.is_corrected[i])
        return [
            (float(p), float(r), float(k), bool(c))
            for p, r, k, c, inside in zip(*columns, by.mask[i], strict=True)
            if inside
        ]

    def ratio(answers: AnswerLogProbs | None) -> float:
        return sum(p - r for p, r, _, _ in tokens(answers))

    def dense(answers: AnswerLogProbs) -> float:
        weights = [5.0 if c else 1.0 for *_, c in tokens(answers)]
        return sum(w * (p - r) for w, (p, r, _, _) in zip(weights, tokens(answers), strict=True)) / sum(weights)

    def kl(answers: AnswerLogProbs) -> float:
        return sum(k for _, _, k, _ in tokens(answers))

    chosen, rejected, worse = inputs.chosen, inputs.rejected, inputs.chosen_negative_image
    beta = 0.1
    reward_w, reward_l = beta * ratio(chosen), beta * ratio(rejected)
    image = beta * (ratio(chosen) - ratio(worse))
    nll = -sum(p for p, *_ in tokens(chosen)) / len(tokens(chosen))
    plain = -log_sigmoid(reward_w - reward_l)
    assert inputs.reward_margins is not None
    margin = float(inputs.reward_margins[i])
    match name:
        case "image_dpo":
            return -log_sigmoid(image)
        case "mdpo":
            return plain - log_sigmoid(image) - log_sigmoid(reward_w)
        case "adpo":
            adversarial = sum(-math.exp(p) * p for p, *_ in tokens(worse))
            return -log_sigmoid(reward_w - beta * ratio(inputs.rejected_negative_image)) + adversarial
        case "ha_dpo":
            return plain + 0.5 * nll
        case "mia_dpo":
            return plain + 0.1 * nll
        case "mpo":
            return 0.8 * plain + 0.2 * (-log_sigmoid(reward_w) - log_sigmoid(-reward_l)) + nll
        case "mm_dpo":
            scale = max(0.1, 1 + 0.5 * (1 - math.exp(-0.5 * margin)))
            return -log_sigmoid(scale * (reward_w - reward_l))
        case "dama":
            return plain
        case "ddpo":
            return -log_sigmoid(beta * (dense(chosen) - dense(rejected)))
        case "chip":
            token = 0.1 * beta * (kl(rejected) - kl(chosen))
            segment = beta * (dense(chosen) - dense(rejected))
            return -log_sigmoid(reward_w - reward_l - token) - log_sigmoid(segment) - log_sigmoid(image)
    raise AssertionError(f"write {name} from its paper here")


@pytest.mark.parametrize("name", FAMILY)
@given(count=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_each_loss_agrees_with_its_paper_written_as_a_loop(name: str, count: int, seed: int) -> None:
    inputs = random_inputs(count, seed)
    expected = tensor(*[by_the_paper(name, inputs, i) for i in range(count)])
    torch.testing.assert_close(preference_outcome(name, inputs, {}).values, expected)


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = random_inputs(3, seed=5)
    answers = (inputs.chosen, inputs.rejected, inputs.chosen_negative_image, inputs.rejected_negative_image)
    tokens = [each.by_token for each in answers if each is not None and each.by_token is not None]
    log_probs = tuple(each.log_probs.clone().requires_grad_() for each in tokens)
    kl = tuple(each.reference_kl for each in tokens if each.reference_kl is not None)
    # Stopped gradients (the confidence weights) aren't seen by finite differences; their own test holds them.
    options = {"has_confidence_weights": False} if name == "adpo" else {}

    def loss(*moved: Tensor) -> Tensor:
        return preference_outcome(name, with_tokens(inputs, moved, kl), options).values

    assert torch.autograd.gradcheck(loss, log_probs)


@pytest.mark.parametrize("name", FAMILY)
@given(count=st.integers(2, 9), seed=st.integers(0, 2**16), cut=st.integers(1, 8))
@settings(max_examples=10)
def test_micro_batches_add_up_to_the_whole_and_leave_the_same_state(name: str, count: int, seed: int, cut: int) -> None:
    cut = min(cut, count - 1)
    state = None
    for step in range(3):
        inputs = replace(random_inputs(count, seed + step), state=state)
        whole = preference_outcome(name, inputs, {})
        parts = [preference_outcome(name, rows(inputs, part), {}) for part in (slice(0, cut), slice(cut, None))]
        total = float(whole.weights.sum())
        torch.testing.assert_close(whole.loss(total), parts[0].loss(total) + parts[1].loss(total))
        sums = add_sums([part.sums for part in parts])
        assert means(sums) == pytest.approx(means(whole.sums))
        entry = PREFERENCE_LOSSES.get(name)
        if entry.initial_state is not None:
            before = entry.initial_state(entry.read_options({})) if state is None else state
            kept = repr(before)
            state = before.after(whole.sums)
            assert repr(before) == kept
            assert vars(before.after(sums)) == pytest.approx(vars(state))


@pytest.mark.parametrize("name", FAMILY)
def test_the_order_of_pairs_doesnt_matter(name: str) -> None:
    inputs = random_inputs(6, seed=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        preference_outcome(name, rows(inputs, order), {}).values, preference_outcome(name, inputs, {}).values[order]
    )


@pytest.mark.parametrize("name", ["ddpo", "chip", "adpo"])
def test_padding_doesnt_matter(name: str) -> None:
    inputs = random_inputs(4, seed=3)

    def padded(answers: AnswerLogProbs) -> AnswerLogProbs:
        by_token = answers.by_token
        assert by_token is not None
        wider = {
            key: torch.cat([value, torch.zeros(4, 3, dtype=value.dtype)], 1) for key, value in vars(by_token).items()
        }
        return AnswerLogProbs.of_tokens(AnswerTokens(**wider))

    names = ("chosen", "rejected", "chosen_negative_image", "rejected_negative_image")
    wider = replace(inputs, **{each: padded(getattr(inputs, each)) for each in names})
    torch.testing.assert_close(preference_outcome(name, wider, {}).values, preference_outcome(name, inputs, {}).values)


@pytest.mark.parametrize("name", FAMILY)
def test_a_log_probability_that_isnt_finite_is_named(name: str) -> None:
    with pytest.raises(NonFiniteError, match="the policy's log-probability \\(chosen\\) of pair 0 is nan"):
        preference_outcome(name, PreferenceInputs(answer(0.0, policy=math.nan), answer(0.0)), {})


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_a_reward_margin_that_isnt_finite_is_named(margin: float) -> None:
    with pytest.raises(NonFiniteError, match="reward_margins of pair 0"):
        PreferenceInputs(answer(0.0), answer(0.0), reward_margins=tensor(margin))


@pytest.mark.parametrize("name", FAMILY)
def test_extreme_margins_give_finite_losses(name: str) -> None:
    inputs = random_inputs(2, seed=4)
    tokens = [each.by_token for each in (inputs.chosen, inputs.rejected) if each.by_token is not None]
    for sign in (1.0, -1.0):
        policy = [torch.where(each.mask, sign * side * 1e6, 0.0) for each, side in zip(tokens, (1, -1), strict=True)]
        extreme = replace(
            inputs,
            chosen=AnswerLogProbs.of_tokens(replace(tokens[0], log_probs=policy[0])),
            rejected=AnswerLogProbs.of_tokens(replace(tokens[1], log_probs=policy[1])),
        )
        assert torch.isfinite(preference_outcome(name, extreme, {}).values).all()


@pytest.mark.parametrize(
    ("name", "absent", "named"),
    [
        ("mdpo", "chosen_negative_image", "chosen_negative_image"),
        ("image_dpo", "chosen_negative_image", "chosen_negative_image"),
        ("adpo", "rejected_negative_image", "rejected_negative_image"),
        ("chip", "chosen_negative_image", "chosen_negative_image"),
        ("mm_dpo", "reward_margins", "reward_margins"),
        ("dama", "reward_margins", "reward_margins"),
    ],
)
def test_a_loss_says_what_its_inputs_lack(name: str, absent: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"the loss {name} needs .*{named}"):
        preference_outcome(name, replace(random_inputs(3), **{absent: None}), {})


@pytest.mark.parametrize("name", ["ddpo", "chip"])
def test_a_loss_on_spans_says_that_it_needs_tokens(name: str) -> None:
    inputs = random_inputs(3)
    with pytest.raises(ValueError, match=f"the loss {name} needs .*by_token"):
        preference_outcome(name, replace(inputs, rejected=replace(inputs.rejected, by_token=None)), {})


@pytest.mark.parametrize(
    ("field", "named"), [("reference_kl", "reference_kl, or set token_weight: 0"), ("is_corrected", "is_corrected")]
)
def test_chip_says_which_level_lacks_its_tensors(field: str, named: str) -> None:
    inputs = random_inputs(3)
    assert inputs.rejected.by_token is not None
    rejected = replace(inputs.rejected, by_token=replace(inputs.rejected.by_token, **{field: None}))
    with pytest.raises(ValueError, match=named):
        preference_outcome("chip", replace(inputs, rejected=rejected), {})


def test_adpo_asks_for_tokens_only_where_it_weighs_them() -> None:
    inputs = random_inputs(3)
    assert inputs.chosen_negative_image is not None
    inputs = replace(inputs, chosen_negative_image=replace(inputs.chosen_negative_image, by_token=None))
    with pytest.raises(ValueError, match=r"chosen_negative_image\.by_token, or set has_confidence_weights: false"):
        preference_outcome("adpo", inputs, {})
    assert torch.isfinite(preference_outcome("adpo", inputs, {"has_confidence_weights": False}).values).all()


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(RegistryError, match=r"anchor_wieght is not an option of 'mdpo'\. Did you mean anchor_weight"):
        preference_outcome("mdpo", random_inputs(2), {"anchor_wieght": 1.0})


def test_dama_is_that_worked_by_hand() -> None:
    # Mean margin 0: alpha_D = sigmoid(margin) / 0.5; for a margin of log 3, sigmoid is 3/4 and alpha_D 1.5.
    # The state's model_scale is 0.8: beta = 0.5 * 1.5 * 0.8 = 0.6; h = 2: log(1 + e^-1.2) = 0.263282.
    state = Hardness(0.9, 2.0, model_scale=0.8)
    inputs = PreferenceInputs(answer(1.0), answer(-1.0), reward_margins=tensor(math.log(3.0)), state=state)
    outcome = preference_outcome("dama", inputs, {"beta": 0.5, "margin_mean": 0.0})
    assert outcome.values.item() == pytest.approx(0.263282, abs=1e-6)
    assert means(outcome.sums)["beta"] == pytest.approx(0.6)


def dama_step(gaps: list[float], state: Hardness | None, margins: list[float] | None = None) -> Hardness:
    """The state after a step whose pairs have these implicit reward gaps (beta 1)."""
    count = len(gaps)
    ones = torch.ones(count, dtype=torch.int64)
    zeros = torch.zeros(count, dtype=torch.float64)
    inputs = PreferenceInputs(
        AnswerLogProbs(tensor(*gaps), ones, zeros),
        AnswerLogProbs(zeros, ones, zeros),
        reward_margins=zeros if margins is None else tensor(*margins),
        state=state,
    )
    options = {"beta": 1.0, "decay": 0.5}
    entry = PREFERENCE_LOSSES.get("dama")
    before = entry.initial_state(entry.read_options(options)) if state is None else state  # type: ignore[misc]
    after: Hardness = before.after(preference_outcome("dama", replace(inputs, state=before), options).sums)
    return after


def test_damas_state_is_that_worked_by_hand() -> None:
    # Step 1: gaps 0 and 2: mean 1, deviation 1, no scale yet.
    first = dama_step([0.0, 2.0], None, margins=[1.0, 3.0])
    assert first.gap_mean == pytest.approx(1.0)
    assert first.margin_mean == pytest.approx(2.0)
    assert first.model_scale == 1.0
    # Step 2: gaps 2, 2.5 and 4; 4 is more than 2 deviations from 1 and left out: batch mean 2.25.
    # model_scale = sigmoid(2.25) / sigmoid(1) = 0.904651 / 0.731059 = 1.237453.
    # Means with decay 0.5: gap (0.5 * 2 + 4.5) / (1 + 2) = 11/6; margin (0.5 * 4 + 0) / (1 + 3) = 0.5.
    second = dama_step([2.0, 2.5, 4.0], first)
    assert second.model_scale == pytest.approx(1.237453, abs=1e-6)
    assert second.gap_mean == pytest.approx(11 / 6)
    assert second.margin_mean == pytest.approx(0.5)


def test_damas_outliers_come_back_when_all_pairs_move() -> None:
    # From a narrow past, a whole batch far off is taken as it is, so the means can follow.
    state = dama_step([0.9, 1.1], None)
    moved = dama_step([50.0, 51.0], state)
    assert moved.gap_mean is not None
    assert moved.gap_mean > 30


def test_dama_starts_at_dpo_and_keeps_every_pair_while_the_past_has_no_spread() -> None:
    state = dama_step([0.0, 0.0], None)
    assert bool(state.is_kept(tensor(-3.0, 0.0, 3.0)).all())
    assert state.model_scale == 1.0


def test_dama_holds_easy_pairs_back_and_lets_hard_ones_loose() -> None:
    ones = torch.ones(3, dtype=torch.int64)
    zeros = torch.zeros(3, dtype=torch.float64)
    answers = AnswerLogProbs(zeros, ones, zeros)
    betas = []
    for margin in (-1.0, 0.0, 1.0):
        inputs = PreferenceInputs(answers, answers, reward_margins=torch.full_like(zeros, margin))
        betas.append(means(preference_outcome("dama", inputs, {"margin_mean": 0.0, "beta": 1.0}).sums)["beta"])
    assert betas == sorted(betas)
    assert betas[1] == pytest.approx(1.0)


def test_damas_state_refuses_sums_that_arent_finite() -> None:
    bad = torch.tensor([math.nan, 1.0])
    fine = torch.tensor([1.0, 1.0])
    with pytest.raises(NonFiniteError, match="the sum of reward_gap"):
        Hardness(0.9, 2.0).after({"reward_gap": bad, "reward_gap_square": fine, "kept_reward_gap": fine})
