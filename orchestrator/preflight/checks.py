"""What can be known before anything starts: files, user code, names, memory, disk, addresses, GPUs.

Everything found is reported at once. Errors stop a run before it takes a single resource; warnings don't.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from actors.config import ModelConfig
from orchestrator.checkpoints import Checkpoints, step_of
from orchestrator.config.cross_checks import warnings
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.preflight.model_folder import ModelFolder, inspect_model_folder
from orchestrator.record.run_record import METRICS
from reward.registry import UnknownRewardError, get_reward_function
from rollout.config import DatasetConfig
from rollout.datasets import DatasetError, PromptSet, load_prompts
from rollout.media import MediaStore
from rollout.user_code import UserCodeError, import_modules

GIB = 1 << 30
SAVED_CONFIG = "config.yaml"
"""The resolved configuration, which every run writes into its folder first."""
CONNECT_DEADLINE_S = 5.0
PEEK_PROMPTS = 8
PROCESS_BYTES = GIB
"""What a process that imports torch and an engine takes before any weight is loaded."""
RAY_CURRENT_CLUSTER = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: an error stops the run, a warning is only said."""

    severity: Literal["error", "warning"]
    message: str


def preflight(config: Config | SFTConfig, *, resume: bool = False, starts_run: bool = True) -> list[Finding]:
    """Check everything that can be checked without starting an engine; takes seconds.

    Args:
        config: what is about to run.
        resume: whether it goes on from the run folder's latest checkpoint.
        starts_run: False where nothing is trained (evaluation), so the run folder isn't looked at.
    Returns:
        errors and warnings, errors first.
    """
    model = inspect_model_folder(config.model.path)
    found = [*_check_model("model.path", config.model, model)]
    if isinstance(config, Config):
        found += _check_algorithm(config)  # first: whether there is a critic may depend on the user's methods
    found += _check_data(config, model)
    found += _check_gpus(config)
    found += _check_tracking(config)
    found += _check_ray(config)
    if isinstance(config, Config):
        if config.critic.path is not None:
            found += _check_model("critic.path", config.model, inspect_model_folder(config.critic.path))
        if config.reference.path is not None and config.algorithm.kl.coefficient > 0:
            found += _check_model("reference.path", config.model, inspect_model_folder(config.reference.path))
        found += _check_rewards(config)
        found += [Finding("warning", message) for message in warnings(config)]
    if starts_run:
        found += _check_run_folder(config, resume)
        found += _check_disk(config, model)
    found += _check_memory(config, model)
    return sorted(found, key=lambda finding: finding.severity)


def _errors(messages: Iterable[str]) -> list[Finding]:
    return [Finding("error", message) for message in messages]


def _check_model(key: str, config: ModelConfig, model: ModelFolder) -> Iterator[Finding]:
    yield from _errors(f"{key}: {problem}" for problem in model.problems)
    if model.max_positions is not None and model.max_positions < config.max_length:
        yield Finding(
            "error",
            f"model.max_length = {config.max_length} is more than the {model.max_positions:,} positions {key} was "
            f"built for (max_position_embeddings). Lower it to {model.max_positions}.",
        )


def _check_data(config: Config | SFTConfig, model: ModelFolder) -> list[Finding]:
    try:
        import_modules(config.data.modules)
    except UserCodeError as error:
        return [Finding("error", f"data.modules: {error}")]
    found = []
    for key, dataset in (("data.train", config.data.train), ("data.evaluation", config.data.evaluation)):
        if dataset is None:
            continue
        try:
            prompts = _peek(dataset)
        except DatasetError as error:
            found.append(Finding("error", f"{key}: {error}"))
            continue
        found += _check_prompts(key, prompts, config, model)
    return found


def _peek(dataset: DatasetConfig) -> PromptSet:
    """The first few prompts, their media in a store that is thrown away."""
    few = dataset.model_copy(update={"limit": min(dataset.limit or PEEK_PROMPTS, PEEK_PROMPTS)})
    with tempfile.TemporaryDirectory(prefix="counterpoint-preflight-") as folder:
        return load_prompts(few, MediaStore(Path(folder)), base=Path.cwd())


