"""Samples are checked for the columns that an objective reads, and for no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.trainer.sample_checks import Columns, check_samples
from rollout.failures import FailureError, FailureKind
from rollout.samples import TokenSequence, TrainingSample
from tests.actors.trainer.sequences import sequence

ROLLOUT = Columns(required=("advantages",), optional=("proximal_log_probs",))


def sample(tokens: int = 3) -> TrainingSample:
    base = sequence("one", 2, tokens)
    zeros = np.zeros(tokens, np.float32)
    return TrainingSample(
        base.prompt, base.prompt_token_ids, base.token_ids, base.loss_mask, zeros, zeros, np.zeros(tokens, np.int32)
    )


def test_a_token_sequence_passes_where_no_column_is_needed() -> None:
    check_samples([sequence("one", 2, 3)], ())


def test_a_column_that_is_not_read_may_hold_anything() -> None:
    broken = replace(sample(), behaviour_log_probs=np.full(1, np.nan, np.float32))
    check_samples([broken], (), ROLLOUT)


def nan_at(index: int) -> np.ndarray:
    values = np.zeros(3, np.float32)
    values[index] = np.nan
    return values


@pytest.mark.parametrize(
    ("samples", "reason", "message"),
    [
        ([], "no_samples", "the batch has no samples"),
        ([sequence("one", 2, 3)], "sample_shape", "1 of 1 samples have no advantages: all must have it"),
        (
            [sample(), replace(sample(), proximal_log_probs=np.zeros(3, np.float32))],
            "sample_shape",
            "1 of 2 samples have no proximal_log_probs: all must have it, or none",
        ),
        ([replace(sample(), advantages=np.zeros(2, np.float32))], "sample_shape", "2 advantages for 3 tokens"),
        ([replace(sample(), loss_mask=np.ones(2, np.bool_))], "sample_shape", "loss_mask has 2 entries for 3 tokens"),
        ([replace(sample(), advantages=nan_at(1))], "sample_not_finite", "advantages of token 1 is nan"),
        ([sample(0)], "sample_shape", "empty completion"),
        ([sample(10)], "banned_token_sampled", "holds a media placeholder"),
    ],
)
def test_samples_that_cannot_be_learned_from_are_refused(
    samples: list[TokenSequence], reason: str, message: str
) -> None:
    with pytest.raises(FailureError, match=message) as caught:
        check_samples(samples, (7,), ROLLOUT)
    assert (caught.value.failure.kind, caught.value.failure.reason) == (FailureKind.BUG, reason)


def test_only_trained_tokens_must_be_finite() -> None:
    masked = replace(sample(), advantages=nan_at(1), loss_mask=np.array([True, False, True]))
    check_samples([masked], (), ROLLOUT)
