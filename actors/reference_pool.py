"""The frozen reference model: log-probabilities and hidden states of completions. Its pool imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.calls import ActorResources, gather
from actors.config import DeadlineConfig, ModelConfig, ReferenceConfig
from rollout.balance import micro_batches, rows_of_sequences, split_over_ranks
from rollout.samples import TokenSequence

if TYPE_CHECKING:
    from torch import Tensor

    from actors.model.batches import ModelBatch

ROLE = "reference"


@dataclass(frozen=True)
class ReferenceSpec:
    """Everything a reference server is made from.

    Attributes:
        model: the policy's; precision and attention are the same here.
        config: another folder, replicas, micro-batches, threads.
        deadlines: of calls.
        temperature: of sampling; log-probabilities are of the tempered distribution.
        media_folder: the media store, on a file system that every server's node sees.
    """

    model: ModelConfig
    config: ReferenceConfig
    deadlines: DeadlineConfig
    temperature: float
    media_folder: Path


class ReferenceServer:
    """One replica of the reference model."""

    def __init__(self, spec: ReferenceSpec, device: str) -> None:
        import torch

        from actors.model.batches import TOKEN_FEATURES
        from actors.model.loading import load_model
        from rollout.encoding import PromptEncoder
        from rollout.media import MediaStore

        torch.set_num_threads(spec.config.threads)
        self.spec = spec
        self._device = device
        path = spec.config.path or spec.model.path
        self._encoder = PromptEncoder.from_pretrained(path, MediaStore(spec.media_folder), spec.model.trust_remote_code)
        self._model = load_model(spec.model, path).to(device).eval().requires_grad_(False)
        self._token_features = TOKEN_FEATURES & set(self._encoder.filler().features)

    def ready(self) -> None:
        """Returns once the model is loaded."""

    def log_probs(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """Log-probabilities of the completions, [tokens] float32 each, nats.

        Raises:
            FailureError: a sequence can't be used (see :func:`actors.model.batches.expand_prompts`).
        """
        from actors.model.forward import completion_log_probs

        def forward(batch: ModelBatch) -> Tensor:
            outcome = completion_log_probs(
                self._model,
                batch,
                temperature=self.spec.temperature,
                banned_token_ids=self._encoder.banned_token_ids,
            )
            return outcome.log_probs.float()[batch.samples, batch.columns]

        return self._by_sequence(sequences, forward)

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float16 | np.float32]]:
        """What the output head makes the logits of the completions of, [tokens, width] each.

        float32 from a float32 model. From a bfloat16 one float16, which takes half the room and loses nothing of
        numbers from 1e-5 to 65504; float32 for a micro-batch with greater ones.

        Raises:
            FailureError: as :meth:`log_probs`.
            NonFiniteError: a hidden state is NaN or infinite.
            ValueError: what the model's family does behind its head isn't known.
        """
        import torch

        from actors.model.forward import completion_hidden_states
        from algorithms.finite import require_finite

        def forward(batch: ModelBatch) -> Tensor:
            hidden = completion_hidden_states(self._model, batch)
            require_finite("the reference's hidden states", hidden, index_name="(token, channel)")
            is_small = hidden.dtype != torch.float32 and bool((hidden.abs() <= torch.finfo(torch.float16).max).all())
            return hidden.to(torch.float16 if is_small else torch.float32)

        return self._by_sequence(sequences, forward)

    def _by_sequence(
        self, sequences: Sequence[TokenSequence], forward: Callable[[ModelBatch], Tensor]
    ) -> list[NDArray[Any]]:
        """What a pass gives each completion token, sequence by sequence.

        Args:
            forward: returns [N, ...] for the N completion tokens of a micro-batch.
        """
        import torch

        from actors.model.batches import expand_prompts, model_batch
        from actors.model.shared_prompts import token_cost

        prompts = expand_prompts(sequences, self._encoder)
        bound = self.spec.config.micro_batch_tokens
        rows, lengths = rows_of_sequences(sequences, token_cost=token_cost(self._model), max_tokens=bound)
        result: list[NDArray[Any]] = [np.empty(0, np.float32)] * len(sequences)
        for group in micro_batches(lengths, range(len(rows)), bound):
            members = [index for row in group for index in rows[row]]
            batch = model_batch(
                [prompts[index] for index in members],
                [sequences[index].token_ids for index in members],
                rows=[number for number, row in enumerate(group) for _ in rows[row]],
                pad_token_id=self._encoder.tokenizer.pad_token_id or 0,
                token_features=self._token_features,
            )
            with torch.no_grad():
                values = forward(batch.to(self._device)).cpu().numpy()
            ends = np.cumsum([len(sequences[index].token_ids) for index in members])
            for index, part in zip(members, np.split(values, ends[:-1]), strict=True):
                result[index] = part.copy()
        return result


class ReferencePool:
    """The driver's side of all replicas. Make it with :meth:`start`.

    Calls raise :class:`FailureError`: a replica's own failure, INFRASTRUCTURE where one died (`reference_died`) or
    didn't answer in time (`reference_timeout`), BUG where it raised (`reference_raised`).
    """

    def __init__(self, spec: ReferenceSpec, actors: Sequence[Any]) -> None:
        self.spec = spec
        self.actors = tuple(actors)

    @classmethod
    async def start(cls, spec: ReferenceSpec, resources: ActorResources | None = None) -> ReferencePool:
        """Start all replicas and wait until their models are loaded. Ray must be initialised.

        Args:
            resources: what each replica asks Ray for; with a GPU, it runs there.
        """
        resources = resources or ActorResources()
        device = "cuda" if resources.num_gpus > 0 else "cpu"
        server: Any = ray.remote(ReferenceServer).options(**resources.options(spec.config.threads))
        pool = cls(spec, [server.remote(spec, device) for _ in range(spec.config.replicas)])
        try:
            calls = {f"replica {index}": actor.ready.remote() for index, actor in enumerate(pool.actors)}
            await gather(calls, ROLE, "start", spec.deadlines.start_s)
        except BaseException:
            await pool.stop()
            raise
        return pool

    async def log_probs(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """The reference's log-probabilities of the completions, [tokens] float32 each, nats."""
        return await self._by_sequence("log_probs", "compute log-probabilities", sequences)

    async def hidden_states(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float16 | np.float32]]:
        """What the reference's head makes the completions' logits of (see :meth:`ReferenceServer.hidden_states`)."""
        return await self._by_sequence("hidden_states", "compute hidden states", sequences)

    async def _by_sequence(self, method: str, what: str, sequences: Sequence[TokenSequence]) -> list[NDArray[Any]]:
        shares = split_over_ranks([sequence.total_tokens for sequence in sequences], len(self.actors))
        indices = {f"replica {number}": share for number, share in enumerate(shares) if share}
        calls = {
            name: getattr(actor, method).remote([sequences[index] for index in indices[name]])
            for name, actor in ((f"replica {number}", actor) for number, actor in enumerate(self.actors))
            if name in indices
        }
        answers = await gather(calls, ROLE, what, self.spec.deadlines.update_s)
        result: list[NDArray[Any]] = [np.empty(0, np.float32)] * len(sequences)
        for name, share in indices.items():
            for index, values in zip(share, answers[name], strict=True):
                result[index] = values
        return result

    async def stop(self) -> None:
        """End all replicas."""
        for actor in self.actors:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be gone already
                ray.kill(actor)
