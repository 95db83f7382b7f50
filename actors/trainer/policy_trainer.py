"""One rank of the policy trainer: from samples to changed weights. No Ray here: policy.py is the shell."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from actors.model.batches import ModelBatch, check_hidden_states, check_samples, token_matrix
from actors.model.forward import TokenLogProbs, completion_log_probs, require_plain
from actors.model.loading import freeze, load_model
from actors.model.lora import add_adapters
from actors.model.output_head import OutputHead, ReferenceOutputs
from actors.model.reference_head import load_output_head
from actors.trainer.deepspeed_engine import Place
from actors.trainer.gradient_combiner import GradientCombiner
from actors.trainer.learner import Learner, MicroBatch, PartialLoss, Plan, UnusableOutputError, merged_reports
from actors.trainer.policy_weights import plain_tensors
from actors.weights.canary import MAX_TOKENS as CANARY_TOKENS
from actors.weights.source import gathered
from algorithms import choices  # noqa: F401  registers the built-in methods
from algorithms.config import AlgorithmConfig
from algorithms.finite import NonFiniteError
from algorithms.inputs import BatchTokens
from algorithms.kl import full, needs_distributions
from algorithms.policy_objective import Denominators, ObjectiveMetrics, TokenBatch, policy_objective
from algorithms.registry import KL_ESTIMATORS, POLICY_LOSSES
from rollout.balance import split_evenly
from rollout.prompts import Prompt, TextPart
from rollout.samples import TrainingSample
from rollout.user_code import import_modules

if TYPE_CHECKING:
    from actors.trainer.spec import PolicySpec

logger = logging.getLogger(__name__)


class PolicyTrainer(Learner):
    """The policy under training on one rank."""

    spec: PolicySpec

    def __init__(self, spec: PolicySpec, place: Place, store: distributed.Store | None = None) -> None:
        import_modules(spec.algorithm.modules)
        super().__init__(spec, place, store)
        has_objectives = spec.algorithm.gradient_combination is not None
        self.combiner = GradientCombiner(spec.algorithm) if has_objectives else None
        self._canary_samples: dict[str, TrainingSample] = {}
        self._reference_head = self._load_reference_head() if needs_distributions(spec.algorithm.kl) else None

    def _load_module(self) -> Any:
        model = self.spec.model
        module = load_model(model)
        freeze(module, model.freeze)
        if model.lora is not None:
            add_adapters(module, model.lora, seed=self.spec.seed)
        return module

    def _load_reference_head(self) -> OutputHead:
        """What the exact KL takes the reference's distributions from; whole on every rank.

        Raises:
            ValueError: the models or the estimator aren't such that it can be taken.
        """
        kl, own = self.spec.algorithm.kl, self.module.get_output_embeddings()
        if KL_ESTIMATORS.get(kl.estimator).function is not full:
            raise ValueError(
                f"algorithm.kl.estimator = {kl.estimator} needs whole distributions, of which the trainer makes the "
                "exact KL alone. Set it to full, or to an estimator of single tokens."
            )
        require_plain(self.module, own)
        path = self.spec.reference or self.spec.model.path
        head = load_output_head(self.spec.model, path).to(self.place.device)
        if len(head.weight) != own.out_features:
            raise ValueError(
                f"algorithm.kl.estimator = {kl.estimator} compares whole distributions, but {path} has "
                f"{len(head.weight)} logits and {self.spec.model.path} has {own.out_features}. Set it to k3, or "
                "reference.path to a model of the same vocabulary."
            )
        return head

    def update(self, samples: list[TrainingSample], kl_coefficient: float) -> dict[str, float]:
        """One training step: `updates_per_step` optimiser steps over consecutive parts of the samples.

        An optimiser step whose loss or gradient isn't finite is skipped on all ranks and counted in
        `train/skipped_updates`.

        Returns:
            The objective's metrics (means over the optimiser steps that were applied, maxima of maxima), and
            `grad_norm`, `learning_rate`, `tokens`, `trained_tokens`, `sequences`, `padding_share`,
            `tokens_per_second`, `seconds`, `skipped_updates`, all under `train/`. The same on every rank, but for time.
        Raises:
            FailureError: the samples can't be trained on; nothing has changed.
        """
        started = time.perf_counter()
        check_samples(samples, self.encoder.banned_token_ids)
        if self._reference_head is not None and kl_coefficient > 0:
            check_hidden_states(samples, self._reference_head.weight.shape[1])
        parts = [samples[part.start : part.stop] for part in split_evenly(len(samples), self._updates_per_step)]
        plans = self._agreed(lambda: [self._plan(part) for part in parts])
        if len(plans) > 1 and samples[0].proximal_log_probs is None:
            plans = [self._with_proximal(plan) for plan in plans]
        self.module.train()
        reports = [report for plan in plans if (report := self._learn(plan, kl_coefficient)) is not None]
        seconds = time.perf_counter() - started
        tokens = sum(sample.total_tokens for sample in samples)
        metrics = merged_reports(reports) | {
            "learning_rate": self._learning_rate(max(0, self.applied_steps - 1)),
            "tokens": float(tokens),
            "trained_tokens": float(sum(int(sample.loss_mask.sum()) for sample in samples)),
            "sequences": float(len(samples)),
            "padding_share": sum(plan.padding_share for plan in plans) / len(plans),
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "skipped_updates": float(len(plans) - len(reports)),
        }
        return {f"train/{name}": value for name, value in metrics.items()}

    def log_probs(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """Log-probabilities of this rank's share of the samples, by index, each [tokens] float32, nats.

        Raises:
            FailureError: as :meth:`update`.
        """
        check_samples(samples, self.encoder.banned_token_ids)
        return self._log_probs(self._agreed(lambda: self._plan(samples)))

    def log_probs_and_collision(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """The same and, as a second row, the sum of squared probabilities at each token: [2, tokens] float32 each."""
        check_samples(samples, self.encoder.banned_token_ids)

        def forward(micro_batch: MicroBatch) -> Tensor:
            outcome = self._completion_log_probs(micro_batch, with_collision=True)
            assert outcome.collision is not None
            return torch.stack([outcome.log_probs, outcome.collision])

        return self._each_token(self._agreed(lambda: self._plan(samples)), forward)

    def canaries(self, prompts: Sequence[Prompt]) -> dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Token ids and log-probabilities of this rank's share of the canaries, by index.

        A canary's completion is the beginning of its prompt's own text: nobody has to sample it, and every policy finds
        some of it likely. Log-probabilities are of the whole distribution at temperature 1, nats.
        """
        # the same ones after every update: encoding them would take longer than a small model's forward pass
        known = self._canary_samples
        self._canary_samples = {p.prompt_id: known.get(p.prompt_id) or self._canary(p) for p in prompts}
        samples = [self._canary_samples[prompt.prompt_id] for prompt in prompts]
        plan = self._agreed(lambda: self._plan(samples))

        def forward(micro_batch: MicroBatch) -> Tensor:
            return completion_log_probs(self.engine.engine, micro_batch.batch, temperature=1.0).log_probs

        found = self._each_token(plan, forward)
        return {index: (samples[index].token_ids, log_probs) for index, log_probs in found.items()}

    def _canary(self, prompt: Prompt) -> TrainingSample:
        expanded = self.encoder.expand(prompt)
        room = min(CANARY_TOKENS, self.spec.model.max_length - len(expanded.token_ids) - 1)
        text = self.encoder.tokenizer.encode(_text_of(prompt), add_special_tokens=False)
        banned = set(self.encoder.banned_token_ids)
        ids = [token for token in text if token not in banned] or list(self.encoder.stop_token_ids)
        count = max(1, min(room, len(ids)))
        zeros = np.zeros(count, np.float32)
        return TrainingSample(
            prompt=prompt,
            prompt_token_ids=expanded.token_ids,
            token_ids=np.asarray(ids[:count], dtype=np.int32),
            loss_mask=np.ones(count, dtype=np.bool_),
            advantages=zeros,
            behaviour_log_probs=zeros,
            policy_versions=np.zeros(count, np.int32),
        )

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

    def _client_state(self) -> dict[str, Any]:
        return super()._client_state() | {"combiner": self.combiner.state() if self.combiner is not None else {}}

    def _restore(self, client_state: dict[str, Any]) -> None:
        super()._restore(client_state)
        if self.combiner is not None:
            self.combiner.restore(client_state["combiner"])

    def _learn(self, plan: Plan, kl_coefficient: float) -> dict[str, float] | None:
        marks = self._marks(plan)
        if self.combiner is not None:
            return self._learn_objectives(plan, marks, kl_coefficient, self.combiner)

        def loss(micro_batch: MicroBatch, denominators: Denominators) -> PartialLoss:
            tokens = _token_batch(micro_batch, marks)
            return self._loss(micro_batch, tokens, self.spec.algorithm, denominators, kl_coefficient)

        return self._optimise(plan, loss)

    def _learn_objectives(
        self,
        plan: Plan,
        marks: list[NDArray[np.float32]] | None,
        kl_coefficient: float,
        combiner: GradientCombiner,
    ) -> dict[str, float] | None:
        """One optimiser step of several objectives: a gradient each, and one of what all share (KL and entropy).

        The shared one isn't weighed. Metrics are those of its pass: ratios, KL, entropy, mismatch.
        """
        denominators = self._denominators(plan)
        if denominators is None:
            return None
        found = [sample.objective_rewards for sample in plan.samples if sample.objective_rewards is not None]
        rewards = torch.from_numpy(np.stack(found)).double().mean(0)
        alone = self.spec.algorithm.model_copy(update={"entropy_coefficient": 0.0})
        gradients, parts = [], list[ObjectiveMetrics]()
        for objective_index in (*range(len(rewards)), None):
            is_shared = objective_index is None

            def loss(micro_batch: MicroBatch, which: int | None = objective_index) -> PartialLoss:
                tokens = _token_batch(micro_batch, marks, objective=-1 if which is None else which)
                algorithm = self.spec.algorithm if which is None else alone
                coefficient = kl_coefficient if which is None else 0.0
                return self._loss(micro_batch, tokens, algorithm, denominators, coefficient)

            parts = self._backward(plan, loss)
            if not is_shared:
                gradients.append([shard.clone() for shard in self.engine.gradients()])
                self.engine.clear_gradients()
        described = self._combined(gradients, rewards, combiner)
        report = self._step(parts if described is not None else [], plan.rounds)
        return None if report is None or described is None else report | described

    def _combined(
        self, gradients: list[list[Tensor]], rewards: Tensor, combiner: GradientCombiner
    ) -> dict[str, float] | None:
        """Add the objectives' combination to the shared gradient; None, and NaN in it, where one isn't finite."""
        shared = self.engine.gradients()
        try:
            described = combiner.combine(
                gradients, rewards, self.applied_steps, is_sharded=self.engine.shards_gradients
            )
        except NonFiniteError as error:
            logger.warning("rank %d: %s", self.place.rank, error)
            for shard in shared:
                shard.fill_(math.nan)
            return None
        for shard, combined in zip(shared, gradients[0], strict=True):
            shard.add_(combined)
        return described

    def _loss(
        self,
        micro_batch: MicroBatch,
        tokens: TokenBatch,
        algorithm: AlgorithmConfig,
        denominators: Denominators,
        kl_coefficient: float,
    ) -> PartialLoss:
        head = self._reference_head if kl_coefficient > 0 else None
        outcome = self._completion_log_probs(
            micro_batch,
            with_entropy=True,
            entropy_gradient=algorithm.entropy_coefficient > 0,
            reference=None if head is None else _reference_outputs(micro_batch, head),
        )
        try:
            return policy_objective(
                outcome.log_probs, outcome.entropy, tokens, algorithm, denominators, kl_coefficient, outcome.kl
            )
        except NonFiniteError as error:
            raise UnusableOutputError(outcome.log_probs, error) from error

    def _marks(self, plan: Plan) -> list[NDArray[np.float32]] | None:
        """What the loss makes of the whole optimiser batch beforehand, sample by sample; None where it has nothing."""
        algorithm = self.spec.algorithm
        entry = POLICY_LOSSES.get(algorithm.loss)
        if entry.prepare is None:
            return None
        samples = plan.samples
        lengths = [len(sample.token_ids) for sample in samples]

        def packed(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(sample, name) for sample in samples]))

        behaviour = packed("behaviour_log_probs")
        has_proximal = samples[0].proximal_log_probs is not None
        tokens = BatchTokens(
            sample=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)),
            mask=packed("loss_mask"),
            advantages=packed("advantages"),
            behaviour_log_probs=behaviour,
            proximal_log_probs=packed("proximal_log_probs") if has_proximal else behaviour,
        )
        marks = entry.prepare(tokens, entry.read_options(algorithm.loss_options, "algorithm.loss_options"))
        return [part.numpy() for part in marks.to(torch.float32).split(lengths)]

    def _completion_log_probs(self, micro_batch: MicroBatch, **wanted: Any) -> TokenLogProbs:
        return completion_log_probs(
            self.engine.engine,
            micro_batch.batch,
            temperature=self.spec.temperature,
            banned_token_ids=self.encoder.banned_token_ids,
            **wanted,
        )

    def _log_probs(self, plan: Plan) -> dict[int, NDArray[np.float32]]:
        return self._each_token(plan, lambda micro_batch: self._completion_log_probs(micro_batch).log_probs)

    def _with_proximal(self, plan: Plan) -> Plan:
        """The plan with the log-probabilities before the first of several optimiser steps."""
        log_probs = self._log_probs(plan)
        zeros = [np.zeros(len(sample.token_ids), np.float32) for sample in plan.samples]
        samples = [
            replace(sample, proximal_log_probs=log_probs.get(index, zeros[index]))
            for index, sample in enumerate(plan.samples)
        ]
        return replace(plan, samples=samples)


