"""The trainer's side of a push: vLLM's trainer engines, with a deadline on every wait and an outcome per generator.

:meth:`DeviceSender.push` is called on every trainer rank, between two updates. Rank 0 talks to the generators; the
others take part in gathering, and in ipc lend their own GPU's memory. A generator that fails never fails the trainer:
every rank comes to the end of its pass, and rank 0 reports.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
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

from actors.weights.push.device_digest import VersionPrint
from actors.weights.push.device_tensors import Pass, PushSource
from actors.weights.push.group import AbsentError, Deadline, MeetingPoint, PeerLostError
from actors.weights.push.ipc_handles import to_plain
from actors.weights.push.recipients import (
    FleetClient,
    FleetError,
    GeneratorPort,
    PhaseDeadlines,
    PushReport,
)
from actors.weights.push.vllm_backends import CheckedNcclInitInfo
from actors.weights.source import DTYPES
from actors.weights.tensors import SourceTensor

logger = logging.getLogger(__name__)

Backend = Literal["nccl", "ipc"]
JOIN_SHARE = 0.25
TRANSFER_SHARE = 0.5
SETTLE_SHARE = 0.1
"""Of a push's deadline."""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """How weights are pushed.

    Attributes:
        backend: "nccl": trainer and generators on different devices (on CPUs through gloo). "ipc": on the same GPUs.
        address: of rank 0's host, as the generators' hosts see it; the group meets there.
        deadline_s: of a push as a whole.
        gather_bytes: under ZeRO-3, how much is gathered at a time.
        packed: send many tensors at once, through buffers of `buffer_bytes`. Without it, ipc under ZeRO-3 holds a
            second copy of the model on every GPU.
        buffer_bytes: with nccl two of them are on every GPU that takes part, with ipc one. One that has to take a
            larger tensor is larger.
    """

    backend: Backend
    address: str
    deadline_s: float
    gather_bytes: int
    packed: bool = True
    buffer_bytes: int = 256 << 20


class CheckedNcclTrainer(NCCLTrainerWeightTransferEngine):
    """Broadcasts to all generators at once. Rank 0 is in the group with them; the other ranks only gather."""

    client: FleetClient
    source: PushSource

    def __init__(self, *, device: torch.device, transfer_s: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._device = device
        self._transfer_s = transfer_s

    def meet(self, address: str, shares: PhaseDeadlines) -> None:
        """Make the group with the generators, on rank 0.

        Args:
            address: of this host, as the generators' hosts see it.
        Raises:
            FleetError: one didn't come, or was lost on the way; the client's outcomes name it.
        """
        client = self.client
        if not client.ports:
            raise FleetError("there is no generator to send to")
        world_size = 1 + sum(port.workers for port in client.ports)
        point = MeetingPoint(address, world_size, Deadline(shares.join_s))
        info = CheckedNcclInitInfo(
            master_address=address,
            master_port=point.meeting.port,
            token=point.meeting.token,
            rank_offset=1,  # each generator gets its own from the client
            world_size=world_size,
            packed=self.packed,
            packed_buffer_size_bytes=self.packed_buffer_size_bytes,
            packed_num_buffers=self.packed_num_buffers,
            deadline_s=shares.transfer_s,
        )
        joining = _beside(lambda: client.init_weight_transfer_engine(worker_init_payload(info)))
        try:
            group = point.open(self._device, is_hopeless=lambda: client.has_failed)
        except (AbsentError, PeerLostError) as error:
            joining.result()  # says which generator it was, where one did fail
            raise FleetError(str(error)) from error
        self.model_update_group = group  # type: ignore[assignment]  # it has the interface of vLLM's
        joining.result()

    def send_weights(self) -> None:
        """Send one version, and see to it that it is loaded. On every rank.

        Raises:
            FleetError: on rank 0: not every generator serves it now.
        """
        one_pass = iter(self.source)
        try:
            if self.is_sender:
                self._send(one_pass, self.source.metadata())
        finally:
            one_pass.drain()
            self._post_send_sync()

    def give_up(self, why: str) -> None:
        """Break the group on all its members."""
        group: Any = self.model_update_group
        if group is not None:
            group.give_up(why)

    def _send(self, one_pass: Pass, meta: list[ParamMeta]) -> None:
        group: Any = self.model_update_group
        info = NCCLWeightTransferUpdateInfo(
            names=[tensor.name for tensor in meta],
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for tensor in meta],
            shapes=[list(tensor.shape) for tensor in meta],
        )
        self.client.start_weight_update()
        receiving = _beside(lambda: self.client.update_weights(vars(info)))
        try:
            with group.bounded(self._transfer_s):
                self._broadcast(one_pass, meta)
        except PeerLostError as error:
            receiving.result()  # says which generator it was, where one did fail
            raise FleetError(str(error)) from error
        except BaseException as error:
            self.give_up(f"the trainer failed while it sent: {error!r}")
            with contextlib.suppress(FleetError):
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


class CheckedIpcTrainer(IPCTrainerWeightTransferEngine):
    """Lends every rank's GPU memory to the generators' workers on the same GPUs, a chunk at a time.

    A generator that fails doesn't stop the others. Failures on rank 0 are kept until all ranks have met in all
    collectives. Nothing of the GPU's memory is held between pushes.
    """

    client: FleetClient
    source: PushSource

    def __init__(self, *, is_new: bool, **kwargs: Any) -> None:
        """Args:
        is_new: the generators haven't been told how the trainer sends.
        """
        super().__init__(**kwargs)
        self._is_new = is_new
        self._failure: FleetError | None = None

    def send_weights(self) -> None:
        """Send one version, and see to it that it is loaded. On every rank.

        Raises:
            FleetError: on rank 0: not every generator serves it now.
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
            except FleetError as error:
                self._failure = error


