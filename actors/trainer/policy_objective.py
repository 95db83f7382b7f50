"""What the policy learns: a recipe's loss, in one gradient or in one for each of several rewards. No Ray here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.model.forward import TokenLogProbs, completion_log_probs, require_plain
from actors.model.loading import freeze, load_model
from actors.model.lora import add_adapters
from actors.model.output_head import OutputHead, ReferenceOutputs
from actors.model.reference_head import load_output_head
from actors.trainer.gradient_combiner import GradientCombiner
from actors.trainer.micro_batch import MicroBatch
from actors.trainer.objective import Objective, token_denominators
from actors.trainer.passes import PartialLoss, Passes, UnusableOutputError
from actors.trainer.sample_checks import Columns
from actors.trainer.spec import PolicySpec
from algorithms import choices  # noqa: F401  registers the built-in methods
from algorithms.aggregation import Denominators
from algorithms.config import AlgorithmConfig
from algorithms.finite import NonFiniteError
from algorithms.inputs import BatchTokens
from algorithms.kl import full, needs_distributions
from algorithms.objective_metrics import ObjectiveMetrics
from algorithms.registry import KL_ESTIMATORS, POLICY_LOSSES
from algorithms.total_loss import TokenBatch, finish_metrics, total_loss
from rollout.samples import TokenSequence
from rollout.user_code import import_modules

logger = logging.getLogger(__name__)

ROLLOUT_COLUMNS = ("advantages", "behaviour_log_probs")
OBJECTIVE_COLUMNS = ("objective_advantages", "objective_rewards")
OPTIONAL_COLUMNS = ("reference_log_probs", "reference_hidden", "proximal_log_probs")


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """What the policy's loss needs of a whole optimiser batch.

    Attributes:
        denominators: its sizes.
        columns: the columns that its samples have, by name.
        marks: [tokens] float32 of each sample, what the loss makes of the whole batch; None where it makes nothing.
        rewards: [objectives] float64, mean reward by objective; None for one gradient.
    """

    denominators: Denominators
    columns: frozenset[str]
    marks: list[NDArray[np.float32]] | None
    rewards: Tensor | None


class PolicyObjective(Objective[PolicyBatch]):
    """Importance weight x policy loss + KL - entropy bonus, as the recipe composes it.

    Attributes:
        kl_coefficient: weight of the KL in the next update.
        uses_rollouts: whether it learns from what the policy sampled; False for supervised fine-tuning, whose
            sequences have no columns.
        combiner: of several objectives' gradients; None for one gradient.
        reference_head: what the exact KL takes the reference's distributions from; whole on every rank. None where the
            recipe has none.
    """

    prefix = "train"

    def __init__(self, spec: PolicySpec, banned_token_ids: tuple[int, ...], device: str) -> None:
        import_modules(spec.algorithm.modules)
        self._spec = spec
        self._algorithm = spec.algorithm
        self._banned_token_ids = banned_token_ids
        self._device = device
        self._loss = POLICY_LOSSES.get(spec.algorithm.loss)
        has_objectives = spec.algorithm.gradient_combination is not None
        self.kl_coefficient = 0.0
        self.uses_rollouts = self._loss.uses_rollouts
        self.combiner = GradientCombiner(spec.algorithm) if has_objectives else None
        self.reference_head: OutputHead | None = None
        required = ROLLOUT_COLUMNS if self.uses_rollouts else ()
        self.columns = Columns(required + (OBJECTIVE_COLUMNS if has_objectives else ()), OPTIONAL_COLUMNS)

    def load_module(self) -> Any:
        """The policy with frozen parts and adapters, and the reference's head where the exact KL needs it.

        Raises:
            ValueError: the exact KL can't be computed with these models or this estimator.
        """
        model = self._spec.model
        module = load_model(model)
        freeze(module, model.freeze)
        if model.lora is not None:
            add_adapters(module, model.lora, seed=self._spec.seed)
        if needs_distributions(self._algorithm.kl):
            self.reference_head = self._load_reference_head(module)
        return module

    def prepare(self, samples: Sequence[TokenSequence]) -> PolicyBatch | None:
        """Denominators, marks and mean rewards; None where no token is trained."""
        denominators = token_denominators(samples)
        if denominators is None:
            return None
        names = (*self.columns.required, *self.columns.optional)
        columns = frozenset(name for name in names if getattr(samples[0], name, None) is not None)
        rewards = None
        if self.combiner is not None:
            rewards = torch.from_numpy(np.stack(_column(samples, "objective_rewards"))).double().mean(0)
        return PolicyBatch(denominators, columns, self._marks(samples, columns), rewards)

    def loss(self, model: Any, micro_batch: MicroBatch, batch: PolicyBatch) -> PartialLoss:
        """See :func:`algorithms.total_loss.total_loss`."""
        advantages = micro_batch.column("advantages") if self.uses_rollouts else None
        return self._partial_loss(model, micro_batch, batch, advantages, self._algorithm, self.kl_coefficient)

    def gradient(self, passes: Passes, batch: PolicyBatch) -> tuple[list[ObjectiveMetrics], dict[str, float]]:
        """One gradient, or the combination of one for each objective plus one of what all share (KL and entropy).

        The shared one isn't weighed. Metrics are those of its pass: ratios, KL, entropy, mismatch.
        """
        if self.combiner is None:
            return super().gradient(passes, batch)
        assert batch.rewards is not None
        alone = self._algorithm.model_copy(update={"entropy_coefficient": 0.0})
        gradients = []
        for objective in range(len(batch.rewards)):

            def loss(model: Any, micro_batch: MicroBatch, objective: int = objective) -> PartialLoss:
                rows = [advantages[objective] for advantages in _column(micro_batch.samples, "objective_advantages")]
                return self._partial_loss(model, micro_batch, batch, micro_batch.matrix(rows), alone, 0.0)

            passes.backward(loss)
            gradients.append([shard.clone() for shard in passes.deepspeed.gradients()])
            passes.deepspeed.clear_gradients()

        def shared(model: Any, micro_batch: MicroBatch) -> PartialLoss:
            nothing = torch.zeros(micro_batch.batch.shape, device=micro_batch.batch.tokens.device)
            return self._partial_loss(model, micro_batch, batch, nothing, self._algorithm, self.kl_coefficient)

        parts = passes.backward(shared)
        described = self._combined(passes, gradients, batch.rewards, self.combiner)
        return (parts, described) if described is not None else ([], {})

    def after_step(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """See :func:`algorithms.total_loss.finish_metrics`."""
        return finish_metrics(sums, maxima)

    def state(self) -> dict[str, Any]:
        """The combiner's."""
        return {"combiner": self.combiner.state() if self.combiner is not None else {}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        if self.combiner is not None:
            self.combiner.restore(state["combiner"])

    def log_probs(self, model: Any, micro_batch: MicroBatch, **wanted: Any) -> TokenLogProbs:
        """Of the tempered distribution without banned tokens (see :func:`actors.model.forward.completion_log_probs`).

        Args:
            wanted: what else of the distribution.
        """
        return completion_log_probs(
            model,
            micro_batch.batch,
            temperature=self._spec.temperature,
            banned_token_ids=self._banned_token_ids,
            **wanted,
        )

    def _partial_loss(
        self,
        model: Any,
        micro_batch: MicroBatch,
        batch: PolicyBatch,
        advantages: Tensor | None,
        algorithm: AlgorithmConfig,
        kl_coefficient: float,
    ) -> PartialLoss:
        head = self.reference_head if kl_coefficient > 0 else None
        outcome = self.log_probs(
            model,
            micro_batch,
            with_entropy=True,
            entropy_gradient=algorithm.entropy_coefficient > 0,
            reference=None if head is None else _reference_outputs(micro_batch, head),
        )
        tokens = self._token_batch(micro_batch, batch, advantages)
        try:
            return total_loss(
                outcome.log_probs, outcome.entropy, tokens, algorithm, batch.denominators, kl_coefficient, outcome.kl
            )
        except NonFiniteError as error:
            raise UnusableOutputError(outcome.log_probs, error) from error

    def _token_batch(self, micro_batch: MicroBatch, batch: PolicyBatch, advantages: Tensor | None) -> TokenBatch:
        def optional(name: str) -> Tensor | None:
            return micro_batch.column(name) if name in batch.columns else None

        own = None if batch.marks is None else [batch.marks[index] for index in micro_batch.indices]
        return TokenBatch(
            micro_batch.column("loss_mask", torch.bool),
            advantages,
            micro_batch.column("behaviour_log_probs") if self.uses_rollouts else None,
            optional("proximal_log_probs"),
            optional("reference_log_probs"),
            marks=None if own is None else micro_batch.matrix(own),
        )

    def _marks(self, samples: Sequence[TokenSequence], columns: frozenset[str]) -> list[NDArray[np.float32]] | None:
        """What the loss makes of the whole optimiser batch beforehand, sample by sample; None where it has nothing."""
        prepare = self._loss.prepare
        if prepare is None:
            return None
        lengths = [len(sample.token_ids) for sample in samples]

        def packed(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate(_column(samples, name)))

        behaviour = packed("behaviour_log_probs")
        tokens = BatchTokens(
            sample=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)),
            mask=packed("loss_mask"),
            advantages=packed("advantages"),
            behaviour_log_probs=behaviour,
            proximal_log_probs=packed("proximal_log_probs") if "proximal_log_probs" in columns else behaviour,
        )
        options = self._loss.read_options(self._algorithm.loss_options, "algorithm.loss_options")
        marks = prepare(tokens, options).to(torch.float32)
        return [part.numpy() for part in marks.split(lengths)]

    def _combined(
        self, passes: Passes, gradients: list[list[Tensor]], rewards: Tensor, combiner: GradientCombiner
    ) -> dict[str, float] | None:
        """Add the objectives' combination to the shared gradient; None, and NaN in it, where one isn't finite."""
        shared = passes.deepspeed.gradients()
        try:
            described = combiner.combine(gradients, rewards, passes.step, is_sharded=passes.deepspeed.shards_gradients)
        except NonFiniteError as error:
            logger.warning("the objectives' gradients can't be combined: %s", error)
            for shard in shared:
                shard.fill_(math.nan)
            return None
        for shard, combined in zip(shared, gradients[0], strict=True):
            shard.add_(combined)
        return described

    def _load_reference_head(self, module: Any) -> OutputHead:
        kl, own = self._algorithm.kl, module.get_output_embeddings()
        if KL_ESTIMATORS.get(kl.estimator).function is not full:
            raise ValueError(
                f"algorithm.kl.estimator = {kl.estimator} needs whole distributions, from which the trainer computes "
                "only the exact KL. Set it to full, or to an estimator of single tokens."
            )
        require_plain(module, own)
        model = self._spec.model
        path = self._spec.reference or model.path
        head = load_output_head(model, path).to(self._device)
        if len(head.weight) != own.out_features:
            raise ValueError(
                f"algorithm.kl.estimator = {kl.estimator} compares whole distributions, but {path} has "
                f"{len(head.weight)} logits and {model.path} has {own.out_features}. Set it to k3, or "
                "reference.path to a model of the same vocabulary."
            )
        return head


def _column(samples: Sequence[TokenSequence], name: str) -> list[NDArray[Any]]:
    """A column that all samples have, sample by sample."""
    return [getattr(sample, name) for sample in samples]


def _reference_outputs(micro_batch: MicroBatch, head: OutputHead) -> ReferenceOutputs:
    """The reference's hidden states of a micro-batch, with zeros for the filler's token."""
    tokens, width = len(micro_batch.batch.tokens), head.weight.shape[1]
    rows = _column(micro_batch.samples, "reference_hidden")
    known = sum(len(row) for row in rows)
    hidden = np.concatenate([*rows, np.zeros((tokens - known, width), rows[0].dtype if rows else np.float32)])
    return ReferenceOutputs(head, torch.from_numpy(hidden).to(micro_batch.batch.tokens.device))
