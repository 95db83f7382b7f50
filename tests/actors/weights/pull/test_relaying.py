"""Several generators and one publisher: who sends what to whom, and what happens when one of them dies or is slow."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from actors.weights.offer import WeightsOffer
from actors.weights.pull.pull import ReceiverSettings
from actors.weights.pull.receiver import ReceivedWeights, WeightReceiver
from actors.weights.pull.relays import Relay
from tests.actors.weights.peers import Peer, content_digest, served_bytes
from tests.actors.weights.versions import bytes_of, changed, random_tensors, source_of
from tests.links import Link

DEADLINE_S = 60.0
BUCKET_BYTES = 64 << 10
VALUES = random_tensors(262_144)
SOURCE = source_of(VALUES)
"""1 MiB, in 16 buckets."""


def content_of(received: ReceivedWeights) -> bytes:
    return bytes(received.parts[-1].held.memory.view)


class Receiving:
    """A receiver at work in a thread."""

    def __init__(self, receiver: WeightReceiver, offer: WeightsOffer) -> None:
        self._found: list[ReceivedWeights | BaseException] = []
        self._thread = threading.Thread(target=self._receive, args=(receiver, offer), daemon=True)
        self._thread.start()

    def _receive(self, receiver: WeightReceiver, offer: WeightsOffer) -> None:
        try:
            self._found.append(receiver.receive(offer, DEADLINE_S))
        except BaseException as error:
            self._found.append(error)

    @property
    def is_at_it(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> ReceivedWeights:
        self._thread.join(2 * DEADLINE_S)
        (found,) = self._found
        if isinstance(found, BaseException):
            raise found
        return found


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def linked(offer: WeightsOffer, link: Link) -> WeightsOffer:
    return replace(offer, endpoint=f"tcp://{link.address}")


def test_a_generator_serves_onward_what_it_has_and_the_publisher_sends_one_model(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1, is_encrypted=True)
    receivers = [new_receiver(name) for name in "abc"]
    offer = publisher.publish(1, SOURCE)
    found = [receiver.receive(offer, DEADLINE_S) for receiver in receivers]
    assert [content_of(received) for received in found] == [bytes_of(SOURCE)] * 3
    assert [(received.source, received.route) for received in found] == [
        ("", "network"),
        ("a", "network"),
        ("b", "network"),
    ]
    assert publisher.server.egress_bytes == SOURCE.nbytes
    assert [served_bytes(receiver) for receiver in receivers] == [SOURCE.nbytes, SOURCE.nbytes, 0]


@pytest.mark.usefixtures("slices")
def test_all_at_once_form_a_chain_through_which_the_buckets_pass_as_they_come(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1)
    receivers = [new_receiver(name) for name in "abcd"]
    for version in range(1, 6):
        source = source_of(random_tensors(262_144, seed=version))
        offer = publisher.publish(version, source)
        found = [working.result() for working in [Receiving(receiver, offer) for receiver in receivers]]
        assert [content_of(received) for received in found] == [bytes_of(source)] * 4
        assert len({received.source for received in found}) == 4, "each has another source"
    assert publisher.server.egress_bytes == 5 * SOURCE.nbytes


def test_changes_are_passed_on_as_changes(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1)
    receivers = [new_receiver(name) for name in "ab"]
    newer = source_of(changed(VALUES, 5, 100_000))
    for version, source in enumerate((SOURCE, newer)):
        offer = publisher.publish(version, source)
        found = [receiver.receive(offer, DEADLINE_S) for receiver in receivers]
    assert [content_of(received) for received in found] == [bytes_of(newer)] * 2
    assert [(received.source, received.route) for received in found] == [("", "delta"), ("a", "delta")]
    assert found[0].received_bytes == found[1].received_bytes < BUCKET_BYTES / 2


def test_changes_are_kept_no_longer_than_the_version_that_they_lead_to(new_publisher, new_receiver):
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES), new_receiver()
    received = []
    for version in range(3):
        offer = publisher.publish(version, source_of(changed(VALUES, *range(version))))
        received.append(receiver.receive(offer, DEADLINE_S).parts[0].held)
    first, second, third = received
    assert (first.deltas, second.deltas) == ({}, {}), "whoever still holds them"
    assert list(third.deltas) == [second.manifest.digest]


def test_those_that_dont_serve_keep_no_changes_for_others(new_publisher, new_receiver):
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES), new_receiver(serves=False)
    for version, source in enumerate((SOURCE, source_of(changed(VALUES, 5)))):
        received = receiver.receive(publisher.publish(version, source), DEADLINE_S)
    assert received.route == "delta"
    assert received.parts[0].held.deltas == {}


def test_who_pulls_from_a_generator_that_is_killed_goes_on_from_the_publisher_with_what_it_has(
    new_publisher, new_receiver
):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1)
    receiver = new_receiver("child", patience_s=DEADLINE_S)
    offer = publisher.publish(1, SOURCE)
    with (
        Link(offer.endpoint.removeprefix("tcp://"), cut_after_bytes=600_000) as link,
        Peer("relay", maps_memory=False, patience_s=30.0) as relay,
    ):
        relay.begin(linked(offer, link))
        until(lambda: link.is_cut)
        working = Receiving(receiver, offer)
        until(lambda: relay.served_bytes >= 8 * BUCKET_BYTES)  # 600,000 bytes are 9 buckets and a bit
        before = publisher.server.egress_bytes
        relay.kill()
        received = working.result()
    assert content_of(received) == bytes_of(SOURCE)
    assert received.source == ""
    assert received.received_bytes == SOURCE.nbytes, "nothing came twice"
    assert publisher.server.egress_bytes - before <= SOURCE.nbytes - 6 * BUCKET_BYTES  # two may have been on their way


def test_a_generator_that_was_killed_and_started_again_gets_the_version_from_another_one(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1)
    offer = publisher.publish(1, SOURCE)
    with Peer("first", maps_memory=False) as first:
        assert first.received(offer).content == content_digest(bytes_of(SOURCE))
    child = new_receiver("child", patience_s=0.2).receive(offer, DEADLINE_S)
    again = new_receiver("first").receive(offer, DEADLINE_S)
    assert [content_of(received) for received in (child, again)] == [bytes_of(SOURCE)] * 2
    assert (child.source, again.source) == ("", "child")


def test_a_slow_generator_completes_its_version_while_two_more_are_published(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=0)
    slow, fast = new_receiver("slow", patience_s=DEADLINE_S), new_receiver("fast")
    sources = [source_of(changed(VALUES, version)) for version in range(3)]
    offer = publisher.publish(0, sources[0])
    with Link(offer.endpoint.removeprefix("tcp://"), cut_after_bytes=500_000) as link:
        working = Receiving(slow, linked(offer, link))
        until(lambda: link.is_cut)
        for version in (1, 2):
            received = fast.receive(publisher.publish(version, sources[version]), DEADLINE_S)
            fast.loaded(received)
            assert content_of(received) == bytes_of(sources[version])
            assert [held.manifest.version for held in publisher.held_parts] == [0, version]
        link.restore()
        finished = working.result()
    assert content_of(finished) == bytes_of(sources[0])
    assert finished.received_bytes == SOURCE.nbytes


def test_a_slow_relay_holds_up_nobody_once_another_one_has_the_version(new_publisher, new_receiver):
    """It isn't silent, only slow: every bucket arrives in time. The version after that, nobody is sent to it at all."""
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=2)
    slow, fast = new_receiver("slow", patience_s=DEADLINE_S), new_receiver("fast")
    child, served = new_receiver("child", patience_s=1.0), []
    with Link(publisher.endpoint.removeprefix("tcp://"), rate_bytes_per_s=150_000) as link:
        for version in (1, 2):
            source = source_of(random_tensors(262_144, seed=version))
            offer, passed = publisher.publish(version, source), link.passed_bytes["from_endpoint"]
            working = Receiving(slow, linked(offer, link))
            until(lambda before=passed: link.passed_bytes["from_endpoint"] > before + 2 * BUCKET_BYTES)
            assert fast.receive(offer, DEADLINE_S).source == ""
            received = child.receive(offer, DEADLINE_S)
            assert working.is_at_it
            assert received.source == "fast"
            assert content_of(received) == bytes_of(source)
            assert content_of(working.result()) == bytes_of(source)
            served.append(served_bytes(slow))
    assert 0 < served[0] < SOURCE.nbytes
    assert served[1] == served[0]


