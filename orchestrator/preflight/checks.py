"""Checks before anything starts: model folders, user code, data, rewards, addresses, run folder, disk.

All findings are reported at once. Errors stop a run before it takes any resource; warnings don't.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from actors.config import ModelConfig
from orchestrator.checkpoints import Checkpoints, step_of
from orchestrator.config.cross_checks import warnings
from orchestrator.config.derived import has_critic
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.preflight.finding import Finding, PlannedRun, errors
from orchestrator.preflight.memory_and_gpus import GIB, check_gpus, check_memory
from orchestrator.preflight.model_folder import ModelFolder, inspect_model_folder
from orchestrator.record.run_record import METRICS
from orchestrator.roles.table import weight_bytes
from reward.registry import UnknownRewardError, get_reward_function
from rollout.config import DatasetConfig
from rollout.datasets import DatasetError, PromptSet, load_prompts
from rollout.media import MediaStore
from rollout.user_code import UserCodeError, import_modules

SAVED_CONFIG = "config.yaml"
"""The resolved configuration, which every run writes into its folder first."""
CONNECT_DEADLINE_S = 5.0
PEEK_PROMPTS = 8
RAY_CURRENT_CLUSTER = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"

Check = Callable[[PlannedRun], Iterable[Finding]]


def preflight(config: Config | SFTConfig, *, resume: bool = False, starts_run: bool = True) -> list[Finding]:
    """Check everything that can be checked without starting an engine; takes seconds.

    Args:
        config: what is about to run.
        resume: whether it continues from the run folder's latest checkpoint.
        starts_run: False where nothing is trained (evaluation), so that the run folder is left alone.
    Returns:
        errors and warnings, errors first.
    """
    run = PlannedRun(config, inspect_model_folder(config.model.path), resume, starts_run)
    checks = SFT_CHECKS if isinstance(config, SFTConfig) else TRAIN_CHECKS
    found = [finding for check in checks for finding in check(run)]
    return sorted(found, key=lambda finding: finding.severity)


def check_model(run: PlannedRun) -> Iterator[Finding]:
    """The folder of the model that all roles start from."""
    yield from _check_folder("model.path", run.config.model, run.model)


def check_other_models(run: PlannedRun) -> Iterator[Finding]:
    """The folders of critic and reference, where the recipe names them."""
    config = run.config
    assert isinstance(config, Config)
    if config.critic.path is not None:
        yield from _check_folder("critic.path", config.model, inspect_model_folder(config.critic.path))
    if config.reference.path is not None and config.algorithm.kl.coefficient > 0:
        yield from _check_folder("reference.path", config.model, inspect_model_folder(config.reference.path))


def _check_folder(key: str, config: ModelConfig, model: ModelFolder) -> Iterator[Finding]:
    yield from errors(f"{key}: {problem}" for problem in model.problems)
    if model.max_positions is not None and model.max_positions < config.max_length:
        yield Finding(
            "error",
            f"model.max_length = {config.max_length} is more than the {model.max_positions:,} positions "
            f"(max_position_embeddings) that the model of {key} was built for. Lower it to {model.max_positions}.",
        )


def check_data(run: PlannedRun) -> list[Finding]:
    """The user's dataset builders, and the first few prompts of each dataset."""
    data = run.config.data
    try:
        import_modules(data.modules)
    except UserCodeError as error:
        return [Finding("error", f"data.modules: {error}")]
    found = []
    for key, dataset in (("data.train", data.train), ("data.evaluation", data.evaluation)):
        if dataset is None:
            continue
        try:
            prompts = _peek(dataset)
        except DatasetError as error:
            found.append(Finding("error", f"{key}: {error}"))
            continue
        found += _check_prompts(key, prompts, run)
    return found


def _peek(dataset: DatasetConfig) -> PromptSet:
    """The first few prompts, with their media in a store that is deleted at once."""
    few = dataset.model_copy(update={"limit": min(dataset.limit or PEEK_PROMPTS, PEEK_PROMPTS)})
    with tempfile.TemporaryDirectory(prefix="counterpoint-preflight-") as folder:
        return load_prompts(few, MediaStore(Path(folder)), base=Path.cwd())


