"""The built-in verifiers: worked examples, then properties."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.registry import RewardRequest
from reward.verifiers import (
    choice_match,
    chosen_letter,
    contains,
    exact_match,
    extract,
    format_match,
    length_penalty,
    numeric_match,
    parse_number,
)
from rollout.failures import DataError
from rollout.prompts import Prompt

Make = Callable[..., RewardRequest]


@pytest.mark.parametrize(
    ("completion", "target", "value"),
    [
        ("<answer>7</answer>", "7", 1.0),
        ("<answer> 7\n</answer>", 7, 1.0),
        ("<answer>8</answer> no, <answer>7</answer>", "7", 1.0),
        ("<answer>7</answer> no, <answer>8</answer>", "7", 0.0),
        ("7", "7", 0.0),
        ("<answer>two  words</answer>", "two words", 1.0),
        ("<answer>b</answer>", ["a", "b"], 1.0),
        ("<answer></answer>", "7", 0.0),
    ],
)
def test_exact_match_compares_the_last_answer(request_for: Make, completion: str, target: Any, value: float) -> None:
    assert exact_match(request_for(completion, target)) == value


def test_exact_match_minds_case_unless_told_otherwise(request_for: Make) -> None:
    request = request_for("<answer>Paris</answer>", "paris")
    assert (exact_match(request), exact_match(request, ignore_case=True)) == (0.0, 1.0)


@pytest.mark.parametrize("verifier", [exact_match, numeric_match, choice_match, contains])
def test_a_missing_target_is_a_failure_of_the_data(request_for: Make, verifier: Callable[..., float]) -> None:
    with pytest.raises(DataError, match="no target"):
        verifier(request_for("no answer here", None))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("1,234.5", Fraction(2469, 2)),
        ("-3/4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("50%", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)),
        ("$5", 5),
        ("−2", -2),
        ("7.", 7),
        (".5", Fraction(1, 2)),
        ("1,23", None),
        ("12,345,67", None),
        ("1/0", None),
        ("12 apples", None),
        ("", None),
        ("nan", None),
        ("1e999", None),
        ("9" * 65, None),
        ("1/2/3", None),
        ("٣", None),
    ],
)
def test_numbers_are_read_exactly_or_not_at_all(text: str, number: Any) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("answer", "target", "arguments", "value"),
    [
        ("0.3333", "1/3", {}, 0.0),
        ("0.3333", "1/3", {"tolerance": 1e-3}, 1.0),
        ("1,000", 1000, {}, 1.0),
        ("100.4", 100, {"relative_tolerance": 0.005}, 1.0),
        ("100.6", 100, {"relative_tolerance": 0.005}, 0.0),
        ("50%", "50", {}, 0.0),
        ("seven", 7, {}, 0.0),
    ],
)
def test_numeric_match_allows_the_larger_tolerance(
    request_for: Make, answer: str, target: Any, arguments: dict[str, float], value: float
) -> None:
    assert numeric_match(request_for(f"<answer>{answer}</answer>", target), **arguments) == value


@pytest.mark.parametrize("target", ["seven", True])
def test_a_target_that_is_no_number_is_a_failure_of_the_data(request_for: Make, target: Any) -> None:
    with pytest.raises(DataError, match="not a number"):
        numeric_match(request_for("<answer>7</answer>", target))


def test_format_match_wants_the_whole_completion(request_for: Make) -> None:
    assert format_match(request_for("<think>a\nb</think>\n<answer>7</answer>")) == 1.0
    assert format_match(request_for("<think>a</think><answer>7</answer> and more")) == 0.0


def test_contains_looks_for_any_of_the_texts(request_for: Make) -> None:
    assert contains(request_for("It is a Cat.", "cat")) == 1.0
    assert contains(request_for("It is a Cat.", "cat"), ignore_case=False) == 0.0
    assert contains(request_for("It is a dog."), text=["cat", "dog"]) == 1.0


def test_contains_refuses_empty_text(request_for: Make) -> None:
    with pytest.raises(DataError, match="empty"):
        contains(request_for("anything", ""))


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (500, -1.0)])
def test_the_overlong_punishment_falls_linearly_over_the_buffer(request_for: Make, tokens: int, value: float) -> None:
    # from 100 - 20 = 80 tokens on, (80 - tokens) / 20
    assert length_penalty(request_for("", tokens=tokens), max_tokens=100, buffer_tokens=20) == value


def test_a_buffer_that_makes_no_sense_is_refused(request_for: Make) -> None:
    with pytest.raises(ValueError, match="buffer_tokens"):
        length_penalty(request_for(""), max_tokens=10, buffer_tokens=0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. Paris", "B"),
        ("b) Paris", "B"),
        ("C: because", "C"),
        (r"So \boxed{D}", "D"),
        ("I think the answer is B", "B"),
        ("The answer is (C).", "C"),
        ("Answer: **D**", "D"),
        ("It must be (A), surely", "A"),
        ("A cat", None),
        ("The answer is a cat", None),
        ("Because", None),
        ("(A) or (B)", None),
        ("The answer is A or B", None),
        ("The answer is c.", "C"),
        ("The answer is D because", "D"),
        ("(C) since (c) is round", "C"),
        ("The answer is A. No, the answer is B.", None),
        ("E", None),
        ("", None),
    ],
)
def test_a_letter_is_chosen_only_where_it_is_stated_once(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_choice_match_reads_the_tag_first(request_for: Make) -> None:
    assert choice_match(request_for("(A) looks right <answer>B</answer>", "b")) == 1.0
    assert choice_match(request_for("The answer is B", "B")) == 1.0
    with pytest.raises(DataError, match="not one of the choices"):
        choice_match(request_for("B", "E"))


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_every_fraction_reads_back(number: Fraction) -> None:
    assert parse_number(str(number)) == number


@given(st.integers(-(10**15), 10**15))
def test_thousands_separators_do_not_change_a_number(number: int) -> None:
    assert parse_number(f"{number:,}") == number


@given(st.text())
def test_any_text_is_a_number_or_none(text: str) -> None:
    assert isinstance(parse_number(text), Fraction | None)


@given(st.text(), st.text(alphabet="ABCD", min_size=1, max_size=1))
def test_the_verifiers_give_zero_or_one_for_any_completion(completion: str, target: str) -> None:
    request = RewardRequest(Prompt((), target), completion)
    assert {f(request) for f in (exact_match, contains, choice_match, format_match)} <= {0.0, 1.0}


@given(st.text().filter(lambda text: "<" not in text))
def test_a_tagged_answer_is_extracted_whole(answer: str) -> None:
    assert extract(f"so <answer>{answer}</answer>", r"<answer>(.*?)</answer>") == answer.strip()


@given(st.integers(0, 10_000), st.integers(1, 5_000), st.integers(0, 5_000))
def test_the_overlong_punishment_never_rises_with_length(tokens: int, buffer: int, rest: int) -> None:
    def penalty(n: int) -> float:
        request = RewardRequest(Prompt(()), "", np.zeros(n, np.int32))
        return length_penalty(request, max_tokens=buffer + rest, buffer_tokens=buffer)

    assert -1.0 <= penalty(tokens + 1) <= penalty(tokens) <= 0.0
