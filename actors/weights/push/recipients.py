"""The generators that a push goes to: asked side by side, each wait bounded, and what became of each.

:class:`FleetClient` is vLLM's synchronous client protocol over many engines. It decides nothing about health: it says
who answered what; who is called in at the next push is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ray.exceptions import RayActorError

from actors.weights.push.device_digest import VersionPrint
from actors.weights.push.group import PEER_LOST, UNTOUCHED, Deadline


class GeneratorPort(Protocol):
    """One generator, as a push calls it. Calls return at once; their futures end with the generator's answer.

    Attributes:
        name: what messages call it.
        incarnation: differs between a generator and the one that took its place after a restart.
        workers: processes that receive: tensor x pipeline x data parallel.
    """

    name: str
    incarnation: str
    workers: int

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]: ...

    def start_weight_update(self) -> Future[Any]: ...

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]: ...

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]: ...


class Standing(StrEnum):
    """Where a push left a generator."""

    CURRENT = "current"
    """It serves the new version; fingerprints agreed."""
    UNTOUCHED = "untouched"
    """It still holds its former version, whole."""
    STALE = "stale"
    """It may hold parts of two versions: it must serve nothing before it has loaded a version whole."""
    LOST = "lost"
    """It died, or gave no answer in time. What it holds isn't known."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """What became of one generator.

    Attributes:
        name: the generator's.
        standing: where it is left.
        why: for all but CURRENT: what happened.
        is_at_fault: whether it failed by itself, not because another did.
        answer: what its `finish_weight_update` returned.
    """

    name: str
    standing: Standing
    why: str = ""
    is_at_fault: bool = False
    answer: Any = None


@dataclass(frozen=True, slots=True)
class PushReport:
    """What became of a push. `digest` is "" where it ended before everything was sent.

    Attributes:
        version: the policy version.
        digest: of what was sent.
        outcomes: one for each generator, in their order.
        join_s: to rebuild the group; 0 where it was still the same.
        send_s: from the first call to the last answer.
    """

    version: int
    digest: str
    outcomes: tuple[PushResult, ...]
    join_s: float
    send_s: float

    @property
    def current(self) -> tuple[str, ...]:
        """Generators that serve the version."""
        return tuple(outcome.name for outcome in self.outcomes if outcome.standing is Standing.CURRENT)

    @property
    def is_whole(self) -> bool:
        """Whether every generator serves it."""
        return len(self.current) == len(self.outcomes)

    def __str__(self) -> str:
        failed = [outcome for outcome in self.outcomes if outcome.standing is not Standing.CURRENT]
        failed.sort(key=lambda outcome: not outcome.is_at_fault)
        lines = [f"policy version {self.version} reached {len(self.current)} of {len(self.outcomes)} generators"]
        return "\n".join(lines + [f"  {outcome.name}: {outcome.standing}: {outcome.why}" for outcome in failed])


@dataclass(frozen=True, slots=True)
class PhaseDeadlines:
    """What parts of a push may take, in seconds.

    Attributes:
        join_s: coming together in a group.
        transfer_s: receiving.
        settle_s: answering, once it is known that the push has failed.
    """

    join_s: float
    transfer_s: float
    settle_s: float


class FleetError(RuntimeError):
    """A step of a push didn't succeed on every generator it needs. The client knows on which."""