def _check_prompts(key: str, prompts: PromptSet, run: PlannedRun) -> Iterator[Finding]:
    config, model = run.config, run.model
    if prompts.quarantined:
        number, failure = prompts.quarantined[0]
        yield Finding(
            "warning",
            f"{key}: {len(prompts.quarantined)} of the first {len(prompts) + len(prompts.quarantined)} rows can't be "
            f"used and will be skipped. The first of them is row {number}: {failure.message}",
        )
    if not model.problems and not model.takes_media and any(prompt.media for prompt in prompts.prompts):
        yield Finding(
            "error",
            f"{key}: prompts have media, and {config.model.path} is a text model. Set model.path to a multimodal "
            "model, or remove images_column.",
        )
    if isinstance(config, SFTConfig):
        yield from _check_responses(key, prompts, config)


def _check_responses(key: str, prompts: PromptSet, config: SFTConfig) -> Iterator[Finding]:
    """The first prompt without a response to imitate."""
    wanted = config.sft.response_key
    for prompt in prompts.prompts:
        if not isinstance(prompt.metadata.get(wanted), str):
            known = ", ".join(sorted(prompt.metadata)) or "nothing"
            yield Finding(
                "error",
                f"{key}: a prompt has no response under {wanted!r} (sft.response_key); its metadata holds {known}. "
                "Add that column, or set sft.response_key to the column that has the responses.",
            )
            return


def check_rewards(run: PlannedRun) -> list[Finding]:
    """The user's reward functions, and the arguments that the recipe gives them."""
    import reward.verifiers  # noqa: F401  registers the built-in functions

    config = run.config
    assert isinstance(config, Config)
    try:
        import_modules(config.reward.modules)
    except UserCodeError as error:
        return [Finding("error", f"reward.modules: {error}")]
    found = []
    for index, component in enumerate(config.reward.components):
        key = f"reward.components.{index}"
        try:
            get_reward_function(component.function).check_arguments(component.arguments)
        except UnknownRewardError as error:
            found.append(Finding("error", f"{key}.function: {error}"))
        except TypeError as error:
            found.append(Finding("error", f"{key}.arguments: {component.function} can't be called with them: {error}."))
    return found


def check_algorithm(run: PlannedRun) -> list[Finding]:
    """The chosen methods, once the user's own methods are imported. It comes before checks of the roles."""
    from algorithms import choices

    config = run.config
    assert isinstance(config, Config)
    try:
        import_modules(config.algorithm.modules)
    except UserCodeError as error:
        return [Finding("error", f"algorithm.modules: {error}")]
    return errors(choices.problems(config.algorithm))


def check_warnings(run: PlannedRun) -> list[Finding]:
    """Settings that are allowed and may surprise."""
    assert isinstance(run.config, Config)
    return [Finding("warning", message) for message in warnings(run.config)]


