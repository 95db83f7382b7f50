"""What a publisher keeps, refills and says of its versions."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import zmq

from actors.weights.manifest import WeightsPart
from actors.weights.offer import WeightsOffer
from actors.weights.pull.connection import Connection, NotServedError
from actors.weights.pull.memory import Memory
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.source import PolicyPartSource, SourceTensor
from tests.actors.weights.versions import bytes_of, changed, random_tensors, source_of

DEADLINE_S = 60.0
COUNT = 2000
"""Elements of a version: 8,000 bytes, in 8 buckets."""


def version_of(seed: int) -> PolicyPartSource:
    return source_of(random_tensors(COUNT, seed=seed))


def inodes(publisher: WeightPublisher) -> list[int]:
    return [held.memory.address.inode for held in publisher.held_parts]


def mapped(publisher: WeightPublisher) -> Memory:
    """The current version, leased."""
    found = Memory.open(publisher.held_parts[-1].memory.address)
    assert found is not None
    return found


def test_an_offer_names_both_parts_and_frozen_weights_are_read_once(new_publisher):
    read = []

    def ones() -> torch.Tensor:
        read.append("f")
        return torch.ones(300)

    frozen = PolicyPartSource(
        [SourceTensor("f", "float32", (300,), (), ones)], gather_bytes=1 << 20, part=WeightsPart.FROZEN
    )
    publisher = new_publisher(epoch=7)
    first, second = (publisher.publish(version, version_of(version), frozen) for version in (1, 2))
    assert read == ["f"]
    assert [part.part for part in first.parts] == [WeightsPart.FROZEN, WeightsPart.TRAINED]
    assert first.parts[0] == second.parts[0]
    assert first.parts[1] != second.parts[1] == second.trained
    assert (second.order, second.nbytes, second.parts[0].nbytes) == ((7, 2), 4 * COUNT, 1200)


def test_a_later_publisher_has_a_greater_epoch(new_publisher):
    assert new_publisher().epoch < new_publisher().epoch


def test_an_offer_never_shows_the_secret_key(new_publisher):
    offer = new_publisher(is_encrypted=True).publish(1, version_of(1))
    assert offer.keys is not None
    assert offer.keys.client_secret.decode() not in repr(offer)
    assert str(offer.keys.client_secret) not in repr(offer)


@pytest.mark.parametrize("bucket_bytes", [0, -64, 1000])
def test_elements_that_would_lie_in_two_buckets_are_refused(bucket_bytes):
    with pytest.raises(ValueError, match="multiple of 64"):
        WeightPublisher(bucket_bytes=bucket_bytes)


def test_memory_that_nobody_reads_is_written_anew_in_place(new_publisher):
    publisher = new_publisher()
    publisher.publish(1, version_of(1))
    before = inodes(publisher)
    publisher.publish(2, version_of(2))
    assert inodes(publisher) == before
    assert bytes(publisher.held_parts[-1].memory.view) == bytes_of(version_of(2))


def test_what_a_generator_maps_stays_as_it_is_and_at_most_two_versions_are_held(new_publisher):
    publisher = new_publisher()
    publisher.publish(1, version_of(1))
    reader = mapped(publisher)
    held = []
    for version in (2, 3, 4):
        publisher.publish(version, version_of(version))
        held.append([held.manifest.version for held in publisher.held_parts])
        assert bytes(reader.view) == bytes_of(version_of(1))
        assert bytes(publisher.held_parts[-1].memory.view) == bytes_of(version_of(version))
    assert held == [[1, 2], [1, 3], [1, 4]]


def test_a_version_is_given_up_with_its_last_reader(new_publisher):
    publisher = new_publisher()
    publisher.publish(1, version_of(1))
    reader = mapped(publisher)
    publisher.publish(2, version_of(2))
    reader.unclaim()
    publisher.publish(3, version_of(3))
    assert [held.manifest.version for held in publisher.held_parts] == [3]


def test_with_readers_of_two_versions_the_older_one_stays(new_publisher):
    publisher = new_publisher()
    readers = []
    for version in (1, 2):
        publisher.publish(version, version_of(version))
        readers.append(mapped(publisher))
    publisher.publish(3, version_of(3))
    assert [held.manifest.version for held in publisher.held_parts] == [1, 3]
    assert [bytes(reader.view) for reader in readers] == [bytes_of(version_of(1)), bytes_of(version_of(2))]


def test_another_size_gets_other_memory(new_publisher):
    publisher = new_publisher()
    publisher.publish(1, version_of(1))
    publisher.publish(2, source_of(random_tensors(COUNT + 1)))
    assert [held.memory.nbytes for held in publisher.held_parts] == [4 * COUNT + 4]


def pulled(publisher: WeightPublisher, offer: WeightsOffer, buckets: int = 8) -> None:
    """As a generator of another host pulls it."""
    with zmq.Context() as context:
        client = Connection(context, offer.endpoint, b"", None)
        for index in range(buckets):
            client.ask("bucket", offer.trained.digest, index=index)
            client.answer("bucket", offer.trained.digest, time.monotonic() + DEADLINE_S)
        client.ask("done", offer.trained.digest)
        client.ask("manifest", "unknown")
        with pytest.raises(NotServedError):
            client.answer("manifest", "unknown", time.monotonic() + DEADLINE_S)
        client.close()


def test_changes_are_measured_once_somebody_has_pulled_over_the_network(new_publisher):
    values = random_tensors(COUNT)
    publisher = new_publisher()
    shares = [publisher.publish(1, source_of(values)).changed_share]
    shares.append((second := publisher.publish(2, source_of(values))).changed_share)
    pulled(publisher, second)
    shares.append(publisher.publish(3, source_of(changed(values, 5, 50, 1999))).changed_share)
    assert shares == [None, None, 3 / COUNT]


def test_a_generator_that_is_still_reading_the_version_before_costs_the_others_no_delta(new_publisher):
    values = random_tensors(COUNT)
    publisher = new_publisher()
    pulled(publisher, publisher.publish(1, source_of(values)))
    reader = mapped(publisher)
    second = publisher.publish(2, source_of(changed(values, 5)))
    assert second.changed_share == 1 / COUNT
    assert sorted(next(iter(publisher.held_parts[-1].deltas.values()))) == list(range(8))
    assert bytes(reader.view) == bytes_of(source_of(values))


def read_then(values: list[torch.Tensor], happens: Callable[[], None]) -> PolicyPartSource:
    """A source of these, with something that happens while it is read."""

    def read() -> torch.Tensor:
        happens()
        return values[0]

    (tensor,) = source_of(values).tensors
    return PolicyPartSource([replace(tensor, read=read)], gather_bytes=1 << 20)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_changes_go_with_the_version_that_they_lead_to_and_before_those_of_the_next_come(new_publisher, is_mapped):
    values = random_tensors(COUNT)
    publisher = new_publisher()
    pulled(publisher, publisher.publish(1, source_of(values)))
    publisher.publish(2, source_of(changed(values, 5)))
    second = publisher.held_parts[-1]
    assert len(second.deltas) == 1
    reader = mapped(publisher) if is_mapped else None
    kept: list[int] = []
    publisher.publish(3, read_then(changed(values, 5, 9), lambda: kept.append(len(second.deltas))))
    # Version 2 is still there for who maps it, and for who comes late and pulls it; else its memory is version 3's.
    assert kept == ([1] if is_mapped else [0])
    assert (reader is not None) == (second in publisher.held_parts)
    assert len(publisher.held_parts[-1].deltas) == 1


def test_without_deltas_nothing_is_measured(new_publisher):
    publisher = new_publisher(has_delta=False)
    pulled(publisher, publisher.publish(1, version_of(1)))
    assert publisher.publish(2, version_of(1)).changed_share is None
    assert publisher.held_parts[-1].deltas == {}


def test_an_offer_says_what_has_been_sent_since_the_one_before(new_publisher):
    publisher = new_publisher()
    first = publisher.publish(1, version_of(1))
    pulled(publisher, first)
    pulled(publisher, first, buckets=2)
    second, third = publisher.publish(2, version_of(2)), publisher.publish(3, version_of(3))
    assert [offer.egress_bytes for offer in (first, second, third)] == [0, 4 * COUNT + 2 * 1024, 0]


def test_a_version_that_could_not_be_read_leaves_nothing_behind(new_publisher):
    publisher = new_publisher()
    values = random_tensors(COUNT // 2, COUNT // 2)
    pulled(publisher, publisher.publish(1, source_of(values)))

    def broken() -> torch.Tensor:
        raise RuntimeError("a rank is gone")

    first, second = source_of(changed(values, 0)).tensors
    source = PolicyPartSource([first, replace(second, read=broken)], gather_bytes=1 << 20)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        publisher.publish(2, source)
    assert publisher.held_parts == [], "half of a version lies where version 1 was"
    offer = publisher.publish(3, source_of(changed(values, 0, 1)))
    assert offer.changed_share is None, "there is nothing that a delta could start from"
    assert bytes(publisher.held_parts[-1].memory.view) == bytes_of(source_of(changed(values, 0, 1)))


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_publishing_while_generators_ask_for_sources_never_locks_up(new_publisher, quick_switches):
    publisher = new_publisher(fan_out=1)
    digests = [publisher.publish(1, version_of(1)).trained.digest]
    is_over = threading.Event()

    def ask(number: int) -> None:
        with zmq.Context() as context:
            client = Connection(context, publisher.endpoint, b"", None)
            while not is_over.is_set():
                member = [f"{number}", f"host {number}", "tcp://x", ""]
                for _ in range(20):  # never done: every version is being pulled when the next one comes
                    client.ask("sources", digests[-1], member=member)
                try:
                    client.answer("sources", digests[-1], time.monotonic() + 0.05)
                except Exception:  # the version is gone: there is another
                    continue
            client.close(linger_ms=0)

    def publish() -> None:
        for version in range(2, 600):
            digests.append(publisher.publish(version, version_of(version % 2)).trained.digest)

    asking = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(3)]
    publishing = threading.Thread(target=publish, daemon=True)
    for thread in (*asking, publishing):
        thread.start()
    publishing.join(DEADLINE_S)
    is_over.set()
    assert not publishing.is_alive(), "publisher and server wait for each other"
    for thread in asking:
        thread.join(DEADLINE_S)
