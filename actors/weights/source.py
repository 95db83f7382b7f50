"""Reads the weights of a policy under training: full tensors under their Hugging Face names, a bounded part at a time.

Tied weights appear once. Under ZeRO-3 the shards are gathered a bucket's worth at a time, on all ranks in the same
order, so no rank ever holds the whole model twice. Tensors are cast to the generators' dtype where they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actors.weights.manifest import DTYPE_BYTES, Manifest, TensorEntry, WeightsPart, plan_layout
from actors.weights.tensors import SourceTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Sink(Protocol):
    """Takes the tensors of a part, in the order of its layout."""

    def put(self, entry: TensorEntry, tensor: Tensor) -> None:
        """Take a whole tensor; it is valid only during the call."""


class WeightSource:
    """One part of a policy: what is read, in which order. Build it on every rank, from the same tensors."""

    def __init__(
        self,
        tensors: Sequence[SourceTensor],
        *,
        gather_bytes: int,
        part: WeightsPart = WeightsPart.TRAINED,
        attributes: str = "",
    ) -> None:
        """Plan the layout.

        Args:
            tensors: in the order in which they are to lie on the wire.
            gather_bytes: under ZeRO-3, how much is gathered at a time; a tensor that is larger comes alone.
            part: what of the policy they are.
            attributes: JSON that goes with them.
        Raises:
            ValueError: there are none.
        """
        if not tensors:
            raise ValueError(f"the policy has no {part} tensor, so there is nothing to publish")
        self.tensors = tuple(tensors)
        self.part = part
        self.attributes = attributes
        self.entries, self.nbytes = plan_layout([(t.name, t.dtype, t.shape) for t in tensors])
        self._groups = list(_grouped(self.tensors, gather_bytes))

    def read(self, sink: Sink | None) -> None:
        """Hand every tensor to the sink. Collective: every rank calls it, between two updates.

        Args:
            sink: takes them on the rank that publishes; None on the others, which only take part in gathering.
        """
        entries = iter(self.entries)
        for group in self._groups:
            parameters = list({id(p): p for tensor in group for p in tensor.parameters}.values())
            with torch.no_grad(), gathered(parameters):
                for tensor in group if sink is not None else ():
                    sink.put(next(entries), tensor.read().detach())  # type: ignore[union-attr]


def module_tensors(
    module: nn.Module, precision: str, wanted: Callable[[nn.Parameter], bool] = lambda parameter: True
) -> list[SourceTensor]:
    """A module's parameters under their own names, tied ones once.

    Args:
        module: the Hugging Face model, not DeepSpeed's wrapper.
        precision: of the generators.
        wanted: which parameters.
    """
    return [
        SourceTensor(name, precision, full_shape(parameter), (parameter,), _reader(parameter))
        for name, parameter in module.named_parameters()
        if wanted(parameter)
    ]


def tensors_in(manifest: Manifest, content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part by name, as views into its bytes.

    Args:
        manifest: of the part.
        content: a buffer with its bytes; torch wants it writable.
    Raises:
        ValueError: it is too short.
    """
    if len(content) < manifest.nbytes:
        raise ValueError(f"{len(content)} bytes, where the manifest names {manifest.nbytes}")
    for entry in manifest.tensors:
        dtype = DTYPES[entry.dtype]
        if entry.nbytes == 0:
            yield entry.name, torch.empty(entry.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(content, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.offset)
        yield entry.name, flat.reshape(entry.shape)


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether training changes it."""
    return bool(parameter.requires_grad)


def is_frozen(parameter: nn.Parameter) -> bool:
    """Whether it stays as it is."""
    return not parameter.requires_grad


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Under ZeRO-3 a parameter is an empty shard that remembers its shape in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Parameters whole within the block, on every rank; a collective under ZeRO-3."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    whole: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return whole


def _reader(parameter: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter


def _grouped(tensors: Sequence[SourceTensor], gather_bytes: int) -> Iterator[list[SourceTensor]]:
    """Consecutive tensors, each group of at most so many bytes, or a single tensor."""
    group: list[SourceTensor] = []
    size = 0
    for tensor in tensors:
        nbytes = DTYPE_BYTES[tensor.dtype] * prod(tensor.shape)
        if group and size + nbytes > gather_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += nbytes
    if group:
        yield group
