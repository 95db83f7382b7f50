"""The group in which a push travels from device to device: how its members meet, and how it ends when one is lost.

Rank 0 is the trainer, all others are workers of generators. They meet at a store that rank 0 opens for one group alone;
through it they learn that all are there before anyone enters a collective, and that the group was given up. What
travels through the store is never unpickled. On CUDA the group is vLLM's PyNcclCommunicator, on CPU a gloo group.

Every wait ends: collectives run inside :meth:`TransferGroup.bounded`, whose watch breaks the group when time is up,
when rank 0 gives it up, or when rank 0 is gone.
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
"""Marks, in the text of an error that crosses processes, a failure that only follows from another member's."""
UNTOUCHED = "[untouched]"
"""Marks an error after which the model holds its former version whole."""
STALE = "[stale]"
"""Marks an error after which the model may hold parts of two versions."""
PROCEED = b"proceed:"
GO = "go"
GIVEN_UP = "given-up"


class PeerLostError(RuntimeError):
    """The group is broken: a member is gone or too slow, or rank 0 gave it up."""

    def __init__(self, why: str) -> None:
        super().__init__(why if why.startswith(PEER_LOST) else f"{PEER_LOST} {why}")


class AbsentError(RuntimeError):
    """Not all members came to the meeting.

    Attributes:
        ranks: of those that didn't come.
    """

    def __init__(self, ranks: tuple[int, ...], why: str) -> None:
        super().__init__(why)
        self.ranks = ranks


class Deadline:
    """A moment after which nothing is waited for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the members of one group meet.

    Attributes:
        address, port: of rank 0's store.
        token: names this meeting; who doesn't know it reads and writes nothing of it.
        world_size: members, rank 0 among them.
    """

    address: str
    port: int
    token: str = field(repr=False)
    world_size: int


