"""What reward functions return: each value is read as a finite number or a failure, then combined to a score. Pure.

A failure never becomes a number. What isn't a real, finite number is refused with a reason and the value's repr.
"""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from reward.config import RewardComponentConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.samples import Score

ComponentValues = dict[str, float]
"""What one function gave one completion: {"function": value}, or {"function/key": value, ...} for a dict."""

TRACEBACK_LINES = 20
REPR_CHARACTERS = 120
_CALLERS = frozenset(str(Path(__file__).with_name(name)) for name in ("worker_main.py", "registry.py"))


def component_labels(components: Sequence[RewardComponentConfig]) -> list[str]:
    """A name for each component: its function's name, with "#2", "#3" where the function is used again."""
    seen: dict[str, int] = {}
    labels = []
    for component in components:
        seen[component.function] = count = seen.get(component.function, 0) + 1
        labels.append(component.function if count == 1 else f"{component.function}#{count}")
    return labels


def user_failure(reason: str, label: str, prompt_id: str, problem: str) -> Failure:
    """A failure of the user's function; its message names the function and the prompt."""
    return Failure(FailureKind.USER_CODE, reason, f"reward function {label!r}, prompt {prompt_id}: {problem}")


def raised(label: str, prompt_id: str, error: BaseException) -> Failure:
    """The failure for an exception that a function raised: its last lines of traceback, or the failure it carries."""
    if isinstance(error, FailureError):
        inner = error.failure
        return Failure(inner.kind, inner.reason, f"reward function {label!r}, prompt {prompt_id}: {inner.message}")
    text = "".join(traceback.format_exception(error.with_traceback(_from_user_code(error.__traceback__)))).rstrip()
    lines = [line[:500] for line in text.splitlines()]
    if len(lines) > TRACEBACK_LINES:
        lines = ["...", *lines[-TRACEBACK_LINES + 1 :]]
    kind = type(error).__name__
    return user_failure("reward_raised", label, prompt_id, f"raised {kind}.\n" + "\n".join(lines))


def read_value(label: str, prompt_id: str, value: Any) -> ComponentValues | Failure:
    """One completion's value: a real, finite number, or a dict of them.

    True and False are 1 and 0. None, text, NaN, an infinity, a tensor, an empty dict and a key that isn't text are
    failures, each with its reason.
    """
    if not isinstance(value, Mapping):
        number = _read_number(label, prompt_id, value, "returned")
        return number if isinstance(number, Failure) else {label: number}
    if not value:
        return user_failure("reward_missing", label, prompt_id, "returned an empty dict; return at least one value")
    entries: ComponentValues = {}
    for key, inner in value.items():
        if not isinstance(key, str) or not key:
            problem = f"returned a dict with the key {bounded_repr(key)}; keys must be non-empty text"
            return user_failure("reward_bad_key", label, prompt_id, problem)
        number = _read_number(label, prompt_id, inner, f"returned, under {bounded_repr(key)},")
        if isinstance(number, Failure):
            return number
        entries[f"{label}/{key}"] = number
    return entries


def read_values(label: str, prompt_id: str, values: Any, count: int) -> list[ComponentValues | Failure]:
    """The values of a group's ``count`` completions, out of what a function for the whole group returned."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        problem = f"returned {bounded_repr(values)} ({type(values).__name__}) instead of a list of {count} numbers"
        reason = "reward_missing" if values is None else "reward_wrong_count"
        return [user_failure(reason, label, prompt_id, problem)] * count
    if len(values) != count:
        problem = f"returned {len(values)} values for {count} completions: {bounded_repr(values)}"
        return [user_failure("reward_wrong_count", label, prompt_id, problem)] * count
    return [read_value(label, prompt_id, value) for value in values]


def combine(
    components: Sequence[RewardComponentConfig], values: Sequence[ComponentValues | Failure], prompt_id: str
) -> Score | Failure:
    """One completion's score: the weighted sum of its components, or the first failure among them.

    Args:
        components: the components with their weights.
        values: [components] what each gave; a dict's entries are summed before the weight.
    """
    total = 0.0
    merged: ComponentValues = {}
    for component, given in zip(components, values, strict=True):
        if isinstance(given, Failure):
            return given
        merged |= given
        total += component.weight * sum(given.values())
    if not math.isfinite(total):
        problem = f"the weighted sum is {total}: {bounded_repr(merged)}; lower the values or their weights"
        return user_failure("reward_infinite", "+".join(c.function for c in components), prompt_id, problem)
    return Score(total, merged)


def bounded_repr(value: Any) -> str:
    """The value's repr, at most about 120 characters; never raises."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = REPR_CHARACTERS
    try:
        text = shortener.repr(value)
    except Exception as error:  # a user's __repr__ may do anything
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= REPR_CHARACTERS else text[: REPR_CHARACTERS - 3] + "..."


def _from_user_code(frames: TracebackType | None) -> TracebackType | None:
    """The traceback without our own lines that called the function; the whole where it has no others."""
    inner = frames
    while inner is not None and inner.tb_frame.f_code.co_filename in _CALLERS:
        inner = inner.tb_next
    return inner or frames


def _read_number(label: str, prompt_id: str, value: Any, said: str) -> float | Failure:
    def refuse(reason: str, why: str) -> Failure:
        problem = f"{said} {bounded_repr(value)} ({type(value).__name__}); {why}"
        return user_failure(reason, label, prompt_id, problem)

    if value is None:
        return refuse("reward_missing", "return a number for every completion")
    if isinstance(value, np.bool_):
        return float(value)
    if not isinstance(value, numbers.Real):
        hint = "; call .item() on it" if hasattr(value, "item") else ""
        return refuse("reward_not_a_number", f"a reward is a real number{hint}")
    try:
        number = float(value)
    except OverflowError:
        return refuse("reward_infinite", f"a reward is at most {sys.float_info.max:.3g}")
    if math.isnan(number):
        return refuse("reward_nan", "a reward is a finite number")
    if math.isinf(number):
        return refuse("reward_infinite", "a reward is a finite number")
    return number
