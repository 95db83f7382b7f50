"""The policy's tensors as vLLM's trainer engines take them: whole, in the wire's dtype, fingerprinted when sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.weights.push.device_digest import VersionPrint, as_integers, lanes
from actors.weights.source import DTYPES, gathered
from actors.weights.tensors import SourceTensor


class PushSource(WeightSource):
    """What a trainer rank sends. Build it on every rank, from the same tensors in the same order.

    Under ZeRO-3 every pass gathers the parameters a group at a time, on all ranks alike: a pass that was begun must
    come to its end on every rank, sent or not, or the others wait in a collective.
    """

    def __init__(
        self,
        tensors: Sequence[SourceTensor],
        *,
        device: torch.device,
        gather_bytes: int,
        is_read: bool = True,
        is_fingerprinted: bool = True,
    ) -> None:
        """Plan the groups.

        Args:
            tensors: in the order of sending.
            device: from which they are sent.
            gather_bytes: how much is gathered at a time; a tensor whose parameters are larger comes alone.
            is_read: whether this rank sends: rank 0 always, the others with ipc. If not, it yields nothing, and only
                takes part in gathering.
            is_fingerprinted: whether this rank answers for what is sent: rank 0.
        Raises:
            ValueError: there are none, or a name comes twice.
        """
        if not tensors:
            raise ValueError("the policy has no tensor to send")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("the policy has two tensors of the same name")
        self._device = device
        self._is_fingerprinted = is_fingerprinted
        self._is_read = is_read
        self._meta = [ParamMeta(tensor.name, DTYPES[tensor.dtype], tuple(tensor.shape)) for tensor in tensors]
        self._groups = list(_groups(tensors, gather_bytes))
        self._sent: list[tuple[SourceTensor, Tensor]] = []

    def metadata(self) -> list[ParamMeta]:
        """Name, wire dtype and full shape of each tensor; nothing is gathered for it."""
        return self._meta

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor."""
        return max(prod(meta.shape) * meta.dtype.itemsize for meta in self._meta)

    def __iter__(self) -> Pass:
        self._sent = []
        return Pass(self)

    def print_of(self, version: int) -> VersionPrint:
        """Of what the last pass yielded. Waits for the device.

        Raises:
            RuntimeError: that pass didn't come to its end, or this rank takes no fingerprints.
        """
        if len(self._sent) != len(self._meta):
            raise RuntimeError(f"{len(self._sent)} of {len(self._meta)} tensors were sent and fingerprinted")
        values = as_integers([tensor_lanes for _, tensor_lanes in self._sent])
        rows = zip(self._sent, values, strict=True)
        return VersionPrint(version, tuple((sent.name, sent.dtype, sent.shape, value) for (sent, _), value in rows))

    def read(self, is_wanted: Callable[[], bool]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each, as long as they are wanted; then only gather."""
        for group in self._groups:
            parameters = list({id(p): p for tensor in group for p in tensor.parameters}.values())
            with gathered(parameters):
                for tensor in group:
                    if not self._is_read or not is_wanted():
                        break
                    whole = self._whole(tensor)
                    if self._is_fingerprinted:
                        self._sent.append((tensor, lanes(whole)))
                    yield tensor.name, whole

    @torch.no_grad()
    def _whole(self, tensor: SourceTensor) -> Tensor:
        piece = tensor.read().detach()
        if tuple(piece.shape) != tuple(tensor.shape):
            raise ValueError(f"{tensor.name} is {list(piece.shape)}, but was declared as {list(tensor.shape)}")
        whole = piece.to(device=self._device, dtype=DTYPES[tensor.dtype]).contiguous()
        if whole.data_ptr() == piece.data_ptr() and any(hasattr(p, "ds_id") for p in tensor.parameters):
            return whole.clone()  # what was gathered is freed while the tensor may still be on its way
        return whole


class Pass:
    """One pass over a source: an iterator that can be brought to its end without reading on."""

    def __init__(self, source: PushSource) -> None:
        self._is_wanted = True
        self._items = source.read(lambda: self._is_wanted)

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._items)

    def drain(self) -> None:
        """Take part in the gathering that is left, so that no other rank waits for this one."""
        self._is_wanted = False
        for _ in self._items:
            pass


def _groups(tensors: Sequence[SourceTensor], gather_bytes: int) -> Iterator[list[SourceTensor]]:
    """Consecutive tensors whose parameters together have at most so many bytes, or a single tensor."""
    group: list[SourceTensor] = []
    gathered_ids: set[int] = set()
    size = 0
    for tensor in tensors:
        new = {id(p): _nbytes(p) for p in tensor.parameters if id(p) not in gathered_ids}
        if group and size + sum(new.values()) > gather_bytes:
            yield group
            group, gathered_ids, size = [], set(), 0
            new = {id(p): _nbytes(p) for p in tensor.parameters}
        group.append(tensor)
        gathered_ids |= new.keys()
        size += sum(new.values())
    if group:
        yield group


def _nbytes(parameter: nn.Parameter) -> int:
    """When whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
