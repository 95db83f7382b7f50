"""From losses by token to one number."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.aggregation import Denominators, count, token_weights
from algorithms.config import AlgorithmConfig
from algorithms.registry import AGGREGATIONS, Options, RegistryError, method

# Two sequences: losses 1, 2, 3 and 10; a third has no trained token.
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
VALUES = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
SWITCHES: dict[str, dict[str, Any]] = {
    "token_mean": {},
    "sequence_mean": {},
    "sequence_sum": {},
    "constant_length": {"length": 4},
}


def config_of(name: str) -> AlgorithmConfig:
    return AlgorithmConfig(aggregation=name, aggregation_options=SWITCHES[name])


def written_out(name: str, mask: Tensor, values: Tensor) -> float:
    """The aggregation as the papers write it, a sequence at a time."""
    rows = [[float(v) for v, m in zip(vs, ms, strict=True) if m] for vs, ms in zip(values, mask, strict=True)]
    rows = [row for row in rows if row]
    match name:
        case "token_mean":
            return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
        case "sequence_mean":
            return sum(sum(row) / len(row) for row in rows) / len(rows)
        case "sequence_sum":
            return sum(sum(row) for row in rows) / len(rows)
    return sum(sum(row) / SWITCHES[name]["length"] for row in rows) / len(rows)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", 16 / 4),
        ("sequence_mean", (2 + 10) / 2),
        ("sequence_sum", (6 + 10) / 2),
        ("constant_length", (6 / 4 + 10 / 4) / 2),
    ],
)
def test_aggregations_are_those_worked_by_hand(aggregation: str, expected: float) -> None:
    weights = token_weights(MASK, config_of(aggregation), Denominators(*count(MASK)), VALUES)
    assert float((weights * VALUES).sum()) == pytest.approx(expected)
    assert (weights[~MASK] == 0).all()


@pytest.mark.parametrize("aggregation", SWITCHES)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), columns=st.integers(1, 7), cut=st.integers(0, 6))
@settings(max_examples=30)
def test_aggregations_are_the_papers_over_any_shape_and_any_split(
    aggregation: str, seed: int, rows: int, columns: int, cut: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[0, 0] = True
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    denominators = Denominators(*count(mask))
    parts = [
        (token_weights(mask[part], config_of(aggregation), denominators, values) * values[part]).sum()
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert float(sum(parts)) == pytest.approx(written_out(aggregation, mask, values), abs=1e-12)


@pytest.mark.parametrize("aggregation", SWITCHES)
def test_the_weight_of_a_sequence_without_trained_tokens_is_zero_and_not_nan(aggregation: str) -> None:
    weights = token_weights(MASK, config_of(aggregation), Denominators(4, 2), VALUES)
    assert (weights[2] == 0).all()


def test_token_and_sequence_means_weigh_a_whole_batch_one() -> None:
    for aggregation in ("token_mean", "sequence_mean"):
        weights = token_weights(MASK, config_of(aggregation), Denominators(*count(MASK)), VALUES)
        assert float(weights.sum()) == pytest.approx(1.0)


def test_with_a_constant_length_no_other_token_changes_a_tokens_weight() -> None:
    shorter = MASK.clone()
    shorter[0, 2] = False
    whole, part = (
        token_weights(mask, config_of("constant_length"), Denominators(*count(mask)), VALUES)
        for mask in (MASK, shorter)
    )
    assert torch.equal(whole[:, 0], part[:, 0])


def test_a_constant_length_must_be_given_and_the_error_says_what_it_is() -> None:
    config = AlgorithmConfig(aggregation="constant_length")
    with pytest.raises(RegistryError, match=r"aggregation_options\.length .* must be set: .*max_tokens"):
        token_weights(MASK, config, Denominators(4, 2), VALUES)


def test_a_sequence_without_trained_tokens_is_not_counted() -> None:
    assert count(MASK) == (4, 2)


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (0, 1), (3, 0)])
def test_an_empty_batch_is_refused(tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="no loss"):
        Denominators(tokens, sequences)


def test_a_users_own_aggregation_is_used_by_name_and_must_give_a_weight_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AGGREGATIONS, "_entries", dict(AGGREGATIONS._entries))  # what is added here goes with the test

    @method(AGGREGATIONS, "last_token")
    def last_token(mask: Tensor, denominators: Denominators, options: Options) -> Tensor:
        is_last = mask.flip(-1).cumsum(-1).flip(-1) == 1
        return is_last * mask / denominators.sequences

    @method(AGGREGATIONS, "by_sequence")
    def by_sequence(mask: Tensor, denominators: Denominators, options: Options) -> Tensor:
        return mask.sum(-1)

    def weights(name: str) -> Tensor:
        return token_weights(MASK, AlgorithmConfig(aggregation=name), Denominators(4, 2), VALUES)

    # The last trained tokens lose 3 and 10.
    assert float((weights("last_token") * VALUES).sum()) == 6.5
    with pytest.raises(ValueError, match=r"weights of \[3\] for a mask of \[3, 3\]"):
        weights("by_sequence")


def test_an_unknown_aggregation_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RegistryError, match="Did you mean 'token_mean'"):
        token_weights(MASK, AlgorithmConfig(aggregation="token_means"), Denominators(4, 2), VALUES)
