"""The trainer's side of a push: vLLM's weight-transfer senders with bounded waits and a result for every generator.

:meth:`DeviceSender.push` is called on every trainer rank, between two updates. Rank 0 calls the generators; the other
ranks take part in gathering and, with ipc, share their own GPU's memory. A generator's failure never fails the trainer:
every rank finishes its pass, and rank 0 reports.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

from actors.weights.push.device_digest import VersionDigests
from actors.weights.push.device_tensors import PushSource, SourcePass
from actors.weights.push.group import Deadline, MissingRanksError, PeerLostError, RendezvousServer
from actors.weights.push.ipc_handles import to_plain
from actors.weights.push.recipients import (
    PhaseDeadlines,
    PushFailedError,
    PushRecipients,
    PushReport,
    PushTarget,
)
from actors.weights.push.vllm_backends import CheckedNcclInitInfo
from actors.weights.source import DTYPES, SourceTensor

logger = logging.getLogger(__name__)

Backend = Literal["nccl", "ipc"]
JOIN_FRACTION = 0.25
TRANSFER_FRACTION = 0.5
CLEANUP_FRACTION = 0.1
"""Fractions of a push's deadline."""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """Settings of a push.

    Attributes:
        backend: "nccl": trainer and generators on different devices (on CPUs through gloo). "ipc": on the same GPUs.
        address: address of rank 0's host for the generators' hosts; the rendezvous is there.
        deadline_s: deadline of a whole push.
        gather_bytes: under ZeRO-3, the largest group that is gathered at once.
        packed: send many tensors at once, through buffers of `buffer_bytes`. Without it, ipc under ZeRO-3 holds a
            second copy of the model on every GPU.
        buffer_bytes: size of a buffer; nccl uses two on every GPU, ipc one. A buffer grows for a larger tensor.
    """

    backend: Backend
    address: str
    deadline_s: float
    gather_bytes: int
    packed: bool = True
    buffer_bytes: int = 256 << 20


class CheckedNcclSender(NCCLTrainerWeightTransferEngine):
    """Broadcasts to all generators at once. Rank 0 is in the transfer group with them; the other ranks only gather."""

    client: PushRecipients
    source: PushSource

    def __init__(self, *, device: torch.device, transfer_s: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._device = device
        self._transfer_s = transfer_s

    def meet(self, address: str, phases: PhaseDeadlines) -> None:
        """Form the transfer group with the generators, on rank 0.

        Args:
            address: this host's address for the generators' hosts.
            phases: deadlines of the phases.
        Raises:
            PushFailedError: a generator was missing or was lost; the client's results name it.
        """
        client = self.client
        if not client.targets:
            raise PushFailedError("the push has no target")
        world_size = 1 + sum(target.workers for target in client.targets)
        point = RendezvousServer(address, world_size, Deadline(phases.join_s))
        info = CheckedNcclInitInfo(
            master_address=address,
            master_port=point.rendezvous.port,
            token=point.rendezvous.token,
            rank_offset=1,  # the client sets each generator's own
            world_size=world_size,
            packed=self.packed,
            packed_buffer_size_bytes=self.packed_buffer_size_bytes,
            packed_num_buffers=self.packed_num_buffers,
            deadline_s=phases.transfer_s,
        )
        joining = _in_thread(lambda: client.init_weight_transfer_engine(worker_init_payload(info)))
        try:
            group = point.open(self._device, must_stop=lambda: client.has_failed)
        except (MissingRanksError, PeerLostError) as error:
            joining.result()  # raises the failure that names the generator, if there is one
            raise PushFailedError(str(error)) from error
        self.model_update_group = group  # type: ignore[assignment]  # it has the interface of vLLM's
        joining.result()

    def send_weights(self) -> None:
        """Send one version and have it loaded and verified. On every rank.

        Raises:
            PushFailedError: on rank 0: a generator does not serve the version.
        """
        one_pass = iter(self.source)
        try:
            if self.is_sender:
                self._send(one_pass, self.source.metadata())
        finally:
            one_pass.drain()
            self._post_send_sync()

    def abort(self, why: str) -> None:
        """Abort the transfer group on all members."""
        group: Any = self.model_update_group
        if group is not None:
            group.abort(why)

    def _send(self, one_pass: SourcePass, meta: list[ParamMeta]) -> None:
        group: Any = self.model_update_group
        info = NCCLWeightTransferUpdateInfo(
            names=[tensor.name for tensor in meta],
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for tensor in meta],
            shapes=[list(tensor.shape) for tensor in meta],
        )
        self.client.start_weight_update()
        receiving = _in_thread(lambda: self.client.update_weights(vars(info)))
        try:
            with group.bounded(self._transfer_s):
                self._broadcast(one_pass, meta)
        except PeerLostError as error:
            receiving.result()  # raises the failure that names the generator, if there is one
            raise PushFailedError(str(error)) from error
        except BaseException as error:
            self.abort(f"the trainer failed during the broadcast: {error!r}")
            with contextlib.suppress(PushFailedError):
                receiving.result()
            raise
        receiving.result()
        self.client.finish_weight_update()

    def _broadcast(self, source: Any, meta: list[ParamMeta]) -> None:
        if self._device.type != "cpu":
            super()._broadcast(source, meta)
            return
        group: Any = self.model_update_group
        pairs = self._checked_iter(source, meta)
        if not self.packed:
            for _, tensor in pairs:
                group.broadcast(tensor, src=0)
            return
        while (chunk := pack_tensors(pairs, lambda item: item[1], self.packed_buffer_size_bytes)) is not None:
            group.broadcast(chunk.packed_tensor, src=0)


class CheckedIpcSender(IPCTrainerWeightTransferEngine):
    """Shares every rank's GPU memory with the generators' workers on the same GPUs, chunk by chunk.

    A generator's failure does not stop the others. A failure on rank 0 is raised after all ranks have been through all
    collectives. No GPU memory is held between pushes.
    """

    client: PushRecipients
    source: PushSource

    def __init__(self, *, is_new: bool, **kwargs: Any) -> None:
        """Args:
        is_new: the generators have still to be told how the trainer sends.
        """
        super().__init__(**kwargs)
        self._is_new = is_new
        self._failure: PushFailedError | None = None

    def send_weights(self) -> None:
        """Send one version and have it loaded and verified. On every rank.

        Raises:
            PushFailedError: on rank 0: a generator does not serve the version.
        """
        self._failure = None
        one_pass: Any = iter(self.source)
        lent = None
        try:
            if self._is_new:
                self._step(lambda: self.client.init_weight_transfer_engine({"packed": self.packed}))
                self._is_new = False
            self._step(self.client.start_weight_update)
            lent = self._send(one_pass)
            self._step(self.client.finish_weight_update)
        finally:
            one_pass.drain()
            self._post_send_sync()
            del lent
        if self._failure is not None:
            raise self._failure

    def _do_send(
        self,
        names: list[str],
        dtype_names: list[str],
        shapes: list[list[int]],
        ipc_handles: Any,
        tensor_sizes: list[int] | None = None,
    ) -> None:
        if not self.is_sender:
            return
        plain = [to_plain(handle) for handle in ipc_handles] if isinstance(ipc_handles, list) else to_plain(ipc_handles)
        chunk = {"names": names, "dtype_names": dtype_names, "shapes": shapes, "ipc_handles": plain}
        if tensor_sizes is not None:
            chunk["tensor_sizes"] = tensor_sizes
        self._step(lambda: self.client.update_weights(chunk))

    def _step(self, call: Callable[[], None]) -> None:
        if self.is_sender and self._failure is None:
            try:
                call()
            except PushFailedError as error:
                self._failure = error


class DeviceSender:
    """Pushes versions from a trainer rank to generators. Build it on every rank, from the same tensors."""

    def __init__(
        self, tensors: Sequence[SourceTensor], settings: PushSettings, *, rank: int, device: torch.device
    ) -> None:
        """Args:
        tensors: in the order of sending, the same on all ranks.
        settings: settings of the push.
        rank: rank of this trainer process.
        device: device of this rank's model.

        Raises:
            ValueError: there is no tensor, two tensors have one name, or the backend is ipc on a CPU.
        """
        if settings.backend == "ipc" and device.type != "cuda":
            raise ValueError(
                f"weights.backend = ipc shares a GPU's memory, but this trainer runs on {device.type}. Set it to zmq."
            )
        self._settings = settings
        self._rank = rank
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        is_one_size = len({DTYPES[tensor.dtype].itemsize for tensor in tensors}) == 1
        self._packed = settings.packed and is_one_size  # with several sizes, a tensor in the buffer may be misaligned
        self._source = PushSource(
            tensors,
            device=device,
            gather_bytes=settings.gather_bytes,
            is_read=rank == 0 or settings.backend == "ipc",
            takes_digests=rank == 0,
        )
        self._client = self._client_of(())
        self._sender: CheckedNcclSender | CheckedIpcSender | None = None

    def push(self, version: int, targets: Sequence[PushTarget] = ()) -> PushReport | None:
        """Send the current weights. Collective: every rank calls it, between two updates.

        Args:
            version: number of the policy version.
            targets: on rank 0, the generators to send to, with distinct names. The transfer group is formed again where
                they differ from those of the last push, or that push failed.
        Returns:
            On rank 0, a report with the result of each generator, failures included; None on the other ranks.
        Raises:
            ValueError: a tensor differs from its declaration, or cannot be sent by this backend.
        """
        if self._rank != 0:
            self._sender = self._sender or self._make_sender()
            self._sender.send_weights()
            return None
        if _key(targets) != _key(self._client.targets):
            self.close()
            self._client = self._client_of(targets)
        computed: list[VersionDigests] = []

        def sent() -> VersionDigests:
            computed.append(self._source.digests_of(version))
            return computed[-1]

        client, deadline = self._client, Deadline(self._settings.deadline_s)
        client.begin(deadline, self._phases, sent, self._abort)
        try:
            if self._sender is None:
                self._sender = self._make_sender()
            self._sender.send_weights()
        except PushFailedError as error:
            client.abandon(str(error))
            self.close()
        except BaseException as error:
            client.abandon(f"the trainer failed: {error!r}")
            self.close()
            raise
        results = tuple(client.results[target.name] for target in targets)
        digest = computed[-1].digest if computed else ""
        report = PushReport(version, digest, results)
        if not report.is_whole:
            logger.warning("%s", report)
        return report

    def close(self) -> None:
        """Leave the transfer group. The next push forms a new one."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()

    @property
    def _phases(self) -> PhaseDeadlines:
        whole_s = self._settings.deadline_s
        return PhaseDeadlines(JOIN_FRACTION * whole_s, TRANSFER_FRACTION * whole_s, CLEANUP_FRACTION * whole_s)

    def _client_of(self, targets: Sequence[PushTarget]) -> PushRecipients:
        return PushRecipients(targets, is_collective=self._settings.backend == "nccl")

    def _make_sender(self) -> CheckedNcclSender | CheckedIpcSender:
        is_sender = self._rank == 0
        wire = {"packed": self._packed, "packed_buffer_size_bytes": self._settings.buffer_bytes}
        if self._settings.backend == "ipc":
            wire["packed_buffer_size_bytes"] = max(self._settings.buffer_bytes, self._source.largest_bytes)
            return CheckedIpcSender(is_new=True, client=self._client, source=self._source, is_sender=is_sender, **wire)
        sender = CheckedNcclSender(
            device=self._device,
            transfer_s=self._phases.transfer_s,
            client=self._client,
            source=self._source,
            is_sender=is_sender,
            **wire,
        )
        if is_sender:
            try:
                sender.meet(self._settings.address, self._phases)
            except BaseException:
                sender.shutdown()
                iter(self._source).drain()  # the other ranks are in the same pass
                raise
        return sender

    def _abort(self, why: str) -> None:
        if isinstance(self._sender, CheckedNcclSender):
            self._sender.abort(why)


def _key(targets: Sequence[PushTarget]) -> list[tuple[str, str, int]]:
    return [(target.name, target.incarnation, target.workers) for target in targets]


def _in_thread(call: Callable[[], None]) -> Future[None]:
    """Run a call in a daemon thread of its own."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            call()
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="push-call", daemon=True).start()
    return result
