"""How a run's roles come to be: each role from its part of the configuration, all of them side by side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.calls import ActorResources
from actors.config import WeightsConfig
from orchestrator.checkpoints import CRITIC, POLICY, Checkpoints, RunState
from orchestrator.cluster import ray_cluster
from orchestrator.config.schema import Config, RoleResources, SFTConfig
from orchestrator.roles.fleet import GeneratorFleet
from orchestrator.roles.reference import Reference
from orchestrator.roles.rewards import Rewards
from orchestrator.step.rollouts import Rollouts
from orchestrator.telemetry import Telemetry
from rollout.cursor import PromptCursor
from rollout.datasets import PromptSet, load_prompts
from rollout.ledger import Ledger
from rollout.media import MediaStore
from rollout.user_code import import_modules

if TYPE_CHECKING:
    from actors.generator.handle import GeneratorHandle
    from actors.reference_pool import ReferencePool
    from actors.reward.server import RewardHandle
    from actors.trainer.critic import CriticGroup
    from actors.trainer.policy import PolicyGroup
    from orchestrator.loop import Training

logger = logging.getLogger(__name__)
T = TypeVar("T")
CANARIES = 4


@dataclass(frozen=True)
class Data:
    """The prompts of a run."""

    train: PromptSet
    held_out: PromptSet | None


@dataclass(frozen=True)
class Roles:
    """The roles of a run, started."""

    policy: Any
    fleet: Any
    reference: Reference | None
    rewards: Any
    critic: CriticGroup | None


def load_data(config: Config, media: MediaStore) -> Data:
    """Training and held-out prompts."""
    import_modules(config.data.modules)
    train = load_prompts(config.data.train, media, base=Path.cwd())
    if config.data.evaluation is None:
        return Data(train, None)
    return Data(train, load_prompts(config.data.evaluation, media, base=Path.cwd()))


def tell_data(data: Data, telemetry: Telemetry) -> None:
    """The lineage of the prompts; rows of them that can't be used are reported, by reason."""
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
    """Everything a training run needs, from Ray to the ledger; all of it is stopped at the end.

    Args:
        checkpoint: the checkpoint to go on from, whose driver's state is `state`; None starts anew.
    """
    telemetry.progress.phase("starting Ray, loading prompts")
    media = MediaStore(config.run.folder / "media")
    async with (
        _beside(asyncio.to_thread(load_data, config, media)) as data_loading,
        ray_cluster(config.cluster, config.deadlines),
    ):
        telemetry.progress.phase("starting trainer, generators, reference and reward server")
        async with start_roles(config, media.folder, telemetry.event) as roles:
            data = await data_loading
            tell_data(data, telemetry)
            if checkpoint is not None:
                await roles.policy.load(checkpoint / POLICY)
                if roles.critic is not None:
                    await roles.critic.load(checkpoint / CRITIC)
            with Ledger(config.run.folder / "ledger.db") as ledger:
                ledger.recover(at_s=time.time())
                training = _training(config, state, checkpoints, telemetry, roles, data, ledger)
                try:
                    yield training
                finally:
                    await training.stop()


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Work beside a block that awaits it within; it doesn't outlive the block."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _training(
    config: Config,
    state: RunState,
    checkpoints: Checkpoints,
    telemetry: Telemetry,
    roles: Roles,
    data: Data,
    ledger: Ledger,
) -> Training:
    from algorithms.choices import needs
    from algorithms.kl import make_kl_controller
    from algorithms.registry import Need
    from orchestrator.loop import Training
    from orchestrator.step.appraisal import Appraiser

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
        fleet=roles.fleet,
        scorer=roles.rewards,
        ledger=ledger,
        on_event=telemetry.event,
        with_greedy=Need.GREEDY_REWARDS in needs(config.algorithm),
    )
    return Training(
        config,
        roles.policy,
        roles.fleet,
        roles.reference,
        roles.rewards,
        roles.critic,
        rollouts,
        cursor,
        list(data.held_out.prompts) if data.held_out else [],
        list(prompts.prompts[:CANARIES]),
        make_kl_controller(config.algorithm.kl, state.kl_controller or None),
        Appraiser(config, state.multipliers or None),
        state,
        checkpoints,
        telemetry,
    )


