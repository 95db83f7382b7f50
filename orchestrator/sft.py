"""Supervised fine-tuning with the policy trainer: the loss "nll" on given responses, no rollouts."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.cluster import ray_cluster
from orchestrator.config.loading import save_config
from orchestrator.config.schema import SFTConfig
from orchestrator.record.progress import Progress
from orchestrator.record.run_record import Record
from orchestrator.roles.table import actor_resources, policy_spec
from orchestrator.step.stopwatch import Stopwatch
from orchestrator.tracking.tracker import Tracker
from rollout.cursor import PromptCursor
from rollout.datasets import DatasetError, PromptSet, load_prompts
from rollout.failures import FailureError
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.samples import TrainingSample
from rollout.user_code import import_modules

if TYPE_CHECKING:
    from actors.trainer.policy import PolicyGroup
    from rollout.encoding import PromptEncoder

logger = logging.getLogger(__name__)


async def fine_tune(config: SFTConfig) -> int:
    """Fine-tune, and write the Hugging Face folder. Returns 0, or 1 with the verdict printed."""
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    tracker = Tracker.start(config.tracking, folder, config.run.name, config.model_dump(mode="json"), is_resumed=False)
    with tracker, Record(folder) as record, Progress(config.trainer.steps) as progress:
        record.event("started", step=0, seed=config.run.seed)
        try:
            async with ray_cluster(config.cluster, config.deadlines):
                progress.phase("starting the trainer, loading prompts")
                policy, samples = await asyncio.gather(_start_policy(config), asyncio.to_thread(load_samples, config))
                try:
                    await _train(config, policy, samples, record, tracker, progress)
                    await policy.export(config.export_folder)
                finally:
                    await policy.stop()
        except FailureError as error:
            record.event("finished", status="FAILED", why=str(error))
            tracker.finish("FAILED")
            progress.finish({"verdict": f"stopped: {error}"})
            return 1
        except asyncio.CancelledError:
            record.event("finished", status="KILLED")
            tracker.finish("KILLED")
            progress.finish({"verdict": "interrupted; nothing was exported"})
            raise
        record.event("finished", status="FINISHED")
        status = tracker.finish("FINISHED")
        words = {"verdict": "done", "model": str(config.export_folder)}
        progress.finish(words | ({"MLflow run": status.run_id} if status.run_id else {}))
    return 0


async def _train(
    config: SFTConfig,
    policy: PolicyGroup,
    samples: Samples,
    record: Record,
    tracker: Tracker,
    progress: Progress,
) -> None:
    cursor = PromptCursor(samples.prompts, seed=config.run.seed)
    tracker.dataset(samples.prompts.name, samples.prompts.digest, len(samples.prompts), "training")
    for step in range(1, config.trainer.steps + 1):
        watch = Stopwatch()
        batch = [samples.by_prompt[prompt.prompt_id] for prompt in cursor.take(config.sft.batch_size)]
        with watch("learn"):
            metrics = await policy.update(batch, kl_coefficient=0.0)
        metrics |= watch.metrics()
        record.metrics(step, metrics)
        tracker.metrics(step, metrics)
        progress.step(step, metrics)


class Samples:
    """Prompts and what is to be imitated for each."""

    def __init__(self, prompts: PromptSet, by_prompt: dict[str, TrainingSample]) -> None:
        self.prompts = prompts
        self.by_prompt = by_prompt


def load_samples(config: SFTConfig) -> Samples:
    """Every prompt with its response as a training sample.

    Raises:
        DatasetError: a prompt has no response under `sft.response_key`, or one longer than the model takes.
    """
    from rollout.encoding import PromptEncoder

    import_modules(config.data.modules)
    media = MediaStore(config.run.folder / "media")
    prompts = load_prompts(config.data.train, media, base=Path.cwd())
    encoder = PromptEncoder.from_pretrained(config.model.path, media, config.model.trust_remote_code)
    by_prompt = {prompt.prompt_id: _sample(prompt, encoder, config) for prompt in prompts.prompts}
    return Samples(prompts, by_prompt)


def _sample(prompt: Prompt, encoder: PromptEncoder, config: SFTConfig) -> TrainingSample:
    response = prompt.metadata.get(config.sft.response_key)
    if not isinstance(response, str):
        have = ", ".join(sorted(prompt.metadata)) or "none"
        raise DatasetError(
            f"prompt {prompt.prompt_id} has no text under sft.response_key = {config.sft.response_key!r} in its "
            f"metadata (it has: {have})"
        )
    prompt_ids, token_ids = encoder.expand(prompt).token_ids, encoder.encode_response(response)
    if len(prompt_ids) + len(token_ids) > config.model.max_length:
        raise DatasetError(
            f"prompt {prompt.prompt_id} and its response have {len(prompt_ids) + len(token_ids)} tokens, more than "
            f"model.max_length = {config.model.max_length}"
        )
    n = len(token_ids)
    return TrainingSample(
        prompt=prompt,
        prompt_token_ids=prompt_ids,
        token_ids=token_ids,
        loss_mask=np.ones(n, dtype=np.bool_),
        advantages=np.ones(n, dtype=np.float32),
        behaviour_log_probs=np.zeros(n, dtype=np.float32),
        policy_versions=np.zeros(n, dtype=np.int32),
    )


async def _start_policy(config: SFTConfig) -> PolicyGroup:
    from actors.trainer.policy import PolicyGroup

    spec = policy_spec(config, config.run.folder / "media")
    return await PolicyGroup.start(spec, actor_resources(config.cluster.policy))
