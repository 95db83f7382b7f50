"""What the critic learns: returns, by a body like the policy's with a head of one output. No Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from actors.model.batches import ModelBatch
from actors.model.forward import completion_logits
from actors.model.loading import load_model
from actors.model.output_head import expected_transform
from actors.trainer.deepspeed_engine import Place
from actors.trainer.learner import Learner
from actors.trainer.micro_batch import MicroBatch
from actors.trainer.objective import Objective, token_denominators
from actors.trainer.passes import PartialLoss, UnusableOutputError
from actors.trainer.sample_checks import Columns
from actors.trainer.spec import CriticSpec
from algorithms.aggregation import Denominators
from algorithms.finite import NonFiniteError, require_finite
from algorithms.logit_tiles import LogitTransform
from algorithms.objective_metrics import ObjectiveMetrics
from algorithms.values import value_loss
from rollout.samples import TokenSequence


class ValueObjective(Objective[Denominators]):
    """Half the squared difference to the returns, with a bound on how far a value moves in one update.

    Its metrics are `loss`, `clipped_share`, `value_mean`, `return_mean` and `explained_variance`.
    """

    prefix = "critic"
    columns = Columns(required=("values", "returns"))

    def __init__(self, spec: CriticSpec) -> None:
        self._spec = spec

    def load_module(self) -> Any:
        """See :func:`load_value_model`."""
        return load_value_model(self._spec)

    def prepare(self, samples: Sequence[TokenSequence]) -> Denominators | None:
        """See :func:`actors.trainer.objective.token_denominators`."""
        return token_denominators(samples)

    def values(self, model: Any, micro_batch: MicroBatch) -> Tensor:
        """See :func:`completion_values`."""
        return completion_values(model, micro_batch.batch)

    def loss(self, model: Any, micro_batch: MicroBatch, batch: Denominators) -> PartialLoss:
        """See :func:`algorithms.values.value_loss`."""
        values = self.values(model, micro_batch)
        mask = micro_batch.column("loss_mask", torch.bool)
        returns, old = micro_batch.column("returns"), micro_batch.column("values")
        try:
            require_finite("the critic's value", values.detach(), mask, index_name="(sequence, token)")
        except NonFiniteError as error:
            raise UnusableOutputError(values, error) from error
        outcome = value_loss(values, old, returns, mask, clip=self._spec.clip)
        loss = outcome.values.sum() / batch.tokens
        inside = mask.to(values.dtype)

        def mean(each: Tensor) -> Tensor:
            return (each.detach() * inside).sum() / batch.tokens

        sums = {
            "loss": loss.detach(),
            "clipped_share": mean(outcome.is_clipped.to(values.dtype)),
            "value_mean": mean(values),
            "return_mean": mean(returns),
            "return_square": mean(returns.square()),
            "error_mean": mean(returns - old),
            "error_square": mean((returns - old).square()),
        }
        return loss, ObjectiveMetrics(sums, {})

    def after_step(self, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
        """The metrics with the explained variance of the returns by the values they were estimated with."""
        report = sums | maxima
        variance = report.pop("return_square") - report["return_mean"] ** 2
        error = report.pop("error_square") - report.pop("error_mean") ** 2
        return report | {"explained_variance": 1 - error / variance if variance > 0 else 0.0}


def critic_learner(spec: CriticSpec, place: Place, store: distributed.Store | None = None) -> Learner[ValueObjective]:
    """The critic under training on one rank."""
    return Learner(spec, place, store, lambda encoder: ValueObjective(spec))


def load_value_model(spec: CriticSpec) -> Any:
    """The model of a folder with a head of one output, 0 at the start, in place of its output embeddings.

    All of the body learns, without adapters: a frozen one would leave the critic no more than its head.

    Raises:
        ValueError: the family scales or caps what its head returns, which would distort the values.
    """
    model = load_model(spec.model)
    transform = expected_transform(model.config)
    if transform != LogitTransform():
        raise ValueError(
            f"critic: {spec.model.path} changes what its output head returns ({transform}), which distorts values. "
            "Name a model of another family in critic.path, or use an estimator without a critic."
        )
    old = model.get_output_embeddings()
    head = nn.Linear(old.weight.shape[1], 1, bias=True, dtype=old.weight.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    return model


def completion_values(model: Any, batch: ModelBatch) -> Tensor:
    """The value before each completion token, [B, T] float32; 0 behind each completion's end."""
    values = completion_logits(model, batch)[:, 0].float()
    return values.new_zeros(batch.shape).index_put((batch.samples, batch.columns), values)
