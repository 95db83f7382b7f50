"""The commands that use a policy without training it: `counterpoint evaluate` and `counterpoint export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.assembly import load_data
from orchestrator.checkpoints import POLICY, CheckpointError, Checkpoints, step_of
from orchestrator.cluster import ray_cluster
from orchestrator.config.loading import load_config
from orchestrator.config.schema import Config
from orchestrator.interruption import run_until_interrupted
from orchestrator.roles.start import start_roles
from orchestrator.run_kinds import kind_of_recipe
from orchestrator.step.evaluation import evaluate as evaluate_prompts
from orchestrator.step.publish import proof_prompts, publish
from orchestrator.telemetry import event_line
from rollout.failures import Failure, FailureError, FailureKind
from rollout.media import MediaStore

STOPPING = "stopping; press Ctrl-C again to stop now"


def evaluate(config: Config, checkpoint: Path | None) -> int:
    """`counterpoint evaluate`: the recipe's model, or one of its checkpoints, on the held-out prompts."""
    return run_until_interrupted(lambda _: _evaluate(config, checkpoint), STOPPING)


def export(run_folder: Path, out: Path) -> int:
    """`counterpoint export`: the best checkpoint of a run as a Hugging Face folder."""
    return run_until_interrupted(lambda _: _export(run_folder, out), STOPPING)


async def _evaluate(config: Config, checkpoint: Path | None) -> int:
    """Evaluate every mode of the recipe on every held-out prompt, and print a table."""
    media = MediaStore(config.run.folder / "media")
    data = load_data(config, media)
    if data.held_out is None:
        message = "the recipe has no data.evaluation, so there is nothing to evaluate on"
        raise FailureError(Failure(FailureKind.DATA, "no_held_out_prompts", message))
    table = Table("mode", "reward", "95% interval", "prompts", "failed", "tokens")
    async with (
        ray_cluster(config.cluster, config.deadlines),
        start_roles(config, media.folder, _print_event, names=("policy", "generator", "reward")) as roles,
    ):
        policy, fleet, rewards = roles.policy, roles.fleet, roles.rewards
        assert policy is not None
        assert fleet is not None
        assert rewards is not None
        version = 0
        if checkpoint is not None:
            await policy.load(checkpoint / POLICY)
            version = step_of(checkpoint)
        prompts = proof_prompts(data.train.prompts, config.weights.canaries)
        await publish(policy, fleet, version, prompts)
        for mode in config.evaluation.modes:
            found = await evaluate_prompts(
                fleet,
                rewards,
                data.held_out.prompts,
                config.evaluation.sampling,
                mode,
                version=version,
                seed=config.run.seed,
                shown=0,
            )
            result, failed = found.result, sum(found.failed.values())
            interval = f"{result.low:.3f} to {result.high:.3f}"
            table.add_row(
                mode, f"{result.reward:.3f}", interval, str(result.n), str(failed), f"{result.mean_tokens:.1f}"
            )
    Console().print(table)
    return 0


def _print_event(kind: str, **data: Any) -> None:
    """An event of a role as one plain line on standard error; standard output has the table alone."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(escape(event_line(kind, data)))


async def _export(run_folder: Path, out: Path) -> int:
    saved = run_folder / "config.yaml"
    config = load_config(saved, (), kind_of_recipe(saved).schema())
    checkpoint = Checkpoints(run_folder, keep=config.checkpoint.keep).best()
    if checkpoint is None:
        raise CheckpointError(
            "checkpoint_missing",
            f"{run_folder} has no whole checkpoint to export. Resume the run to its next checkpoint first.",
        )
    async with (
        ray_cluster(config.cluster, config.deadlines),
        start_roles(config, run_folder / "media", _print_event, names=("policy",)) as roles,
    ):
        assert roles.policy is not None
        await roles.policy.load(checkpoint / POLICY)
        await roles.policy.export(out)
    return 0
