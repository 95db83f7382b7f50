"""From losses by token to one number."""

import pytest
import torch

from algorithms.aggregation import Denominators, count, token_weights
from algorithms.config import AlgorithmConfig

# Two sequences: losses 1, 2, 3 and 10; a third has no trained token.
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
VALUES = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", 16 / 4), ("sequence_mean", (2 + 10) / 2), ("sequence_sum", (6 + 10) / 2)],
)
def test_aggregations_are_those_worked_by_hand(aggregation: str, expected: float) -> None:
    config = AlgorithmConfig.model_validate({"aggregation": aggregation})
    tokens, sequences = count(MASK)
    weights = token_weights(MASK, config, Denominators(tokens, sequences), VALUES)
    assert float((weights * VALUES).sum()) == pytest.approx(expected)
    assert (weights[~MASK] == 0).all()


def test_a_sequence_without_trained_tokens_is_not_counted() -> None:
    assert count(MASK) == (4, 2)


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (0, 1), (3, 0)])
def test_an_empty_batch_is_refused(tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="no loss"):
        Denominators(tokens, sequences)
