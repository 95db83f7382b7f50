"""Lays values by token, packed end to end, out as a matrix with a row a sequence, without a loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The layout of sequences of given lengths, packed and in rows padded on the right.

    Made once for a batch and used for each of its tensors.

    Attributes:
        lengths: [rows] int64, tokens of each sequence; 0 is allowed.
        width: columns of a matrix; at least the longest.
    """

    lengths: Tensor
    width: int

    @classmethod
    def of(cls, lengths: Tensor, width: int | None = None) -> Packing:
        """The layout of sequences of these lengths, as wide as the longest unless told otherwise.

        Raises:
            ValueError: the width can't hold the longest sequence.
        """
        longest = int(lengths.max()) if len(lengths) else 0
        if width is not None and width < longest:
            raise ValueError(f"width = {width} can't hold the longest sequence of {longest} tokens")
        return cls(lengths, longest if width is None else width)

    @cached_property
    def cells(self) -> Tensor:
        """[tokens] int64, the place of each token in the flattened matrix."""
        starts = self.lengths.cumsum(0) - self.lengths
        offsets = torch.arange(len(self.lengths), device=self.lengths.device) * self.width - starts
        return torch.arange(int(self.lengths.sum()), device=self.lengths.device) + torch.repeat_interleave(
            offsets, self.lengths
        )

    def to_rows(self, packed: Tensor) -> Tensor:
        """[tokens] as [rows, width], 0 (False) behind each sequence's end.

        Raises:
            ValueError: there are not as many values as tokens.
        """
        if packed.shape != self.cells.shape:
            raise ValueError(f"packed values must be {list(self.cells.shape)}, one a token, got {list(packed.shape)}")
        matrix = packed.new_zeros(len(self.lengths) * self.width)
        return matrix.index_copy_(0, self.cells, packed).view(len(self.lengths), self.width)
