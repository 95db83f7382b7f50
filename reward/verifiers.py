"""Built-in verifiers: reward functions that decide by a rule, each from one completion and its target.

A target that is missing or can't be read is a failure of the data (``target_missing``, ``target_invalid``).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from reward.registry import RewardRequest, reward_function
from rollout.failures import DataError

ANSWER = r"<answer>(.*?)</answer>"
THINK_THEN_ANSWER = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"

_LONGEST_NUMBER = 64
_LARGEST_EXPONENT = 308
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*[$€£]?\s*(?:(?P<whole>\d+)\s+(?P<part>\d+\s*/\s*\d+)|(?P<top>{_UNSIGNED})"
    rf"(?:\s*/\s*(?P<bottom>{_UNSIGNED}))?)\s*(?P<percent>%?)",
    re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def extract(text: str, pattern: str | None) -> str | None:
    """The first group (or, without groups, the whole) of the last match of ``pattern``; None where there is none.

    The last match counts, as the final answer of a text that revises itself. A pattern of None takes the whole text.
    """
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text, re.DOTALL))
    if not matches:
        return None
    found = matches[-1]
    return ((found.group(1) if found.re.groups else found.group(0)) or "").strip()


def parse_number(text: str) -> Fraction | None:
    """The number that the whole of ``text`` is, exactly; None where it isn't one.

    Reads 1,234.5 (groups of three only), -3/4, 1 1/2, \\frac{3}{4}, 50% (one half), 1e-3, $5, a Unicode minus, one full
    stop at the end. Refuses 1,23, 1/0, words, units, and more than 64 characters or exponents beyond 308.
    """
    text = _LATEX_FRACTION.sub(r"\1/\2", text.strip().strip("$")).replace("\N{MINUS SIGN}", "-").replace("\\%", "%")
    if len(text) > _LONGEST_NUMBER:
        return None
    match = _NUMBER.fullmatch(text) or _NUMBER.fullmatch(text.removesuffix("."))
    if match is None:
        return None
    try:
        if match["whole"] is not None:
            value = int(match["whole"]) + Fraction(match["part"].replace(" ", ""))
        else:
            value = _unsigned(match["top"]) / (_unsigned(match["bottom"]) if match["bottom"] else 1)
    except ZeroDivisionError:
        return None
    return value * (-1 if match["sign"] == "-" else 1) / (100 if match["percent"] else 1)


def _unsigned(text: str) -> Fraction:
    exponent = re.split("[eE]", text)[1:]
    if exponent and abs(int(exponent[0])) > _LARGEST_EXPONENT:
        raise ZeroDivisionError  # as unreadable as a zero denominator
    return Fraction(text.replace(",", ""))


@reward_function("exact_match")
def exact_match(request: RewardRequest, *, pattern: str | None = ANSWER, ignore_case: bool = False) -> float:
    """1 where the extracted answer is the target's text, else 0.

    Surrounding white space is ignored and runs of it inside count as one space. A target that is a list allows any of
    its entries; numbers are compared as text ("7.0" is not 7: use numeric_match). No match of ``pattern`` gives 0.
    """
    allowed = {_plain(text, ignore_case) for text in _texts(request)}
    answer = extract(request.completion, pattern)
    return float(answer is not None and _plain(answer, ignore_case) in allowed)


@reward_function("numeric_match")
def numeric_match(
    request: RewardRequest,
    *,
    pattern: str | None = ANSWER,
    tolerance: float = 0.0,
    relative_tolerance: float = 1e-6,
) -> float:
    """1 where the extracted answer is a number within the tolerance of the target, else 0.

    Numbers are read as in :func:`parse_number`: "50%" is one half, so it isn't a target of 50. The distance allowed is
    the larger of ``tolerance`` and ``relative_tolerance`` times the target's size. Text that isn't wholly a number,
    such as "12 apples", gives 0.
    """
    target = request.target
    if target is None or target == "":
        raise DataError("target_missing", f"prompt {request.prompt_id} has no target; numeric_match needs a number")
    wanted = parse_number(str(target)) if not isinstance(target, bool) else None
    if wanted is None:
        raise DataError("target_invalid", f"prompt {request.prompt_id}: the target {target!r:.80} is not a number")
    answer = extract(request.completion, pattern)
    given = parse_number(answer) if answer is not None else None
    if given is None:
        return 0.0
    return float(abs(given - wanted) <= max(Fraction(tolerance), Fraction(relative_tolerance) * abs(wanted)))


@reward_function("format_match")
def format_match(request: RewardRequest, *, pattern: str = THINK_THEN_ANSWER) -> float:
    """1 where the whole completion matches ``pattern`` (``re.fullmatch``; a dot matches newlines too), else 0.

    The default, reasoning and then an answer in tags, doesn't forbid a tag inside another's text.
    """
    return float(re.fullmatch(pattern, request.completion, re.DOTALL) is not None)


@reward_function("contains")
def contains(request: RewardRequest, *, text: str | list[str] | None = None, ignore_case: bool = True) -> float:
    """1 where the completion contains the text, or any entry of a list; else 0. By default the text is the target.

    It looks for characters, not words: "cat" is in "concatenate". Empty text would be in everything and is refused.
    """
    wanted = _texts(request) if text is None else [text] if isinstance(text, str) else list(text)
    if not wanted or not all(wanted):
        raise DataError("target_invalid", f"prompt {request.prompt_id}: contains can't look for empty text")
    completion = _plain(request.completion, ignore_case)
    return float(any(_plain(one, ignore_case) in completion for one in wanted))


@reward_function("length_penalty")
def length_penalty(request: RewardRequest, *, max_tokens: int, buffer_tokens: int) -> float:
    """The soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), from -1 to 0, of the completion's tokens.

    0 up to ``max_tokens - buffer_tokens``, then falling linearly, -1 from ``max_tokens`` on. ``max_tokens`` is usually
    the sampling limit; the end-of-turn token counts.

    Raises:
        ValueError: not 0 < buffer_tokens <= max_tokens.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"length_penalty needs 0 < buffer_tokens <= max_tokens; got {buffer_tokens} and {max_tokens}")
    over = len(request.token_ids) - (max_tokens - buffer_tokens)
    return -min(max(over / buffer_tokens, 0.0), 1.0)