class TransferGroup(ABC):
    """Members of a push, of whom rank 0 sends. It has the interface of vLLM's communicators."""

    def __init__(self, meeting: Meeting, rank: int, store: PrefixStore) -> None:
        self.rank = rank
        self.world_size = meeting.world_size
        self._store = store
        self._broken: str | None = None
        self._breaking = threading.Lock()
        self._deadline: Deadline | None = None

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Send a contiguous tensor from rank `src`, or receive it in place. On CUDA it is only enqueued.

        Raises:
            PeerLostError: the group is broken.
        """
        if self._broken is not None:
            raise PeerLostError(self._broken)
        if tensor.numel():
            self._broadcast(tensor, src, stream)

    @contextlib.contextmanager
    def bounded(self, deadline_s: float) -> Iterator[None]:
        """Collectives within the block are over when it ends, at the latest after so many seconds.

        Raises:
            PeerLostError: they aren't, or the group was broken meanwhile. The group is of no use any more.
        """
        self._deadline = Deadline(deadline_s)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(self._deadline, over), name="push-watch", daemon=True)
        watch.start()
        try:
            yield
            self._settle()
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

    def give_up(self, why: str) -> None:
        """Break the group here and, from rank 0, on all other members. From any thread, any number of times."""
        self._break(why)

    def destroy(self) -> None:
        """Leave the group; collectives that are under way here end with an error."""
        self._break("this member has left the group")

    def _watch(self, deadline: Deadline, over: threading.Event) -> None:
        while not over.wait(min(WATCH_S, deadline.left_s)):
            if deadline.left_s == 0.0:
                self._break(f"it was not over within {deadline.seconds:g} s")
                return
            if (why := self._given_up()) is not None:
                self._break(why)
                return

    def _given_up(self) -> str | None:
        """Why rank 0 has given the group up, if it has."""
        try:
            return self._store.get(GIVEN_UP).decode(errors="replace") if self._store.check([GIVEN_UP]) else None
        except RuntimeError as error:
            return f"the trainer, who sends, is gone ({error})"

    def _break(self, why: str) -> None:
        with self._breaking:
            if self._broken is not None:
                return
            self._broken = why
            if self.rank == 0:
                with contextlib.suppress(RuntimeError):
                    _put(self._store, GIVEN_UP, why.encode())
            self._close()

    @abstractmethod
    def _broadcast(self, tensor: Tensor, src: int, stream: Any) -> None: ...

    @abstractmethod
    def _settle(self) -> None:
        """Return when everything enqueued is done."""

    @abstractmethod
    def _close(self) -> None:
        """Make every collective under way end, and free the connections. Called once, from any thread."""


class GlooGroup(TransferGroup):
    """Between CPUs, over TCP. A member that dies is noticed at once, one that stands still by the deadline."""

    def __init__(self, meeting: Meeting, rank: int, store: PrefixStore, deadline: Deadline) -> None:
        super().__init__(meeting, rank, store)
        gloo: Any = ProcessGroupGloo  # torch's stubs lack most of it
        options = gloo._Options()
        options._timeout = timedelta(seconds=max(POLL_S, deadline.left_s))
        own_address = _own_address(meeting)
        options._devices = [gloo.create_device(hostname=own_address, lazy_init=False)]
        self._work: Any = None
        self._group: Any = gloo(store, rank, meeting.world_size, options)

    def _broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        if not tensor.is_contiguous():
            raise ValueError("only a contiguous tensor can be broadcast")
        group, deadline = self._group, self._deadline
        if group is None or deadline is None:
            raise PeerLostError(self._broken or "a broadcast needs a deadline: use it within bounded()")
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
            self._break(self._given_up() or f"a member didn't take part in a broadcast: {said}")
            raise PeerLostError(self._broken or said) from error
        self._work = None

    def _wait(self, work: Any) -> None:
        """gloo can't be interrupted: wait a little at a time, and leave it alone once the group is broken."""
        while not work.is_completed():
            if self._broken is not None:
                raise PeerLostError(self._broken)
            with contextlib.suppress(RuntimeError):  # "timed out", or what went wrong, of which the last wait tells
                work.wait(GLOO_WAIT)
        work.wait()

    def _settle(self) -> None:
        """Broadcasts block."""

    def _close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            threading.Thread(target=_outlive, args=(group, self._work), name="push-close", daemon=True).start()


class NcclGroup(TransferGroup):
    """Between GPUs, through vLLM's communicator. A member that is lost shows by the deadline, or by what rank 0 says.

    NCCL's kernels wait for ever for a member that is gone; aborting the communicator ends them.
    """

    def __init__(self, meeting: Meeting, rank: int, store: PrefixStore, communicator: Any) -> None:
        super().__init__(meeting, rank, store)
        self._communicator = communicator

    def _broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        self._communicator.broadcast(tensor, src=src, stream=stream)

    def _settle(self) -> None:
        torch.accelerator.synchronize()

    def _close(self) -> None:
        self._communicator.destroy()  # ncclCommAbort, in a thread of its own, joined for at most 5 s


