"""The prompt cursor: every prompt once an epoch, and a resumed run goes on with exactly the next one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.cursor import PromptCursor
from rollout.datasets import DatasetError, PromptSet
from rollout.prompts import Message, Prompt, TextPart


def prompt_set(n: int, name: str = "numbers") -> PromptSet:
    prompts = (Prompt((Message("user", (TextPart(f"{name} {k}"),)),), target=k) for k in range(n))
    return PromptSet(name, f"{name}.jsonl", tuple(prompts))


def targets(prompts: list[Prompt]) -> list[int]:
    return [prompt.target for prompt in prompts]


def test_every_epoch_draws_each_prompt_once_in_an_order_of_its_own() -> None:
    cursor = PromptCursor(prompt_set(20), seed=0)
    first, second = targets(cursor.take(20)), targets(cursor.take(20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))


def test_the_seed_decides_the_order() -> None:
    orders = [targets(PromptCursor(prompt_set(20), seed=seed).take(20)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_more_than_an_epoch_can_be_taken_at_once() -> None:
    drawn = targets(PromptCursor(prompt_set(3), seed=0).take(7))
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]


def test_a_quarantined_prompt_is_never_drawn_again() -> None:
    prompts = prompt_set(4)
    cursor = PromptCursor(prompts, seed=0)
    cursor.quarantine(prompts.prompts[2].prompt_id)
    restored = PromptCursor.restore(prompts, cursor.state([prompts.prompts[2]]))
    assert 2 not in targets(cursor.take(12))
    assert 2 not in targets(restored.take(12))


def test_when_every_prompt_is_quarantined_it_says_so_instead_of_searching_for_ever() -> None:
    prompts = prompt_set(2)
    cursor = PromptCursor(prompts, seed=0)
    for prompt in prompts.prompts:
        cursor.quarantine(prompt.prompt_id)
    with pytest.raises(DatasetError, match="every one of the 2 prompts of numbers is quarantined"):
        cursor.take(1)


def test_a_restored_cursor_draws_the_open_prompts_first_and_in_their_order() -> None:
    prompts = prompt_set(10)
    cursor = PromptCursor(prompts, seed=0)
    drawn = cursor.take(5)
    restored = PromptCursor.restore(prompts, cursor.state(drawn[1:]))
    assert restored.take(4) == drawn[1:]


@given(taken=st.integers(0, 25), still_open=st.integers(0, 6), bad=st.sets(st.integers(0, 6), max_size=3))
def test_a_restored_cursor_draws_the_open_prompts_and_then_what_would_have_come(
    taken: int, still_open: int, bad: set[int]
) -> None:
    prompts = prompt_set(7)
    cursor = PromptCursor(prompts, seed=5)
    for k in bad:
        cursor.quarantine(prompts.prompts[k].prompt_id)
    drawn = cursor.take(taken)
    open_prompts = drawn[len(drawn) - min(still_open, taken) :]
    state = json.loads(json.dumps(cursor.state(open_prompts)))
    restored = PromptCursor.restore(prompt_set(7), state)
    assert targets(restored.take(len(open_prompts) + 20)) == targets(open_prompts) + targets(cursor.take(20))
    assert restored.quarantined == cursor.quarantined


def test_a_state_of_other_prompts_is_refused() -> None:
    state = PromptCursor(prompt_set(5), seed=0).state()
    with pytest.raises(DatasetError, match=r"numbers\.jsonl has changed since the checkpoint"):
        PromptCursor.restore(prompt_set(6), state)


def test_a_prompt_of_another_set_can_not_be_open() -> None:
    with pytest.raises(ValueError, match="is not one of the 3 prompts of numbers"):
        PromptCursor(prompt_set(3), seed=0).state(prompt_set(1, "letters").prompts)


def test_a_cursor_restored_twice_draws_the_newly_open_prompts_before_those_still_undrawn() -> None:
    prompts = prompt_set(9)
    cursor = PromptCursor(prompts, seed=0)
    drawn = cursor.take(4)
    once = PromptCursor.restore(prompts, cursor.state(drawn[1:]))
    assert once.take(1) == drawn[1:2]
    twice = PromptCursor.restore(prompts, once.state(drawn[:2]))
    assert twice.take(5) == drawn + PromptCursor.restore(prompts, cursor.state()).take(1)
