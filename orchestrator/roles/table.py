"""The roles of a run as a table: when each is needed, what it takes, how it is started. A new role is a new row.

Start, preflight, the plan and the local Ray cluster iterate over :data:`ROLES`. Ray and torch are imported by the
functions that start a role, so that a plan costs neither.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from actors.config import ModelConfig
from orchestrator.config.derived import has_critic
from orchestrator.config.schema import ClusterConfig, Config, RoleResources, SFTConfig

if TYPE_CHECKING:
    from actors.calls import ActorResources
    from actors.trainer.critic import CriticGroup
    from actors.trainer.policy import PolicyGroup
    from actors.trainer.spec import PolicySpec
    from orchestrator.roles.fleet import GeneratorFleet
    from orchestrator.roles.reference import Reference
    from orchestrator.roles.rewards import Rewards

PROCESS_BYTES = 1 << 30
"""Memory of a process that imports torch and an engine, before any weight is loaded."""

AnyConfig = Config | SFTConfig
OnEvent = Callable[..., None]
"""Told of deaths and restarts: kind, and data by keyword."""


class RunningRole(Protocol):
    """A started role, as the loop talks to it."""

    async def stop(self) -> None:
        """End all its actors."""


@dataclass(frozen=True)
class Role:
    """A row of the table. All functions but `is_needed` take only a configuration that needs the role.

    Attributes:
        name: of the role, and of its resources in the configuration's section `cluster`.
        actor: what messages call one of its actors ("rank").
        is_needed: (config) whether a run of this configuration has the role. The user's methods must be imported.
        replicas: (config) number of its actors.
        needed_bytes: (config, parameters) memory of all its actors on one machine without GPUs, roughly, activations
            left out, for a model of so many parameters.
        settings: (config) its main settings, for the plan; "" for none.
        start: (config, media folder, on_event) its start, which returns the running role. A start that fails or is
            cancelled leaves nothing running, and raises FailureError where it fails.
    """

    name: str
    actor: str
    is_needed: Callable[[AnyConfig], bool]
    replicas: Callable[..., int]
    needed_bytes: Callable[..., int]
    settings: Callable[..., str]
    start: Callable[..., Awaitable[RunningRole]]

    def resources(self, cluster: ClusterConfig) -> RoleResources:
        """What each of its actors asks Ray for."""
        found: RoleResources = getattr(cluster, self.name)
        return found


def needed_roles(config: AnyConfig) -> tuple[Role, ...]:
    """The roles that a run of this configuration has. The user's methods must be imported."""
    return tuple(role for role in ROLES if role.is_needed(config))


def actor_resources(resources: RoleResources) -> ActorResources:
    """A role's resources as options of a Ray actor."""
    from actors.calls import ActorResources

    return ActorResources(resources.cpus, resources.gpus, resources.custom)


def weight_bytes(model: ModelConfig, parameters: int) -> int:
    """Size of so many parameters in the model's precision."""
    return parameters * (4 if model.precision == "float32" else 2)


def _learner_bytes(config: AnyConfig, parameters: int) -> int:
    """Ranks that train the whole model: parameters, gradients and AdamW's two moments in float32, 16 bytes each."""
    mixed = 0 if config.model.precision == "float32" else weight_bytes(config.model, parameters)
    copies = config.trainer.ranks if config.trainer.zero_stage == 0 else 1
    return config.trainer.ranks * PROCESS_BYTES + copies * (parameters * 16 + mixed)


def _policy_bytes(config: AnyConfig, parameters: int) -> int:
    """The ranks, and the version that they have published."""
    weights = weight_bytes(config.model, parameters)
    published = weights if isinstance(config, Config) else 0
    if config.model.lora is None:
        return _learner_bytes(config, parameters) + published
    copies = 1 if config.trainer.zero_stage == 3 else config.trainer.ranks  # of weights that are not trained
    return config.trainer.ranks * PROCESS_BYTES + copies * weights + published


def _generator_bytes(config: Config, parameters: int) -> int:
    """Weights and cache of each generator, the version it receives and the second copy where versions are staged."""
    weights, lora = weight_bytes(config.model, parameters), config.model.lora
    least = config.weights.stage_from_mib
    is_adapter = lora is not None and lora.sync == "adapter"  # an engine with adapters loads in place
    is_staged = least is not None and weights >= least << 20 and not is_adapter
    copies = 1 + is_staged + (not config.weights.shared_memory)
    cache = int(config.generator.kv_cache_gib * (1 << 30))
    return config.generator.replicas * (PROCESS_BYTES + copies * weights + cache)


def _reference_bytes(config: Config, parameters: int) -> int:
    return config.reference.replicas * (PROCESS_BYTES + weight_bytes(config.model, parameters))


async def _start_policy(config: AnyConfig, media_folder: Path, on_event: OnEvent) -> PolicyGroup:
    from actors.trainer.policy import PolicyGroup

    return await PolicyGroup.start(policy_spec(config, media_folder), actor_resources(config.cluster.policy))


def policy_spec(config: AnyConfig, media_folder: Path) -> PolicySpec:
    """The specification of the policy's ranks. Supervised fine-tuning trains them with the loss "nll"."""
    from actors.trainer.spec import PolicySpec
    from algorithms.config import AlgorithmConfig

    spec = PolicySpec(
        model=config.model,
        trainer=config.trainer,
        algorithm=AlgorithmConfig(loss="nll"),
        deadlines=config.deadlines,
        temperature=1.0,
        media_folder=media_folder.resolve(),
        seed=config.run.seed,
        total_updates=config.trainer.steps * config.trainer.updates_per_step,
    )
    if isinstance(config, SFTConfig):
        return spec
    return replace(
        spec,
        algorithm=config.algorithm,
        temperature=config.rollout.sampling.temperature,
        reference=config.reference.path,
        weights=config.weights,
    )