class MeetingPoint:
    """Rank 0's side: opens the store on one address and a free port, and waits for the others there."""

    def __init__(self, address: str, world_size: int, deadline: Deadline) -> None:
        """Args:
            address: of this host, as the generators' hosts see it; the store listens on it and no other.
            world_size: members, rank 0 among them.
            deadline: until when all must have come.
        Raises:
            OSError: the address isn't this host's.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        self.meeting = Meeting(address, listener.getsockname()[1], secrets.token_hex(16), world_size)
        self._deadline = deadline
        self._store = PrefixStore(self.meeting.token, _server(self.meeting, listener, deadline))

    def open(self, device: torch.device, is_hopeless: Callable[[], bool] = lambda: False) -> TransferGroup:
        """Wait until all are here, and make the group with them.

        Args:
            device: of what will be sent.
            is_hopeless: asked again and again; True ends the wait.
        Raises:
            AbsentError: not all came in time; those who came are sent away.
            PeerLostError: one was lost between coming and joining.
        """
        missing = set(range(1, self.meeting.world_size))
        while missing:
            missing = {rank for rank in missing if not self._store.check([_here(rank)])}
            if missing and (is_hopeless() or self._deadline.left_s == 0.0):
                why = f"ranks {sorted(missing)} of {self.meeting.world_size} didn't come to the meeting"
                _put(self._store, GO, why.encode())
                raise AbsentError(tuple(sorted(missing)), why)
            if missing:
                time.sleep(min(POLL_S, self._deadline.left_s))
        greeting = b"" if device.type == "cpu" else _unique_id()
        _put(self._store, GO, PROCEED + greeting)
        return _make_group(self.meeting, 0, self._store, device, greeting, self._deadline)


def join_group(meeting: Meeting, rank: int, device: torch.device, deadline_s: float) -> TransferGroup:
    """A worker's side: come to the meeting, wait for the others, and make the group with them.

    Raises:
        PeerLostError: rank 0 isn't there, others didn't come in time, or one was lost meanwhile.
    """
    deadline = Deadline(deadline_s)
    wait = timedelta(seconds=deadline_s)
    try:
        client = TCPStore(meeting.address, meeting.port, is_master=False, timeout=wait, wait_for_workers=False)
        store = PrefixStore(meeting.token, client)
        _put(store, _here(rank), b"1")
        word = store.get(GO)
    except RuntimeError as error:
        raise PeerLostError(f"the trainer at {meeting.address}:{meeting.port} doesn't answer: {error}") from error
    if not word.startswith(PROCEED):
        raise PeerLostError(word.decode(errors="replace"))
    return _make_group(meeting, rank, store, device, word.removeprefix(PROCEED), deadline)


def _make_group(
    meeting: Meeting, rank: int, store: PrefixStore, device: torch.device, greeting: bytes, deadline: Deadline
) -> TransferGroup:
    try:
        if device.type == "cpu":
            return GlooGroup(meeting, rank, store, deadline)
        communicator = _within(deadline, lambda: _communicator(meeting, rank, greeting, device))
        return NcclGroup(meeting, rank, store, communicator)
    except (RuntimeError, TimeoutError) as error:
        raise PeerLostError(f"a member came to the meeting but didn't join the group: {error}") from error


def _communicator(meeting: Meeting, rank: int, unique_id: bytes, device: torch.device) -> Any:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    with unpinned_nccl_env():
        communicator = PyNcclCommunicator.from_unique_id_bytes(
            unique_id, rank=rank, world_size=meeting.world_size, device=device
        )
    if communicator.disabled:
        raise RuntimeError("VLLM_DISABLE_PYNCCL is set, or a group of one was asked for: NCCL would send nothing")
    return communicator


def _unique_id() -> bytes:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId())


def _outlive(group: Any, work: Any) -> None:
    """Close a gloo group, which takes until its last operation has come to its end or its deadline."""
    group.abort()
    if work is not None:
        with contextlib.suppress(RuntimeError):
            work.wait()


def _within(deadline: Deadline, make: Callable[[], Made]) -> Made:
    """What `make` returns. Where it hangs, its thread is left behind: NCCL's set-up can't be interrupted."""
    made: Future[Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="push-set-up", daemon=True).start()
    return made.result(timeout=deadline.left_s)


def _server(meeting: Meeting, listener: socket.socket, deadline: Deadline) -> TCPStore:
    return TCPStore(
        meeting.address,
        meeting.port,
        is_master=True,
        timeout=timedelta(seconds=max(POLL_S, deadline.left_s)),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,  # torch's other server doesn't take a socket that listens already
    )


def _own_address(meeting: Meeting) -> str:
    """This host's address on the way to rank 0. Nothing is sent."""
    family = socket.AF_INET6 if ":" in meeting.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting.address, meeting.port))
        return str(probe.getsockname()[0])


def _here(rank: int) -> str:
    return f"here/{rank}"


def _put(store: Any, key: str, value: bytes) -> None:
    """torch's stubs know of text only."""
    store.set(key, value)
