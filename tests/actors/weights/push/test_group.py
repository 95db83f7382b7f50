"""How the members of a push meet, and that no wait among them is for ever."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from actors.weights.push.group import (
    Deadline,
    MissingRanksError,
    NcclGroup,
    PeerLostError,
    Rendezvous,
    RendezvousServer,
    TransferGroup,
    join_group,
)

CPU = torch.device("cpu")
HOST = "127.0.0.1"


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """Threads for the members that aren't rank 0."""
    with ThreadPoolExecutor() as executor:
        yield executor


def met(beside: ThreadPoolExecutor, workers: int) -> list[TransferGroup]:
    """A group of rank 0 and so many workers, by rank."""
    point = RendezvousServer(HOST, 1 + workers, Deadline(10.0))
    joining = [beside.submit(join_group, point.rendezvous, 1 + rank, CPU, 10.0) for rank in range(workers)]
    return [point.open(CPU), *(future.result() for future in joining)]


def received(group: TransferGroup, tensor: torch.Tensor, deadline_s: float = 10.0) -> torch.Tensor:
    with group.bounded(deadline_s):
        group.broadcast(tensor, src=0)
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_every_member_receives_what_rank_0_sends(beside: ThreadPoolExecutor, dtype: torch.dtype, shape: tuple):
    trainer, *workers = met(beside, 2)
    sent = torch.randn(shape).mul(50).to(dtype)
    receiving = [beside.submit(received, worker, torch.empty(shape, dtype=dtype)) for worker in workers]
    received(trainer, sent)
    assert all(torch.equal(future.result(), sent) for future in receiving)


def test_members_that_dont_come_are_named_and_those_who_came_are_sent_away(beside: ThreadPoolExecutor):
    point = RendezvousServer(HOST, 4, Deadline(0.5))
    joining = beside.submit(join_group, point.rendezvous, 2, CPU, 30.0)
    with pytest.raises(MissingRanksError) as caught:
        point.open(CPU)
    assert caught.value.ranks == (1, 3)
    with pytest.raises(PeerLostError, match=r"ranks \[1, 3\] of 4 were missing"):
        joining.result()


def test_a_rendezvous_that_must_stop_ends_at_once():
    with pytest.raises(MissingRanksError):
        RendezvousServer(HOST, 2, Deadline(3600.0)).open(CPU, must_stop=lambda: True)


def test_who_doesnt_know_the_token_isnt_met(beside: ThreadPoolExecutor):
    point = RendezvousServer(HOST, 2, Deadline(0.5))
    joining = beside.submit(join_group, replace(point.rendezvous, token="guessed"), 1, CPU, 1.0)
    with pytest.raises(MissingRanksError):
        point.open(CPU)
    with pytest.raises(PeerLostError, match="does not answer"):
        joining.result()


def test_a_rendezvous_without_a_listener_ends_with_an_error():
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PeerLostError, match="does not answer"):
        join_group(Rendezvous(HOST, port, "token", 2), 1, CPU, 1.0)


def test_a_group_that_rank_0_gives_up_ends_for_all_with_its_reason(beside: ThreadPoolExecutor):
    trainer, *workers = met(beside, 2)
    waiting = [beside.submit(received, worker, torch.empty(3), 3600.0) for worker in workers]
    trainer.abort("generator-7 died")
    for future in waiting:
        with pytest.raises(PeerLostError, match="generator-7 died"):
            future.result()
    with pytest.raises(PeerLostError, match="generator-7 died"):
        received(trainer, torch.empty(3))


def test_a_broadcast_that_isnt_over_in_time_ends(beside: ThreadPoolExecutor):
    _, worker = met(beside, 1)
    with pytest.raises(PeerLostError, match=r"longer than its deadline of 0\.3 s"):
        received(worker, torch.empty(3), 0.3)


def test_an_error_of_the_users_own_passes_through(beside: ThreadPoolExecutor):
    _, worker = met(beside, 1)
    with pytest.raises(RuntimeError, match="own"), worker.bounded(10.0):
        raise RuntimeError("own")


def die_as_trainer(link: Connection) -> None:
    point = RendezvousServer(HOST, 2, Deadline(60.0))
    link.send(point.rendezvous)
    group = point.open(CPU)
    with group.bounded(60.0):
        group.broadcast(torch.ones(3), src=0)
        os._exit(1)


def test_a_trainer_that_dies_is_missed_by_its_workers():
    ours, theirs = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("spawn").Process(target=die_as_trainer, args=(theirs,))
    trainer.start()
    try:
        worker = join_group(ours.recv(), 1, CPU, 60.0)
        assert torch.equal(received(worker, torch.zeros(3)), torch.ones(3))
        with pytest.raises(PeerLostError):
            received(worker, torch.zeros(3), 3600.0)
    finally:
        trainer.join()


class Kernel:
    """A communicator like NCCL's: a broadcast is enqueued at once, and done when the others take part, or on abort."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.aborts = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        self.done.clear()

    def destroy(self) -> None:
        self.aborts += 1
        self.done.set()


class KernelGroup(NcclGroup):
    """Settles when the kernel is done, as a device does."""

    def _wait_until_done(self) -> None:
        self._communicator.done.wait()


def kernel_group(rank: int, store: HashStore) -> tuple[KernelGroup, Kernel]:
    kernel = Kernel()
    return KernelGroup(Rendezvous(HOST, 1, "token", 2), rank, PrefixStore("token", store), kernel), kernel


def test_a_kernel_that_waits_for_a_lost_member_is_aborted_by_the_deadline():
    group, kernel = kernel_group(1, HashStore())
    with pytest.raises(PeerLostError, match=r"longer than its deadline of 0\.2 s"):
        received(group, torch.ones(3), 0.2)
    assert kernel.aborts == 1
    with pytest.raises(PeerLostError, match="longer than its deadline"):
        received(group, torch.ones(3))


def test_a_kernel_is_aborted_when_rank_0_gives_the_group_up(beside: ThreadPoolExecutor):
    store = HashStore()
    (trainer, _), (worker, kernel) = kernel_group(0, store), kernel_group(1, store)
    waiting: Future[Any] = beside.submit(received, worker, torch.ones(3), 3600.0)
    trainer.abort("generator-7 died")
    with pytest.raises(PeerLostError, match="generator-7 died"):
        waiting.result()
    assert kernel.aborts == 1


def test_a_kernel_that_is_done_in_time_is_left_alone():
    group, kernel = kernel_group(1, HashStore())
    with group.bounded(10.0):
        group.broadcast(torch.ones(3), src=0)
        kernel.done.set()
    assert kernel.aborts == 0