class FleetClient:
    """vLLM's `VLLMWeightSyncClient` over several generators; one for each group, used for push after push.

    Every method waits for all generators together and raises FleetError where the push can't go on.
    """

    def __init__(self, ports: Sequence[GeneratorPort], *, is_collective: bool) -> None:
        """Args:
        ports: the generators, in the order of their ranks.
        is_collective: whether all receive in one collective (nccl), so that one that fails stops the others. If not
            (ipc), the others go on without it.
        """
        self.ports = tuple(ports)
        self._is_collective = is_collective
        self.begin(Deadline(0.0), PhaseDeadlines(0.0, 0.0, 0.0), _nothing, lambda why: None)

    def begin(
        self,
        deadline: Deadline,
        shares: PhaseDeadlines,
        sent: Callable[[], VersionPrint],
        on_failure: Callable[[str], None],
    ) -> None:
        """Start a push.

        Args:
            deadline: of all calls together.
            shares: of the deadline.
            sent: what was sent, once it was.
            on_failure: called at once, from any thread, where a generator fails that others wait for.
        """
        self.deadline = deadline
        self._shares = shares
        self._sent = sent
        self._on_failure = on_failure
        waiting = "its turn never came"
        self.outcomes = {port.name: PushResult(port.name, Standing.UNTOUCHED, waiting) for port in self.ports}
        self._going = list(self.ports)
        self.has_failed = False
        self._is_open = False
        self._half_open: list[GeneratorPort] = []

    def first_rank(self, port: GeneratorPort) -> int:
        """The rank of a generator's first worker; rank 0 is the trainer."""
        before = self.ports[: self.ports.index(port)]
        return 1 + sum(other.workers for other in before)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every generator join, each under its own ranks."""

        def join(port: GeneratorPort) -> Future[Any]:
            own = {"rank_offset": self.first_rank(port)} if self._is_collective else {}
            return port.init_weight_transfer_engine(init_info | own)

        self._ask("join the group", join, Standing.UNTOUCHED, self._shares.join_s)
        self._go_on()

    def start_weight_update(self) -> None:
        """Open a session on every generator."""
        self._is_open = True
        self._ask("start an update", lambda port: port.start_weight_update(), Standing.UNTOUCHED)
        self._go_on()

    def update_weights(self, update_info: Any) -> None:
        """Let every generator receive."""
        receive = "receive the weights"
        self._ask(receive, lambda port: port.update_weights(update_info), Standing.STALE, self._shares.transfer_s)
        self._go_on()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Compare what arrived with what was sent, and let those generators serve it where nothing differs."""
        sent = self._sent()
        check, digest = {"verify": sent.pack(), "digest": sent.digest}, sent.digest
        self._ask("verify the weights", lambda port: port.update_weights(check), Standing.STALE)
        finish = "finish the update"
        answers = self._ask(finish, lambda port: port.finish_weight_update(sent.version, digest), Standing.STALE)
        for name, answer in answers.items():
            self.outcomes[name] = PushResult(name, Standing.CURRENT, answer=answer)
        self._going = []
        if self.has_failed:
            raise FleetError(self._blame())

    def note_failure(self, port: GeneratorPort, standing: Standing, why: str, *, is_at_fault: bool = True) -> None:
        """Note what a generator failed at; it takes no further part in this push."""
        self.has_failed = True
        if self._is_open and port.workers > 1 and standing is not Standing.LOST:
            self._half_open.append(port)  # the workers that didn't fail still wait for the end of the session
        self.outcomes[port.name] = PushResult(port.name, standing, why, is_at_fault)
        self._going = [other for other in self._going if other is not port]

    def abandon(self, why: str) -> None:
        """End the push for all that could have gone on; workers with an open session put their layers back."""
        answers: dict[str, Future[Any]] = {}
        if self._is_open:
            asked, self._half_open = [*self._going, *self._half_open], []
            answers = {port.name: _called(lambda port: port.update_weights({"abandon": why}), port) for port in asked}
            wait(answers.values(), timeout=max(self._shares.settle_s, self.deadline.left_s))
        for port in self._going:
            standing, answer = self.outcomes[port.name].standing, answers.get(port.name)
            if answer is not None and not answer.done():
                self.note_failure(port, Standing.LOST, "didn't abandon the update within the deadline")
                continue
            if answer is not None:
                standing = self._standing(port, str(answer.exception()), standing)
            self.note_failure(port, standing, f"the push was called off: {why}", is_at_fault=False)

    def _go_on(self) -> None:
        if not self._going or (self._is_collective and self.has_failed):
            why = self._blame()
            self.abandon(why)
            raise FleetError(why)

    def _blame(self) -> str:
        at_fault = [outcome for outcome in self.outcomes.values() if outcome.is_at_fault]
        return "; ".join(f"{outcome.name} {outcome.why}" for outcome in at_fault) or "a member of the group was lost"

    def _ask(
        self,
        what: str,
        call: Callable[[GeneratorPort], Future[Any]],
        standing: Standing,
        together_s: float | None = None,
    ) -> dict[str, Any]:
        """Answers by name of those that could; what became of the others is noted.

        Args:
            standing: where a generator is left that fails here.
            together_s: where they wait for one another in this, how long each itself waits for the others.
        """
        until, settle_s = Deadline(self.deadline.left_s), self._shares.settle_s
        is_together = together_s is not None and self._is_collective
        if together_s is not None and is_together:
            until = Deadline(min(until.left_s, together_s + settle_s))
        if standing is Standing.STALE:
            for port in self._going:
                self.outcomes[port.name] = PushResult(port.name, standing, f"was asked to {what}, and went no further")
        asked = {_called(call, port): port for port in self._going}
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
                self._note_error(asked[future], error, standing, what)
                if is_together:
                    self._on_failure(self._blame())
                    until = Deadline(min(settle_s, until.left_s))
        for future in pending:
            self.note_failure(asked[future], Standing.LOST, f"didn't {what} within the deadline, and gave no answer")
        return answers

    def _note_error(self, port: GeneratorPort, error: BaseException, standing: Standing, what: str) -> None:
        text = str(error) or repr(error)
        is_dead = isinstance(error, RayActorError | BrokenExecutor)
        standing = Standing.LOST if is_dead else self._standing(port, text, standing)
        self.note_failure(port, standing, f"couldn't {what}: {text}", is_at_fault=PEER_LOST not in text)

    @staticmethod
    def _standing(port: GeneratorPort, text: str, worst: Standing) -> Standing:
        """One worker of several may be untouched where another isn't."""
        return Standing.UNTOUCHED if UNTOUCHED in text and port.workers == 1 else worst


def _called(call: Callable[[GeneratorPort], Future[Any]], port: GeneratorPort) -> Future[Any]:
    try:
        return call(port)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed


def _nothing() -> VersionPrint:
    raise FleetError("nothing was sent yet")
