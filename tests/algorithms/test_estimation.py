"""What stands around every estimator: token rewards, credit by turn, weighting by difficulty, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.estimation import estimate_advantages, weigh_by_difficulty
from algorithms.finite import NonFiniteError
from algorithms.inputs import AdvantageInputs
from algorithms.registry import ADVANTAGE_ESTIMATORS, Options, RegistryError, advantage_estimator
from algorithms.turns import by_turn

BY_SAMPLE = ("grpo", "dr_grpo", "rloo", "reinforce", "opo", "gpg", "reinforce_plus_plus_baseline", "grpo_winner")


def batch(
    rewards: list[float], group: list[int], masks: list[str], token_rewards: list[float] | None = None
) -> AdvantageInputs:
    """Samples whose masks are drawn: "a" for an action, "." for a token of the environment."""
    return AdvantageInputs(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        group=torch.tensor(group),
        lengths=torch.tensor([len(mask) for mask in masks]),
        mask=torch.tensor([token == "a" for mask in masks for token in mask]),
        token_rewards=None if token_rewards is None else torch.tensor(token_rewards, dtype=torch.float64),
    )


@st.composite
def batches(draw: st.DrawFn) -> AdvantageInputs:
    masks = draw(st.lists(st.text("a.", min_size=1, max_size=9), min_size=1, max_size=8))
    eighths = st.integers(-16, 16).map(lambda n: n / 8)
    tokens = sum(map(len, masks))
    return batch(
        draw(st.lists(eighths, min_size=len(masks), max_size=len(masks))),
        draw(st.lists(st.integers(0, 2), min_size=len(masks), max_size=len(masks))),
        masks,
        draw(st.none() | st.lists(eighths, min_size=tokens, max_size=tokens)),
    )


def turns_by_loop(inputs: AdvantageInputs, discount: float) -> list[tuple[int, int, list[int], float]]:
    """Each turn as (prompt, number, tokens, what it is credited with)."""
    found, start = [], 0
    for sample, length in enumerate(inputs.lengths.tolist()):
        turns: list[list[int]] = []
        for token in range(start, start + length):
            if not inputs.mask[token]:
                continue
            if turns and turns[-1][-1] == token - 1:
                turns[-1].append(token)
            else:
                turns.append([token])
        credit, rows = 0.0, []
        for number, tokens in reversed(list(enumerate(turns))):
            own = 0.0 if inputs.token_rewards is None else sum(float(inputs.token_rewards[t]) for t in tokens)
            own += float(inputs.rewards[sample]) if number == len(turns) - 1 else 0.0
            credit = own + discount * credit
            rows.append((int(inputs.group[sample]), number, tokens, credit))
        found += reversed(rows)
        start += length
    return found


def test_token_rewards_are_summed_into_the_reward_of_their_sample() -> None:
    # Sums over the actions: 1 + 0.5, 0 + 1, and 0; the environment's tokens count for nothing.
    inputs = batch([1, 0, 0], [0, 0, 0], ["a.a", "aa", "a"], [0.25, 9, 0.25, 1, 0, 0])
    mean = 2.5 / 3
    expected = torch.tensor([1.5 - mean, 0, 1.5 - mean, 1 - mean, 1 - mean, -mean], dtype=torch.float64)
    torch.testing.assert_close(estimate_advantages("dr_grpo", inputs), expected)


@pytest.mark.parametrize("name", BY_SAMPLE)
@given(inputs=batches())
@settings(max_examples=40)
def test_advantages_stand_on_the_actions_alone(name: str, inputs: AdvantageInputs) -> None:
    found = estimate_advantages(name, inputs)
    assert found.shape == inputs.mask.shape
    assert torch.equal(found[~inputs.mask], torch.zeros(int((~inputs.mask).sum()), dtype=torch.float64))
    for sample in range(len(inputs.lengths)):
        assert len(set(found[(inputs.sample == sample) & inputs.mask].tolist())) <= 1


def test_credit_by_turn_is_the_one_worked_by_hand() -> None:
    # First sample: turns of 2 and 1 tokens with token rewards 1 and 0 and the reward 2 at the end. Second: the same
    # turns with 0 and 1, and the reward 0. With nothing handed back, the first turns have 1 and 0 (mean 1/2), the
    # second 2 and 1 (mean 3/2).
    inputs = batch([2, 0], [4, 4], ["aa.a", "a.aa"], [0.5, 0.5, 9, 0, 0, 9, 0.5, 0.5])
    found = estimate_advantages("dr_grpo", inputs, credit="turn", turn_discount=0.0)
    assert found.tolist() == [0.5, 0.5, 0, 0.5, -0.5, 0, -0.5, -0.5]
    # With half handed back, the first turns have 1 + 2/2 and 0 + 1/2: mean 5/4.
    found = estimate_advantages("dr_grpo", inputs, credit="turn", turn_discount=0.5)
    assert found.tolist() == [0.75, 0.75, 0, 0.5, -0.75, 0, -0.5, -0.5]


@given(batches(), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60)
def test_turns_agree_with_a_loop(inputs: AdvantageInputs, discount: float) -> None:
    turns, expected = by_turn(inputs, discount), turns_by_loop(inputs, discount)
    torch.testing.assert_close(turns.inputs.rewards, torch.tensor([each[3] for each in expected], dtype=torch.float64))
    assert turns.inputs.lengths.tolist() == [len(each[2]) for each in expected]
    assert turns.actions.index.tolist() == [token for each in expected for token in each[2]]
    # Turns share a group exactly where prompt and number are the same.
    pairs = dict(zip(turns.inputs.group.tolist(), [each[:2] for each in expected], strict=True))
    assert [pairs[group] for group in turns.inputs.group.tolist()] == [each[:2] for each in expected]
    assert len(pairs) == len({each[:2] for each in expected})


@pytest.mark.parametrize("name", BY_SAMPLE)
@given(inputs=batches())
@settings(max_examples=40)
def test_with_one_turn_a_sample_credit_by_turn_is_credit_by_trajectory(name: str, inputs: AdvantageInputs) -> None:
    whole = replace(inputs, mask=torch.ones_like(inputs.mask))
    torch.testing.assert_close(
        estimate_advantages(name, whole, credit="turn"), estimate_advantages(name, whole), rtol=1e-7, atol=1e-9
    )


def test_a_reward_at_the_end_alone_reaches_all_turns_and_no_group_holds_turns_of_different_number() -> None:
    inputs = batch([1, 0], [0, 0], ["a.a", "a"])
    # First turns: 1 and 0. The second turn has no peer.
    assert estimate_advantages("dr_grpo", inputs, credit="turn").tolist() == [0.5, 0, 0, -0.5]


def test_a_batch_without_an_action_has_no_advantages() -> None:
    inputs = batch([1, 0], [0, 0], ["..", "."], [1, 2, 3])
    for credit in ("trajectory", "turn"):
        found = estimate_advantages("grpo", inputs, credit=credit)  # type: ignore[arg-type]
        assert torch.equal(found, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(estimate_advantages("reinforce_plus_plus", inputs), torch.zeros(3, dtype=torch.float64))


def test_difficulty_weighs_groups_by_how_far_from_certain_they_are() -> None:
    # Mean rewards 1/2, 1/4 and 1 between the batch's bounds 0 and 1: weights 1, 3/4 and 0.
    inputs = batch([1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2], ["aa", *["a"] * 7])
    ones = torch.ones(9, dtype=torch.float64)
    assert weigh_by_difficulty(ones, inputs).tolist() == [1, 1, 1, 0.75, 0.75, 0.75, 0.75, 0, 0]
    # Between -1 and 1 the means are 3/4, 5/8 and 1.
    found = weigh_by_difficulty(ones, inputs, low=-1, high=1).tolist()
    assert found == [0.75] * 3 + [15 / 16] * 4 + [0, 0]


@given(batches(), st.sampled_from([-2.0, 7.0]), st.sampled_from([0.25, 8.0]))
@settings(max_examples=50)
def test_difficulty_does_not_change_with_a_shift_or_scale_of_the_rewards(
    inputs: AdvantageInputs, shift: float, scale: float
) -> None:
    ones = torch.ones(len(inputs.mask), dtype=torch.float64)
    found = weigh_by_difficulty(ones, inputs)
    moved = weigh_by_difficulty(ones, replace(inputs, rewards=inputs.rewards * scale + shift))
    torch.testing.assert_close(moved, found, rtol=0, atol=1e-9)
    assert bool(((found >= 0) & (found <= 1)).all())


def test_difficulty_leaves_a_batch_of_equal_rewards_alone_and_refuses_bounds_the_wrong_way_round() -> None:
    inputs = batch([2, 2], [0, 1], ["a", "a"])
    tokens = torch.tensor([1.0, -1.0])
    assert torch.equal(weigh_by_difficulty(tokens, inputs), tokens)
    with pytest.raises(ValueError, match="low = 1 is above high = 0"):
        weigh_by_difficulty(tokens, inputs, low=1, high=0)
    with pytest.raises(NonFiniteError, match="the reward of sample 1 is nan"):
        weigh_by_difficulty(tokens, batch([2, math.nan], [0, 1], ["a", "a"]))


def test_shapes_that_differ_are_refused() -> None:
    inputs = batch([1, 0], [0, 0], ["a", "aa"])
    with pytest.raises(ValueError, match=r"\[samples\] all, got \[3\], \[2\] and \[2\]"):
        estimate_advantages("grpo", replace(inputs, rewards=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"token_rewards must be \[3\], one a completion token, got \[2\]"):
        estimate_advantages("grpo", replace(inputs, token_rewards=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"greedy_rewards must be \[2\], got \[3\]"):
        estimate_advantages("remax", replace(inputs, greedy_rewards=torch.zeros(3)))


def test_whole_number_rewards_are_refused_rather_than_rounded() -> None:
    inputs = batch([1, 0], [0, 0], ["a", "a"])
    with pytest.raises(ValueError, match="floating point"):
        estimate_advantages("grpo", replace(inputs, rewards=torch.tensor([1, 0])))


def test_no_samples_give_no_advantages() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert estimate_advantages("grpo", AdvantageInputs(torch.zeros(0), empty, empty, empty.bool())).shape == (0,)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gae", "values"),
        ("remax", "greedy_rewards"),
        ("gdpo", "components, is_present, component_weights"),
        ("optimal_token_baseline", "collision"),
    ],
)
def test_an_estimator_without_what_it_needs_is_refused_naming_the_field(name: str, missing: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}' needs .* but AdvantageInputs has no {missing}"):
        estimate_advantages(name, batch([1, 0], [0, 0], ["a", "a"]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("reinforce_plus_plus", "credits each token already, so credit by turn can't be applied"),
        ("remax", "works on greedy rewards, which belong to a whole completion and not to a turn"),
        ("gdpo", "works on components, which belong to a whole completion and not to a turn"),
    ],
)
def test_an_estimator_that_knows_no_turns_is_refused_with_the_reason(name: str, reason: str) -> None:
    inputs = replace(
        batch([1, 0], [0, 0], ["a", "a"]),
        greedy_rewards=torch.zeros(2),
        components=torch.zeros(2, 1),
        is_present=torch.ones(2, 1, dtype=torch.bool),
        component_weights=torch.ones(1),
    )
    with pytest.raises(ValueError, match=reason):
        estimate_advantages(name, inputs, credit="turn")


def test_token_rewards_with_an_estimator_of_components_are_refused_with_the_reason() -> None:
    inputs = replace(
        batch([1, 0], [0, 0], ["a", "a"], [0, 1]),
        components=torch.zeros(2, 1),
        is_present=torch.ones(2, 1, dtype=torch.bool),
        component_weights=torch.ones(1),
    )
    with pytest.raises(ValueError, match=r"token rewards .* belong to none of them"):
        estimate_advantages("gdpo", inputs)


def test_a_turn_discount_outside_its_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"turn_discount = 1\.5 must lie between 0 and 1"):
        estimate_advantages("grpo", batch([1, 0], [0, 0], ["a", "a"]), credit="turn", turn_discount=1.5)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(RegistryError, match=r"advantage_options\.discont is not an option .* Did you mean discount"):
        estimate_advantages("reinforce_plus_plus", batch([1.0], [0], ["a"]), {"discont": 1.0})


def test_an_estimator_of_ones_own_is_checked_like_the_built_in_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ADVANTAGE_ESTIMATORS, "_entries", dict(ADVANTAGE_ESTIMATORS._entries))

    @advantage_estimator("test_of_ones_own")
    def of_ones_own(inputs: AdvantageInputs, options: Options) -> Tensor:
        return 1 / inputs.rewards

    assert "test_of_ones_own" in ADVANTAGE_ESTIMATORS
    with pytest.raises(NonFiniteError, match="the advantage by 'test_of_ones_own' of sample 1 is inf"):
        estimate_advantages("test_of_ones_own", batch([1, 0], [0, 0], ["a", "aa"]))
    found = estimate_advantages("test_of_ones_own", batch([1, 2], [0, 0], ["a", "a."]))
    assert found.tolist() == [1, 0.5, 0]
