"""vLLM's side of a push, inside each of the engine's worker processes: its `nccl` and `ipc` backends, checked.

Tensors arrive as in vLLM's own engines. Here each is fingerprinted on the device as it is handed to the model, and
nothing counts as loaded before the fingerprints agree with the trainer's. One session, while generation is paused:

1. `start_weight_update`
2. `update_weights` with tensors ("names"): nccl once, at the same time as the trainer's broadcast; ipc once a chunk
3. `update_weights` with {"verify": VersionPrint.pack(), "digest": ...}: raises where anything differs, and says what
4. `finish_weight_update`: refuses what wasn't verified

A generator that missed a push catches up by pulling: an update without "names" goes to our zmq engine, which checks for
itself, and needs no third call. A session that won't be finished is ended by {"abandon": why}, which always raises.
After any error the layers are in place again, but the model may hold parts of two versions ("[stale]" in the error's
text), or still its former version whole ("[untouched]").
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

from actors.weights.push.device_digest import VersionPrint, as_integers, lanes
from actors.weights.push.group import STALE, UNTOUCHED, Meeting, TransferGroup, join_group
from actors.weights.push.ipc_handles import from_plain
from actors.weights.source import DTYPES
from actors.weights.worker.transfer_backend import ZmqWeightTransferEngine, refresh_tied_heads

NAMED_IN_ERRORS = 5


class NotLoadedError(RuntimeError):
    """The version that was pushed isn't what the model holds."""


class Intake:
    """Stands where vLLM's engines expect the model: fingerprints tensors on their way in, and sees that it takes them.

    The first time a name comes, its tensor is loaded alone, so that a name which the model ignores is found out. Which
    names it takes doesn't change, so later they go in as they come.
    """

    def __init__(self, model: nn.Module, known: set[str], *, is_part: bool) -> None:
        """Args:
        model: what takes them.
        known: names that it is known to take; added to.
        is_part: the model holds only some layers or experts, and rightly ignores the others.
        """
        self._model: Any = model
        self._known = known
        self._is_part = is_part
        self._received: dict[str, tuple[str, tuple[int, ...], Tensor]] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hand tensors on to the model.

        Raises:
            NotLoadedError: it ignores one, or one comes twice.
        """
        given = list(weights)
        for name, tensor in given:
            if name in self._received:
                raise NotLoadedError(f"{name} came twice")
            self._received[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), lanes(tensor))
        loaded: set[str] = set()
        for name, tensor in given:
            if name not in self._known:
                loaded |= self._load([(name, tensor)])
        later = [(name, tensor) for name, tensor in given if name in self._known]
        self._known.update(name for name, _ in given)
        return loaded | self._load(later) if later else loaded

    def is_empty(self) -> bool:
        """Whether nothing has come yet."""
        return not self._received

    def print_of(self, version: int) -> VersionPrint:
        """Of everything that came. Waits for the device."""
        values = as_integers([tensor_lanes for _, _, tensor_lanes in self._received.values()])
        rows = zip(self._received.items(), values, strict=True)
        return VersionPrint(version, tuple((name, dtype, shape, value) for (name, (dtype, shape, _)), value in rows))

    def _load(self, given: list[tuple[str, Tensor]]) -> set[str]:
        read: set[str] = set()
        loaded = self._model.load_weights(_noted(given, read))
        ignored = [name for name, _ in given if name not in read]
        if not ignored and loaded is not None and not loaded and not self._is_part:
            ignored = [name for name, _ in given]
        if ignored:
            raise NotLoadedError(f"the model doesn't take {_some(ignored)}")
        return loaded or set()


class _CheckedEngine(WeightTransferEngine[Any, Any]):
    """What both engines do around vLLM's own receiving. Comes first among the bases."""

    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pulled = ZmqWeightTransferEngine(*args, **kwargs)
        self._known: set[str] = set()
        self._is_verified = False
        self._intake = self._new_intake()

    def start_weight_update(self) -> None:
        """Make the layers ready to be loaded anew.

        Raises:
            NotLoadedError: the weights' memory is given up while the engine sleeps.
        """
        if getattr(self.model_config, "enable_sleep_mode", False) and _weights_are_asleep():
            raise NotLoadedError(f"{UNTOUCHED} the engine's weights are asleep; wake_up(tags=['weights']) comes first")
        self._intake, self._is_verified = self._new_intake(), False
        super().start_weight_update()  # type: ignore[safe-super]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One step of a session (see the top of the file).

        Raises:
            NotLoadedError: and whatever vLLM or the group raises; the text says in which state the model is.
        """
        is_pull = not update_info.keys() & {"names", "verify", "abandon"}
        try:
            if "abandon" in update_info:
                raise NotLoadedError(f"the update was abandoned: {update_info['abandon']}")
            if "verify" in update_info:
                self._verify(VersionPrint.unpack(update_info["verify"]), str(update_info["digest"]))
            elif is_pull:
                self._pulled.update_weights(update_info)
                self._is_verified = True
            else:
                self._receive(update_info)
        except BaseException as error:
            self._put_back()
            if not isinstance(error, Exception):
                raise
            mark = UNTOUCHED if self._intake.is_empty() and not is_pull else STALE
            raise NotLoadedError(f"{mark} {type(error).__name__}: {error}") from error

    def finish_weight_update(self) -> None:
        """Put processed weights in place.

        Raises:
            NotLoadedError: they weren't verified. vLLM then takes the session for open: abandon it.
        """
        if not self._is_verified:
            self._put_back()
            raise NotLoadedError(f"{STALE} weights were loaded, but never compared with what the trainer sent")
        super().finish_weight_update()  # type: ignore[safe-super]
        if self.device.type == "cpu":
            refresh_tied_heads(self.model)
        else:
            torch.accelerator.synchronize()

    def prepare(self, paths: list[str]) -> None:
        """See :meth:`ZmqWeightTransferEngine.prepare`."""
        self._pulled.prepare(paths)

    def stage(self, update_info: dict[str, Any]) -> str:
        """See :meth:`ZmqWeightTransferEngine.stage`. A session has emptied the layers before it is known what comes."""
        return "an engine that versions are pushed into loads those that it pulls in place too"

    def shutdown(self) -> None:
        """Leave the group, and unmap what was pulled."""
        super().shutdown()  # type: ignore[safe-super]
        self._pulled.shutdown()

    def _receive(self, update_info: dict[str, Any]) -> None:
        self._is_verified = False
        info = self.parse_update_info(update_info)
        model = self.model
        self.model = self._intake  # type: ignore[assignment]  # the base hands tensors to self.model.load_weights
        try:
            self.receive_weights(info)
        finally:
            self.model = model
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _verify(self, sent: VersionPrint, digest: str) -> None:
        came = self._intake.print_of(sent.version)
        theirs, ours = ({name: rest for name, *rest in side.tensors} for side in (sent, came))
        if missing := [name for name in theirs if name not in ours]:
            raise NotLoadedError(f"policy version {sent.version} came without {_some(missing)}")
        if strange := [name for name in ours if name not in theirs]:
            raise NotLoadedError(f"policy version {sent.version} came with {_some(strange)}, which wasn't sent")
        if changed := [name for name in theirs if theirs[name] != ours[name]]:
            raise NotLoadedError(f"policy version {sent.version} was damaged on the way: {_some(changed)}")
        if came.digest != digest:
            raise NotLoadedError(f"policy version {sent.version} has digest {came.digest}, not the announced {digest}")
        self._is_verified = True

    def _put_back(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def _new_intake(self) -> Intake:
        parallel = self.parallel_config
        is_part = parallel.pipeline_parallel_size > 1 or parallel.enable_expert_parallel
        return Intake(self.model, self._known, is_part=is_part)


@dataclass(kw_only=True)
class CheckedNcclInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's, with the meeting's token and a deadline.

    Attributes:
        token: of the meeting at master_address and master_port.
        deadline_s: for this worker to join the group, and for each transfer.
    """

    token: str = field(repr=False)
    deadline_s: float


