"""Supervised fine-tuning's loop: the policy trainer with the loss "nll" on given responses, without rollouts.

The run shell (`run_shell.py`) does everything that is not particular to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.assembly import Data, tell_data
from orchestrator.checkpoints import POLICY, Checkpoints, RunState
from orchestrator.cluster import ray_cluster
from orchestrator.config.schema import SFTConfig
from orchestrator.interruption import uninterrupted
from orchestrator.roles.start import start_roles
from orchestrator.step.stopwatch import Stopwatch
from orchestrator.telemetry import Telemetry
from rollout.cursor import PromptCursor
from rollout.datasets import DatasetError, PromptSet, load_prompts
from rollout.media import MediaStore
from rollout.prompts import Prompt
from rollout.samples import TokenSequence
from rollout.user_code import import_modules

if TYPE_CHECKING:
    from actors.trainer.policy import PolicyGroup
    from rollout.encoding import PromptEncoder


@dataclass(frozen=True)
class Samples:
    """Prompts, and for each the sample with its response.

    Attributes:
        prompts: the prompts in the order of the data.
        by_prompt: the sample of each prompt, by the prompt's id.
    """

    prompts: PromptSet
    by_prompt: Mapping[str, TokenSequence]


@dataclass
class FineTuning:
    """One fine-tuning run: its trainer, its samples and its state.

    Attributes:
        config: the resolved recipe.
        policy: the trainer.
        samples: what is imitated.
        cursor: where training stands in the samples.
        state: what a checkpoint keeps.
        checkpoints: where checkpoints are written.
        telemetry: where metrics and events are sent.
    """

    config: SFTConfig
    policy: PolicyGroup
    samples: Samples
    cursor: PromptCursor
    state: RunState
    checkpoints: Checkpoints
    telemetry: Telemetry
    is_whole: bool = field(default=True, init=False)
    """Whether the trainer is at the state's step: False from the start of an update until it has succeeded."""

    async def train(self) -> None:
        """Train from the state's step to the last one.

        Raises:
            FailureError: the trainer was lost; the state is that of the last whole step.
        """
        while self.state.version < self.config.trainer.steps:
            before, metrics, watch = self.state.version, dict[str, float](), Stopwatch()
            try:
                with watch("learn"):
                    await uninterrupted(self.learn(metrics))
            finally:
                if self.state.version > before:  # a step that was made is recorded, even if the run ends with it
                    self.telemetry.step(self.state.version, metrics | watch.metrics())
            await self.checkpoint_if_due()

    async def learn(self, metrics: dict[str, float]) -> None:
        """One update on the next batch; its figures are added to `metrics`."""
        self.is_whole = False
        batch = [self.samples.by_prompt[prompt.prompt_id] for prompt in self.cursor.take(self.config.sft.batch_size)]
        metrics |= await self.policy.update(batch, kl_coefficient=0.0)
        self.state.version += 1
        self.is_whole = True

    async def checkpoint_if_due(self) -> None:
        """Write a checkpoint every `checkpoint.every_steps` steps and after the last step."""
        step = self.state.version
        if step % self.config.checkpoint.every_steps and step != self.config.trainer.steps:
            return
        watch = Stopwatch()
        with watch("checkpoint"):
            await uninterrupted(self.checkpoint())
        self.telemetry.further_metrics(step, watch.named())

    async def checkpoint(self) -> None:
        """Write a checkpoint, from which the run continues with exactly the next samples."""
        self.state.cursor = self.cursor.state()
        self.state.mlflow_run_id = self.telemetry.tracker.run_id
        path = await self.checkpoints.write(self.state, self.policy.save)
        self.telemetry.event("checkpoint", step=self.state.version, path=str(path))


@contextlib.asynccontextmanager
async def start_fine_tuning(
    config: SFTConfig, state: RunState, checkpoints: Checkpoints, telemetry: Telemetry, checkpoint: Path | None
) -> AsyncIterator[FineTuning]:
    """Start everything a fine-tuning run needs; all of it is stopped at the end.

    Args:
        checkpoint: the checkpoint to continue from, whose state is `state`; None starts at step 0.
    Raises:
        FailureError: Ray or the trainer didn't start.
        DatasetError: a prompt can't be used, or the prompts are not those of the checkpoint.
    """
    telemetry.progress.phase("starting Ray, loading prompts")
    media = MediaStore(config.run.folder / "media")
    loading = asyncio.ensure_future(asyncio.to_thread(load_samples, config, media))
    try:
        async with ray_cluster(config.cluster, config.deadlines):
            telemetry.progress.phase("starting the trainer")
            async with start_roles(config, media.folder, telemetry.event, names=("policy",)) as roles:
                assert roles.policy is not None
                samples = await loading
                tell_data(Data(samples.prompts, None), telemetry)
                if state.cursor:
                    cursor = PromptCursor.restore(samples.prompts, state.cursor)
                else:
                    cursor = PromptCursor(samples.prompts, seed=config.run.seed)
                if checkpoint is not None:
                    await roles.policy.load(checkpoint / POLICY)
                yield FineTuning(config, roles.policy, samples, cursor, state, checkpoints, telemetry)
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


def load_samples(config: SFTConfig, media: MediaStore) -> Samples:
    """Every prompt with its response as a token sequence.

    Raises:
        DatasetError: a prompt has no response under `sft.response_key`, or one longer than the model takes.
    """
    from rollout.encoding import PromptEncoder

    import_modules(config.data.modules)
    prompts = load_prompts(config.data.train, media, base=Path.cwd())
    encoder = PromptEncoder.from_pretrained(config.model.path, media, config.model.trust_remote_code)
    return Samples(prompts, {prompt.prompt_id: _sample(prompt, encoder, config) for prompt in prompts.prompts})


def _sample(prompt: Prompt, encoder: PromptEncoder, config: SFTConfig) -> TokenSequence:
    response = prompt.metadata.get(config.sft.response_key)
    if not isinstance(response, str):
        have = ", ".join(sorted(prompt.metadata)) or "none"
        raise DatasetError(
            f"prompt {prompt.prompt_id} has no text under sft.response_key = {config.sft.response_key!r} in its "
            f"metadata (it has: {have}). Add that column to the data, or set sft.response_key to one it has."
        )
    prompt_ids, token_ids = encoder.expand(prompt).token_ids, encoder.encode_response(response)
    if len(prompt_ids) + len(token_ids) > config.model.max_length:
        raise DatasetError(
            f"prompt {prompt.prompt_id} and its response have {len(prompt_ids) + len(token_ids)} tokens, more than "
            f"model.max_length = {config.model.max_length}. Raise model.max_length, or shorten the response."
        )
    return TokenSequence(
        prompt=prompt,
        prompt_token_ids=prompt_ids,
        token_ids=token_ids,
        loss_mask=np.ones(len(token_ids), dtype=np.bool_),
    )
