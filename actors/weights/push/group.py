"""The transfer group of a push, which broadcasts from device to device: its rendezvous, its deadlines and its abort.

Rank 0 is the trainer, all other ranks are workers of generators. They meet at a store that rank 0 opens for one group;
through it they learn that all ranks are present before any enters a collective, and that the group was aborted. Nothing
in the store is ever unpickled. On CUDA the group is vLLM's PyNcclCommunicator, on CPU a gloo group.

Every wait is bounded: collectives run inside :meth:`TransferGroup.bounded`, whose watch thread breaks the group at the
deadline, when rank 0 aborts it, or when rank 0 is lost.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

Made = TypeVar("Made")

POLL_S = 0.1
WATCH_S = 0.25
GLOO_WAIT = timedelta(milliseconds=50)
PEER_LOST = "[peer lost]"
"""Marks, in the text of an error that crosses processes, a failure that another member has caused."""
UNTOUCHED = "[untouched]"
"""Marks an error after which the model holds its former version, whole."""
STALE = "[stale]"
"""Marks an error after which the model may hold parts of two versions."""
PROCEED = b"proceed:"
GO = "go"
ABORTED = "given-up"


class PeerLostError(RuntimeError):
    """The group is broken: a member was lost or too slow, or rank 0 aborted the group."""

    def __init__(self, why: str) -> None:
        super().__init__(why if why.startswith(PEER_LOST) else f"{PEER_LOST} {why}")


class MissingRanksError(RuntimeError):
    """Some ranks were missing at the rendezvous.

    Attributes:
        ranks: the missing ranks.
    """

    def __init__(self, ranks: tuple[int, ...], why: str) -> None:
        super().__init__(why)
        self.ranks = ranks


class Deadline:
    """A point in time that bounds waits."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Remaining seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Address and token of the store at which the members of one group meet.

    Attributes:
        address, port: of rank 0's store.
        token: prefix of the group's keys; without it, the keys can be neither read nor written.
        world_size: number of members, rank 0 included.
    """

    address: str
    port: int
    token: str = field(repr=False)
    world_size: int


class TransferGroup(ABC):
    """The members of a push; rank 0 sends. It has the interface of vLLM's communicators."""

    def __init__(self, rendezvous: Rendezvous, rank: int, store: PrefixStore) -> None:
        self.rank = rank
        self.world_size = rendezvous.world_size
        self._store = store
        self._broken: str | None = None
        self._breaking = threading.Lock()
        self._deadline: Deadline | None = None

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Send a contiguous tensor from rank `src`, or receive it in place. On CUDA this only enqueues it.

        Raises:
            PeerLostError: the group is broken.
        """
        if self._broken is not None:
            raise PeerLostError(self._broken)
        if tensor.numel():
            self._broadcast(tensor, src, stream)

    @contextlib.contextmanager
    def bounded(self, deadline_s: float) -> Iterator[None]:
        """Bound the collectives within the block: they have finished when it ends, at the latest after `deadline_s`.

        Raises:
            PeerLostError: they had not finished, or the group was broken meanwhile. The group stays broken.
        """
        self._deadline = Deadline(deadline_s)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(self._deadline, over), name="push-watch", daemon=True)
        watch.start()
        try:
            yield
            self._wait_until_done()
        except PeerLostError:
            raise
        except RuntimeError as error:
            if self._broken is not None:
                raise PeerLostError(self._broken) from error
            raise
        finally:
            over.set()
            watch.join()
            self._deadline = None
        if self._broken is not None:
            raise PeerLostError(self._broken)

    def abort(self, why: str) -> None:
        """Break the group here and, from rank 0, on all other members. Thread-safe and idempotent."""
        self._break(why)

    def destroy(self) -> None:
        """Leave the group; collectives in progress here end with an error."""
        self._break("this member has left the group")

    def _watch(self, deadline: Deadline, over: threading.Event) -> None:
        while not over.wait(min(WATCH_S, deadline.left_s)):
            if deadline.left_s == 0.0:
                self._break(f"the transfer took longer than its deadline of {deadline.seconds:g} s")
                return
            if (why := self._abort_reason()) is not None:
                self._break(why)
                return

    def _abort_reason(self) -> str | None:
        """Rank 0's reason for aborting the group; None while it has not."""
        try:
            return self._store.get(ABORTED).decode(errors="replace") if self._store.check([ABORTED]) else None
        except RuntimeError as error:
            return f"the connection to the trainer was lost ({error})"

    def _break(self, why: str) -> None:
        with self._breaking:
            if self._broken is not None:
                return
            self._broken = why
            if self.rank == 0:
                with contextlib.suppress(RuntimeError):
                    _put(self._store, ABORTED, why.encode())
            self._close()

    @abstractmethod
    def _broadcast(self, tensor: Tensor, src: int, stream: Any) -> None: ...

    @abstractmethod
    def _wait_until_done(self) -> None:
        """Return when everything enqueued is done."""

    @abstractmethod
    def _close(self) -> None:
        """End every collective in progress and free the connections. Called once, from any thread."""


