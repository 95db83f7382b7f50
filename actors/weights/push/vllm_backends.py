"""The nccl and ipc transfer backends of a push, inside each of the vLLM engine's worker processes: vLLM's, with checks.

Tensors arrive as in vLLM's own backends. Here a device digest of each is computed as it is given to the model, and the
version counts as loaded only when the digests agree with the trainer's. One session, while generation is paused:

1. `start_weight_update`
2. `update_weights` with tensors ("names"): nccl once, at the same time as the trainer's broadcast; ipc once a chunk
3. `update_weights` with {"verify": VersionDigests.pack(), "digest": ...}: raises where anything differs, and names it
4. `finish_weight_update`: refuses weights that were not verified

A generator that missed a push pulls the version: an update without "names" goes to the zmq transfer backend, whose
bytes the generator has checked, and skips the third call. {"abandon": why} ends a session that will not be finished; it
always raises. After any error the layers are restored, but the model may hold parts of two versions ("[stale]" in the
error's text) or its former version whole ("[untouched]").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from actors.weights.push.device_digest import VersionDigests, as_integers, digest_halves
from actors.weights.push.group import STALE, UNTOUCHED, Rendezvous, TransferGroup, join_group
from actors.weights.push.ipc_handles import from_plain
from actors.weights.source import DTYPES
from actors.weights.worker.transfer_backend import ZmqTransferBackend, first_names, refresh_tied_heads


class NotLoadedError(RuntimeError):
    """The model does not hold the pushed version."""


class DigestingModel:
    """A model for vLLM's backends that computes a device digest of each tensor and checks that the model takes it.

    A name that comes for the first time is loaded alone, which detects that the model ignores it. The set of names that
    the model takes is constant, so known names are loaded together.
    """

    def __init__(self, model: nn.Module, known: set[str], *, is_part: bool) -> None:
        """Args:
        model: the model to load into.
        known: names that the model is known to take; new ones are added.
        is_part: the model holds only some layers or experts, and ignores the names of the others.
        """
        self._model: Any = model
        self._known = known
        self._is_part = is_part
        self._received: dict[str, tuple[str, tuple[int, ...], Tensor]] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors into the model.

        Raises:
            NotLoadedError: the model ignores a name, or a name comes twice.
        """
        given = list(weights)
        for name, tensor in given:
            if name in self._received:
                raise NotLoadedError(f"{name} arrived twice")
            self._received[name] = (
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                digest_halves(tensor),
            )
        loaded: set[str] = set()
        for name, tensor in given:
            if name not in self._known:
                loaded |= self._load([(name, tensor)])
        later = [(name, tensor) for name, tensor in given if name in self._known]
        self._known.update(name for name, _ in given)
        return loaded | self._load(later) if later else loaded

    def is_empty(self) -> bool:
        """Whether no tensor has come yet."""
        return not self._received

    def digests_of(self, version: int) -> VersionDigests:
        """Device digests of the received tensors. Synchronises with the device."""
        values = as_integers([halves for _, _, halves in self._received.values()])
        rows = zip(self._received.items(), values, strict=True)
        return VersionDigests(version, tuple((name, dtype, shape, value) for (name, (dtype, shape, _)), value in rows))

    def _load(self, given: list[tuple[str, Tensor]]) -> set[str]:
        read: set[str] = set()
        loaded = self._model.load_weights(_noted(given, read))
        ignored = [name for name, _ in given if name not in read]
        if not ignored and loaded is not None and not loaded and not self._is_part:
            ignored = [name for name, _ in given]
        if ignored:
            raise NotLoadedError(f"the model ignores {first_names(ignored)}")
        return loaded or set()


