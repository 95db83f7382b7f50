"""One rank of the critic: a body like the policy's with a head of one output, regressed on returns. No Ray here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.model.batches import ModelBatch, check_samples, token_matrix
from actors.model.forward import completion_logits
from actors.model.loading import load_model
from actors.model.output_head import expected_transform
from actors.trainer.learner import Learner, MicroBatch, PartialLoss, UnusableOutputError, merged_reports
from algorithms.finite import NonFiniteError, require_finite
from algorithms.logit_tiles import LogitTransform
from algorithms.policy_objective import Denominators, ObjectiveMetrics
from algorithms.values import value_loss
from rollout.balance import split_evenly
from rollout.samples import TrainingSample

if TYPE_CHECKING:
    from actors.trainer.spec import CriticSpec


class ValueTrainer(Learner):
    """The critic under training on one rank."""

    spec: CriticSpec

    def _load_module(self) -> Any:
        return load_value_model(self.spec)

    def values(self, samples: list[TrainingSample]) -> dict[int, NDArray[np.float32]]:
        """Values of this rank's share of the samples, by index: [tokens] float32 each, before each completion token."""
        check_samples(samples, self.encoder.banned_token_ids)
        plan = self._agreed(lambda: self._plan(samples))
        return self._each_token(plan, lambda micro_batch: completion_values(self.engine.engine, micro_batch.batch))

    def update(self, samples: list[TrainingSample]) -> dict[str, float]:
        """One training step, in as many optimiser steps as the policy's.

        Returns:
            Under `critic/`: `loss`, `clipped_share`, `value_mean`, `return_mean`, `explained_variance`, `grad_norm`,
            `learning_rate`, `skipped_updates`, `seconds`.
        Raises:
            FailureError: the samples can't be trained on; nothing has changed.
        """
        started = time.perf_counter()
        check_samples(samples, self.encoder.banned_token_ids)
        parts = [samples[part.start : part.stop] for part in split_evenly(len(samples), self._updates_per_step)]
        plans = self._agreed(lambda: [self._plan(part) for part in parts])
        self.module.train()
        reports = [report for plan in plans if (report := self._optimise(plan, self._loss)) is not None]
        metrics = merged_reports([_explained(report) for report in reports]) | {
            "learning_rate": self._learning_rate(max(0, self.applied_steps - 1)),
            "skipped_updates": float(len(plans) - len(reports)),
            "seconds": time.perf_counter() - started,
        }
        return {f"critic/{name}": value for name, value in metrics.items()}

    def _loss(self, micro_batch: MicroBatch, denominators: Denominators) -> PartialLoss:
        samples, batch = micro_batch.samples, micro_batch.batch
        values = completion_values(self.engine.engine, batch)

        def matrix(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            none = np.zeros(0, np.float32)  # the filler has neither values nor returns
            rows = [none if (row := getattr(sample, name)) is None else row for sample in samples]
            return token_matrix(rows, batch.shape, dtype).to(values.device)

        mask, returns, old = matrix("loss_mask", torch.bool), matrix("returns"), matrix("values")
        try:
            require_finite("the critic's value", values.detach(), mask, index_name="(sequence, token)")
        except NonFiniteError as error:
            raise UnusableOutputError(values, error) from error
        outcome = value_loss(values, old, returns, mask, clip=self.spec.clip)
        loss = outcome.values.sum() / denominators.tokens
        inside = mask.to(values.dtype)

        def mean(each: Tensor) -> Tensor:
            return (each.detach() * inside).sum() / denominators.tokens

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


def load_value_model(spec: CriticSpec) -> Any:
    """The model of a folder with a head of one output, 0 at the start, in place of its output embeddings.

    All of the body learns, without adapters: a frozen one would leave the critic no more than its head.

    Raises:
        ValueError: the family scales or caps what its head says, which would bend the values.
    """
    model = load_model(spec.model)
    transform = expected_transform(model.config)
    if transform != LogitTransform():
        raise ValueError(
            f"critic: {spec.model.path} changes what its output head says ({transform}), which values can't bear. "
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


def _explained(report: dict[str, float]) -> dict[str, float]:
    """The report with the explained variance of the returns by the values they were estimated with."""
    report = dict(report)
    variance = report.pop("return_square") - report["return_mean"] ** 2
    error = report.pop("error_square") - report.pop("error_mean") ** 2
    return report | {"explained_variance": 1 - error / variance if variance > 0 else 0.0}