@contextlib.asynccontextmanager
async def start_roles(
    config: Config | SFTConfig,
    media_folder: Path,
    on_event: Callable[..., None],
    names: Sequence[str] | None = None,
) -> AsyncIterator[Roles]:
    """Start roles side by side; stop every one of them at the end, also those of a start that failed.

    Args:
        names: which roles; None for all that the configuration needs.
    Raises:
        FailureError: a role didn't start; says which and why.
    """
    wanted = set(names or ("policy", "critic", "generator", "reference", "reward"))
    fleet = scorer = reference = None
    starts: dict[str, asyncio.Task[Any]] = {"policy": asyncio.create_task(start_policy(config, media_folder))}
    if isinstance(config, Config):
        if "generator" in wanted:
            fleet = GeneratorFleet(
                lambda name: start_generator(config, media_folder, name),
                config.deadlines.start_s,
                on_event,
                config.weights.grace_s,
            )
            starts["generator"] = asyncio.create_task(fleet.start(config.generator.replicas))
        if "reward" in wanted:
            scorer = Rewards(
                lambda: start_reward(config, media_folder),
                deadline_s=config.deadlines.score_s,
                stop_s=config.deadlines.stop_s,
                on_event=on_event,
            )
            starts["reward"] = asyncio.create_task(scorer.start())
        if "reference" in wanted and config.algorithm.kl.coefficient > 0:
            reference = Reference(lambda: start_reference(config, media_folder), on_event=on_event)
            starts["reference"] = asyncio.create_task(reference.start())
        import_modules(config.algorithm.modules)  # the driver makes the advantages
        if "critic" in wanted:
            starts["critic"] = asyncio.create_task(start_critic(config, media_folder))
    try:
        await asyncio.gather(*starts.values())
        critic = starts["critic"].result() if "critic" in starts else None
        yield Roles(starts["policy"].result(), fleet, reference, scorer, critic)
    finally:
        for start in starts.values():
            start.cancel()
        ended = await asyncio.gather(*starts.values(), return_exceptions=True)
        learners = [each for name, each in zip(starts, ended, strict=True) if name in ("policy", "critic")]
        started = (fleet, scorer, reference, *(each for each in learners if not isinstance(each, BaseException)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * config.deadlines.stop_s):
                await asyncio.gather(*(role.stop() for role in started if role is not None), return_exceptions=True)


def share(role: RoleResources) -> ActorResources:
    """What an actor of a role asks Ray for."""
    return ActorResources(role.cpus, role.gpus, role.custom)


async def start_policy(config: Config | SFTConfig, media_folder: Path) -> PolicyGroup:
    """The trainer's ranks."""
    from actors.trainer.policy import PolicyGroup, PolicySpec
    from algorithms.config import AlgorithmConfig

    is_rl = isinstance(config, Config)
    rl: Any = config
    spec = PolicySpec(
        model=config.model,
        trainer=config.trainer,
        algorithm=rl.algorithm if is_rl else AlgorithmConfig(loss="nll"),
        deadlines=config.deadlines,
        temperature=rl.rollout.sampling.temperature if is_rl else 1.0,
        media_folder=media_folder.resolve(),
        seed=config.run.seed,
        total_updates=config.trainer.steps * config.trainer.updates_per_step,
        reference=rl.reference.path if is_rl else None,
        weights=rl.weights if is_rl else WeightsConfig(),
    )
    return await PolicyGroup.start(spec, share(config.cluster.policy))


async def start_critic(config: Config, media_folder: Path) -> CriticGroup | None:
    """The critic's ranks; None where the advantage estimator needs no values."""
    if not config.has_critic:
        return None
    from actors.trainer.critic import CriticGroup, CriticSpec

    spec = CriticSpec(
        # all of a critic's body learns, whatever the policy's adapters
        model=config.model.model_copy(update={"path": config.critic.path or config.model.path, "lora": None}),
        trainer=config.trainer.model_copy(update={"learning_rate": config.critic.learning_rate}),
        deadlines=config.deadlines,
        media_folder=media_folder.resolve(),
        seed=config.run.seed,
        total_updates=config.trainer.steps * config.trainer.updates_per_step,
        clip=config.critic.clip,
    )
    return await CriticGroup.start(spec, share(config.cluster.critic))


async def start_reference(config: Config, media_folder: Path) -> ReferencePool:
    """The reference servers."""
    from actors.reference_pool import ReferencePool, ReferenceSpec

    spec = ReferenceSpec(
        model=config.model,
        config=config.reference,
        deadlines=config.deadlines,
        temperature=config.rollout.sampling.temperature,
        media_folder=media_folder.resolve(),
    )
    return await ReferencePool.start(spec, share(config.cluster.reference))


async def start_generator(config: Config, media_folder: Path, name: str) -> GeneratorHandle:
    """One generator."""
    from actors.generator.generator import GeneratorSpec
    from actors.generator.handle import GeneratorHandle

    spec = GeneratorSpec(
        model=config.model,
        config=config.generator,
        deadlines=config.deadlines,
        media_folder=media_folder.resolve(),
        name=name,
        seed=config.run.seed,
        weights=config.weights,
    )
    return await GeneratorHandle.start(spec, share(config.cluster.generator))


async def start_reward(config: Config, media_folder: Path) -> RewardHandle:
    """The reward server."""
    from actors.reward.server import RewardSpec, start_reward_server

    spec = RewardSpec(config.reward, media_folder.resolve())
    return await start_reward_server(spec, share(config.cluster.reward), deadline_s=config.deadlines.start_s)