class GlooGroup(TransferGroup):
    """Broadcasts between CPUs over TCP. A member's death is detected at once, a hung member at the deadline."""

    def __init__(self, rendezvous: Rendezvous, rank: int, store: PrefixStore, deadline: Deadline) -> None:
        super().__init__(rendezvous, rank, store)
        gloo: Any = ProcessGroupGloo  # torch's stubs lack most of it
        options = gloo._Options()
        options._timeout = timedelta(seconds=max(POLL_S, deadline.left_s))
        own_address = _own_address(rendezvous)
        options._devices = [gloo.create_device(hostname=own_address, lazy_init=False)]
        self._work: Any = None
        self._group: Any = gloo(store, rank, rendezvous.world_size, options)

    def _broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        if not tensor.is_contiguous():
            raise ValueError("only a contiguous tensor can be broadcast")
        group, deadline = self._group, self._deadline
        if group is None or deadline is None:
            raise PeerLostError(self._broken or "a broadcast needs a deadline: call it within bounded()")
        options = BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        options.timeout = timedelta(seconds=max(POLL_S, deadline.left_s))
        self._work = group.broadcast([tensor.view(-1).view(torch.uint8)], options)
        try:
            self._wait(self._work)
        except PeerLostError:
            raise
        except RuntimeError as error:
            said = str(error).partition(". This is typically")[0]
            self._break(self._abort_reason() or f"a member dropped out of a broadcast: {said}")
            raise PeerLostError(self._broken or said) from error
        self._work = None

    def _wait(self, work: Any) -> None:
        """Wait in short intervals, because gloo cannot be interrupted, and stop once the group is broken."""
        while not work.is_completed():
            if self._broken is not None:
                raise PeerLostError(self._broken)
            with contextlib.suppress(RuntimeError):  # a timeout, or an error that the last wait raises again
                work.wait(GLOO_WAIT)
        work.wait()

    def _wait_until_done(self) -> None:
        """Does nothing: gloo's broadcasts block."""

    def _close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            threading.Thread(target=_close_gloo, args=(group, self._work), name="push-close", daemon=True).start()


