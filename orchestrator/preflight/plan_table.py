"""What a configuration amounts to, in a dozen rows for a person."""

from __future__ import annotations

from orchestrator.config.schema import Config, DataConfig, RoleResources, SFTConfig
from rollout.config import DatasetConfig


def plan_rows(config: Config | SFTConfig) -> list[tuple[str, str]]:
    """Name and value of each row of the plan."""
    model, trainer = config.model, config.trainer
    frozen = ", ".join(name.replace("_", " ") for name, is_frozen in model.freeze if is_frozen) or "nothing"
    if model.lora is not None:
        frozen = f"all but adapters of rank {model.lora.rank} on {', '.join(model.lora.targets)}"
    rows = [
        ("run", f"{config.run.name} in {config.run.folder}, seed {config.run.seed}"),
        ("model", f"{model.path}, {model.precision}, up to {model.max_length:,} tokens"),
        ("frozen", frozen),
        *_data_rows(config.data),
        (
            "trainer",
            f"{trainer.steps} steps on {_count(trainer.ranks, 'rank')}{_resources(config.cluster.policy)}, "
            f"ZeRO {trainer.zero_stage}, learning rate {trainer.learning_rate:g} {trainer.schedule.kind}",
        ),
    ]
    if isinstance(config, SFTConfig):
        rows += [("batch", f"{config.sft.batch_size} samples"), ("export", str(config.export_folder))]
    else:
        rows += _rollout_rows(config)
    checkpoint = config.checkpoint
    rows.append(("checkpoints", f"every {checkpoint.every_steps} steps, {checkpoint.keep} kept"))
    return [*rows, ("cluster", config.cluster.address or "a local Ray")]


def _data_rows(data: DataConfig) -> list[tuple[str, str]]:
    rows = [("prompts", _dataset(data.train))]
    if data.evaluation is not None:
        rows.append(("held out", _dataset(data.evaluation)))
    return rows


def _dataset(dataset: DatasetConfig) -> str:
    source = str(dataset.path) if dataset.path is not None else f"{dataset.builder}, split {dataset.split}"
    return f"{source}, first {dataset.limit:,}" if dataset.limit is not None else source


def _rollout_rows(config: Config) -> list[tuple[str, str]]:
    rollout, algorithm, sampling = config.rollout, config.algorithm, config.rollout.sampling
    stale = "synchronous" if rollout.max_staleness == 0 else f"up to {rollout.max_staleness} versions stale"
    samples = rollout.prompts_per_step * rollout.group_size
    kl = algorithm.kl
    rewards = ", ".join(f"{component.weight:g} x {component.function}" for component in config.reward.components)
    modes = " and ".join(config.evaluation.modes)
    every = config.evaluation.every_steps
    when = f"before, every {every} steps and after" if every else "before and after"
    return [
        (
            "step",
            f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {samples:,} samples, {stale}, "
            f"{_count(trainer_updates := config.trainer.updates_per_step, 'update')}"
            + (f" of {samples // trainer_updates:,}" if trainer_updates > 1 else ""),
        ),
        ("sampling", f"temperature {sampling.temperature:g}, up to {sampling.max_tokens:,} tokens"),
        ("generators", _count(config.generator.replicas, "generator") + _resources(config.cluster.generator)),
        ("reward", f"{rewards}; {_count(config.reward.workers, 'worker')}{_resources(config.cluster.reward)}"),
        (
            "algorithm",
            f"{algorithm.advantage} advantages, {algorithm.loss} loss, {algorithm.aggregation}, "
            f"correction {algorithm.correction.method}",
        ),
        (
            "critic",
            f"learning rate {config.critic.learning_rate:g}, {_count(config.trainer.ranks, 'rank')}"
            f"{_resources(config.cluster.critic)}"
            if config.has_critic
            else "none",
        ),
        (
            "reference",
            f"KL {kl.coefficient:g} ({kl.estimator} in the {kl.placement}), "
            f"{_count(config.reference.replicas, 'server')}{_resources(config.cluster.reference)}"
            if kl.coefficient > 0
            else "none",
        ),
        ("evaluation", f"{modes}, {when}" if config.data.evaluation is not None else "none"),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _resources(resources: RoleResources) -> str:
    asked = [f"{value:g} {name}" for name, value in (("CPU", resources.cpus), ("GPU", resources.gpus)) if value]
    asked += [f"{value:g} {name}" for name, value in resources.custom.items()]
    return f" ({', '.join(asked)} each)" if asked else ""