def check_run_folder(run: PlannedRun) -> Iterator[Finding]:
    """Whether the run folder can be written, and whether a run in it fits `--resume`."""
    if not run.starts_run:
        return
    folder, steps = run.config.run.folder, run.config.trainer.steps
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        yield Finding("error", f"run.folder = {folder} can't be written to ({error.strerror}). Choose another folder.")
        return
    latest = Checkpoints(folder, keep=1).latest()
    if latest is None:
        yield from _check_beginning(folder, run.resume)
    elif not run.resume:
        yield Finding(
            "error",
            f"run.folder = {folder} already holds a run (checkpoint of step {step_of(latest)}). Continue it with "
            "--resume, or choose another run.folder.",
        )
    elif step_of(latest) >= steps:
        yield Finding(
            "warning",
            f"--resume: the run is already at step {step_of(latest)} of trainer.steps = {steps}. Raise trainer.steps "
            "to train further.",
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _check_beginning(folder: Path, resume: bool) -> Iterator[Finding]:
    """Whether a run in a folder without a checkpoint may begin at step 0."""
    metrics = folder / METRICS
    if resume and not (folder / SAVED_CONFIG).is_file():
        yield Finding("error", f"--resume: {folder} holds no run to continue. Remove --resume to start a new one.")
    elif resume:
        yield Finding("warning", f"--resume: the run in {folder} left no checkpoint, so it starts over at step 0.")
    elif metrics.is_file() and metrics.stat().st_size > 0:
        yield Finding(
            "error",
            f"run.folder = {folder} already holds a run, which left no checkpoint. Start it over with --resume, or "
            "choose another run.folder.",
        )


def check_disk(run: PlannedRun) -> Iterator[Finding]:
    """Whether the disk has room for the checkpoints and an export."""
    if not run.starts_run:
        return
    config, parameters = run.config, run.model.parameters
    weights = weight_bytes(config.model, parameters)
    # Checkpoints of adapters, which are small, hold nothing else. A critic is trained whole.
    trained = int(config.model.lora is None) + int(isinstance(config, Config) and has_critic(config))
    checkpoint = trained * (weights + parameters * 12)  # float32 parameters and AdamW's two moments
    best = int(isinstance(config, Config))  # kept besides the newest
    kept = config.checkpoint.keep + best + 1  # and the one being written
    needed = kept * checkpoint + weights
    free = shutil.disk_usage(_existing(config.run.folder)).free
    if free < needed:
        yield Finding(
            "error",
            f"run.folder = {config.run.folder} has {free / GIB:.1f} GiB free; {kept} checkpoints and an export take "
            f"about {needed / GIB:.1f} GiB. Free some, choose another run.folder, or lower checkpoint.keep.",
        )


def check_ray(run: PlannedRun) -> Iterator[Finding]:
    """Whether the Ray cluster that the recipe names answers."""
    address = run.config.cluster.address
    if address is None:
        return
    if address == "auto":
        known = os.environ.get("RAY_ADDRESS")
        if known is None and RAY_CURRENT_CLUSTER.is_file():
            known = RAY_CURRENT_CLUSTER.read_text().strip()
        if not known or known == "auto":
            yield Finding(
                "error",
                "cluster.address = auto finds no running Ray cluster on this machine. Start one with `ray start "
                "--head`, or set cluster.address to null for a local one.",
            )
            return
        address = known
    if problem := _unreachable(address if "://" in address else f"ray://{address}"):
        yield Finding(
            "error",
            f"cluster.address = {run.config.cluster.address}: {problem}. Check that the cluster runs, or set "
            "cluster.address to null for a local one.",
        )


def check_tracking(run: PlannedRun) -> Iterator[Finding]:
    """Whether the MLflow server that the recipe names answers."""
    tracking = run.config.tracking
    if not tracking.enabled or tracking.uri is None or not tracking.uri.startswith(("http://", "https://")):
        return
    if problem := _unreachable(tracking.uri):
        yield Finding(
            "warning",
            f"tracking.uri = {tracking.uri}: {problem}. The run continues without it; the record is kept and sent when "
            "the server answers.",
        )


def _unreachable(uri: str) -> str | None:
    """Why nothing answers at an address within the deadline, or None."""
    parts = urlsplit(uri)
    try:
        port = parts.port or {"https": 443, "ray": 10001}.get(parts.scheme, 80)
    except ValueError:
        return "its port is not a number from 0 to 65535"
    if not parts.hostname:
        return "it names no host"
    try:
        with socket.create_connection((parts.hostname, port), timeout=CONNECT_DEADLINE_S):
            return None
    except TimeoutError:
        return f"{parts.hostname}:{port} did not answer within {CONNECT_DEADLINE_S:g} s"
    except OSError as error:
        return f"{parts.hostname}:{port} can't be reached ({error.strerror or error})"


TRAIN_CHECKS: tuple[Check, ...] = (
    check_model,
    check_algorithm,
    check_data,
    check_gpus,
    check_tracking,
    check_ray,
    check_other_models,
    check_rewards,
    check_warnings,
    check_run_folder,
    check_disk,
    check_memory,
)
"""Checks of training and evaluation."""

SFT_CHECKS: tuple[Check, ...] = (
    check_model,
    check_data,
    check_gpus,
    check_tracking,
    check_ray,
    check_run_folder,
    check_disk,
    check_memory,
)
"""Checks of supervised fine-tuning."""
