"""Evaluation on held-out prompts: the mean reward with an interval, and the prompts that could not be judged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.record.run_record import EvaluationResult, SampleRow, sample_rows
from orchestrator.roles.fleet import NO_GENERATOR, GeneratorFleet
from orchestrator.roles.rewards import Rewards
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.intervals import mean_interval
from rollout.prompts import Prompt
from rollout.samples import Generation, ScoredGroup

Mode = Literal["greedy", "sampled"]
IN_FLIGHT = 512
"""Prompts that are generated or judged at once."""
MAX_ATTEMPTS = 3
"""Attempts at generating for one prompt."""
MAX_FAILED_SHARE = 0.1
"""An evaluation with a larger share of failed prompts is an error."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one policy version.

    Attributes:
        mode: greedy or sampled decoding.
        version: the policy version.
        result: mean, interval and components over the prompts that were judged.
        failed: prompts that could not be generated or judged, by reason. No mean includes them.
        rows: the first completions, always of the same prompts.
        seconds: wall time.
    """

    mode: Mode
    version: int
    result: EvaluationResult
    failed: dict[str, int]
    rows: list[SampleRow]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The result under its metric names ("eval/greedy/reward")."""
        failed = {f"eval/{self.mode}/failed": float(sum(self.failed.values()))}
        return self.result.metrics(self.mode) | failed


async def evaluate(
    fleet: GeneratorFleet,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    mode: Mode,
    *,
    version: int,
    seed: int,
    shown: int,
) -> Evaluation:
    """One completion for every prompt, judged by the run's rewards.

    Args:
        sampling: of the sampled mode; greedy decoding only sets its temperature to 0.
        seed: prompt k is sampled with seed + k, so that evaluations of two versions differ by the policy alone.
        shown: how many completions to return as rows.
    Raises:
        FailureError: more than a tenth of the prompts failed (`evaluation_failed`), no generator is left
            (`no_generator`), or a role has a defect.
    """
    started = time.monotonic()
    if mode == "greedy":
        sampling = replace_temperature(sampling, 0.0)
    room = asyncio.Semaphore(IN_FLIGHT)

    async def judge(index: int, prompt: Prompt) -> ScoredGroup | Failure:
        async with room:
            generation = await _generate(fleet, prompt, sampling, seed + index, f"eval-{mode}-{version}-{index}")
            if isinstance(generation, Failure):
                return generation
            scores = await rewards.score(prompt, generation.completions)
            if isinstance(scores, Failure):
                return scores
            return ScoredGroup(prompt.prompt_id, prompt, generation, scores)

    outcomes = await asyncio.gather(*(judge(index, prompt) for index, prompt in enumerate(prompts)))
    judged = [outcome for outcome in outcomes if isinstance(outcome, ScoredGroup)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if not judged or len(failures) > MAX_FAILED_SHARE * len(outcomes):
        message = f"{len(failures)} of {len(outcomes)} held-out prompts failed; the last one: {failures[-1].message}"
        raise FailureError(Failure(failures[-1].kind, "evaluation_failed", message))
    counts: dict[str, int] = {}
    for failure in failures:
        counts[failure.reason] = counts.get(failure.reason, 0) + 1
    rows = [row for group in judged[:shown] for row in sample_rows(group)]
    return Evaluation(mode, version, _result(judged), counts, rows, time.monotonic() - started)


async def _generate(
    fleet: GeneratorFleet, prompt: Prompt, sampling: SamplingConfig, seed: int, name: str
) -> Generation | Failure:
    """One completion. A request that died with its generator is sent again, to another generator if possible."""
    for attempt in range(MAX_ATTEMPTS):
        try:
            return await fleet.generate(prompt, 1, sampling, seed, f"{name}-{attempt}-{time.monotonic_ns()}")
        except FailureError as error:
            if error.failure.kind is not FailureKind.INFRASTRUCTURE or error.failure.reason == NO_GENERATOR:
                raise
            last = error.failure
    return last


def replace_temperature(sampling: SamplingConfig, temperature: float) -> SamplingConfig:
    """The same sampling at another temperature."""
    return sampling.model_copy(update={"temperature": temperature})


def _result(judged: Sequence[ScoredGroup]) -> EvaluationResult:
    scores = [group.scores[0] for group in judged]
    interval = mean_interval([score.value for score in scores])
    names = sorted({name for score in scores for name in score.components})
    return EvaluationResult(
        reward=interval.mean,
        low=interval.low,
        high=interval.high,
        n=len(scores),
        mean_tokens=float(np.mean([len(group.generation.completions[0]) for group in judged])),
        components={n: float(np.mean([s.components[n] for s in scores if n in s.components])) for n in names},
    )