class BehindLink(WeightReceiver):
    """A generator that others reach through a bad link."""

    link: Link | None = None

    def member(self, offer: WeightsOffer) -> Relay:
        member = super().member(offer)
        self.link = self.link or Link(member.endpoint.removeprefix("tcp://"), cut_after_bytes=500_000)
        return replace(member, endpoint=f"tcp://{self.link.address}")


def test_a_generator_serves_the_version_before_until_who_pulls_it_has_it(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1)
    parent = BehindLink("parent", ReceiverSettings(maps_memory=False))
    child = new_receiver("child", patience_s=DEADLINE_S)
    newer = source_of(changed(VALUES, 0))
    offer = publisher.publish(0, SOURCE)
    parent.receive(offer, DEADLINE_S)
    assert parent.link is not None
    with contextlib.closing(parent), parent.link as link:
        working = Receiving(child, offer)
        until(lambda: link.is_cut)
        assert content_of(parent.receive(publisher.publish(1, newer), DEADLINE_S)) == bytes_of(newer)
        link.restore()
        received = working.result()
    assert content_of(received) == bytes_of(SOURCE)
    assert received.source == "parent"


def test_who_waits_at_a_generator_that_is_cut_off_itself_goes_to_the_publisher(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1)
    parent, child = new_receiver("parent", patience_s=DEADLINE_S), new_receiver("child", patience_s=0.5)
    offer = publisher.publish(1, SOURCE)
    with Link(offer.endpoint.removeprefix("tcp://"), cut_after_bytes=500_000) as link:
        working = Receiving(parent, linked(offer, link))
        until(lambda: link.is_cut)
        received = child.receive(offer, DEADLINE_S)
        link.restore()
        assert content_of(working.result()) == bytes_of(SOURCE)
    assert content_of(received) == bytes_of(SOURCE)
    assert (received.source, received.received_bytes) == ("", SOURCE.nbytes)


def test_a_generator_of_an_earlier_publisher_serves_those_of_a_later_one(new_publisher, new_receiver):
    # A publisher that starts again makes other keys, and its generators are still there.
    receivers = [new_receiver(name) for name in "ab"]
    for epoch in (1, 2):
        publisher = new_publisher(bucket_bytes=BUCKET_BYTES, fan_out=1, is_encrypted=True, epoch=epoch)
        source = source_of(random_tensors(262_144, seed=epoch))
        offer = publisher.publish(1, source)
        found = [receiver.receive(offer, DEADLINE_S) for receiver in receivers]
        assert [content_of(received) for received in found] == [bytes_of(source)] * 2
        assert [received.source for received in found] == ["", "a"]
        publisher.stop()