def _check_prompts(key: str, prompts: PromptSet, config: Config | SFTConfig, model: ModelFolder) -> Iterator[Finding]:
    if prompts.quarantined:
        number, failure = prompts.quarantined[0]
        yield Finding(
            "warning",
            f"{key}: {len(prompts.quarantined)} of the first {len(prompts) + len(prompts.quarantined)} rows can't be "
            f"used and will be set aside, the first of them row {number}: {failure.message}",
        )
    if not model.problems and not model.takes_media and any(prompt.media for prompt in prompts.prompts):
        yield Finding(
            "error",
            f"{key}: prompts have media, but {config.model.path} is a text model. Name a multimodal model, or leave "
            "out images_column.",
        )
    if isinstance(config, SFTConfig):
        wanted = config.sft.response_key
        for prompt in prompts.prompts:
            if not isinstance(prompt.metadata.get(wanted), str):
                known = ", ".join(sorted(prompt.metadata)) or "nothing"
                yield Finding(
                    "error",
                    f"{key}: a prompt has no text to imitate under {wanted!r} (sft.response_key); its metadata holds "
                    f"{known}. Add that column, or set sft.response_key.",
                )
                return


def _check_rewards(config: Config) -> list[Finding]:
    import reward.verifiers  # noqa: F401  registers the built-in functions

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


def _check_algorithm(config: Config) -> list[Finding]:
    """The choices once more, now that the user's own methods are known."""
    from algorithms import choices

    try:
        import_modules(config.algorithm.modules)
    except UserCodeError as error:
        return [Finding("error", f"algorithm.modules: {error}")]
    return _errors(choices.problems(config.algorithm))


