"""Statistics over groups of samples, of unequal size and in any order, without a loop over groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which group each sample belongs to, numbered without gaps.

    Attributes:
        index: [samples] int64, from 0 to `count` - 1.
        count: groups.
    """

    index: Tensor
    count: int

    @classmethod
    def of(cls, group: Tensor) -> Groups:
        """Number the groups of arbitrary ids, [samples] int64, in the order of the ids."""
        ids, index = group.unique(return_inverse=True)
        return cls(index, len(ids))

    @classmethod
    def one(cls, group: Tensor) -> Groups:
        """All samples as one group."""
        return cls(torch.zeros_like(group), 1)

    def sum(self, values: Tensor) -> Tensor:
        """[groups], the sum of [samples] values over each group."""
        return values.new_zeros(self.count).index_add_(0, self.index, values)

    def size(self, like: Tensor) -> Tensor:
        """[groups], samples of each, in the dtype of `like`."""
        return self.sum(torch.ones_like(like))

    def least(self, values: Tensor) -> Tensor:
        """[groups], the smallest of the values of each."""
        return values.new_full((self.count,), float("inf")).scatter_reduce(0, self.index, values, "amin")

    def largest(self, values: Tensor) -> Tensor:
        """[groups], the largest of the values of each."""
        return values.new_full((self.count,), float("-inf")).scatter_reduce(0, self.index, values, "amax")


@dataclass(frozen=True)
class Centred:
    """Values relative to their group: [samples] each.

    Attributes:
        values: the value minus its group's mean; exactly 0 where all values of a group are equal.
        size: samples of the group.
        mean: of the group.
        std: of the group, the sample one (n - 1); 0 for a group of one.
    """

    values: Tensor
    size: Tensor
    mean: Tensor
    std: Tensor


def centre(values: Tensor, groups: Groups) -> Centred:
    """Centre values over their group.

    The group's minimum is taken off first, so that equal values give exactly 0 whatever their size.

    Args:
        values: [samples] float.
        groups: of the same samples.
    """
    index = groups.index
    size = groups.size(values)
    least = groups.least(values)
    shifted = values - least[index]
    mean = groups.sum(shifted) / size
    centred = shifted - mean[index]
    std = (groups.sum(centred.square()) / (size - 1).clamp(min=1)).sqrt()
    return Centred(centred, size[index], (least + mean)[index], std[index])
