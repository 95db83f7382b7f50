"""Memory that generators map instead of receiving, and the memory that receiving takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from actors.weights.offer import WeightsOffer
from actors.weights.pull.memory import Memory
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.pull.receiver import ReceivedWeights, WeightReceiver
from rollout.failures import FailureError
from tests.actors.weights.peers import Peer, content_digest
from tests.actors.weights.versions import bytes_of, changed, random_tensors, source_of

DEADLINE_S = 30.0
MIB = 1 << 20
VALUES = random_tensors(1008, 1552)
SOURCE = source_of(VALUES)
"""10,240 bytes, in 10 buckets."""


@pytest.fixture
def elsewhere(new_publisher, monkeypatch) -> Callable[..., WeightPublisher]:
    """Makes publishers of another host, as far as the receivers know."""

    def make(**options: object) -> WeightPublisher:
        with monkeypatch.context() as patch:
            patch.setattr("actors.weights.pull.publisher.host_identity", lambda: "another host")
            return new_publisher(**options)

    return make


def content_of(received: ReceivedWeights) -> bytes:
    return bytes(received.parts[-1].held.memory.view)


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S / 2
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def damage(memory: Memory, position: int) -> None:
    """Flip a bit behind everybody's back."""
    with open(memory.path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def in_threads(receivers: list[WeightReceiver], offer: WeightsOffer) -> list[ReceivedWeights]:
    """All receive at once."""
    found: dict[str, ReceivedWeights] = {}

    def receive(receiver: WeightReceiver) -> None:
        found[receiver.name] = receiver.receive(offer, DEADLINE_S)

    threads = [threading.Thread(target=receive, args=(receiver,), daemon=True) for receiver in receivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
    return [found[receiver.name] for receiver in receivers]


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_on_the_publishers_host_its_memory_is_mapped_and_nothing_is_sent(new_publisher, new_receiver, is_encrypted):
    publisher = new_publisher(is_encrypted=is_encrypted)
    received = new_receiver(maps_memory=True).receive(publisher.publish(1, SOURCE), DEADLINE_S)
    assert content_of(received) == bytes_of(SOURCE)
    assert (received.route, received.source, received.received_bytes) == ("memory", "", 0)
    assert received.parts[0].held.memory.address.inode == publisher.held_parts[0].memory.address.inode
    assert publisher.server.egress_bytes == 0


def test_mapped_memory_is_given_back_once_loaded_and_then_written_anew_in_place(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver(maps_memory=True)
    inodes = []
    for version in (1, 2, 3):
        source = source_of(changed(VALUES, version))
        offer = publisher.publish(version, source)
        received = receiver.receive(offer, DEADLINE_S)
        assert content_of(received) == bytes_of(source)
        inodes.append(received.parts[0].held.memory.address.inode)
        receiver.loaded(received)
        until(lambda digest=offer.trained.digest: not publisher.server.is_pulled(digest))
    assert len(set(inodes)) == 1


def test_mapped_memory_that_isnt_loaded_yet_is_left_alone(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver(maps_memory=True)
    received = receiver.receive(publisher.publish(1, SOURCE), DEADLINE_S)
    for version in (2, 3):
        offer = publisher.publish(version, source_of(changed(VALUES, version)))
        assert content_of(received) == bytes_of(SOURCE)
    later = receiver.receive(offer, DEADLINE_S)
    assert content_of(later) == bytes_of(source_of(changed(VALUES, 3)))
    receiver.loaded(received)  # late, and about memory that was given back with the next version
    receiver.loaded(later)


def test_damaged_shared_memory_is_not_accepted(new_publisher, new_receiver):
    publisher = new_publisher()
    offer = publisher.publish(1, SOURCE)
    damage(publisher.held_parts[0].memory, 10_239)
    with pytest.raises(FailureError) as caught:
        new_receiver(maps_memory=True).receive(offer, DEADLINE_S)
    assert caught.value.failure.reason == "weights_corrupt"


def test_readers_of_one_host_share_the_work_of_checking_and_who_receives_anew_checks_all(new_publisher, new_receiver):
    publisher = new_publisher()
    offer = publisher.publish(1, SOURCE)
    first, second = new_receiver("a", maps_memory=True), new_receiver("b", maps_memory=True)
    first.receive(offer, DEADLINE_S)
    damage(publisher.held_parts[0].memory, 5000)
    assert second.receive(offer, DEADLINE_S).route == "memory", "the other has checked it, before it was damaged"
    with pytest.raises(FailureError) as caught:
        second.receive(offer, DEADLINE_S, anew=True)
    assert caught.value.failure.reason == "weights_corrupt"


def test_memory_that_was_made_for_another_version_is_not_taken_for_this_one(new_publisher, new_receiver):
    publisher, other = new_publisher(), new_receiver("other", maps_memory=True)
    offer = publisher.publish(1, SOURCE)
    manifest = publisher.held_parts[0].manifest
    newer = publisher.publish(2, source_of(changed(VALUES, 0)))
    other.loaded(other.receive(newer, DEADLINE_S))  # so all of version 2 is marked as checked
    publisher.server.hold(type(publisher.held_parts[0])(manifest, publisher.held_parts[0].memory))
    with pytest.raises(FailureError):  # the late one asks for version 1, and is told of the memory it was in
        new_receiver("late", maps_memory=True).receive(offer, DEADLINE_S)


def test_one_generator_of_a_host_pulls_and_the_others_map_its_memory(elsewhere, new_receiver):
    publisher = elsewhere()
    receivers = [new_receiver(name, maps_memory=True) for name in "abc"]
    for version in range(1, 11):
        source = source_of(random_tensors(1008, 1552, seed=version))
        found = in_threads(receivers, publisher.publish(version, source))
        assert [content_of(received) for received in found] == [bytes_of(source)] * 3
        assert sorted(received.route for received in found) == ["memory", "memory", "network"]
        (leader,) = (r.name for r, received in zip(receivers, found, strict=True) if received.route == "network")
        assert {received.source for received in found} == {"", leader}
        for receiver, received in zip(receivers, found, strict=True):
            receiver.loaded(received)
    assert publisher.server.egress_bytes == 10 * SOURCE.nbytes


def test_a_leader_writes_over_its_memory_once_its_neighbours_have_loaded_it(elsewhere, new_receiver):
    publisher = elsewhere()
    leader, neighbour = (new_receiver(name, maps_memory=True) for name in "ab")
    inodes: list[int] = []

    def is_written_over() -> bool:  # it is, unless the neighbour's word that it is done is still on its way
        version = len(inodes)
        offer = publisher.publish(version, source_of(changed(VALUES, version)))
        found = [receiver.receive(offer, DEADLINE_S) for receiver in (leader, neighbour)]
        for receiver, received in zip((leader, neighbour), found, strict=True):
            receiver.loaded(received)
        (inode,) = {received.parts[0].held.memory.address.inode for received in found}
        inodes.append(inode)
        return inodes[-2:] == [inode, inode]

    until(is_written_over)


def test_a_leader_leaves_alone_what_a_neighbour_hasnt_loaded_yet(elsewhere, new_receiver):
    publisher = elsewhere()
    leader, neighbour = (new_receiver(name, maps_memory=True) for name in "ab")
    offer = publisher.publish(1, SOURCE)
    leader.receive(offer, DEADLINE_S)
    received = neighbour.receive(offer, DEADLINE_S)
    newer = source_of(changed(VALUES, 0))
    assert content_of(leader.receive(publisher.publish(2, newer), DEADLINE_S)) == bytes_of(newer)
    assert received.source == "a"
    assert content_of(received) == bytes_of(SOURCE)


def test_a_neighbours_damaged_memory_is_not_accepted_and_the_version_comes_from_the_publisher(elsewhere, new_receiver):
    publisher = elsewhere()
    leader, neighbour = (new_receiver(name, maps_memory=True) for name in "ab")
    offer = publisher.publish(1, SOURCE)
    damage(leader.receive(offer, DEADLINE_S).parts[0].held.memory, 3000)
    received = neighbour.receive(offer, DEADLINE_S)
    assert content_of(received) == bytes_of(SOURCE)
    # The nine buckets that are right came from the neighbour, before the damaged one had failed often enough.
    assert (received.route, received.source) == ("network", "")
    assert received.received_bytes == SOURCE.nbytes


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_receiving_takes_at_most_two_buckets_of_memory_beyond_the_version(new_publisher, is_encrypted):
    publisher = new_publisher(bucket_bytes=8 * MIB, is_encrypted=is_encrypted)
    values = [torch.arange(64 * MIB, dtype=torch.float32)]
    source = source_of(values)
    with Peer("a", maps_memory=False) as peer:
        whole = peer.received(publisher.publish(1, source))
        assert (whole.route, whole.received_bytes) == ("network", 256 * MIB)
        assert whole.content == content_digest(publisher.held_parts[0].memory.view)
        values[0][::1000] += 1
        changes = peer.received(publisher.publish(2, source))
        assert changes.route == "delta"
        assert changes.content == content_digest(publisher.held_parts[0].memory.view)
    assert max(whole.private_bytes, changes.private_bytes) <= 2 * 8 * MIB + 2 * MIB
