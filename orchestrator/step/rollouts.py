"""The rollouts of a run: draws prompts, has groups generated and scored, records what became of them, gives batches.

:mod:`rollout.admission` decides what may be admitted and what makes a batch, :mod:`rollout.groups` what a group may do
next, :mod:`rollout.equal_rewards` which groups teach nothing. This file carries messages between them, the fleet and
the reward server.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.roles.fleet import NO_GENERATOR, GeneratorFleet
from orchestrator.roles.rewards import Rewards
from rollout.admission import AdmissionScheduler
from rollout.config import RolloutConfig, SamplingConfig
from rollout.cursor import PromptCursor
from rollout.equal_rewards import EQUAL_REWARDS, EqualRewards, teaches_nothing
from rollout.failures import Failure, FailureError, FailureKind
from rollout.groups import (
    Admit,
    Consume,
    Drop,
    FinishGeneration,
    FinishScoring,
    GroupEvent,
    Groups,
    StartGeneration,
)
from rollout.ledger import Ledger, LedgerError
from rollout.prompts import Prompt
from rollout.samples import FinishReason, Generation, ScoredGroup

BUDGET_WINDOW = 200
"""Groups over which the share of groups that failed is taken."""


@dataclass
class Activity:
    """Wall time in which some group was generated, and in which groups were only scored."""

    generating: int = 0
    scoring: int = 0
    generate_s: float = 0.0
    score_s: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def change(self, generating: int = 0, scoring: int = 0) -> None:
        """Add the time since the last change, then change the counts."""
        now = time.monotonic()
        if self.generating:
            self.generate_s += now - self._since
        elif self.scoring:
            self.score_s += now - self._since
        self._since = now
        self.generating += generating
        self.scoring += scoring

    def read(self) -> tuple[float, float]:
        """Seconds of generation and of scoring alone, up to now."""
        self.change()
        return self.generate_s, self.score_s


@dataclass(frozen=True)
class Batch:
    """The groups of one training step, and what the trainer waited for.

    Attributes:
        groups: prompts_per_step scored groups.
        generate_s: seconds of the wait in which some group was generated.
        score_s: seconds of the wait in which groups were only scored.
        dropped: groups dropped since the last batch, by reason.
    """

    groups: tuple[ScoredGroup, ...]
    generate_s: float
    score_s: float
    dropped: dict[str, int]


class Rollouts:
    """All rollouts of a run. Runs in the driver's event loop."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        steps: int,
        first_step: int,
        seed: int,
        cursor: PromptCursor,
        fleet: GeneratorFleet,
        rewards: Rewards,
        ledger: Ledger,
        on_event: Callable[..., None],
        with_greedy: bool = False,
    ) -> None:
        """
        Args:
            with_greedy: also generate and score a greedy completion of each prompt, the baseline of some estimators.
        """
        self._config = config
        self._scheduler = AdmissionScheduler(config.prompts_per_step, config.max_staleness, steps)
        self._next_batch = first_step
        self._seed = seed
        self._cursor = cursor
        self._fleet = fleet
        self._rewards = rewards
        self._ledger = ledger
        self._on_event = on_event
        self._with_greedy = with_greedy
        account = ledger.account()
        self._groups = Groups(admitted=account.admitted, consumed=account.consumed, dropped=account.dropped)
        self._prompts: dict[str, Prompt] = {}
        self._scored: dict[str, ScoredGroup] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._fatal: BaseException | None = None
        self._activity = Activity()
        self._failed: deque[bool] = deque(maxlen=BUDGET_WINDOW)
        self._last_failure: Failure | None = None
        self._equal_rewards = EqualRewards(config.prompts_per_step)
        self._draws: Counter[str] = Counter()
        self._drawn_at = -1
        self._dropped_since: dict[str, int] = {}
        self._handed_out: list[Prompt] = []

    @property
    def dropped(self) -> int:
        """Groups dropped over the whole run."""
        return sum(self._groups.dropped.values())

    @property
    def open_prompts(self) -> list[Prompt]:
        """Prompts that the policy hasn't learned from yet, in the order of admission. A checkpoint saves them."""
        return self._handed_out + [self._prompts[group_id] for group_id in self._groups.open]

    def learned(self) -> None:
        """Tell that the policy has learned from the batch last collected."""
        self._handed_out = []

    def admit(self) -> None:
        """Start as many groups as the staleness bound allows now. Call it after every publication."""
        open_groups = self._groups.open.values()
        version = self._fleet.served_version
        if version < 0:
            return
        room = self._scheduler.capacity(open_groups, next_batch=self._next_batch, served_version=version)
        for prompt in self._cursor.take(room) if room else []:
            group_id = f"g{self._groups.admitted:08d}"
            self._prompts[group_id] = prompt
            self._apply(Admit(group_id, prompt.prompt_id, version, time.time()))
            seed = self._seed_of(prompt, version)
            task = asyncio.get_running_loop().create_task(self._run_group(group_id, prompt, seed))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def collect(self) -> Batch:
        """The next batch, as soon as it is complete. Every call within has its own deadline.

        Raises:
            FailureError: too many groups failed (`too_many_dropped`), the rewards teach nothing (`nothing_to_learn`),
                or a failure that no retry can mend.
        """
        before = self._activity.read()
        while True:
            self._raise_verdict()
            self.admit()
            chosen = self._scheduler.batch(self._groups.open.values(), next_batch=self._next_batch)
            if chosen is not None:
                break
            if not self._tasks:
                # No generator serves, so no group is open. Only the fleet can tell when one serves again.
                await self._fleet.until_serving()
                continue
            self._changed.clear()
            await self._changed.wait()
        groups = tuple(self._scored.pop(group.group_id) for group in chosen)
        self._handed_out = [group.prompt for group in groups]
        now = time.time()
        self._apply(*(Consume(group.group_id, self._next_batch, now) for group in groups))
        self._next_batch += 1
        self.admit()
        after, dropped = self._activity.read(), self._dropped_since
        self._dropped_since = {}
        return Batch(groups, after[0] - before[0], after[1] - before[1], dropped)

    async def stop(self) -> None:
        """Cancel every open group and record it as dropped, reason `run_stopped`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        now = time.time()
        try:
            self._apply(*(Drop(group_id, "run_stopped", now) for group_id in self._groups.open))
        except LedgerError as error:  # usually what stopped the run; a resume records these groups
            self._on_event("account_left_open", open=len(self._groups.open), why=str(error))

    def _seed_of(self, prompt: Prompt, version: int) -> int:
        """Seed of a group, from the run's seed, the prompt, the version, and how often it was drawn at that version.

        An interruption changes none of these, so a resumed run samples what an uninterrupted one would have.
        """
        if version != self._drawn_at:
            self._drawn_at, self._draws = version, Counter()
        self._draws[prompt.prompt_id] += 1
        name = f"{self._seed}:{prompt.prompt_id}:{version}:{self._draws[prompt.prompt_id]}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1

    async def _run_group(self, group_id: str, prompt: Prompt, seed: int) -> None:
        """Take one group from ADMITTED to READY or DROPPED."""
        try:
            self._apply(StartGeneration(group_id, time.time()))
            generated = await self._generate_both(group_id, prompt, seed)
            if isinstance(generated, Failure):
                self._drop_failed(group_id, generated)
                return
            generation, greedy = generated
            versions = [c.policy_versions for c in generation.completions if len(c)]
            low = min((int(v.min()) for v in versions), default=self._fleet.served_version)
            high = max((int(v.max()) for v in versions), default=low)
            self._apply(FinishGeneration(group_id, generation.generator, low, high, time.time()))
            self._activity.change(scoring=1)
            try:
                baseline = greedy.completions if greedy is not None else ()
                scores = await self._rewards.score(prompt, (*generation.completions, *baseline))
            finally:
                self._activity.change(scoring=-1)
            if isinstance(scores, Failure):
                self._drop_failed(group_id, scores)
                return
            greedily = None
            if baseline:
                *scored, last = scores
                scores, greedily = tuple(scored), (baseline[0], last)
            values = [score.value for score in scores]
            self._apply(FinishScoring(group_id, sum(values) / len(values), time.time()))
            self._failed.append(False)
            if self._config.drop_equal_rewards:
                self._equal_rewards = self._equal_rewards.after(values)
                if teaches_nothing(values):
                    self._drop(group_id, EQUAL_REWARDS)
                    return
            self._scored[group_id] = ScoredGroup(group_id, prompt, generation, scores, greedily)
        except Exception as error:  # collect() raises it; otherwise it would wait for this group for ever
            self._fatal = self._fatal or error

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _generate_both(
        self, group_id: str, prompt: Prompt, seed: int
    ) -> tuple[Generation, Generation | None] | Failure:
        """The completions of one group, and the greedy one if the run takes it for a baseline."""
        config = self._config
        sampled = self._generate(group_id, prompt, config.group_size, config.sampling, seed)
        if not self._with_greedy:
            result = await sampled
            return result if isinstance(result, Failure) else (result, None)
        greedily = config.sampling.model_copy(update={"temperature": 0.0})
        result, greedy = await asyncio.gather(sampled, self._generate(f"{group_id}-greedy", prompt, 1, greedily, seed))
        if isinstance(result, Failure):
            return result
        return greedy if isinstance(greedy, Failure) else (result, greedy)

    async def _generate(
        self, group_id: str, prompt: Prompt, count: int, sampling: SamplingConfig, seed: int
    ) -> Generation | Failure:
        """Completions of one prompt. After an infrastructure failure they are generated anew, elsewhere if possible."""
        last: Failure | None = None
        for attempt in range(self._config.max_attempts):
            self._activity.change(generating=1)
            try:
                result = await self._fleet.generate(prompt, count, sampling, seed, f"{group_id}-{attempt}")
            except FailureError as error:
                if error.failure.kind is not FailureKind.INFRASTRUCTURE or error.failure.reason == NO_GENERATOR:
                    raise
                last = error.failure
                self._on_event("generation_retried", group=group_id, attempt=attempt, why=last.message)
                continue
            finally:
                self._activity.change(generating=-1)
            if isinstance(result, Failure):
                return result
            if any(c.finish_reason is FinishReason.ABORT for c in result.completions):
                message = f"vLLM aborted the generation of group {group_id}"
                last = Failure(FailureKind.INFRASTRUCTURE, "generation_aborted", message)
                continue
            return result
        assert last is not None
        return last

    def _drop(self, group_id: str, reason: str, detail: str = "") -> None:
        self._apply(Drop(group_id, reason, time.time(), detail))
        self._dropped_since[reason] = self._dropped_since.get(reason, 0) + 1

    def _drop_failed(self, group_id: str, failure: Failure) -> None:
        """Drop a group that failed and count it against the budget. A prompt at fault is never drawn again."""
        prompt = self._prompts[group_id]
        self._failed.append(True)
        self._drop(group_id, failure.reason, failure.message)
        self._last_failure = failure
        self._on_event(
            "group_dropped",
            group=group_id,
            prompt=prompt.prompt_id,
            failure=failure.kind,
            reason=failure.reason,
            why=failure.message,
        )
        if failure.kind is FailureKind.DATA:
            self._cursor.quarantine(prompt.prompt_id)

    def _raise_verdict(self) -> None:
        """Raise what ends the run: a defect, nothing left to learn, or too many failures."""
        if self._fatal is not None:
            raise self._fatal
        if (verdict := self._equal_rewards.verdict()) is not None:
            raise FailureError(verdict)
        failed, seen = sum(self._failed), len(self._failed)
        enough = min(BUDGET_WINDOW, 2 * self._config.prompts_per_step)
        if seen >= enough and failed > self._config.max_dropped_share * seen and self._last_failure is not None:
            message = (
                f"{failed} of the last {seen} groups failed and were dropped, which is more than "
                f"rollout.max_dropped_share = {self._config.max_dropped_share:g} allows. The last failure was "
                f"{self._last_failure.reason}: {self._last_failure.message}"
            )
            raise FailureError(Failure(self._last_failure.kind, "too_many_dropped", message))

    def _apply(self, *events: GroupEvent) -> None:
        """Move groups and record it in the ledger, in one transaction. If the ledger refuses, no group has moved."""
        groups, transitions = self._groups, []
        for event in events:
            groups, made = groups.on(event)
            transitions += made
        self._ledger.append(transitions)
        self._groups = groups
        for event in events:
            if event.group_id not in groups.open:
                self._prompts.pop(event.group_id, None)


def dropped_metrics(dropped: dict[str, int]) -> dict[str, float]:
    """How many groups were dropped in a step, in all and by reason."""
    by_reason = {f"rollout/dropped/{reason}": float(count) for reason, count in dropped.items()}
    return {"rollout/dropped": float(sum(dropped.values())), **by_reason}