def _check_run_folder(config: Config | SFTConfig, resume: bool) -> Iterator[Finding]:
    folder = config.run.folder
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        yield Finding("error", f"run.folder = {folder} can't be written to ({error.strerror}). Choose another.")
        return
    latest = Checkpoints(folder, keep=config.checkpoint.keep).latest()
    if latest is None:
        yield from _check_beginning(folder, resume)
    elif not resume:
        yield Finding(
            "error",
            f"run.folder = {folder} already holds a run (checkpoint of step {step_of(latest)}). Continue it with "
            "--resume, or choose another run.folder.",
        )
    elif step_of(latest) >= config.trainer.steps:
        yield Finding(
            "warning",
            f"--resume: the run is already at step {step_of(latest)} of trainer.steps = {config.trainer.steps}. "
            "Raise trainer.steps to train on.",
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _check_beginning(folder: Path, resume: bool) -> Iterator[Finding]:
    """What stands in the way of beginning at step 0."""
    metrics = folder / METRICS
    if resume and not (folder / SAVED_CONFIG).is_file():
        yield Finding("error", f"--resume: {folder} holds no run to go on with. Leave --resume out to start one.")
    elif resume:
        yield Finding("warning", f"--resume: the run in {folder} left no checkpoint, so it starts over.")
    elif metrics.is_file() and metrics.stat().st_size > 0:
        yield Finding(
            "error",
            f"run.folder = {folder} already holds a run, which left no checkpoint. Start it over with --resume, or "
            "choose another run.folder.",
        )


def _value_bytes(config: ModelConfig) -> int:
    return 4 if config.precision == "float32" else 2


def _check_disk(config: Config | SFTConfig, model: ModelFolder) -> Iterator[Finding]:
    weights = model.parameters * _value_bytes(config.model)
    # Of adapters, which are small, checkpoints keep no more than themselves; a critic is trained whole.
    trained = int(config.model.lora is None) + int(isinstance(config, Config) and config.has_critic)
    checkpoint = trained * (weights + model.parameters * 12)  # float32 parameters and AdamW's two moments
    best = int(isinstance(config, Config))  # kept besides the newest
    kept = config.checkpoint.keep + best + 1  # and the one being written
    needed = kept * checkpoint + weights
    free = shutil.disk_usage(_existing(config.run.folder)).free
    if free < needed:
        yield Finding(
            "error",
            f"run.folder = {config.run.folder} has {free / GIB:.1f} GiB free, and {kept} checkpoints with an export "
            f"take about {needed / GIB:.1f} GiB. Free some, choose another run.folder, or lower checkpoint.keep.",
        )


def memory_estimate(config: Config | SFTConfig, parameters: int) -> int:
    """Bytes all roles take together on one machine without GPUs, roughly, activations left out."""
    weights = parameters * _value_bytes(config.model)
    mixed = 0 if config.model.precision == "float32" else weights
    replicated = config.trainer.ranks if config.trainer.zero_stage == 0 else 1
    processes = config.trainer.ranks * PROCESS_BYTES
    trained_whole = processes + replicated * (parameters * 16 + mixed)
    copies = 1 if config.trainer.zero_stage == 3 else config.trainer.ranks  # of weights that aren't trained
    total = trained_whole if config.model.lora is None else processes + copies * weights
    if isinstance(config, Config):
        total += trained_whole if config.has_critic else 0
        cache = int(config.generator.kv_cache_gib * GIB)
        published = weights * (1 if config.weights.shared_memory else 1 + config.generator.replicas)
        least, lora = config.weights.stage_from_mib, config.model.lora
        is_adapter = lora is not None and lora.sync == "adapter"  # such an engine loads in place
        is_staged = least is not None and weights >= least << 20 and not is_adapter
        total += published + config.generator.replicas * (PROCESS_BYTES + (1 + is_staged) * weights + cache)
        if config.algorithm.kl.coefficient > 0:
            total += config.reference.replicas * (PROCESS_BYTES + weights)
    return total


def _check_memory(config: Config | SFTConfig, model: ModelFolder) -> Iterator[Finding]:
    if config.cluster.address is not None or _gpus_asked(config) > 0:
        return
    needed, available = memory_estimate(config, model.parameters), psutil.virtual_memory().available
    if needed > available:
        yield Finding(
            "warning",
            f"the roles take about {needed / GIB:.1f} GiB together and {available / GIB:.1f} GiB of memory are "
            "available. Lower generator.kv_cache_gib or the number of replicas, or use a smaller model.",
        )


def _gpus_asked(config: Config | SFTConfig) -> float:
    asked = config.cluster.policy.gpus * config.trainer.ranks
    if isinstance(config, Config):
        asked += config.cluster.generator.gpus * config.generator.replicas + config.cluster.reward.gpus
        if config.has_critic:
            asked += config.cluster.critic.gpus * config.trainer.ranks
        if config.algorithm.kl.coefficient > 0:
            asked += config.cluster.reference.gpus * config.reference.replicas
    return asked


def _check_gpus(config: Config | SFTConfig) -> Iterator[Finding]:
    if config.cluster.address is not None:
        return  # the cluster's nodes have them, not this machine
    asked = _gpus_asked(config)
    needs_one = config.model.attention == "flash_attention_2"
    if asked == 0 and not needs_one:
        return
    import torch

    present = torch.cuda.device_count()
    if asked > present:
        yield Finding(
            "error",
            f"cluster asks for {asked:g} GPUs in all and this machine has {present}. Lower the roles' gpus, or give "
            "cluster.address of a cluster that has them.",
        )
    elif needs_one and config.cluster.policy.gpus == 0:
        yield Finding(
            "error", "model.attention = flash_attention_2 needs a GPU and cluster.policy.gpus is 0. Set sdpa instead."
        )


def _check_ray(config: Config | SFTConfig) -> Iterator[Finding]:
    address = config.cluster.address
    if address is None:
        return
    if address == "auto":
        known = os.environ.get("RAY_ADDRESS")
        if known is None and RAY_CURRENT_CLUSTER.is_file():
            known = RAY_CURRENT_CLUSTER.read_text().strip()
        if not known or known == "auto":
            yield Finding(
                "error",
                "cluster.address = auto finds no running Ray cluster here. Start one with `ray start --head`, or set "
                "it to null for a local one.",
            )
            return
        address = known
    if problem := _unreachable(address if "://" in address else f"ray://{address}"):
        yield Finding(
            "error",
            f"cluster.address = {config.cluster.address}: {problem}. Check that the cluster runs, or set it to null "
            "for a local one.",
        )


def _check_tracking(config: Config | SFTConfig) -> Iterator[Finding]:
    uri = config.tracking.uri
    if not config.tracking.enabled or uri is None or not uri.startswith(("http://", "https://")):
        return
    if problem := _unreachable(uri):
        yield Finding(
            "warning",
            f"tracking.uri = {uri}: {problem}. The run goes on; what it would have sent is kept and sent when the "
            "server is back.",
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
