"""Damage, strangers, other publishers and a lack of memory, with real processes: refused or cured, and never loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import zmq

from actors.weights.offer import Keys, WeightsOffer
from tests.actors.weights.sync_parties import Call, Party, Template, TransportError, left_behind, template, truth, until
from tests.links import Link

FULL_BYTES = 904_032
"""Of what is trained."""
NETWORK: dict[str, Any] = {"maps_memory": False}


@pytest.fixture(scope="module")
def forks() -> Iterator[Template]:
    with template() as made:
        yield made


@pytest.fixture
def parties(forks: Template) -> Iterator[Template]:
    yield forks
    forks.end_parties()
    assert left_behind() == []


def through(link: Link, offer: WeightsOffer) -> WeightsOffer:
    """The same offer, by way of a link."""
    return replace(offer, endpoint=f"tcp://{link.address}")


def linked(offer: WeightsOffer) -> Link:
    """A link to who offers it."""
    return Link(offer.endpoint.removeprefix("tcp://"))


def checked(call: Call, version: int, seed: int = 0, scale: int = 1) -> dict[str, Any]:
    """The result, if it is this version and nothing else."""
    result = call.result()
    assert isinstance(result, dict)
    assert (result["version"], result["state"]) == (version, truth(version, seed, scale))
    return result


def reason_of(call: Call) -> str:
    """Why it failed."""
    with pytest.raises(TransportError) as caught:
        call.result()
    return caught.value.reason


@pytest.mark.parametrize("is_encrypted", [True, False], ids=["curve", "plain"])
@pytest.mark.parametrize("after_bytes", [20, 100, 250, 700, 3_000, 100_000, 450_000, 800_000])
def test_a_byte_flipped_on_the_way_is_caught_and_what_it_was_in_is_sent_again(
    parties: Template, is_encrypted: bool, after_bytes: int
):
    publisher = parties.publisher(is_encrypted=is_encrypted)
    receiver = parties.receiver("receiver", **NETWORK)
    offer = publisher.publish(1)
    with linked(offer) as link:
        link.corrupt_after_bytes = after_bytes
        checked(receiver.receive(through(link, offer)), 1)
        assert link.flipped_bits == 1


@pytest.mark.parametrize("after_bytes", [20, 100, 300, 900])
def test_a_byte_flipped_in_what_a_receiver_asks_is_caught_too(parties: Template, after_bytes: int):
    publisher, receiver = parties.publisher(), parties.receiver("receiver", **NETWORK)
    offer = publisher.publish(1)
    with linked(offer) as link:
        link.watched, link.corrupt_after_bytes = "to_endpoint", after_bytes
        checked(receiver.receive(through(link, offer)), 1)
        assert link.flipped_bits == 1


def test_a_byte_flipped_in_a_delta_is_caught_and_does_no_harm_to_what_it_is_applied_to(parties: Template):
    publisher, receiver = parties.publisher(is_encrypted=False), parties.receiver("receiver", **NETWORK)
    first = publisher.publish(1)
    with linked(first) as link:
        checked(receiver.receive(through(link, first)), 1)
        offer = through(link, publisher.publish(2))
        receiver.stop_at("first_bucket")
        call = receiver.receive(offer)
        receiver.until_stopped("first_bucket")
        link.corrupt_after_bytes = link.passed_bytes["from_endpoint"] + 200
        receiver.go()
        assert checked(call, 2)["received_bytes"] < FULL_BYTES
        assert link.flipped_bits == 1


def test_a_relay_whose_memory_is_damaged_is_left_for_the_publisher(parties: Template):
    publisher = parties.publisher(fan_out=1)
    relay, leaf = (parties.receiver(name, **NETWORK) for name in ("relay", "leaf"))
    offer = publisher.publish(1)
    checked(relay.receive(offer), 1)
    relay.ask("damage").result()
    result = checked(leaf.receive(offer), 1)
    assert [event["source"] for event in leaf.events if "source" in event][-2:] == ["relay", ""]
    assert result["source"] == ""
    assert any("arrived damaged" in line for line in leaf.logs)


def test_a_neighbour_whose_memory_is_damaged_is_not_believed(parties: Template):
    publisher = parties.publisher(is_elsewhere=True, fan_out=1)
    leader, neighbour = (parties.receiver(name) for name in ("leader", "neighbour"))
    offer = publisher.publish(1)
    checked(leader.receive(offer), 1)
    leader.ask("damage").result()
    assert checked(neighbour.receive(offer), 1)["route"] == "network"
    assert any("does not hold version 1" in line for line in neighbour.logs)


def test_a_client_with_another_key_is_refused_logged_once_and_disturbs_nobody(parties: Template):
    publisher = parties.publisher()
    member, stranger = (parties.receiver(name, **NETWORK) for name in ("member", "stranger"))
    offer = publisher.publish(1)
    foreign = replace(offer, keys=Keys(*zmq.curve_keypair()))
    for _ in range(3):
        assert reason_of(stranger.receive(foreign)) == "weights_refused"
    checked(member.receive(offer), 1)
    assert len([line for line in publisher.logs if "another key" in line]) == 1
    checked(stranger.receive(offer), 1)


def test_a_publisher_with_another_key_gives_nothing_that_is_taken(parties: Template):
    publisher, receiver = parties.publisher(), parties.receiver("receiver", **NETWORK)
    offer = publisher.publish(1)
    foreign = replace(offer, server_key=zmq.curve_keypair()[0])
    assert reason_of(receiver.receive(foreign, 1.0)) in ("weights_timeout", "weights_refused")
    checked(receiver.receive(offer), 1)


@pytest.mark.parametrize("settings", [NETWORK, {}], ids=["network", "memory"])
def test_of_two_publishers_the_later_ones_versions_count(parties: Template, settings: dict[str, Any]):
    old, new = parties.publisher(fan_out=1), parties.publisher(fan_out=1)
    receivers = [parties.receiver(name, **settings) for name in ("first", "second")]
    for version in (1, 2):
        offer = old.publish(version)
        for receiver in receivers:
            checked(receiver.receive(offer), version)
    late = old.publish(3)
    offer = new.publish(2, seed=5)  # a run that went on from a checkpoint: other weights by the same number
    checked(receivers[0].receive(offer), 2, seed=5)
    checked(receivers[1].receive(late), 3)  # hears of the new one later
    assert reason_of(receivers[0].receive(late)) == "weights_superseded"
    checked(receivers[1].receive(offer), 2, seed=5)
    for receiver in receivers:
        assert reason_of(receiver.receive(old.publish(4))) == "weights_superseded"
        assert receiver.ask("state").result() == truth(2, 5)
    offer = new.publish(3, seed=5)
    for receiver in receivers:
        checked(receiver.receive(offer), 3, seed=5)


@pytest.mark.parametrize("settings", [NETWORK, {}], ids=["network", "memory"])
def test_an_old_version_that_arrives_late_changes_nothing(parties: Template, settings: dict[str, Any]):
    publisher, receiver = parties.publisher(), parties.receiver("receiver", **settings)
    late = publisher.publish(1)
    checked(receiver.receive(publisher.publish(2)), 2)
    assert reason_of(receiver.receive(late)) == "weights_superseded"
    assert receiver.ask("state").result() == truth(2)


@pytest.mark.parametrize("phase", ["manifest_asked", "manifest_there", "source_told", "first_bucket", "middle_bucket"])
def test_a_version_overtaken_while_it_was_received_comes_whole_or_not_at_all(parties: Template, phase: str):
    publisher = parties.publisher()
    slow, quick = (parties.receiver(name, **NETWORK) for name in ("slow", "quick"))
    for receiver in (slow, quick):
        checked(receiver.receive(publisher.publish(1)), 1)
    slow.stop_at(phase)
    overtaken = slow.receive(publisher.publish(2))
    slow.until_stopped(phase)
    for version in (3, 4):
        offer = publisher.publish(version)
        checked(quick.receive(offer), version)
    current = slow.receive(offer)  # it waits for the one before
    slow.go()
    assert overtaken.outcome() == "weights_gone" or checked(overtaken, 2)
    checked(current, 4)


def test_a_receiver_without_room_keeps_its_version_and_catches_up_once_there_is_some(parties: Template):
    small, large = parties.publisher(), parties.publisher(scale=200)
    receiver = parties.receiver("receiver", **NETWORK)
    checked(receiver.receive(small.publish(1)), 1)
    receiver.ask("limit", spare_bytes=100 << 20).result()
    offer = large.publish(2)
    assert offer.nbytes > 150 << 20
    assert reason_of(receiver.receive(offer)) == "weights_no_room"
    assert receiver.ask("state").result() == truth(1)
    receiver.ask("limit", spare_bytes=None).result()
    checked(receiver.receive(offer), 2, scale=200)


def test_where_memory_is_short_a_version_goes_to_disk_and_neighbours_map_it_there(parties: Template):
    publisher = parties.publisher(is_elsewhere=True)
    leader, neighbour = (parties.receiver(name) for name in ("leader", "neighbour"))
    leader.ask("pretend", available_bytes=1000).result()
    offer = publisher.publish(1)
    assert checked(leader.receive(offer), 1)["on_disk"]
    assert checked(neighbour.receive(offer), 1)["route"] == "memory"
    assert any("weights are put in" in line for line in leader.logs)
    checked(leader.receive(publisher.publish(2)), 2)


def test_who_gave_up_a_relay_that_only_hung_takes_it_again_for_the_next_version(parties: Template):
    publisher = parties.publisher(fan_out=1)
    relay, leaf = (parties.receiver(name, **NETWORK) for name in ("relay", "leaf"))
    relay.stop_at("middle_bucket")
    offer = publisher.publish(1)
    hanging = relay.receive(offer)
    relay.until_stopped("middle_bucket")
    assert checked(leaf.receive(offer), 1)["source"] == ""
    relay.go()
    checked(hanging, 1)
    offer = publisher.publish(2)
    checked(relay.receive(offer), 2)
    assert checked(leaf.receive(offer), 2)["source"] == "relay"


def test_what_is_loaded_twice_is_pulled_once_and_anew_again_as_a_whole(parties: Template):
    publisher, receiver = parties.publisher(), parties.receiver("receiver", **NETWORK)
    offer = publisher.publish(1)
    assert checked(receiver.receive(offer), 1)["received_bytes"] > FULL_BYTES
    assert checked(receiver.receive(offer), 1)["received_bytes"] == 0
    assert checked(receiver.receive(offer, anew=True), 1)["received_bytes"] > FULL_BYTES


def test_a_killed_process_gives_its_memory_back_though_others_had_mapped_it(parties: Template):
    publisher = parties.publisher()
    receivers: list[Party] = [parties.receiver(name) for name in ("first", "second")]
    for version in (1, 2):
        offer = publisher.publish(version)
        for receiver in receivers:
            checked(receiver.receive(offer), version)
    before = publisher.memories()
    publisher.kill()
    assert receivers[0].memories() | receivers[1].memories() <= before
    successor = parties.publisher()
    offer = successor.publish(2)
    for receiver in receivers:
        checked(receiver.receive(offer), 2)
    until(lambda: not before & (receivers[0].memories() | receivers[1].memories()), "end of the old memory")


def test_two_processes_by_one_name_both_get_every_version(parties: Template):
    """One was cut off and replaced, and then came back."""
    publisher = parties.publisher(fan_out=1)
    receivers = [parties.receiver(name, **NETWORK) for name in ("relay", "relay", "leaf", "leaf")]
    for version in (1, 2, 3):
        offer = publisher.publish(version)
        for call in [receiver.receive(offer) for receiver in receivers]:
            checked(call, version)
