"""Version after version at one receiver: which is later, what comes again, and what comes as a delta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.weights.manifest import WeightsPart
from actors.weights.offer import WeightsOffer
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.pull.receiver import ReceivedWeights, WeightReceiver
from rollout.failures import FailureError
from tests.actors.weights.versions import bytes_of, changed, random_tensors, source_of

pytestmark = pytest.mark.usefixtures("slices")

DEADLINE_S = 30.0
BUCKET_BYTES = 1024
"""256 elements of 4 bytes."""
VALUES = random_tensors(1008, 1552)
"""10,240 bytes: the first tensor has 63 times 64 of them, so there is no gap before the second."""
FROZEN = source_of(random_tensors(700, seed=9), part=WeightsPart.FROZEN, prefix="f")


def in_bucket(*buckets: int) -> list[int]:
    """Positions of elements, one in each of these buckets."""
    return [256 * bucket + 7 for bucket in buckets]


def content_of(received: ReceivedWeights) -> bytes:
    return bytes(received.parts[-1].held.memory.view)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(FailureError) as caught:
        call()
    return caught.value.failure.reason


def taken(receiver: WeightReceiver, offer: WeightsOffer) -> ReceivedWeights:
    """Received and loaded."""
    received = receiver.receive(offer, DEADLINE_S)
    receiver.loaded(received)
    return received


def test_an_older_version_that_comes_late_is_refused_and_nothing_changes(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    old = publisher.publish(1, source_of(VALUES))
    new = publisher.publish(2, source_of(changed(VALUES, 0)))
    received = taken(receiver, new)
    with pytest.raises(FailureError, match="version 1 is older than the received version 2") as caught:
        receiver.receive(old, DEADLINE_S)
    assert caught.value.failure.reason == "weights_superseded"
    again = receiver.receive(new, DEADLINE_S)
    assert again.received_bytes == 0
    assert content_of(again) == content_of(received) == bytes_of(source_of(changed(VALUES, 0)))


def test_a_version_that_failed_doesnt_make_those_before_it_old(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    old = publisher.publish(1, source_of(VALUES))
    other = new_publisher(epoch=publisher.epoch)
    gone = other.publish(2, source_of(VALUES))
    other.publish(3, source_of(VALUES))
    assert refused(lambda: receiver.receive(gone, DEADLINE_S)) == "weights_gone"
    assert content_of(receiver.receive(old, DEADLINE_S)) == bytes_of(source_of(VALUES))


def test_a_later_publisher_counts_whatever_its_version_and_an_earlier_one_no_longer(new_publisher, new_receiver):
    first, second, receiver = new_publisher(epoch=1), new_publisher(epoch=2), new_receiver()
    taken(receiver, first.publish(7, source_of(VALUES)))
    resumed = source_of(changed(VALUES, 1))
    assert content_of(taken(receiver, second.publish(5, resumed))) == bytes_of(resumed)
    assert refused(lambda: receiver.receive(first.publish(8, source_of(VALUES)), DEADLINE_S)) == "weights_superseded"
    assert content_of(taken(receiver, second.publish(6, source_of(VALUES)))) == bytes_of(source_of(VALUES))


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_what_a_later_publisher_has_unchanged_isnt_pulled_again(new_publisher, new_receiver, is_encrypted):
    receiver = new_receiver()
    taken(receiver, new_publisher(is_encrypted=is_encrypted).publish(7, source_of(VALUES), FROZEN))
    later = new_publisher(is_encrypted=is_encrypted).publish(5, source_of(changed(VALUES, *in_bucket(2))), FROZEN)
    received = taken(receiver, later)
    assert received.received_bytes == BUCKET_BYTES
    assert [part.manifest.part for part in received.parts] == [WeightsPart.FROZEN, WeightsPart.TRAINED]
    assert bytes(received.parts[0].held.memory.view) == bytes_of(FROZEN)


def test_frozen_weights_are_pulled_and_loaded_once(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    first = taken(receiver, publisher.publish(1, source_of(VALUES), FROZEN))
    second = taken(receiver, publisher.publish(2, source_of(VALUES), FROZEN))
    assert [[part.manifest.part for part in each.parts] for each in (first, second)] == [
        [WeightsPart.FROZEN, WeightsPart.TRAINED],
        [WeightsPart.TRAINED],
    ]
    assert bytes(first.parts[0].held.memory.view) == bytes_of(FROZEN)
    assert (first.received_bytes, second.received_bytes) == (FROZEN.nbytes + 10_240, 0)


def test_frozen_weights_that_were_received_but_not_loaded_are_loaded_next_time_without_coming_again(
    new_publisher, new_receiver
):
    publisher, receiver = new_publisher(), new_receiver()
    receiver.receive(publisher.publish(1, source_of(VALUES), FROZEN), DEADLINE_S)
    received = receiver.receive(publisher.publish(2, source_of(VALUES), FROZEN), DEADLINE_S)
    assert [part.manifest.part for part in received.parts] == [WeightsPart.FROZEN, WeightsPart.TRAINED]
    assert received.received_bytes == 0


@pytest.mark.parametrize("way", ["anew", "forget_loaded"])
def test_everything_can_be_made_to_come_again(new_publisher, new_receiver, way):
    receiver = new_receiver()
    offer = new_publisher().publish(1, source_of(VALUES), FROZEN)
    taken(receiver, offer)
    if way == "forget_loaded":
        receiver.forget_loaded()
    received = receiver.receive(offer, DEADLINE_S, anew=way == "anew")
    assert [part.manifest.part for part in received.parts] == [WeightsPart.FROZEN, WeightsPart.TRAINED]
    assert received.received_bytes == FROZEN.nbytes + 10_240
    assert content_of(received) == bytes_of(source_of(VALUES))


def test_an_adapter_travels_with_its_attributes_beside_the_frozen_weights(new_publisher, new_receiver):
    adapter = source_of(random_tensors(10), part=WeightsPart.ADAPTER)
    adapter.attributes = '{"r": 8}'
    received = taken(new_receiver(), new_publisher().publish(1, adapter, FROZEN))
    assert [part.manifest.part for part in received.parts] == [WeightsPart.FROZEN, WeightsPart.ADAPTER]
    assert received.parts[1].manifest.attributes == '{"r": 8}'
    assert content_of(received) == bytes_of(adapter)


def test_from_the_version_before_only_what_changed_comes(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    taken(receiver, publisher.publish(1, source_of(VALUES)))
    new = source_of(changed(VALUES, *in_bucket(1, 5, 9)))
    offer = publisher.publish(2, new)
    received = taken(receiver, offer)
    assert content_of(received) == bytes_of(new)
    assert received.route == "delta"
    deltas = publisher.held_parts[-1].deltas
    assert sorted(next(iter(deltas.values()))) == list(range(10))
    assert received.received_bytes == sum(map(len, next(iter(deltas.values())).values())) < 3 * BUCKET_BYTES / 4
    assert offer.changed_share == 3 / 2560


def test_from_an_older_version_whole_buckets_come_where_something_has_changed_since(new_publisher, new_receiver):
    publisher, ahead, behind = new_publisher(), new_receiver("ahead"), new_receiver("behind")
    taken(behind, publisher.publish(1, source_of(VALUES)))
    taken(ahead, publisher.publish(2, source_of(changed(VALUES, *in_bucket(1)))))
    new = source_of(changed(VALUES, *in_bucket(1, 5)))
    offer = publisher.publish(3, new)
    received = taken(behind, offer)
    assert content_of(received) == bytes_of(new)
    # The delta is from version 2. Bucket 1 is another one than in version 1, and so is bucket 5: both come whole.
    assert (received.route, received.received_bytes) == ("network", 2 * BUCKET_BYTES)
    assert content_of(taken(ahead, offer)) == bytes_of(new)


def test_with_another_layout_everything_comes_whole(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    taken(receiver, publisher.publish(1, source_of(VALUES)))
    new = source_of([*VALUES, torch.ones(10)])
    received = taken(receiver, publisher.publish(2, new))
    assert content_of(received) == bytes_of(new)
    assert (received.route, received.received_bytes) == ("network", new.nbytes)


def test_with_the_same_size_and_other_names_only_what_changed_comes(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    taken(receiver, publisher.publish(1, source_of(VALUES)))
    received = taken(receiver, publisher.publish(2, source_of(VALUES, prefix="renamed")))
    assert received.received_bytes == 0
    assert received.parts[0].manifest.tensors[0].name == "renamed0"
    assert content_of(received) == bytes_of(source_of(VALUES))


@pytest.mark.parametrize("damage", [b"no delta at all", b"\x00", "cut", "another"])
def test_a_damaged_delta_is_replaced_by_the_whole_bucket(new_publisher, new_receiver, damage):
    publisher, receiver = new_publisher(), new_receiver()
    taken(receiver, publisher.publish(1, source_of(VALUES)))
    new = source_of(changed(VALUES, *in_bucket(1, 5)))
    offer = publisher.publish(2, new)
    deltas = next(iter(publisher.held_parts[-1].deltas.values()))
    deltas[5] = {"cut": deltas[5][:-1], "another": deltas[1]}.get(damage, damage)
    received = taken(receiver, offer)
    assert content_of(received) == bytes_of(new)
    assert received.received_bytes == len(deltas[1]) + BUCKET_BYTES


def test_changes_are_never_applied_to_what_damaged_ones_have_left_behind(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    taken(receiver, publisher.publish(1, source_of(VALUES)))
    new = source_of(changed(VALUES, *in_bucket(1, 5)))
    offer = publisher.publish(2, new)
    held = publisher.held_parts[-1]
    deltas = next(iter(held.deltas.values()))
    right, deltas[5] = deltas[5], deltas[1]
    held.memory.view[5 * BUCKET_BYTES] ^= 1
    assert refused(lambda: receiver.receive(offer, DEADLINE_S)) == "weights_corrupt"
    deltas[5] = right
    held.memory.view[5 * BUCKET_BYTES] ^= 1
    received = taken(receiver, offer)
    assert content_of(received) == bytes_of(new)
    assert received.received_bytes == BUCKET_BYTES, "whole, and bucket 1 had come the first time"


def test_where_everything_has_changed_the_buckets_themselves_come(new_publisher, new_receiver):
    publisher, receiver = new_publisher(), new_receiver()
    taken(receiver, publisher.publish(1, source_of(VALUES)))
    new = source_of(random_tensors(1008, 1552, seed=5))
    received = taken(receiver, publisher.publish(2, new))
    assert (received.route, received.received_bytes) == ("network", 10_240)
    assert content_of(received) == bytes_of(new)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2559), max_size=4), st.sampled_from(["takes it", "is away"])),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_generator_has_missed_it_gets_exactly_the_current_version(new_publisher, new_receiver, steps):
    publisher: WeightPublisher = new_publisher()
    receivers = [new_receiver("always"), new_receiver("sometimes")]
    values = VALUES
    for version, (places, attendance) in enumerate(steps):
        values = changed(values, *places)
        offer = publisher.publish(version, source_of(values))
        for receiver in receivers if attendance == "takes it" else receivers[:1]:
            received = taken(receiver, offer)
            assert content_of(received) == bytes_of(source_of(values))
            assert received.parts[0].manifest.digest == offer.trained.digest
    publisher.stop()
    for receiver in receivers:
        receiver.close()
        receiver.close()
