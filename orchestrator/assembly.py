"""Puts one training run together: Ray, prompts, roles, ledger and loop. How a role is started is in `roles/`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from algorithms.choices import needs
from algorithms.kl import make_kl_controller
from algorithms.registry import Need
from orchestrator.checkpoints import CRITIC, POLICY, Checkpoints, RunState
from orchestrator.cluster import ray_cluster
from orchestrator.config.schema import Config
from orchestrator.loop import Training
from orchestrator.roles.start import Roles, start_roles
from orchestrator.step.agreement_check import CHECK_PROMPTS
from orchestrator.step.appraisal import Appraiser
from orchestrator.step.publish import proof_prompts
from orchestrator.step.rollouts import Rollouts
from orchestrator.telemetry import Telemetry
from rollout.cursor import PromptCursor
from rollout.datasets import PromptSet, load_prompts
from rollout.ledger import Ledger
from rollout.media import MediaStore
from rollout.user_code import import_modules

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """The prompts of a run."""

    train: PromptSet
    held_out: PromptSet | None


def load_data(config: Config, media: MediaStore) -> Data:
    """Training and held-out prompts."""
    import_modules(config.data.modules)
    train = load_prompts(config.data.train, media, base=Path.cwd())
    if config.data.evaluation is None:
        return Data(train, None)
    return Data(train, load_prompts(config.data.evaluation, media, base=Path.cwd()))


def tell_data(data: Data, telemetry: Telemetry) -> None:
    """Record the lineage of the prompts, and by reason the rows that can't be used."""
    for prompts, context in ((data.train, "training"), (data.held_out, "evaluation")):
        if prompts is None:
            continue
        telemetry.tracker.dataset(prompts.name, prompts.digest, len(prompts), context, prompts.source)
        if prompts.quarantined:
            telemetry.event("rows_quarantined", dataset=prompts.name, **prompts.quarantined_by_reason)


@contextlib.asynccontextmanager
async def start_training(
    config: Config, state: RunState, checkpoints: Checkpoints, telemetry: Telemetry, checkpoint: Path | None
) -> AsyncIterator[Training]:
    """Start everything that a training run needs, from Ray to the ledger; at the end stop all of it.

    Args:
        checkpoint: the checkpoint to continue from, whose driver's state is `state`; None starts at step 0.
    Raises:
        FailureError: Ray, a role, the prompts or the ledger failed to start; says which and why.
    """
    telemetry.progress.phase("starting Ray, loading prompts")
    media = MediaStore(config.run.folder / "media")
    async with (
        _beside(asyncio.to_thread(load_data, config, media)) as data_loading,
        ray_cluster(config.cluster, config.deadlines),
    ):
        telemetry.progress.phase("starting trainer, generators and the other roles")
        async with start_roles(config, media.folder, telemetry.event) as roles:
            data = await data_loading
            tell_data(data, telemetry)
            if checkpoint is not None:
                await _load(roles, checkpoint)
            with Ledger(config.run.folder / "ledger.db") as ledger:
                ledger.recover(at_s=time.time())
                training = _training(config, state, checkpoints, telemetry, roles, data, ledger)
                try:
                    yield training
                finally:
                    await training.stop()


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Do work beside a block that awaits it within; the work ends with the block."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _load(roles: Roles, checkpoint: Path) -> None:
    """Bring the trained roles to a checkpoint."""
    if roles.policy is not None:
        await roles.policy.load(checkpoint / POLICY)
    if roles.critic is not None:
        await roles.critic.load(checkpoint / CRITIC)


def _training(
    config: Config,
    state: RunState,
    checkpoints: Checkpoints,
    telemetry: Telemetry,
    roles: Roles,
    data: Data,
    ledger: Ledger,
) -> Training:
    """The loop of a run whose roles have started."""
    policy, fleet, rewards = roles.policy, roles.fleet, roles.rewards
    assert policy is not None
    assert fleet is not None
    assert rewards is not None
    prompts = data.train
    cursor = (
        PromptCursor.restore(prompts, state.cursor) if state.cursor else PromptCursor(prompts, seed=config.run.seed)
    )
    rollouts = Rollouts(
        config.rollout,
        steps=config.trainer.steps,
        first_step=state.version,
        seed=config.run.seed,
        cursor=cursor,
        fleet=fleet,
        rewards=rewards,
        ledger=ledger,
        on_event=telemetry.event,
        with_greedy=Need.GREEDY_REWARDS in needs(config.algorithm),
    )
    return Training(
        config=config,
        policy=policy,
        fleet=fleet,
        reference=roles.reference,
        rewards=rewards,
        critic=roles.critic,
        rollouts=rollouts,
        cursor=cursor,
        held_out=list(data.held_out.prompts) if data.held_out else [],
        canaries=proof_prompts(prompts.prompts, config.weights.canaries),
        check_prompts=list(prompts.prompts[:CHECK_PROMPTS]),
        controller=make_kl_controller(config.algorithm.kl, state.kl_controller or None),
        appraiser=Appraiser(config, state.multipliers or None),
        state=state,
        checkpoints=checkpoints,
        telemetry=telemetry,
    )
