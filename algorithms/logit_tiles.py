"""Logits of an output head and their gradients, one tile of [tokens, vocabulary] at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MIN_WIDTH = 1024
"""Columns of a tile where there are so many tokens that not all fit side by side: narrower products are slow."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model family does to its head's output: cap * tanh(scale * output / cap).

    Attributes:
        scale: Granite divides its logits, Cohere multiplies them.
        softcap: Gemma's bound on the size of a logit; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """The logits, of the same shape."""
        logits = output if self.scale == 1 else output * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


class LogitSettings(NamedTuple):
    """From an output head's outputs to the logits of the distribution that is sampled from.

    Attributes:
        transform: of the outputs.
        temperature: above 0; divides the transformed outputs.
        banned_token_ids: ascending; their logits are the least number there is.
    """

    transform: LogitTransform
    temperature: float
    banned_token_ids: tuple[int, ...]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax is computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Head:
    """An output head and its inputs; gives the logits of a tile and takes their gradient.

    A tile's tensors live in buffers that the next tile overwrites.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: LogitSettings,
        tile_bytes: int,
        *,
        extra_buffers: int = 0,
        like: Head | None = None,
    ) -> None:
        """Plan the tiles.

        Args:
            hidden: [N, H].
            weight: [V, H].
            bias: [V].
            settings: what makes logits of the head's outputs.
            tile_bytes: of all buffers of a tile together.
            extra_buffers: how many :meth:`buffer` gives.
            like: take the tiles of this head.
        """
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.transform, self.temperature, self.banned = settings
        self.dtype = work_dtype(hidden.dtype)
        self.is_narrow = hidden.dtype != self.dtype
        self.tokens, self.vocabulary = len(hidden), len(weight)
        buffers = 1 + extra_buffers + (self.transform.softcap is not None)
        element_bytes = buffers * self.dtype.itemsize + self.is_narrow * hidden.dtype.itemsize
        elements = max(tile_bytes // element_bytes, 1)
        self.width = max(min(elements // max(self.tokens, 1), self.vocabulary), min(MIN_WIDTH, self.vocabulary))
        self.width = min(self.width, elements)
        self.block = min(max(elements // self.width, 1), max(self.tokens, 1))
        if like is not None:
            self.width, self.block = like.width, like.block
        self._values = self._new_buffer(self.dtype)
        self._outputs = self._new_buffer(hidden.dtype) if self.is_narrow else self._values
        self._extra = [self._new_buffer(self.dtype) for _ in range(extra_buffers)]
        self._slope: Tensor | None = None
        self._gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def zeros(self) -> Tensor:
        """[N] zeros of the type that is computed in."""
        return torch.zeros(self.tokens, dtype=self.dtype, device=self.hidden.device)

    def buffer(self, index: int, rows: slice, columns: slice) -> Tensor:
        """[rows, columns] of one of the extra buffers."""
        return _shaped(self._extra[index], rows, columns)

    def logits(self, rows: slice, columns: slice, *, keeps_slope: bool = False) -> Tensor:
        """[rows, columns] logits over temperature, to be overwritten at will.

        Args:
            keeps_slope: keep what :meth:`pull_back` needs of a soft cap.
        """
        outputs = _shaped(self._outputs, rows, columns)
        torch.mm(self.hidden[rows], self.weight[columns].t(), out=outputs)
        if self.bias is not None:
            outputs.add_(self.bias[columns])
        values = _shaped(self._values, rows, columns)
        if self.is_narrow:
            values.copy_(outputs)
        scale, cap = self.transform.scale, self.transform.softcap
        if cap is not None:
            values.mul_(scale / cap).tanh_()
            if keeps_slope:
                self._slope = self._new_buffer(self.dtype) if self._slope is None else self._slope
                # d tanh(x) = 1 - tanh(x)^2
                torch.mul(values, values, out=_shaped(self._slope, rows, columns)).neg_().add_(1)
            scale = cap
        if scale != self.temperature:
            values.mul_(scale / self.temperature)
        return self._fill_banned(values, columns, torch.finfo(self.dtype).min)

    def expect_gradients(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Make room for the gradients that are wanted."""
        self._gradients = (
            self.hidden.new_zeros(self.hidden.shape, dtype=self.dtype) if hidden else None,
            (torch.empty_like if self.tokens else torch.zeros_like)(self.weight) if weight else None,
            self.hidden.new_zeros(self.vocabulary, dtype=self.dtype) if bias else None,
        )
        splits_tokens = self.block < self.tokens
        # Sums over blocks of tokens are kept in float32, one tile's at a time.
        self._rows_sum = (
            self.hidden.new_empty(self.width, self.hidden.shape[1], dtype=self.dtype)
            if weight and splits_tokens and self.is_narrow
            else None
        )

    def pull_back(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Add a tile's part to the gradients.

        Args:
            gradient: [rows, columns] of the logits over temperature; overwritten.
        """
        self._fill_banned(gradient, columns, 0.0)
        if self.transform.softcap is not None:
            assert self._slope is not None
            gradient.mul_(_shaped(self._slope, rows, columns))
        if self.transform.scale != self.temperature:
            gradient.mul_(self.transform.scale / self.temperature)
        of_hidden, of_weight, of_bias = self._gradients
        if of_bias is not None:
            of_bias[columns] += gradient.sum(0)
        if self.is_narrow:
            gradient = _shaped(self._outputs, rows, columns).copy_(gradient)
        if of_hidden is not None:
            if self.is_narrow:
                of_hidden[rows] += gradient @ self.weight[columns]
            else:
                of_hidden[rows].addmm_(gradient, self.weight[columns])
        if of_weight is not None:
            self._add_to_weight(of_weight, gradient, rows, columns)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, in their own types; None where not expected."""
        of_hidden, of_weight, of_bias = self._gradients
        return (
            of_hidden.to(self.hidden.dtype) if of_hidden is not None else None,
            of_weight,
            of_bias.to(self.bias.dtype) if of_bias is not None and self.bias is not None else None,
        )

    def _add_to_weight(self, of_weight: Tensor, gradient: Tensor, rows: slice, columns: slice) -> None:
        """All blocks of tokens of a tile's columns follow one another, so that the first can write."""
        part = of_weight[columns]
        if rows.start == 0 and self._rows_sum is None:
            torch.mm(gradient.t(), self.hidden[rows], out=part)
        elif self._rows_sum is None:
            part.addmm_(gradient.t(), self.hidden[rows])
        else:
            total = self._rows_sum[: len(part)]
            product = gradient.t() @ self.hidden[rows]
            if rows.start == 0:
                total.copy_(product)
            else:
                total.add_(product)
            if rows.stop == self.tokens:
                part.copy_(total)

    def _fill_banned(self, values: Tensor, columns: slice, value: float) -> Tensor:
        first, last = (bisect_left(self.banned, bound) for bound in (columns.start, columns.stop))
        if first < last:
            places = torch.tensor(self.banned[first:last], device=values.device) - columns.start
            values.index_fill_(1, places, value)
        return values

    def _new_buffer(self, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(self.block * self.width, dtype=dtype)


def tiles(head: Head) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile; all rows of some columns before the next columns."""
    for column in range(0, head.vocabulary, head.width):
        columns = slice(column, min(column + head.width, head.vocabulary))
        for row in range(0, head.tokens, head.block):
            yield slice(row, min(row + head.block, head.tokens)), columns


def _shaped(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return buffer[: height * width].view(height, width)
