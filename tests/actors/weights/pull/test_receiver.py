"""A receiver behind a bad link or a bad publisher: what it notices, what it keeps, and how it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import zmq

from actors.weights.offer import Keys, WeightsOffer
from actors.weights.pull.pull import PLAIN
from actors.weights.pull.receiver import ReceivedWeights, WeightReceiver
from rollout.failures import FailureError, FailureKind
from tests.actors.weights.versions import bytes_of, random_tensors, source_of
from tests.links import Link

DEADLINE_S = 30.0
BUCKET_BYTES = 64 << 10
SOURCE = source_of(random_tensors(3000, 200_000, 1, 59_143))
"""1,048,640 bytes with the gaps: 16 buckets and a little."""
OVERHEAD_BYTES = 32 << 10
"""Of all headers and the manifest."""


@contextmanager
def linked(offer: WeightsOffer, **settings: object) -> Iterator[tuple[WeightsOffer, Link]]:
    """The same offer, with the publisher behind a link."""
    with Link(offer.endpoint.removeprefix("tcp://"), **settings) as link:  # type: ignore[arg-type]
        yield replace(offer, endpoint=f"tcp://{link.address}"), link


def content_of(received: ReceivedWeights) -> bytes:
    return bytes(received.parts[-1].held.memory.view)


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(FailureError) as caught:
        call()
    assert caught.value.failure.kind is FailureKind.INFRASTRUCTURE
    return caught.value.failure.reason


def content_through(receiver: WeightReceiver, offer: WeightsOffer, deadline_s: float = DEADLINE_S) -> bytes:
    return content_of(receiver.receive(offer, deadline_s))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("is_encrypted", [False, True])
def test_what_arrives_is_what_was_published(new_publisher, new_receiver, is_encrypted):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, is_encrypted=is_encrypted)
    received = new_receiver().receive(publisher.publish(1, SOURCE), DEADLINE_S)
    assert content_of(received) == bytes_of(SOURCE)
    assert (received.route, received.source, received.received_bytes) == ("network", "", SOURCE.nbytes)
    assert publisher.server.egress_bytes == SOURCE.nbytes


@pytest.mark.parametrize("folder", [False, True])
def test_the_path_of_a_part_leads_other_processes_to_its_bytes(new_publisher, new_receiver, tmp_path, folder):
    receiver = new_receiver(folder=tmp_path if folder else None)
    received = receiver.receive(new_publisher().publish(1, SOURCE), DEADLINE_S)
    with open(received.parts[0].path, "rb") as file:
        assert file.read(SOURCE.nbytes) == bytes_of(SOURCE)
    assert received.parts[0].held.memory.is_on_disk == folder


@pytest.mark.usefixtures("slices")
def test_a_byte_flipped_on_the_wire_is_caught_and_only_that_bucket_is_asked_for_again(new_publisher, new_receiver):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES)
    with linked(publisher.publish(1, SOURCE), corrupt_after_bytes=400_000) as (offer, link):
        received = new_receiver().receive(offer, DEADLINE_S)
        assert link.flipped_bits == 1
    assert content_of(received) == bytes_of(SOURCE)
    assert SOURCE.nbytes <= received.received_bytes <= SOURCE.nbytes + BUCKET_BYTES
    assert publisher.server.egress_bytes == SOURCE.nbytes + BUCKET_BYTES


@pytest.mark.usefixtures("slices")
def test_a_byte_flipped_in_an_encrypted_stream_ends_the_connection_and_costs_what_was_under_way(
    new_publisher, new_receiver
):
    publisher = new_publisher(bucket_bytes=BUCKET_BYTES, is_encrypted=True)
    with linked(publisher.publish(1, SOURCE), corrupt_after_bytes=400_000) as (offer, link):
        received = new_receiver().receive(offer, DEADLINE_S)
        assert link.flipped_bits == 1
        assert link.passed_bytes["from_endpoint"] <= SOURCE.nbytes + PLAIN.window * BUCKET_BYTES + OVERHEAD_BYTES
    assert content_of(received) == bytes_of(SOURCE)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("flip", range(0, 1000, 40))
def test_a_byte_flipped_anywhere_is_survived(new_publisher, new_receiver, flip):
    # Greetings, the manifest, headers, the first buckets: whatever it hits, the version arrives whole in the end.
    source = source_of(random_tensors(100))
    publisher = new_publisher(bucket_bytes=256)
    with linked(publisher.publish(1, source), corrupt_after_bytes=flip) as (offer, link):
        assert content_through(new_receiver(patience_s=0.1), offer) == bytes_of(source)
        assert link.flipped_bits == (flip < link.passed_bytes["from_endpoint"])


@pytest.mark.usefixtures("slices")
def test_a_bucket_that_is_always_damaged_ends_in_a_failure_and_the_others_are_kept(new_publisher, new_receiver):
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES), new_receiver()
    offer = publisher.publish(1, SOURCE)
    memory = publisher.held_parts[0].memory
    memory.view[5 * BUCKET_BYTES] ^= 1
    assert reason_of(lambda: receiver.receive(offer, DEADLINE_S)) == "weights_corrupt"
    memory.view[5 * BUCKET_BYTES] ^= 1
    sent = publisher.server.egress_bytes
    assert content_through(receiver, offer) == bytes_of(SOURCE)
    # buckets are asked for in order, two at a time: 0 to 4 had arrived, perhaps some after them
    assert publisher.server.egress_bytes - sent <= SOURCE.nbytes - 5 * BUCKET_BYTES


def test_a_manifest_that_isnt_the_one_offered_is_not_believed(new_publisher, new_receiver):
    publisher = new_publisher()
    offer = publisher.publish(1, SOURCE)
    manifest = publisher.held_parts[0].manifest
    vars(manifest)["packed"] = replace(manifest, version=2).packed
    assert reason_of(lambda: new_receiver().receive(offer, DEADLINE_S)) == "weights_corrupt"


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_transfer_that_was_cut_fails_in_time_and_goes_on_with_what_had_arrived(
    new_publisher, new_receiver, is_encrypted
):
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES, is_encrypted=is_encrypted), new_receiver()
    with linked(publisher.publish(1, SOURCE), cut_after_bytes=600_000) as (offer, link):
        assert reason_of(lambda: receiver.receive(offer, 2.0)) == "weights_timeout"
        assert link.passed_bytes["from_endpoint"] == 600_000
        link.restore()
        received = receiver.receive(offer, DEADLINE_S)
        total = link.passed_bytes["from_endpoint"]
    assert content_of(received) == bytes_of(SOURCE)
    assert received.received_bytes <= SOURCE.nbytes - 600_000 + PLAIN.window * BUCKET_BYTES
    # A window of buckets was under way, and what was asked for in vain over a new connection came when the link did.
    assert total <= SOURCE.nbytes + 2 * PLAIN.window * BUCKET_BYTES + OVERHEAD_BYTES


@pytest.mark.usefixtures("slices")
def test_a_bucket_that_was_half_written_over_when_the_link_was_cut_is_not_taken_for_what_it_was(
    new_publisher, new_receiver
):
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES), new_receiver()
    receiver.receive(publisher.publish(1, SOURCE), DEADLINE_S)
    other = source_of(random_tensors(3000, 200_000, 1, 59_143, seed=1))
    # 300,000 bytes end within the fifth bucket, from 262,144 to 327,680.
    with linked(publisher.publish(2, other), cut_after_bytes=300_000) as (offer, _):
        assert reason_of(lambda: receiver.receive(offer, 2.0)) == "weights_timeout"
    assert content_through(receiver, publisher.publish(3, SOURCE)) == bytes_of(SOURCE)


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_call_that_nobody_waits_for_any_more_ends_and_what_had_arrived_is_kept(
    new_publisher, new_receiver, is_silent
):
    """By itself it would have an hour's time, from a silent publisher or from a slow one."""
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES), new_receiver(patience_s=0.5)
    settings = {"cut_after_bytes": 300_000} if is_silent else {"rate_bytes_per_s": 2 * BUCKET_BYTES}
    with linked(publisher.publish(1, SOURCE), **settings) as (offer, link):
        reasons: list[str] = []
        working = threading.Thread(target=lambda: reasons.append(reason_of(lambda: receiver.receive(offer, 3600.0))))
        working.start()
        while link.passed_bytes["from_endpoint"] < 200_000:
            time.sleep(0.01)
        receiver.interrupt()
        working.join(DEADLINE_S)
        assert reasons == ["weights_timeout"]
        link.restore()
        link.rate_bytes_per_s = None
        received = receiver.receive(offer, DEADLINE_S)
    assert content_of(received) == bytes_of(SOURCE)
    assert received.received_bytes < SOURCE.nbytes