class DeviceSender:
    """A trainer rank's part in pushing versions to generators. Make it on every rank, from the same tensors."""

    def __init__(
        self, tensors: Sequence[SourceTensor], settings: PushSettings, *, rank: int, device: torch.device
    ) -> None:
        """Args:
        tensors: in the order of sending, the same on all ranks.
        settings: how.
        rank: of this trainer process.
        device: of this rank's model.

        Raises:
            ValueError: there is nothing to send, two tensors have one name, or ipc is asked for without a GPU.
        """
        if settings.backend == "ipc" and device.type != "cuda":
            raise ValueError(f"weights can be pushed over ipc from a GPU only; this trainer runs on {device.type}")
        self._settings = settings
        self._rank = rank
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        is_one_size = len({DTYPES[tensor.dtype].itemsize for tensor in tensors}) == 1
        self._packed = settings.packed and is_one_size  # else a tensor may lie askew behind another in the buffer
        self._source = PushSource(
            tensors,
            device=device,
            gather_bytes=settings.gather_bytes,
            is_read=rank == 0 or settings.backend == "ipc",
            is_fingerprinted=rank == 0,
        )
        self._client = self._client_of(())
        self._engine: CheckedNcclTrainer | CheckedIpcTrainer | None = None

    def push(self, version: int, ports: Sequence[GeneratorPort] = ()) -> PushReport | None:
        """Send the weights as they are now. Collective: every rank calls it, between two updates.

        Args:
            version: number of the policy version.
            ports: on rank 0, the generators to send to, each with another name. Where they aren't those of the last
                push, or that push failed, the group is made anew.
        Returns:
            On rank 0, what became of each generator. Generators that fail are reported, not raised.
        Raises:
            ValueError: the tensors aren't as declared, or can't be sent this way.
        """
        if self._rank != 0:
            self._engine = self._engine or self._make_engine()
            self._engine.send_weights()
            return None
        started = time.monotonic()
        if _key(ports) != _key(self._client.ports):
            self.close()
            self._client = self._client_of(ports)
        printed: list[VersionPrint] = []

        def sent() -> VersionPrint:
            printed.append(self._source.print_of(version))
            return printed[-1]

        client, deadline = self._client, Deadline(self._settings.deadline_s)
        client.begin(deadline, self._shares, sent, self._give_up)
        join_s = 0.0
        try:
            if self._engine is None:
                self._engine = self._make_engine()
                join_s = time.monotonic() - started
            self._engine.send_weights()
        except FleetError as error:
            client.abandon(str(error))
            self.close()
        except BaseException as error:
            client.abandon(f"the trainer failed: {error!r}")
            self.close()
            raise
        outcomes = tuple(client.outcomes[port.name] for port in ports)
        digest = printed[-1].digest if printed else ""
        report = PushReport(version, digest, outcomes, join_s, time.monotonic() - started - join_s)
        if not report.is_whole:
            logger.warning("%s", report)
        return report

    def close(self) -> None:
        """Leave the group. The next push makes a new one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    @property
    def _shares(self) -> PhaseDeadlines:
        whole_s = self._settings.deadline_s
        return PhaseDeadlines(JOIN_SHARE * whole_s, TRANSFER_SHARE * whole_s, SETTLE_SHARE * whole_s)

    def _client_of(self, ports: Sequence[GeneratorPort]) -> FleetClient:
        return FleetClient(ports, is_collective=self._settings.backend == "nccl")

    def _make_engine(self) -> CheckedNcclTrainer | CheckedIpcTrainer:
        is_sender = self._rank == 0
        wire = {"packed": self._packed, "packed_buffer_size_bytes": self._settings.buffer_bytes}
        if self._settings.backend == "ipc":
            wire["packed_buffer_size_bytes"] = max(self._settings.buffer_bytes, self._source.largest_bytes)
            return CheckedIpcTrainer(is_new=True, client=self._client, source=self._source, is_sender=is_sender, **wire)
        engine = CheckedNcclTrainer(
            device=self._device,
            transfer_s=self._shares.transfer_s,
            client=self._client,
            source=self._source,
            is_sender=is_sender,
            **wire,
        )
        if is_sender:
            try:
                engine.meet(self._settings.address, self._shares)
            except BaseException:
                engine.shutdown()
                iter(self._source).drain()  # the other ranks are on their way through it
                raise
        return engine

    def _give_up(self, why: str) -> None:
        if isinstance(self._engine, CheckedNcclTrainer):
            self._engine.give_up(why)


def _key(ports: Sequence[GeneratorPort]) -> list[tuple[str, str, int]]:
    return [(port.name, port.incarnation, port.workers) for port in ports]


def _beside(call: Callable[[], None]) -> Future[None]:
    """A call on a thread of its own, which nothing waits for at exit."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            call()
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="push-call", daemon=True).start()
    return result
