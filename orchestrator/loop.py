"""The training loop. Synchronous training is this loop with `rollout.max_staleness: 0`.

One step: collect a batch of scored groups, pass it through reference and critic, estimate advantages, update the
policy, publish the new version to the generators. Meanwhile the generators sample later batches, as far as the
staleness bound allows.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from algorithms.kl import AdaptiveKL, FixedKL, needs_distributions
from algorithms.registry import Need
from orchestrator.checkpoints import BestMetric, Checkpoints, RunState
from orchestrator.config.schema import Config
from orchestrator.interruption import uninterrupted
from orchestrator.record.run_record import sample_rows
from orchestrator.roles.fleet import GeneratorFleet
from orchestrator.roles.reference import Reference
from orchestrator.roles.rewards import Rewards
from orchestrator.step.agreement_check import alarm, measure_agreement
from orchestrator.step.appraisal import (
    Appraisal,
    Appraiser,
    as_samples,
    batch_metrics,
    with_hidden_states,
    with_proximal,
    with_reference,
    with_values,
)
from orchestrator.step.evaluation import evaluate
from orchestrator.step.publish import publish
from orchestrator.step.rollouts import Batch, Rollouts, dropped_metrics
from orchestrator.step.stopwatch import Stopwatch
from orchestrator.telemetry import Telemetry
from rollout.cursor import PromptCursor
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import TrainingSample

if TYPE_CHECKING:
    from actors.trainer.critic import CriticGroup
    from actors.trainer.policy import PolicyGroup


@dataclass
class Training:
    """One training run: its roles, its state, and where it is recorded.

    Attributes:
        config: the resolved recipe.
        policy, fleet, reference, rewards, critic: the roles. There is no reference where the KL has no weight, and no
            critic where the advantage estimator needs no values.
        rollouts: carries groups from admission to the batch.
        cursor: position in the training prompts.
        held_out: prompts of the evaluation; empty for none.
        canaries: prompts whose log-probabilities prove each weight update; empty for a proof by digest alone.
        check_prompts: prompts of the agreement check.
        controller: the KL's weight.
        appraiser: makes advantages of rewards.
        state: the driver's part of a checkpoint.
        checkpoints: of the run folder.
        telemetry: receives metrics, samples and events.
        agreement: the agreement check of the current version, where one was started.
        is_whole: whether the trainer's weights are those of the state's version. False from the start of an
            update until it has succeeded.
    """

    config: Config
    policy: PolicyGroup
    fleet: GeneratorFleet
    reference: Reference | None
    rewards: Rewards
    critic: CriticGroup | None
    rollouts: Rollouts
    cursor: PromptCursor
    held_out: list[Prompt]
    canaries: list[Prompt]
    check_prompts: list[Prompt]
    controller: FixedKL | AdaptiveKL
    appraiser: Appraiser
    state: RunState
    checkpoints: Checkpoints
    telemetry: Telemetry
    agreement: asyncio.Task[dict[str, float]] | None = field(default=None, init=False)
    is_whole: bool = field(default=True, init=False)

    async def train(self) -> None:
        """Train from the state's version to the last step.

        Raises:
            FailureError: a role was lost or a budget is spent; the state is that of the last completed step.
        """
        await self.publish()
        await self.evaluate_and_checkpoint()
        while self.state.version < self.config.trainer.steps:
            watch = Stopwatch()
            batch = await self.rollouts.collect()
            watch.add("generate", batch.generate_s)
            watch.add("score", batch.score_s)
            with watch("reference"):
                appraisal = await self.appraise(batch)
            before, metrics = self.state.version, dict[str, float]()
            try:
                with watch("learn"):
                    metrics |= await self.take_agreement()
                    await self.fleet.sleep(self.config.generator.sleep_level)
                    await uninterrupted(self.learn(appraisal, metrics))
                with watch("sync"):
                    metrics |= await self.publish()
                self.check_agreement(metrics)
            finally:
                if self.state.version > before:  # a completed step is recorded, even if the run ends with it
                    self.record_step(batch, appraisal.samples, metrics | watch.metrics())
            await self.evaluate_and_checkpoint()

    def is_due(self, every_steps: int) -> bool:
        """Whether an act is due that is done at the start, every so many steps, and at the end."""
        version = self.state.version
        return version in (0, self.config.trainer.steps) or bool(every_steps and version % every_steps == 0)

    async def evaluate_and_checkpoint(self) -> None:
        """Evaluate where that is due. Write a checkpoint where one is due, and of each new best."""
        best_before, watch = self.state.best, Stopwatch()
        if self.is_due(self.config.evaluation.every_steps) and self.state.evaluated < self.state.version:
            with watch("evaluate"):
                await self.evaluate()
            self.state.evaluated = self.state.version
        is_wanted = self.state.best != best_before or self.is_due(self.config.checkpoint.every_steps)
        if self.state.version > 0 and is_wanted and not self.checkpoints.holds(self.state.version):
            with watch("checkpoint"):
                await uninterrupted(self.checkpoint())
        self.telemetry.further_metrics(self.state.version, watch.named())

    async def appraise(self, batch: Batch) -> Appraisal:
        """The batch as training samples with advantages, after the forward passes that the recipe's methods need."""
        samples = as_samples(batch.groups)
        if self.reference is not None and needs_distributions(self.config.algorithm.kl):
            samples = with_hidden_states(samples, await self.reference.hidden_states(samples))
        elif self.reference is not None:
            samples = with_reference(samples, await self.reference.log_probs(samples))
        collision = None
        if Need.COLLISION in self.appraiser.needs:
            both = await self.policy.log_probs_and_collision(samples)
            samples, collision = with_proximal(samples, [row[0] for row in both]), [row[1] for row in both]
        elif self.config.trainer.updates_per_step > 1 or Need.PROXIMAL_LOG_PROBS in self.appraiser.needs:
            samples = with_proximal(samples, await self.policy.log_probs(samples))
        if self.critic is not None:
            samples = with_values(samples, await self.critic.values(samples))
        return self.appraiser.appraise(samples, batch.groups, self.controller.coefficient, collision)

    async def learn(self, appraisal: Appraisal, metrics: dict[str, float]) -> None:
        """One policy update, and everything that changes together with it. Its metrics are added to `metrics`."""
        coefficient, samples = self.controller.coefficient, appraisal.samples
        self.is_whole = False
        if self.critic is not None:
            metrics |= await self.critic.update(samples)
        if self.critic is None or self.state.version >= self.config.critic.warmup_steps:
            metrics |= await self.policy.update(samples, kl_coefficient=coefficient)
        metrics |= appraisal.metrics
        metrics["train/kl_coefficient"] = coefficient
        self.state.version += 1
        self.is_whole = True
        self.rollouts.learned()
        if "train/kl_reference" in metrics:
            self.controller = self.controller.update(metrics["train/kl_reference"])
        self.appraiser.learned(appraisal)

    async def publish(self) -> dict[str, float]:
        """Bring the current version to every generator, with proof, and admit the groups that it makes room for."""
        version = self.state.version
        published = await publish(self.policy, self.fleet, version, self.canaries)
        self.rollouts.admit()
        if self.config.rollout.max_staleness > 0:
            sampling = self.config.rollout.sampling
            check = measure_agreement(self.fleet, self.policy, self.check_prompts, sampling, version)
            self.agreement = asyncio.create_task(check)
        return published.metrics()

    async def take_agreement(self) -> dict[str, float]:
        """The result of the agreement check of the current version; empty where none was started, or it was lost.

        It is awaited before the update, which ends that version. A check that was lost with a role says nothing of the
        policy.
        """
        check, self.agreement = self.agreement, None
        try:
            return await check if check is not None else {}
        except FailureError as error:
            if error.failure.kind is not FailureKind.INFRASTRUCTURE:
                raise
            self.telemetry.event("no_agreement_check", version=self.state.version, why=str(error))
            return {}

    def check_agreement(self, metrics: dict[str, float]) -> None:
        """Record how far trainer and generators disagree, if it was measured; raise an alarm where it is too far.

        Raises:
            FailureError: weights.on_alarm = stop, and they disagree.
        """
        names = ("mismatch_kl", "max_logprob_gap")
        if self.config.rollout.max_staleness == 0:  # the update began at the version that sampled the batch
            metrics |= {f"rollout/{n}": metrics[f"train/{n}"] for n in names if f"train/{n}" in metrics}
        message = alarm(metrics, self.config.weights)
        if message is not None:
            self.telemetry.event("alarm", version=self.state.version - 1, why=message)
            if self.config.weights.on_alarm == "stop":
                raise FailureError(Failure(FailureKind.BUG, "mismatch_alarm", message))

    def record_step(self, batch: Batch, samples: list[TrainingSample], metrics: dict[str, float]) -> None:
        """Record the metrics and some samples of one step."""
        step = self.state.version
        metrics |= batch_metrics(batch.groups, step - 1) | dropped_metrics(batch.dropped)
        metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step_s"]
        metrics["rollout/completions_per_s"] = metrics["rollout/completions"] / metrics["time/step_s"]
        self.telemetry.step(step, metrics)
        if self.telemetry.wants_samples(step):
            size = self.config.rollout.group_size
            by_sample = [float(s.advantages[0]) if len(s.advantages) else 0.0 for s in samples]
            rows = [
                row
                for index, group in enumerate(batch.groups)
                for row in sample_rows(group, by_sample[index * size : (index + 1) * size])[:2]
            ]
            self.telemetry.samples(step, rows[: self.config.tracking.samples])

    async def evaluate(self) -> None:
        """Evaluate the current version on held-out prompts, in every mode of the recipe."""
        settings, version = self.config.evaluation, self.state.version
        is_first_or_last = version in (0, self.config.trainer.steps)
        prompts = self.held_out if is_first_or_last else self.held_out[: settings.prompts]
        if not prompts:
            return
        shown: dict[str, float] = {}
        for mode in settings.modes:
            found = await evaluate(
                self.fleet,
                self.rewards,
                prompts,
                settings.sampling,
                mode,
                version=version,
                seed=self.config.run.seed,
                shown=self.config.tracking.samples,
            )
            self.telemetry.evaluation(found)
            metrics = found.metrics()
            shown |= metrics
            value = metrics.get(self.config.checkpoint.metric)
            if value is not None and (self.state.best is None or value > self.state.best.value):
                self.state.best = BestMetric(value=value, step=version)
        self.telemetry.progress.evaluation(version, shown)

    async def stop(self) -> None:
        """Stop generation. Open groups are dropped with the reason `run_stopped`."""
        if self.agreement is not None:
            self.agreement.cancel()
            await asyncio.gather(self.agreement, return_exceptions=True)
        await self.rollouts.stop()

    async def checkpoint(self) -> None:
        """Write a checkpoint of the current version, from which the run can be resumed exactly."""
        self.state.cursor = self.cursor.state(self.rollouts.open_prompts)
        self.state.kl_controller = self.controller.state()
        self.state.multipliers = self.appraiser.state()
        self.state.mlflow_run_id = self.telemetry.tracker.run_id
        save_critic = None if self.critic is None else self.critic.save
        path = await self.checkpoints.write(self.state, self.policy.save, save_critic)
        self.telemetry.event("checkpoint", step=self.state.version, path=str(path))