@reward_function("choice_match")
def choice_match(request: RewardRequest, *, choices: str = "ABCD", pattern: str | None = ANSWER) -> float:
    """1 where the completion chooses the target's letter, else 0.

    Read from the last match of ``pattern`` if there is one, else from the whole completion (see
    :func:`chosen_letter`). Naming two letters chooses none.
    """
    target = str(request.target).strip().upper() if request.target is not None else ""
    if not target:
        raise DataError("target_missing", f"prompt {request.prompt_id} has no target; choice_match needs a letter")
    if len(target) != 1 or target not in choices.upper():
        raise DataError(
            "target_invalid", f"prompt {request.prompt_id}: {target!r:.40} is not one of the choices {choices}"
        )
    answer = extract(request.completion, pattern)
    return float(chosen_letter(request.completion if answer is None else answer, choices) == target)


def chosen_letter(text: str, choices: str = "ABCD") -> str | None:
    """The one letter ``text`` chooses, in upper case; None where it chooses none, or more than one.

    Reads "B", "(b)", "B. Paris", "b) Paris", "B: Paris", "\\boxed{B}" and "... the answer is B". The article in "A cat"
    and the letters of words are no choice.
    """
    upper = f"[{re.escape(choices.upper())}]"
    letter = f"[{re.escape(choices.upper() + choices.lower())}]"
    marked = rf"\(\s*({letter})\s*\)|\[\s*({letter})\s*\]|\\boxed\{{\s*({letter})\s*\}}|\*\*({letter})\*\*"
    another = rf"(?!\s*(?:,|/|or\b|and\b)\s*[(\[*]*{upper}\b)"
    said = rf"(?:{marked}|({upper})(?![\w'])|({letter})(?=[.,;:)!]|\s*$)){another}"
    text = text.strip()
    if whole := re.fullmatch(rf"(?:{marked}|({letter}))\s*[.):,]?", text):
        found = [whole.groups()]
    elif stated := re.findall(rf"(?i:\banswer)(?i:\s+is\b)?\s*[:=]?\s*{said}", text):
        found = stated
    else:
        found = re.findall(rf"^({letter})[.):](?=\s|$)|\\boxed\{{\s*({letter})\s*\}}|\(({letter})\)", text)
    chosen = {"".join(group or "" for group in groups).upper() for groups in found}
    return chosen.pop() if len(chosen) == 1 else None


def _texts(request: RewardRequest) -> list[str]:
    """The texts a target allows."""
    target: Any = request.target
    entries = list(target) if isinstance(target, list | tuple) else [target]
    if not entries or any(entry is None for entry in entries):
        raise DataError("target_missing", f"prompt {request.prompt_id} has no target, and its reward compares with one")
    return [str(entry) for entry in entries]


def _plain(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