class _CheckedBackend(WeightTransferEngine[Any, Any]):
    """The checks of both backends around vLLM's own receiving. Must be the first base class."""

    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pulled = ZmqTransferBackend(*args, **kwargs)
        self._known: set[str] = set()
        self._is_verified = False
        self._digesting = self._new_digesting_model()

    def start_weight_update(self) -> None:
        """Prepare the layers for loading.

        Raises:
            NotLoadedError: the vLLM engine sleeps, so the weights have no memory.
        """
        if getattr(self.model_config, "enable_sleep_mode", False) and _weights_are_asleep():
            raise NotLoadedError(
                f"{UNTOUCHED} the vLLM engine's weights are asleep. Call wake_up(tags=['weights']) first."
            )
        self._digesting, self._is_verified = self._new_digesting_model(), False
        super().start_weight_update()  # type: ignore[safe-super]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One step of a session (see the top of the file).

        Raises:
            NotLoadedError: the step failed; the text names the cause and the state of the model.
        """
        is_pull = not update_info.keys() & {"names", "verify", "abandon"}
        try:
            if "abandon" in update_info:
                raise NotLoadedError(f"the update was abandoned: {update_info['abandon']}")
            if "verify" in update_info:
                self._verify(VersionDigests.unpack(update_info["verify"]), str(update_info["digest"]))
            elif is_pull:
                self._pulled.update_weights(update_info)
                self._is_verified = True
            else:
                self._receive(update_info)
        except BaseException as error:
            self._restore_layers()
            if not isinstance(error, Exception):
                raise
            mark = UNTOUCHED if self._digesting.is_empty() and not is_pull else STALE
            raise NotLoadedError(f"{mark} {type(error).__name__}: {error}") from error

    def finish_weight_update(self) -> None:
        """Process the loaded weights for the kernels.

        Raises:
            NotLoadedError: they were not verified. vLLM considers the session open: abandon it.
        """
        if not self._is_verified:
            self._restore_layers()
            raise NotLoadedError(f"{STALE} the loaded weights were not compared with the trainer's digests")
        super().finish_weight_update()  # type: ignore[safe-super]
        if self.device.type == "cpu":
            refresh_tied_heads(self.model)
        else:
            torch.accelerator.synchronize()

    def prepare(self, paths: list[str]) -> None:
        """See :meth:`ZmqTransferBackend.prepare`."""
        self._pulled.prepare(paths)

    def stage(self, update_info: dict[str, Any]) -> str:
        """Never stages: a session prepares the layers for loading before it is known what will come."""
        return "weights.backend is nccl or ipc, which load pulled versions in place"

    def shutdown(self) -> None:
        """Leave the transfer group and unmap pulled versions."""
        super().shutdown()  # type: ignore[safe-super]
        self._pulled.shutdown()

    def _receive(self, update_info: dict[str, Any]) -> None:
        self._is_verified = False
        info = self.parse_update_info(update_info)
        model = self.model
        self.model = self._digesting  # type: ignore[assignment]  # the base class calls self.model.load_weights
        try:
            self.receive_weights(info)
        finally:
            self.model = model
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _verify(self, sent: VersionDigests, digest: str) -> None:
        came = self._digesting.digests_of(sent.version)
        theirs, ours = ({name: rest for name, *rest in side.tensors} for side in (sent, came))
        if missing := [name for name in theirs if name not in ours]:
            raise NotLoadedError(f"policy version {sent.version} arrived without {first_names(missing)}")
        if strange := [name for name in ours if name not in theirs]:
            raise NotLoadedError(
                f"policy version {sent.version} arrived with {first_names(strange)}, which the trainer did not send"
            )
        if changed := [name for name in theirs if theirs[name] != ours[name]]:
            raise NotLoadedError(f"policy version {sent.version} was damaged in transfer: {first_names(changed)}")
        if came.digest != digest:
            raise NotLoadedError(f"policy version {sent.version} has digest {came.digest}, but {digest} was announced")
        self._is_verified = True

    def _restore_layers(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def _new_digesting_model(self) -> DigestingModel:
        parallel = self.parallel_config
        is_part = parallel.pipeline_parallel_size > 1 or parallel.enable_expert_parallel
        return DigestingModel(self.model, self._known, is_part=is_part)


@dataclass(kw_only=True)
class CheckedNcclInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's init info, with the rendezvous's token and a deadline.

    Attributes:
        token: token of the rendezvous at master_address and master_port.
        deadline_s: bounds joining the group, and each transfer.
    """

    token: str = field(repr=False)
    deadline_s: float


