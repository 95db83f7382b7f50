"""Reads the trainer's weights: full tensors under their Hugging Face names, in groups of bounded size.

Tied weights appear once. Under ZeRO-3 the shards are gathered group by group, on all ranks in the same order, so no
rank ever holds the whole model twice. Tensors are cast to the generators' dtype where they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actors.weights.manifest import DTYPE_BYTES, Manifest, TensorEntry, WeightsPart, plan_layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class SourceTensor:
    """A tensor of the policy: its name on the wire and how to read it.

    Attributes:
        name: on the wire, as in the model's Hugging Face checkpoint.
        dtype: "float32", "bfloat16" or "float16", on the wire.
        shape: full shape, independent of the trainer's sharding.
        parameters: parameters that must be whole (gathered, under ZeRO-3) for `read`.
        read: returns the full tensor, in any dtype and on any device; valid only while the parameters are whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    read: Callable[[], Tensor]


class TensorSink(Protocol):
    """Receives the tensors of a part, in the order of its layout."""

    def put(self, entry: TensorEntry, tensor: Tensor) -> None:
        """Receive a whole tensor; it is valid only during the call."""


class PolicyPartSource:
    """One part of the policy, as the trainer reads it. Build it on every rank, from the same tensors in one order."""

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
            tensors: in the order of the layout.
            gather_bytes: under ZeRO-3, the largest group that is gathered at once; a larger tensor is a group alone.
            part: the part of the policy that they are.
            attributes: JSON that accompanies them.
        Raises:
            ValueError: the part has no tensor.
        """
        if not tensors:
            raise ValueError(f"the policy has no {part} tensor to publish. Check model.freeze and model.lora.")
        self.tensors = tuple(tensors)
        self.part = part
        self.attributes = attributes
        self.entries, self.nbytes = plan_layout([(t.name, t.dtype, t.shape) for t in tensors])
        self._groups = list(_grouped(self.tensors, gather_bytes))

    def read(self, sink: TensorSink | None) -> None:
        """Hand every tensor to the sink. Collective: every rank calls it, between two updates.

        Args:
            sink: receives them on the rank that publishes; None on the others, which only take part in gathering.
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
    """A module's parameters as source tensors under their own names, tied ones once.

    Args:
        module: the Hugging Face model, not DeepSpeed's wrapper.
        precision: dtype of the generators.
        wanted: selects the parameters.
    """
    return [
        SourceTensor(name, precision, full_shape(parameter), (parameter,), _reader(parameter))
        for name, parameter in module.named_parameters()
        if wanted(parameter)
    ]


def tensors_in(manifest: Manifest, content: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each entry of a part, as views into its bytes.

    Args:
        manifest: the part's manifest.
        content: a writable buffer with the part's bytes.
    Raises:
        ValueError: the buffer is too short.
    """
    if len(content) < manifest.nbytes:
        raise ValueError(f"the buffer has {len(content)} bytes, the manifest describes {manifest.nbytes}")
    for entry in manifest.tensors:
        dtype = DTYPES[entry.dtype]
        if entry.nbytes == 0:
            yield entry.name, torch.empty(entry.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(content, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.offset)
        yield entry.name, flat.reshape(entry.shape)


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether training changes the parameter."""
    return bool(parameter.requires_grad)


def is_frozen(parameter: nn.Parameter) -> bool:
    """Whether training leaves the parameter unchanged."""
    return not parameter.requires_grad


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's full shape; under ZeRO-3 it is an empty shard with the full shape in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Context in which the parameters are whole on every rank; a collective under ZeRO-3."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    whole: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return whole


def _reader(parameter: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter


def _grouped(tensors: Sequence[SourceTensor], gather_bytes: int) -> Iterator[list[SourceTensor]]:
    """Groups of consecutive tensors, each of at most `gather_bytes` bytes or a single tensor."""
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