async def _start_critic(config: Config, media_folder: Path, on_event: OnEvent) -> CriticGroup:
    from actors.trainer.critic import CriticGroup
    from actors.trainer.spec import CriticSpec

    spec = CriticSpec(
        # The critic's whole body is trained, whatever adapters the policy has.
        model=config.model.model_copy(update={"path": config.critic.path or config.model.path, "lora": None}),
        trainer=config.trainer.model_copy(update={"learning_rate": config.critic.learning_rate}),
        deadlines=config.deadlines,
        media_folder=media_folder.resolve(),
        seed=config.run.seed,
        total_updates=config.trainer.steps * config.trainer.updates_per_step,
        clip=config.critic.clip,
    )
    return await CriticGroup.start(spec, actor_resources(config.cluster.critic))


async def _start_generators(config: Config, media_folder: Path, on_event: OnEvent) -> GeneratorFleet:
    from actors.generator.handle import GeneratorHandle
    from actors.generator.spec import GeneratorSpec
    from orchestrator.roles.fleet import GeneratorFleet

    async def launch(name: str) -> GeneratorHandle:
        spec = GeneratorSpec(
            model=config.model,
            config=config.generator,
            deadlines=config.deadlines,
            media_folder=media_folder.resolve(),
            name=name,
            seed=config.run.seed,
            weights=config.weights,
        )
        return await GeneratorHandle.start(spec, actor_resources(config.cluster.generator))

    fleet = GeneratorFleet(launch, config.deadlines.start_s, on_event, config.weights.grace_s)
    await fleet.start(config.generator.replicas)
    return fleet


async def _start_reference(config: Config, media_folder: Path, on_event: OnEvent) -> Reference:
    from actors.reference_pool import ReferencePool, ReferenceSpec
    from orchestrator.roles.reference import Reference

    spec = ReferenceSpec(
        model=config.model,
        config=config.reference,
        deadlines=config.deadlines,
        temperature=config.rollout.sampling.temperature,
        media_folder=media_folder.resolve(),
    )
    reference = Reference(
        lambda: ReferencePool.start(spec, actor_resources(config.cluster.reference)),
        restarts=config.restarts,
        deadlines=config.deadlines,
        on_event=on_event,
    )
    await reference.start()
    return reference


async def _start_reward(config: Config, media_folder: Path, on_event: OnEvent) -> Rewards:
    from actors.reward.server import RewardSpec, start_reward_server
    from orchestrator.roles.rewards import Rewards

    spec = RewardSpec(config.reward, media_folder.resolve())
    rewards = Rewards(
        lambda: start_reward_server(spec, actor_resources(config.cluster.reward), deadline_s=config.deadlines.start_s),
        restarts=config.restarts,
        deadlines=config.deadlines,
        on_event=on_event,
    )
    await rewards.start()
    return rewards


def _policy_settings(config: AnyConfig) -> str:
    trainer = config.trainer
    return f"ZeRO {trainer.zero_stage}, learning rate {trainer.learning_rate:g} {trainer.schedule.kind}"


def _reference_settings(config: Config) -> str:
    kl = config.algorithm.kl
    return f"KL {kl.coefficient:g} ({kl.estimator} in the {kl.placement})"


def _reward_settings(config: Config) -> str:
    components = ", ".join(f"{component.weight:g} x {component.function}" for component in config.reward.components)
    workers = config.reward.workers
    return f"{workers} worker{'' if workers == 1 else 's'}, {components}"


ROLES = (
    Role(
        name="policy",
        actor="rank",
        is_needed=lambda config: True,
        replicas=lambda config: config.trainer.ranks,
        needed_bytes=_policy_bytes,
        settings=_policy_settings,
        start=_start_policy,
    ),
    Role(
        name="critic",
        actor="rank",
        is_needed=lambda config: isinstance(config, Config) and has_critic(config),
        replicas=lambda config: config.trainer.ranks,
        needed_bytes=_learner_bytes,
        settings=lambda config: f"learning rate {config.critic.learning_rate:g}",
        start=_start_critic,
    ),
    Role(
        name="generator",
        actor="vLLM engine",
        is_needed=lambda config: isinstance(config, Config),
        replicas=lambda config: config.generator.replicas,
        needed_bytes=_generator_bytes,
        settings=lambda config: f"up to {config.generator.max_sequences:,} sequences at once",
        start=_start_generators,
    ),
    Role(
        name="reference",
        actor="server",
        is_needed=lambda config: isinstance(config, Config) and config.algorithm.kl.coefficient > 0,
        replicas=lambda config: config.reference.replicas,
        needed_bytes=_reference_bytes,
        settings=_reference_settings,
        start=_start_reference,
    ),
    Role(
        name="reward",
        actor="server",
        is_needed=lambda config: isinstance(config, Config),
        replicas=lambda config: 1,
        needed_bytes=lambda config, parameters: 0,  # its processes import no engine
        settings=_reward_settings,
        start=_start_reward,
    ),
)
"""Every role that a run may have, in the order in which a plan shows them."""
