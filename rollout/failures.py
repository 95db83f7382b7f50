"""Failures and their kinds. Every failure in the system has one of these kinds, each with its own remedy and budget."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PEER_REFUSED = "peer_refused"
"""Reason of the failure that healthy actors report when one of their peers has refused the same call."""


class FailureKind(StrEnum):
    """Who is at fault, which decides what happens next."""

    INFRASTRUCTURE = "infrastructure"
    """An actor, host or link: retry elsewhere."""
    DATA = "data"
    """The prompt or its media: quarantine the prompt, never retry."""
    USER_CODE = "user_code"
    """A reward function or environment of the user's: retry, then drop the group and report the traceback."""
    BUG = "bug"
    """An invariant of ours is broken: stop, save, say where."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure as data, so that it can cross processes and be counted.

    Attributes:
        kind: who is at fault.
        reason: a short stable name in snake_case that counters and metrics are keyed by ("prompt_too_long",
            "reward_timeout", "media_truncated").
        message: what a person reads: where, what, why, what to do.
    """

    kind: FailureKind
    reason: str
    message: str


class FailureError(Exception):
    """A :class:`Failure` as an exception. It pickles, so Ray carries it between processes."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure

    def __reduce__(self) -> tuple[type[FailureError], tuple[Failure]]:
        return type(self), (self.failure,)


class DataError(FailureError):
    """The prompt or its media can't be used."""

    def __init__(self, reason: str | Failure, message: str = "") -> None:
        super().__init__(reason if isinstance(reason, Failure) else Failure(FailureKind.DATA, reason, message))
