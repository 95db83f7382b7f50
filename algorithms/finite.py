"""Checks that every input of a formula is finite, and names the first value that is not."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A NaN or an infinity where a finite number is needed. Names the tensor and the place."""


def require_finite(name: str, values: Tensor, mask: Tensor | None = None, *, index_name: str = "index") -> None:
    """Raise unless every value (every one inside `mask`, where given) is finite.

    Args:
        name: the tensor's name, for the error.
        values: float, any shape.
        mask: bool, of the same shape: where to look.
        index_name: what an index means ("sample"), for the error.
    Raises:
        NonFiniteError: names the tensor, the first offending index, its value and how many there are.
    """
    is_bad = ~torch.isfinite(values)
    if mask is not None:
        is_bad = is_bad & mask
    if not bool(is_bad.any()):
        return
    places = is_bad.nonzero()
    first = tuple(places[0].tolist())
    shown = first[0] if len(first) == 1 else first
    raise NonFiniteError(
        f"{name} of {index_name} {shown} is {float(values[first])} ({len(places)} of {values.numel()} aren't finite). "
        f"It was made before this step: look for the model, reward or sampler that returned it."
    )
