"""The generators that receive a push: called concurrently, every wait bounded, with a result for each.

:class:`PushRecipients` implements vLLM's synchronous client protocol over several vLLM engines. It reports results; the
caller decides about the generators' health and chooses the targets of the next push.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ray.exceptions import RayActorError

from actors.weights.push.device_digest import VersionDigests
from actors.weights.push.group import PEER_LOST, UNTOUCHED, Deadline


class PushTarget(Protocol):
    """The interface of one generator for a push. Calls return at once with a future of the generator's answer.

    Attributes:
        name: its name in messages.
        incarnation: identifies the process; a restart changes it.
        workers: number of processes that receive: tensor x pipeline x data parallel.
    """

    name: str
    incarnation: str
    workers: int

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]: ...

    def start_weight_update(self) -> Future[Any]: ...

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]: ...

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]: ...


class RecipientState(StrEnum):
    """The weights of a generator after a push."""

    CURRENT = "current"
    """It serves the new version; the device digests agreed."""
    UNTOUCHED = "untouched"
    """It holds its former version, whole."""
    STALE = "stale"
    """It may hold parts of two versions, and must load a whole version before it serves."""
    LOST = "lost"
    """It died or missed a deadline. What it holds is unknown."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """What became of one recipient of a push.

    Attributes:
        name: the generator's name.
        state: its weights after the push.
        why: the reason, unless the state is CURRENT.
        is_at_fault: whether its own failure is the cause, rather than another generator's.
        answer: what its `finish_weight_update` returned.
    """

    name: str
    state: RecipientState
    why: str = ""
    is_at_fault: bool = False
    answer: Any = None


@dataclass(frozen=True, slots=True)
class PushReport:
    """The results of a push.

    Attributes:
        version: the policy version.
        digest: digest of the sent version; "" where the push ended before all tensors were sent.
        results: one for each generator, in the order of the targets.
    """

    version: int
    digest: str
    results: tuple[PushResult, ...]

    @property
    def current(self) -> tuple[str, ...]:
        """Names of the generators that serve the version."""
        return tuple(result.name for result in self.results if result.state is RecipientState.CURRENT)

    @property
    def is_whole(self) -> bool:
        """Whether every generator serves the version."""
        return len(self.current) == len(self.results)

    def __str__(self) -> str:
        failed = [result for result in self.results if result.state is not RecipientState.CURRENT]
        failed.sort(key=lambda result: not result.is_at_fault)
        lines = [f"policy version {self.version} reached {len(self.current)} of {len(self.results)} generators"]
        return "\n".join(lines + [f"  {result.name}: {result.state}: {result.why}" for result in failed])


@dataclass(frozen=True, slots=True)
class PhaseDeadlines:
    """Deadlines of a push's phases, in seconds.

    Attributes:
        join_s: forming the group.
        transfer_s: sending and receiving.
        cleanup_s: the remaining answers, after the push has failed.
    """

    join_s: float
    transfer_s: float
    cleanup_s: float


class PushFailedError(RuntimeError):
    """A step of a push failed on a generator that it needs. :attr:`PushRecipients.results` names the generator."""


class PushRecipients:
    """vLLM's `VLLMWeightSyncClient` over several generators; one object serves a group for many pushes.

    Every method waits for all generators together and raises PushFailedError where the push cannot continue.
    """

    def __init__(self, targets: Sequence[PushTarget], *, is_collective: bool) -> None:
        """Args:
        targets: the generators, in the order of their ranks.
        is_collective: True: all receive in one collective (nccl), so a failure of one stops the others. False (ipc):
            the others continue.
        """
        self.targets = tuple(targets)
        self._is_collective = is_collective
        self.begin(Deadline(0.0), PhaseDeadlines(0.0, 0.0, 0.0), _nothing_sent, lambda why: None)

    def begin(
        self,
        deadline: Deadline,
        phases: PhaseDeadlines,
        sent: Callable[[], VersionDigests],
        on_failure: Callable[[str], None],
    ) -> None:
        """Start a push.

        Args:
            deadline: bounds all calls together.
            phases: deadlines of the phases.
            sent: returns the digests of what was sent, after sending.
            on_failure: called at once, from any thread, when a generator fails for which others wait.
        """
        self.deadline = deadline
        self._phases = phases
        self._sent = sent
        self._on_failure = on_failure
        waiting = "the push ended before this generator was called"
        self.results = {
            target.name: PushResult(target.name, RecipientState.UNTOUCHED, waiting) for target in self.targets
        }
        self._remaining = list(self.targets)
        self.has_failed = False
        self._is_open = False
        self._open_sessions: list[PushTarget] = []

    def first_rank(self, target: PushTarget) -> int:
        """The rank of a generator's first worker; rank 0 is the trainer."""
        before = self.targets[: self.targets.index(target)]
        return 1 + sum(other.workers for other in before)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every generator join the group, each under its own ranks."""

        def join(target: PushTarget) -> Future[Any]:
            own = {"rank_offset": self.first_rank(target)} if self._is_collective else {}
            return target.init_weight_transfer_engine(init_info | own)

        self._ask("join the group", join, RecipientState.UNTOUCHED, self._phases.join_s)
        self._continue()

    def start_weight_update(self) -> None:
        """Open a session on every generator."""
        self._is_open = True
        self._ask("start an update", lambda target: target.start_weight_update(), RecipientState.UNTOUCHED)
        self._continue()

    def update_weights(self, update_info: Any) -> None:
        """Have every generator receive."""
        receive = "receive the weights"
        self._ask(
            receive, lambda target: target.update_weights(update_info), RecipientState.STALE, self._phases.transfer_s
        )
        self._continue()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have every generator compare the digests with what was sent, and serve the version where they agree."""
        sent = self._sent()
        check, digest = {"verify": sent.pack(), "digest": sent.digest}, sent.digest
        self._ask("verify the weights", lambda target: target.update_weights(check), RecipientState.STALE)
        finish = "finish the update"
        answers = self._ask(
            finish, lambda target: target.finish_weight_update(sent.version, digest), RecipientState.STALE
        )
        for name, answer in answers.items():
            self.results[name] = PushResult(name, RecipientState.CURRENT, answer=answer)
        self._remaining = []
        if self.has_failed:
            raise PushFailedError(self._causes())

    def note_failure(self, target: PushTarget, state: RecipientState, why: str, *, is_at_fault: bool = True) -> None:
        """Record a generator's failure and leave it out of the rest of this push."""
        self.has_failed = True
        if self._is_open and target.workers > 1 and state is not RecipientState.LOST:
            self._open_sessions.append(target)  # its other workers still wait for the end of the session
        self.results[target.name] = PushResult(target.name, state, why, is_at_fault)
        self._remaining = [other for other in self._remaining if other is not target]

    def abandon(self, why: str) -> None:
        """End the push for the remaining generators; workers with an open session restore their layers."""
        answers: dict[str, Future[Any]] = {}
        if self._is_open:
            asked, self._open_sessions = [*self._remaining, *self._open_sessions], []
            answers = {
                target.name: _called(lambda target: target.update_weights({"abandon": why}), target) for target in asked
            }
            wait(answers.values(), timeout=max(self._phases.cleanup_s, self.deadline.left_s))
        for target in self._remaining:
            state, answer = self.results[target.name].state, answers.get(target.name)
            if answer is not None and not answer.done():
                self.note_failure(target, RecipientState.LOST, "did not end its update session within the deadline")
                continue
            if answer is not None:
                state = self._state(target, str(answer.exception()), state)
            self.note_failure(target, state, f"the push was abandoned: {why}", is_at_fault=False)

    def _continue(self) -> None:
        if not self._remaining or (self._is_collective and self.has_failed):
            why = self._causes()
            self.abandon(why)
            raise PushFailedError(why)

    def _causes(self) -> str:
        at_fault = [result for result in self.results.values() if result.is_at_fault]
        return (
            "; ".join(f"{result.name} {result.why}" for result in at_fault) or "a member of the transfer group was lost"
        )

    def _ask(
        self,
        what: str,
        call: Callable[[PushTarget], Future[Any]],
        state: RecipientState,
        together_s: float | None = None,
    ) -> dict[str, Any]:
        """Call all remaining generators. Returns the answers by name and records the failures of the others.

        Args:
            state: the state of a generator that fails in this call.
            together_s: for a call in which the generators wait for one another: their own deadline.
        """
        until, cleanup_s = Deadline(self.deadline.left_s), self._phases.cleanup_s
        is_together = together_s is not None and self._is_collective
        if together_s is not None and is_together:
            until = Deadline(min(until.left_s, together_s + cleanup_s))
        if state is RecipientState.STALE:
            for target in self._remaining:
                self.results[target.name] = PushResult(
                    target.name, state, f"was asked to {what}, and the push ended there"
                )
        asked = {_called(call, target): target for target in self._remaining}
        answers: dict[str, Any] = {}
        pending = set(asked)
        while pending:
            done, pending = wait(pending, timeout=until.left_s, return_when=FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                if (error := future.exception()) is None:
                    answers[asked[future].name] = future.result()
                    continue
                self._note_error(asked[future], error, state, what)
                if is_together:
                    self._on_failure(self._causes())
                    until = Deadline(min(cleanup_s, until.left_s))
        for future in pending:
            self.note_failure(asked[future], RecipientState.LOST, f"did not {what} within the deadline")
        return answers

    def _note_error(self, target: PushTarget, error: BaseException, state: RecipientState, what: str) -> None:
        text = str(error) or repr(error)
        is_dead = isinstance(error, RayActorError | BrokenExecutor)
        state = RecipientState.LOST if is_dead else self._state(target, text, state)
        self.note_failure(target, state, f"could not {what}: {text}", is_at_fault=PEER_LOST not in text)

    @staticmethod
    def _state(target: PushTarget, text: str, worst: RecipientState) -> RecipientState:
        """UNTOUCHED only where the one worker says so: of several, another may have changed."""
        return RecipientState.UNTOUCHED if UNTOUCHED in text and target.workers == 1 else worst


def _called(call: Callable[[PushTarget], Future[Any]], target: PushTarget) -> Future[Any]:
    try:
        return call(target)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed


def _nothing_sent() -> VersionDigests:
    raise PushFailedError("no push has begun")
