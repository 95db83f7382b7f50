"""A micro-batch as tensors. Media are processed only on the rank that trains on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.model.batches import TOKEN_FEATURES, ModelBatch, model_batch, token_matrix
from actors.trainer.planning import Plan
from rollout.encoding import ExpandedPrompt, PromptEncoder
from rollout.samples import TokenSequence


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences of a plan that run through the model at once.

    Attributes:
        indices: of the sequences in the plan's samples, in the order of the batch.
        samples: the sequences themselves.
        batch: their tensors, on the model's device. Where there is a filler, it is the last of the batch's B sequences
            and not among `samples`.
    """

    indices: list[int]
    samples: list[TokenSequence]
    batch: ModelBatch

    def column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, T] of a column of the samples by name, with zeros behind each completion's end and for the filler."""
        return self.matrix([getattr(sample, name) for sample in self.samples], dtype)

    def matrix(self, values: Sequence[NDArray[Any]], dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, T] of [tokens] values of each sample, with zeros as in :meth:`column`."""
        return token_matrix(values, self.batch.shape, dtype).to(self.batch.tokens.device)


class MicroBatchMaker:
    """Makes the micro-batches of one rank."""

    def __init__(self, encoder: PromptEncoder, *, zero_stage: int, device: str) -> None:
        self._filler = encoder.filler()
        self._filler_completion = np.array(encoder.stop_token_ids[:1] or [0], np.int32)
        self._token_features = TOKEN_FEATURES & set(self._filler.features)
        self._pad_token_id = encoder.tokenizer.pad_token_id or 0
        # ZeRO 2 and 3 wait for the vision tower on all ranks if one of them runs it.
        self._needs_media = zero_stage >= 2 and bool(self._filler.features)
        self._device = device

    def make(self, plan: Plan, turn: int) -> MicroBatch:
        """The plan's micro-batch of this turn, with a filler of one untrained token where it lacks something.

        A filler stands in where this rank has no micro-batch left but another has, and where it has no media.
        """
        rows = plan.micro_batches[turn] if turn < len(plan.micro_batches) else []
        indices = [index for row in rows for index in row]
        samples = [plan.samples[index] for index in indices]
        prompts = [plan.prompts[index] for index in indices]
        completions = [sample.token_ids for sample in samples]
        row_numbers = [number for number, row in enumerate(rows) for _ in row]
        if not rows or (self._needs_media and not _has_media(prompts)):
            prompts.append(self._filler)
            completions.append(self._filler_completion)
            row_numbers.append(len(rows))
        batch = model_batch(
            prompts,
            completions,
            pad_token_id=self._pad_token_id,
            token_features=self._token_features,
            rows=row_numbers,
        )
        return MicroBatch(indices, samples, batch.to(self._device))


def _has_media(prompts: Iterable[ExpandedPrompt]) -> bool:
    return any(prompt.features for prompt in prompts)