class NcclGroup(TransferGroup):
    """Broadcasts between GPUs through vLLM's communicator. A lost member shows at the deadline or by rank 0's abort.

    NCCL's kernels wait without bound for a lost member; aborting the communicator ends them.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, store: PrefixStore, communicator: Any) -> None:
        super().__init__(rendezvous, rank, store)
        self._communicator = communicator

    def _broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        self._communicator.broadcast(tensor, src=src, stream=stream)

    def _wait_until_done(self) -> None:
        torch.accelerator.synchronize()

    def _close(self) -> None:
        self._communicator.destroy()  # ncclCommAbort, in a thread of its own, joined for at most 5 s


class RendezvousServer:
    """Rank 0's side of the rendezvous: opens the store on a free port and waits for the other ranks."""

    def __init__(self, address: str, world_size: int, deadline: Deadline) -> None:
        """Args:
            address: this host's address for the generators' hosts; the store listens on it alone.
            world_size: number of members, rank 0 included.
            deadline: bounds the rendezvous.
        Raises:
            OSError: this host does not have the address.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        self.rendezvous = Rendezvous(address, listener.getsockname()[1], secrets.token_hex(16), world_size)
        self._deadline = deadline
        self._store = PrefixStore(self.rendezvous.token, _server(self.rendezvous, listener, deadline))

    def open(self, device: torch.device, must_stop: Callable[[], bool] = lambda: False) -> TransferGroup:
        """Wait for all ranks and make the group with them.

        Args:
            device: the device of the tensors to send.
            must_stop: polled during the wait; True ends it.
        Raises:
            MissingRanksError: ranks were missing at the deadline; those present are told so.
            PeerLostError: a rank was lost between its arrival and joining.
        """
        missing = set(range(1, self.rendezvous.world_size))
        while missing:
            missing = {rank for rank in missing if not self._store.check([_present_key(rank)])}
            if missing and (must_stop() or self._deadline.left_s == 0.0):
                why = f"ranks {sorted(missing)} of {self.rendezvous.world_size} were missing at the rendezvous"
                _put(self._store, GO, why.encode())
                raise MissingRanksError(tuple(sorted(missing)), why)
            if missing:
                time.sleep(min(POLL_S, self._deadline.left_s))
        greeting = b"" if device.type == "cpu" else _unique_id()
        _put(self._store, GO, PROCEED + greeting)
        return _make_group(self.rendezvous, 0, self._store, device, greeting, self._deadline)


def join_group(rendezvous: Rendezvous, rank: int, device: torch.device, deadline_s: float) -> TransferGroup:
    """A worker's side of the rendezvous: wait for the other ranks and make the group with them.

    Raises:
        PeerLostError: rank 0 is unreachable, ranks were missing at the deadline, or one was lost meanwhile.
    """
    deadline = Deadline(deadline_s)
    wait = timedelta(seconds=deadline_s)
    try:
        client = TCPStore(rendezvous.address, rendezvous.port, is_master=False, timeout=wait, wait_for_workers=False)
        store = PrefixStore(rendezvous.token, client)
        _put(store, _present_key(rank), b"1")
        word = store.get(GO)
    except RuntimeError as error:
        raise PeerLostError(
            f"the trainer's rendezvous at {rendezvous.address}:{rendezvous.port} does not answer: {error}"
        ) from error
    if not word.startswith(PROCEED):
        raise PeerLostError(word.decode(errors="replace"))
    return _make_group(rendezvous, rank, store, device, word.removeprefix(PROCEED), deadline)


def _make_group(
    rendezvous: Rendezvous, rank: int, store: PrefixStore, device: torch.device, greeting: bytes, deadline: Deadline
) -> TransferGroup:
    try:
        if device.type == "cpu":
            return GlooGroup(rendezvous, rank, store, deadline)
        communicator = _call_within(deadline, lambda: _communicator(rendezvous, rank, greeting, device))
        return NcclGroup(rendezvous, rank, store, communicator)
    except (RuntimeError, TimeoutError) as error:
        raise PeerLostError(f"a member of the rendezvous failed to join the group: {error}") from error


def _communicator(rendezvous: Rendezvous, rank: int, unique_id: bytes, device: torch.device) -> Any:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    with unpinned_nccl_env():
        communicator = PyNcclCommunicator.from_unique_id_bytes(
            unique_id, rank=rank, world_size=rendezvous.world_size, device=device
        )
    if communicator.disabled:
        raise RuntimeError(
            "vLLM's NCCL communicator is disabled. Unset VLLM_DISABLE_PYNCCL, and push to at least one generator."
        )
    return communicator


def _unique_id() -> bytes:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId())


def _close_gloo(group: Any, work: Any) -> None:
    """Close a gloo group after its last operation has ended or reached its deadline."""
    group.abort()
    if work is not None:
        with contextlib.suppress(RuntimeError):
            work.wait()


def _call_within(deadline: Deadline, make: Callable[[], Made]) -> Made:
    """The result of `make`, within the deadline. A hung thread is left behind: NCCL's set-up cannot be interrupted."""
    made: Future[Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="push-set-up", daemon=True).start()
    return made.result(timeout=deadline.left_s)


def _server(rendezvous: Rendezvous, listener: socket.socket, deadline: Deadline) -> TCPStore:
    return TCPStore(
        rendezvous.address,
        rendezvous.port,
        is_master=True,
        timeout=timedelta(seconds=max(POLL_S, deadline.left_s)),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,  # torch's libuv server cannot take over a listening socket
    )


def _own_address(rendezvous: Rendezvous) -> str:
    """The address of this host from which rank 0 is reached. Sends nothing."""
    family = socket.AF_INET6 if ":" in rendezvous.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as unconnected:
        unconnected.connect((rendezvous.address, rendezvous.port))
        return str(unconnected.getsockname()[0])


def _present_key(rank: int) -> str:
    return f"present/{rank}"


def _put(store: Any, key: str, value: bytes) -> None:
    """Set a key to bytes; torch's stubs declare text only."""
    store.set(key, value)
