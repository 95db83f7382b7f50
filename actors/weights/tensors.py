"""One tensor of the policy as the weight sync sees it: what it is called on the wire, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class SourceTensor:
    """A tensor of the policy under training.

    Attributes:
        name: on the wire, as in the model's Hugging Face checkpoint.
        dtype: "float32", "bfloat16" or "float16", on the wire.
        shape: full shape, whatever the trainer's sharding.
        parameters: what must be whole (gathered, under ZeRO-3) for `read`.
        read: the full tensor, in any dtype and on any device; valid only while its parameters are whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    read: Callable[[], Tensor]
