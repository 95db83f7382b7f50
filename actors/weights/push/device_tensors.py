"""The policy's tensors as a push sends them: whole, in the wire's dtype, with a device digest of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.weights.push.device_digest import VersionDigests, as_integers, digest_halves
from actors.weights.source import DTYPES, SourceTensor, gathered


class PushSource(WeightSource):
    """vLLM's `WeightSource` over a trainer rank's tensors. Build it on every rank, from the same tensors in one order.

    Under ZeRO-3 every pass gathers the parameters group by group, on all ranks. A pass that has begun must run to its
    end on every rank, whether it sends or not; otherwise the other ranks wait in a collective.
    """

    def __init__(
        self,
        tensors: Sequence[SourceTensor],
        *,
        device: torch.device,
        gather_bytes: int,
        is_read: bool = True,
        takes_digests: bool = True,
    ) -> None:
        """Plan the groups.

        Args:
            tensors: in the order of sending.
            device: the device from which they are sent.
            gather_bytes: the largest group that is gathered at once; a tensor with larger parameters is a group alone.
            is_read: whether this rank sends: rank 0 always, the others with ipc. A rank that does not send yields
                nothing and only takes part in gathering.
            takes_digests: whether this rank computes the device digests: rank 0.
        Raises:
            ValueError: there is no tensor, or two have one name.
        """
        if not tensors:
            raise ValueError("the policy has no tensor to send")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("the policy has two tensors of one name")
        self._device = device
        self._takes_digests = takes_digests
        self._is_read = is_read
        self._meta = [ParamMeta(tensor.name, DTYPES[tensor.dtype], tuple(tensor.shape)) for tensor in tensors]
        self._groups = list(_groups(tensors, gather_bytes))
        self._sent: list[tuple[SourceTensor, Tensor]] = []

    def metadata(self) -> list[ParamMeta]:
        """Name, wire dtype and full shape of each tensor. Gathers nothing."""
        return self._meta

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor in bytes."""
        return max(prod(meta.shape) * meta.dtype.itemsize for meta in self._meta)

    def __iter__(self) -> SourcePass:
        self._sent = []
        return SourcePass(self)

    def digests_of(self, version: int) -> VersionDigests:
        """Device digests of the tensors of the last pass. Synchronises with the device.

        Raises:
            RuntimeError: the pass ended early, or this rank computes no digests.
        """
        if len(self._sent) != len(self._meta):
            raise RuntimeError(f"{len(self._sent)} of {len(self._meta)} tensors were sent and have a device digest")
        values = as_integers([halves for _, halves in self._sent])
        rows = zip(self._sent, values, strict=True)
        return VersionDigests(version, tuple((sent.name, sent.dtype, sent.shape, value) for (sent, _), value in rows))

    def read(self, is_wanted: Callable[[], bool]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each while `is_wanted` says so; after that, gather only."""
        for group in self._groups:
            parameters = list({id(p): p for tensor in group for p in tensor.parameters}.values())
            with gathered(parameters):
                for tensor in group:
                    if not self._is_read or not is_wanted():
                        break
                    whole = self._whole(tensor)
                    if self._takes_digests:
                        self._sent.append((tensor, digest_halves(whole)))
                    yield tensor.name, whole

    @torch.no_grad()
    def _whole(self, tensor: SourceTensor) -> Tensor:
        piece = tensor.read().detach()
        if tuple(piece.shape) != tuple(tensor.shape):
            raise ValueError(f"{tensor.name} has shape {list(piece.shape)}, but was declared with {list(tensor.shape)}")
        whole = piece.to(device=self._device, dtype=DTYPES[tensor.dtype]).contiguous()
        if whole.data_ptr() == piece.data_ptr() and any(hasattr(p, "ds_id") for p in tensor.parameters):
            return whole.clone()  # the gathered parameter is freed while the tensor may still be in transfer
        return whole


class SourcePass:
    """One pass over a source: an iterator that can be run to its end without yielding tensors."""

    def __init__(self, source: PushSource) -> None:
        self._is_wanted = True
        self._items = source.read(lambda: self._is_wanted)

    def __iter__(self) -> SourcePass:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._items)

    def drain(self) -> None:
        """Take part in the remaining gathers, so that no other rank waits for this one."""
        self._is_wanted = False
        for _ in self._items:
            pass


def _groups(tensors: Sequence[SourceTensor], gather_bytes: int) -> Iterator[list[SourceTensor]]:
    """Groups of consecutive tensors whose parameters have at most `gather_bytes` bytes, or of a single tensor."""
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
    """Bytes of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