@pytest.mark.parametrize("closes", [False, True])
def test_a_link_that_comes_back_within_the_deadline_is_not_even_noticed(new_publisher, new_receiver, closes):
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES), new_receiver(patience_s=0.3)
    with linked(publisher.publish(1, SOURCE), cut_after_bytes=300_000, cut_closes=closes) as (offer, link):

        def restore() -> None:
            while not link.is_cut:
                time.sleep(0.01)
            time.sleep(0.5)
            link.restore()

        threading.Thread(target=restore, daemon=True).start()
        received = receiver.receive(offer, DEADLINE_S)
        assert link.connections >= 2
    assert content_of(received) == bytes_of(SOURCE)
    assert received.received_bytes == SOURCE.nbytes


def test_a_slow_link_is_given_more_time_each_time(new_publisher, new_receiver):
    # A bucket takes half a second, and patience is a tenth of one: 0.1 + 0.2 + 0.4 s pass in vain, 0.8 s don't.
    source = source_of(random_tensors(10_000))
    publisher, receiver = new_publisher(bucket_bytes=BUCKET_BYTES // 4), new_receiver(patience_s=0.1)
    with linked(publisher.publish(1, source), rate_bytes_per_s=BUCKET_BYTES // 2) as (offer, _):
        assert content_through(receiver, offer) == bytes_of(source)


@pytest.mark.parametrize("maps_memory", [False, True])
def test_a_silent_publisher_ends_in_a_failure_that_says_how_long_it_was_waited_for(
    new_publisher, new_receiver, maps_memory
):
    receiver = new_receiver(patience_s=0.2, maps_memory=maps_memory)
    with linked(new_publisher().publish(1, SOURCE)) as (offer, link):
        link.cut()
        with pytest.raises(
            FailureError, match=r"policy version 1 from tcp://.*the publisher did not deliver it within 1 s"
        ):
            receiver.receive(offer, 1.0)


def test_a_publisher_that_has_ended_ends_in_a_failure(new_publisher, new_receiver):
    publisher = new_publisher()
    offer = publisher.publish(1, SOURCE)
    publisher.stop()
    assert reason_of(lambda: new_receiver(patience_s=0.2).receive(offer, 1.0)) == "weights_timeout"


def test_a_version_that_is_no_longer_served_is_gone_at_once(new_publisher, new_receiver):
    publisher = new_publisher()
    offers = [publisher.publish(version, SOURCE) for version in (1, 2)]
    receiver = new_receiver()
    assert reason_of(lambda: receiver.receive(offers[0], DEADLINE_S)) == "weights_gone"
    assert content_through(receiver, offers[1]) == bytes_of(SOURCE)


def test_another_runs_keys_are_refused_at_once_and_the_right_ones_work_afterwards(new_publisher, new_receiver):
    receiver = new_receiver()
    offer = new_publisher(is_encrypted=True).publish(1, SOURCE)
    wrong = replace(offer, keys=Keys(*zmq.curve_keypair()))
    assert reason_of(lambda: receiver.receive(wrong, DEADLINE_S)) == "weights_refused"
    assert content_through(receiver, offer) == bytes_of(SOURCE)


def test_a_publisher_with_another_key_is_not_believed(new_publisher, new_receiver):
    offer = new_publisher(is_encrypted=True).publish(1, SOURCE)
    wrong = replace(offer, server_key=zmq.curve_keypair()[0])
    assert reason_of(lambda: new_receiver().receive(wrong, 1.0)) in ("weights_timeout", "weights_refused")


def test_without_room_the_failure_names_what_was_tried(new_publisher, new_receiver, monkeypatch, tmp_path):
    offer = new_publisher().publish(1, SOURCE)
    monkeypatch.setattr("actors.weights.pull.memory.RESERVE_BYTES", 1 << 60)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(
        FailureError, match=r"no room for 1,048,\d+ bytes of weights. Tried memory: .*; .*nowhere"
    ) as caught:
        new_receiver().receive(offer, DEADLINE_S)
    assert caught.value.failure.reason == "weights_no_room"
