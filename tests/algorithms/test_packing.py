"""Packed values laid out in rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.packing import Packing

lengths_of_rows = st.lists(st.integers(0, 7), min_size=1, max_size=9)


def numbered(lengths: list[int]) -> Tensor:
    return torch.arange(1, sum(lengths) + 1, dtype=torch.float32)


def test_rows_are_padded_on_the_right() -> None:
    layout = Packing.of(torch.tensor([2, 0, 3]))
    assert layout.to_rows(numbered([2, 0, 3])).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    mask = Packing.of(torch.tensor([1, 2]), width=3).to_rows(torch.ones(3, dtype=torch.bool))
    assert mask.tolist() == [[True, False, False], [True, True, False]]


@given(lengths_of_rows, st.integers(0, 3))
@settings(max_examples=50)
def test_rows_agree_with_a_loop(lengths: list[int], room: int) -> None:
    packed = numbered(lengths)
    layout = Packing.of(torch.tensor(lengths), max(lengths) + room)
    matrix = layout.to_rows(packed)
    expected = torch.zeros(len(lengths), max(lengths) + room)
    for row, values in enumerate(packed.split(lengths)):
        expected[row, : len(values)] = values
    assert torch.equal(matrix, expected)


def test_sizes_that_do_not_fit_are_refused() -> None:
    layout = Packing.of(torch.tensor([2, 3]))
    with pytest.raises(ValueError, match=r"packed values must be \[5\], one a token, got \[4\]"):
        layout.to_rows(torch.zeros(4))
    with pytest.raises(ValueError, match="width = 2 can't hold the longest sequence of 3 tokens"):
        Packing.of(torch.tensor([2, 3]), width=2)


def test_no_rows_make_an_empty_matrix() -> None:
    assert Packing.of(torch.zeros(0, dtype=torch.long)).to_rows(torch.zeros(0)).shape == (0, 0)