class CheckedNcclBackend(_CheckedBackend, NCCLWeightTransferEngine):
    """Receives the trainer's broadcast: through NCCL between GPUs, through gloo between CPUs."""

    init_info_cls: Any = CheckedNcclInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: Any) -> None:
        """Leave the former transfer group and join a new one.

        Args:
            init_info: a CheckedNcclInitInfo.
        Raises:
            PeerLostError: the group was not formed within the deadline.
        """
        self._leave()
        if init_info.master_address is None or init_info.master_port is None:
            raise ValueError(
                "init info for nccl lacks master_address or master_port, where the trainer's rendezvous is"
            )
        rendezvous = Rendezvous(init_info.master_address, init_info.master_port, init_info.token, init_info.world_size)
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + init_info.rank_offset
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers
        self._deadline_s = init_info.deadline_s
        self.model_update_group = join_group(rendezvous, rank, self.device, init_info.deadline_s)  # type: ignore[assignment]

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Take part in the trainer's broadcasts.

        Raises:
            PeerLostError: they missed the deadline, or a member was lost. This worker has left the group.
        """
        group: Any = self.model_update_group
        if group is None:
            raise NotLoadedError("this worker has joined no transfer group. Call init_weight_transfer_engine first.")
        try:
            with group.bounded(self._deadline_s):
                if self.device.type == "cpu":
                    self._receive_on_cpu(group, update_info)
                else:
                    super().receive_weights(update_info)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        group, self.model_update_group = self.model_update_group, None
        if group is not None:
            group.destroy()

    def _receive_on_cpu(self, group: TransferGroup, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """vLLM's `receive_weights` without CUDA streams."""
        for chunk in _chunks(update_info, self.packed_buffer_size_bytes if self.packed else 0):
            names, dtypes, shapes, sizes = (list(column) for column in zip(*chunk, strict=True))
            buffer = torch.empty(sum(sizes), dtype=torch.uint8)
            group.broadcast(buffer, src=0)
            self._digesting.load_weights(unpack_tensor(buffer, names, shapes, dtypes, sizes))


class CheckedIpcBackend(_CheckedBackend, IPCWeightTransferEngine):
    """Reads weights from the memory of a trainer on the same GPU."""

    init_info_cls = IPCWeightTransferInitInfo
    update_info_cls = IPCWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: IPCWeightTransferInitInfo) -> None:
        """Record how the trainer sends.

        Raises:
            ValueError: the vLLM engine runs on a CPU.
        """
        if self.device.type != "cuda":
            raise ValueError(
                f"weights.backend = ipc shares a GPU's memory, but this vLLM engine runs on {self.device.type}"
            )
        super().init_transfer_engine(init_info)

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """Parse a chunk whose handles are plain values.

        Raises:
            ValueError: the handles are pickled, or are no handles.
        """
        if "ipc_handles_pickled" in update_dict:
            raise ValueError("pickled IPC handles are refused: send plain values (ipc_handles)")
        handles = update_dict.get("ipc_handles")
        plain = [from_plain(handle) for handle in handles] if isinstance(handles, list) else from_plain(handles or {})
        return super().parse_update_info(update_dict | {"ipc_handles": plain})

    def _restore_layers(self) -> None:
        super()._restore_layers()
        self._packed_importer.close()


def _chunks(info: NCCLWeightTransferUpdateInfo, buffer_bytes: int) -> Iterator[list[tuple[Any, ...]]]:
    """Name, dtype, shape and bytes of the tensors in each broadcast. Without a buffer that is one tensor; with one, a
    chunk ends with the tensor that makes it larger than the buffer, as in `pack_tensors`."""
    chunk: list[tuple[Any, ...]] = []
    total = 0
    for name, dtype_name, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
        dtype = DTYPES[dtype_name]
        size = torch.Size(shape).numel() * dtype.itemsize
        chunk.append((name, dtype, shape, size))
        total += size
        if total > buffer_bytes or not buffer_bytes:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _noted(given: list[tuple[str, Tensor]], read: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in given:
        yield name, tensor
        read.add(name)


def _weights_are_asleep() -> bool:
    from vllm.device_allocator import get_mem_allocator_instance

    allocations: dict[int, Any] = getattr(get_mem_allocator_instance(), "pointer_to_data", {})
    return any(data.tag == "weights" and data.is_asleep for data in allocations.values())