class CheckedNcclEngine(_CheckedEngine, NCCLWeightTransferEngine):
    """Receives what the trainer broadcasts: through NCCL between GPUs, through gloo between CPUs."""

    init_info_cls: Any = CheckedNcclInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join a new group, and leave the one before.

        Args:
            init_info: a CheckedNcclInitInfo.
        Raises:
            PeerLostError: the group didn't come about in time.
        """
        self._leave()
        if init_info.master_address is None or init_info.master_port is None:
            raise ValueError("a push needs the address and port of the trainer's meeting point")
        meeting = Meeting(init_info.master_address, init_info.master_port, init_info.token, init_info.world_size)
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + init_info.rank_offset
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers
        self._deadline_s = init_info.deadline_s
        self.model_update_group = join_group(meeting, rank, self.device, init_info.deadline_s)  # type: ignore[assignment]

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Take part in the trainer's broadcasts.

        Raises:
            PeerLostError: they weren't over in time, or a member was lost. The group is of no use any more.
        """
        group: Any = self.model_update_group
        if group is None:
            raise NotLoadedError("this worker is in no group: init_weight_transfer_engine comes first")
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
        """What vLLM's `receive_weights` does with CUDA streams, without them."""
        for chunk in _chunks(update_info, self.packed_buffer_size_bytes if self.packed else 0):
            names, dtypes, shapes, sizes = (list(column) for column in zip(*chunk, strict=True))
            buffer = torch.empty(sum(sizes), dtype=torch.uint8)
            group.broadcast(buffer, src=0)
            self._intake.load_weights(unpack_tensor(buffer, names, shapes, dtypes, sizes))


class CheckedIpcEngine(_CheckedEngine, IPCWeightTransferEngine):
    """Reads weights from the memory of a trainer on the same GPU."""

    init_info_cls = IPCWeightTransferInitInfo
    update_info_cls = IPCWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: IPCWeightTransferInitInfo) -> None:
        """Note how the trainer sends.

        Raises:
            ValueError: there is no GPU to share.
        """
        if self.device.type != "cuda":
            raise ValueError(f"the ipc backend shares a GPU's memory, but this engine runs on {self.device.type}")
        super().init_transfer_engine(init_info)

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """A chunk whose handles are plain values.

        Raises:
            ValueError: they are pickled, or aren't handles.
        """
        if "ipc_handles_pickled" in update_dict:
            raise ValueError("pickled handles aren't taken; send plain ones")
        handles = update_dict.get("ipc_handles")
        plain = [from_plain(handle) for handle in handles] if isinstance(handles, list) else from_plain(handles or {})
        return super().parse_update_info(update_dict | {"ipc_handles": plain})

    def _put_back(self) -> None:
        super()._put_back()
        self._packed_importer.close()


def _chunks(info: NCCLWeightTransferUpdateInfo, buffer_bytes: int) -> Iterator[list[tuple[Any, ...]]]:
    """Name, dtype, shape and bytes of the tensors in each broadcast: one, or, with a buffer, as `pack_tensors` cuts
    them, behind the first tensor that makes a chunk larger than the buffer."""
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


def _some(names: list[str]) -> str:
    more = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def _weights_are_asleep() -> bool:
    from vllm.device_allocator import get_mem_allocator_instance

    allocations: dict[int, Any] = getattr(get_mem_allocator_instance(), "pointer_to_data", {})
    return any(data.tag == "weights" and data.is_asleep for data in allocations.values())