def _text_of(prompt: Prompt) -> str:
    return "".join(part.text for message in prompt.messages for part in message.parts if isinstance(part, TextPart))


def _token_batch(
    micro_batch: MicroBatch, marks: Sequence[NDArray[np.float32]] | None, *, objective: int | None = None
) -> TokenBatch:
    """Tensors of a micro-batch; with the advantages of one objective alone, or with none for objective -1."""
    samples, batch = micro_batch.samples, micro_batch.batch
    device = batch.tokens.device

    def matrix(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return token_matrix([getattr(sample, name) for sample in samples], batch.shape, dtype).to(device)

    own = None if marks is None else [marks[index] for index in micro_batch.indices]
    return TokenBatch(
        matrix("loss_mask", torch.bool),
        matrix("advantages") if objective is None else _objective_advantages(samples, objective, batch).to(device),
        matrix("behaviour_log_probs"),
        None if samples[0].proximal_log_probs is None else matrix("proximal_log_probs"),
        None if samples[0].reference_log_probs is None else matrix("reference_log_probs"),
        marks=None if own is None else token_matrix(own, batch.shape, torch.float32).to(device),
    )


def _reference_outputs(micro_batch: MicroBatch, head: OutputHead) -> ReferenceOutputs:
    rows = [sample.reference_hidden for sample in micro_batch.samples if sample.reference_hidden is not None]
    hidden = torch.from_numpy(np.concatenate(rows))
    return ReferenceOutputs(head, hidden.to(micro_batch.batch.tokens.device))


def _objective_advantages(samples: Sequence[TrainingSample], objective: int, batch: ModelBatch) -> Tensor:
    rows = [sample.objective_advantages for sample in samples]
    if objective < 0:
        return torch.zeros(batch.shape)
    nothing = np.zeros(0, np.float32)  # the filler has none
    return token_matrix([nothing if row is None else row[objective] for row in rows], batch.shape, torch.float32)
