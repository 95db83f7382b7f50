"""One rank of the policy: a learner with the policy's objective, and what only a policy does. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from actors.model.forward import completion_log_probs
from actors.trainer.deepspeed_engine import Place
from actors.trainer.learner import Learner
from actors.trainer.micro_batch import MicroBatch
from actors.trainer.planning import Plan
from actors.trainer.policy_objective import PolicyObjective
from actors.trainer.policy_weights import plain_tensors
from actors.trainer.sample_checks import check_hidden_states
from actors.trainer.spec import PolicySpec
from actors.weights.canary import MAX_TOKENS as CANARY_TOKENS
from actors.weights.source import gathered
from rollout.prompts import Prompt, TextPart
from rollout.samples import TokenSequence, TrainingSample


class PolicyLearner:
    """The policy under training on one rank. Every method must be called on all ranks together."""

    def __init__(self, spec: PolicySpec, place: Place, store: distributed.Store | None = None) -> None:
        self.spec = spec
        self.place = place
        self.learner = Learner(
            spec, place, store, lambda encoder: PolicyObjective(spec, encoder.banned_token_ids, place.device)
        )
        self.objective = self.learner.objective
        self.encoder = self.learner.encoder
        self._canary_sequences: dict[str, TokenSequence] = {}

    @property
    def module(self) -> Any:
        """The Hugging Face model; its parameters are sharded under ZeRO-3."""
        return self.learner.module

    def update(self, samples: Sequence[TokenSequence], kl_coefficient: float) -> dict[str, float]:
        """One training step, as :meth:`actors.trainer.learner.Learner.update`.

        Args:
            samples: :class:`TrainingSample` for a loss that learns from rollouts.
            kl_coefficient: weight of the KL to the reference in the loss.
        Returns:
            Its metrics, and `tokens`, `trained_tokens`, `sequences`, `padding_share`, `tokens_per_second`, all under
            `train/`. The same on every rank, but for time.
        Raises:
            FailureError: the samples can't be trained on; nothing has changed.
        """
        started = time.perf_counter()
        self.objective.kl_coefficient = kl_coefficient
        plans = self.learner.plans(samples)
        if self.objective.reference_head is not None and kl_coefficient > 0:
            check_hidden_states(samples, self.objective.reference_head.weight.shape[1])
        if len(plans) > 1 and self.objective.uses_rollouts:
            plans = [self._with_proximal(plan) for plan in plans]
        metrics = self.learner.train(plans)
        seconds = time.perf_counter() - started
        tokens = sum(sample.total_tokens for sample in samples)
        return metrics | {
            "train/tokens": float(tokens),
            "train/trained_tokens": float(sum(int(sample.loss_mask.sum()) for sample in samples)),
            "train/sequences": float(len(samples)),
            "train/padding_share": sum(plan.padding_share for plan in plans) / len(plans),
            "train/tokens_per_second": tokens / seconds,
            "train/seconds": seconds,
        }

    def log_probs(self, sequences: Sequence[TokenSequence]) -> dict[int, NDArray[np.float32]]:
        """Log-probabilities of this rank's share of the sequences, by index, each [tokens] float32, nats.

        Raises:
            FailureError: a sequence can't be used.
        """
        return self.learner.each_token(sequences, self._token_log_probs)

    def log_probs_and_collision(self, sequences: Sequence[TokenSequence]) -> dict[int, NDArray[np.float32]]:
        """The same and, as a second row, the sum of squared probabilities at each token: [2, tokens] float32 each."""

        def forward(model: Any, micro_batch: MicroBatch) -> Tensor:
            outcome = self.objective.log_probs(model, micro_batch, with_collision=True)
            assert outcome.collision is not None
            return torch.stack([outcome.log_probs, outcome.collision])

        return self.learner.each_token(sequences, forward)

    def canaries(self, prompts: Sequence[Prompt]) -> dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Token ids and log-probabilities of this rank's share of the canaries, by index.

        A canary's completion is the beginning of its prompt's own text: it needs no sampling, and every policy finds
        some of it likely. Log-probabilities are of the whole distribution at temperature 1, nats.
        """
        # the same ones after every update: encoding them would take longer than a small model's forward pass
        known = self._canary_sequences
        self._canary_sequences = {p.prompt_id: known.get(p.prompt_id) or self._canary(p) for p in prompts}
        sequences = [self._canary_sequences[prompt.prompt_id] for prompt in prompts]

        def forward(model: Any, micro_batch: MicroBatch) -> Tensor:
            return completion_log_probs(model, micro_batch.batch, temperature=1.0).log_probs

        found = self.learner.each_token(sequences, forward)
        return {index: (sequences[index].token_ids, log_probs) for index, log_probs in found.items()}

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder with weights, processor and tokenizer; rank 0 writes, all ranks call.

        Adapters are added to the layers they sit on, in float32: the folder is that of a plain model.
        """
        writes = self.place.rank == 0
        weights: dict[str, Tensor] = {}
        for tensor in plain_tensors(self.module, self.spec.model.precision):
            with gathered(list(tensor.parameters)):
                if writes:
                    weights[tensor.name] = tensor.read().to("cpu", tensor.parameters[0].dtype, copy=True)
        if writes:
            state = self.module.state_dict()
            buffers = {name: state[name].cpu() for name, _ in self.module.named_buffers() if name in state}
            self.module.save_pretrained(folder, state_dict=weights | buffers)
            self.encoder.save_pretrained(folder)
        distributed.barrier()

    def save(self, folder: Path) -> None:
        """See :meth:`actors.trainer.learner.Learner.save`."""
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        """See :meth:`actors.trainer.learner.Learner.load`."""
        self.learner.load(folder)

    def _token_log_probs(self, model: Any, micro_batch: MicroBatch) -> Tensor:
        return self.objective.log_probs(model, micro_batch).log_probs

    def _canary(self, prompt: Prompt) -> TokenSequence:
        expanded = self.encoder.expand(prompt)
        room = min(CANARY_TOKENS, self.spec.model.max_length - len(expanded.token_ids) - 1)
        text = self.encoder.tokenizer.encode(_text_of(prompt), add_special_tokens=False)
        banned = set(self.encoder.banned_token_ids)
        ids = [token for token in text if token not in banned] or list(self.encoder.stop_token_ids)
        count = max(1, min(room, len(ids)))
        return TokenSequence(
            prompt=prompt,
            prompt_token_ids=expanded.token_ids,
            token_ids=np.asarray(ids[:count], dtype=np.int32),
            loss_mask=np.ones(count, dtype=np.bool_),
        )

    def _with_proximal(self, plan: Plan) -> Plan:
        """The plan with the log-probabilities before the first of several optimiser steps, where it has none yet."""
        samples = [sample for sample in plan.samples if isinstance(sample, TrainingSample)]
        if samples[0].proximal_log_probs is not None:
            return plan
        log_probs = self.learner.passes(plan).each_token(self._token_log_probs)
        zeros = [np.zeros(len(sample.token_ids), np.float32) for sample in samples]
        return replace(
            plan,
            samples=[
                replace(sample, proximal_log_probs=log_probs.get(index, zeros[index]))
                for index, sample in enumerate(samples)
            ],
        )


def _text_of(prompt: Prompt) -> str:
    return "".join(part.text for message in prompt.messages for part in message.parts if isinstance(part, TextPart))
