"""The plan: a configuration summed up in a dozen rows for a person."""

from __future__ import annotations

from orchestrator.config.schema import Config, DataConfig, RoleResources, SFTConfig
from orchestrator.roles.table import ROLES, Role
from rollout.config import DatasetConfig


def plan_rows(config: Config | SFTConfig) -> list[tuple[str, str]]:
    """Name and value of each row of the plan.

    A critic that only the user's own estimator needs is shown once the file of that estimator is imported.
    """
    rows = [
        ("run", f"{config.run.name} in {config.run.folder}, seed {config.run.seed}"),
        ("model", f"{config.model.path}, {config.model.precision}, up to {config.model.max_length:,} tokens"),
        ("frozen", _frozen(config)),
        *_data_rows(config.data),
        ("steps", _steps(config)),
    ]
    if isinstance(config, Config):
        rows += _method_rows(config)
    rows += [(role.name, _role(role, config)) for role in ROLES if role.is_needed(config) or isinstance(config, Config)]
    if isinstance(config, Config):
        rows.append(("evaluation", _evaluation(config)))
    return [
        *rows,
        ("checkpoints", f"every {count(config.checkpoint.every_steps, 'step')}, {config.checkpoint.keep} kept"),
        ("export", str(config.export_folder or "none")),
        ("cluster", config.cluster.address or "a local Ray"),
    ]


def _frozen(config: Config | SFTConfig) -> str:
    """The parts of the model that are not trained."""
    lora = config.model.lora
    if lora is not None:
        return f"all but adapters of rank {lora.rank} on {', '.join(lora.targets)}"
    return ", ".join(name.replace("_", " ") for name, is_frozen in config.model.freeze if is_frozen) or "nothing"


def _data_rows(data: DataConfig) -> list[tuple[str, str]]:
    rows = [("training prompts", _dataset(data.train))]
    if data.evaluation is not None:
        rows.append(("held-out prompts", _dataset(data.evaluation)))
    return rows


def _dataset(dataset: DatasetConfig) -> str:
    source = str(dataset.path) if dataset.path is not None else f"{dataset.builder}, split {dataset.split}"
    return f"{source}, first {dataset.limit:,}" if dataset.limit is not None else source


def _steps(config: Config | SFTConfig) -> str:
    steps = config.trainer.steps
    if isinstance(config, SFTConfig):
        return f"{steps:,}, each of {count(config.sft.batch_size, 'sample')}"
    rollout, updates = config.rollout, config.trainer.updates_per_step
    samples = rollout.prompts_per_step * rollout.group_size
    is_synchronous = rollout.max_staleness == 0
    stale = "synchronous" if is_synchronous else f"up to {count(rollout.max_staleness, 'version')} stale"
    of = f" of {samples // updates:,} samples" if updates > 1 else ""
    return (
        f"{steps:,}, each of {rollout.prompts_per_step} prompts x {rollout.group_size} = {samples:,} samples, {stale}, "
        f"{count(updates, 'update')}{of}"
    )


def _method_rows(config: Config) -> list[tuple[str, str]]:
    sampling, algorithm = config.rollout.sampling, config.algorithm
    return [
        ("sampling", f"temperature {sampling.temperature:g}, up to {sampling.max_tokens:,} tokens"),
        (
            "algorithm",
            f"{algorithm.advantage} advantages, {algorithm.loss} loss, {algorithm.aggregation}, "
            f"correction {algorithm.correction.method}",
        ),
    ]


def _role(role: Role, config: Config | SFTConfig) -> str:
    """Actors, resources and main settings of a role; "none" where the run doesn't need it."""
    if not role.is_needed(config):
        return "none"
    actors = count(role.replicas(config), role.actor) + _resources(role.resources(config.cluster))
    return f"{actors}, {role.settings(config)}"


def _evaluation(config: Config) -> str:
    if config.data.evaluation is None:
        return "none"
    every = config.evaluation.every_steps
    when = f"before, every {every} steps and after" if every else "before and after"
    return f"{' and '.join(config.evaluation.modes)}, {when}"


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 rank", "2 ranks"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _resources(resources: RoleResources) -> str:
    asked = [f"{value:g} {name}" for name, value in (("CPU", resources.cpus), ("GPU", resources.gpus)) if value]
    asked += [f"{value:g} {name}" for name, value in resources.custom.items()]
    return f" ({', '.join(asked)} each)" if asked else ""
