"""Publisher, relay and receiver killed at every phase of a delivery, as real processes: everybody ends on the current
version, whole, and nobody ever had anything else than one version that was published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.weights.offer import WeightsOffer
from tests.actors.weights.sync_parties import Call, Party, Template, left_behind, template, truth

GIVES_UP_S = 1.5
"""Deadline of whoever receives from a publisher that is about to die."""
MEMORIES = 3
"""Of a process: the frozen weights, the current version, and the one before where somebody still reads it."""
FULL_BYTES = 904_032
"""Of what is trained."""

PULLING = ("manifest_asked", "manifest_there", "source_told", "first_bucket", "middle_bucket", "last_bucket", "checked")
MAPPING = ("manifest_asked", "manifest_there", "memory_asked", "address_told", "mapped", "half_checked", "checked")
MAPPING_A_NEIGHBOURS = (*MAPPING[:2], "source_told", *MAPPING[2:])
LOADING = ("received", "half_loaded", "loaded")


@dataclass(frozen=True)
class Layout:
    """How two receivers get a version.

    Attributes:
        name: for the test's name.
        publisher, receiver: settings.
    """

    name: str
    publisher: dict[str, Any]
    receiver: dict[str, Any]


NETWORK = Layout("network", {"fan_out": 1}, {"maps_memory": False})
"""Publisher, first, second: a chain over TCP."""
MEMORY = Layout("memory", {}, {})
"""Both map the publisher's memory."""
NEIGHBOURS = Layout("neighbours", {"is_elsewhere": True}, {})
"""First pulls over TCP, second maps its memory."""


@dataclass
class Scene:
    """A publisher and the receivers "first" and "second"; every result is held against what was published."""

    template: Template
    layout: Layout
    receivers: dict[str, Party] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.publisher = self.new_publisher()
        for name in ("first", "second"):
            self.new_receiver(name)

    def new_publisher(self) -> Party:
        """Takes the place of the one before."""
        self.publisher = self.template.publisher(**self.layout.publisher)
        return self.publisher

    def new_receiver(self, name: str) -> Party:
        """Takes the place of the one before."""
        self.receivers[name] = self.template.receiver(name, **self.layout.receiver)
        return self.receivers[name]

    def deliver(self, version: int) -> WeightsOffer:
        """Publish a version, and bring it to every receiver."""
        offer = self.publisher.publish(version)
        calls = []
        for receiver in self.receivers.values():  # in this order they find their places
            calls.append(receiver.receive(offer))
            calls[-1].passed("manifest_there")
        for call in calls:
            assert checked(call.result(), version)
        return offer

    def end(self, version: int) -> None:
        """All that live are on this version, hold little more than that, and nothing is left of the dead."""
        assert [party.ask("state").result() for party in self.receivers.values()] == [truth(version)] * 2
        held = {party.name: party.memories() for party in (self.publisher, *self.receivers.values())}
        assert all(len(memories) <= MEMORIES for memories in held.values()), held
        if self.layout is MEMORY:
            assert held["first"] | held["second"] <= held["publisher"], held
        assert left_behind() == []


def checked(result: dict[str, Any], version: int) -> dict[str, Any]:
    """A result, if it is this version and nothing else."""
    assert (result["version"], result["state"]) == (version, truth(version))
    return result


@pytest.fixture(scope="module")
def parties() -> Iterator[Template]:
    with template() as made:
        yield made


@pytest.fixture(autouse=True)
def _end(parties: Template) -> Iterator[None]:
    yield
    parties.end_parties()


def cases(layout: Layout, victim: str, *phases: str) -> list[Any]:
    """A case for each phase."""
    return [pytest.param(layout, victim, phase, id=f"{layout.name}-{victim}-{phase}") for phase in phases]


@pytest.mark.parametrize(
    ("layout", "victim", "phase"),
    [
        *cases(NETWORK, "first", *PULLING, *LOADING, "serving_first", "serving_middle"),
        *cases(NETWORK, "second", *PULLING, *LOADING),
        *cases(MEMORY, "first", *MAPPING, *LOADING),
        *cases(NEIGHBOURS, "first", *PULLING, *LOADING, "serving_memory"),
        *cases(NEIGHBOURS, "second", *MAPPING_A_NEIGHBOURS, *LOADING),
    ],
)
def test_a_relay_or_receiver_killed_at_any_phase_holds_nobody_up_and_catches_up_when_it_is_back(
    parties: Template, layout: Layout, victim: str, phase: str
):
    scene = Scene(parties, layout)
    scene.deliver(1)
    offer = scene.publisher.publish(2)
    first, second, killed = scene.receivers["first"], scene.receivers["second"], scene.receivers[victim]
    killed.stop_at(phase)
    calls = {"first": first.receive(offer)}
    if killed is second or phase.startswith("serving"):
        calls["first"].passed("manifest_there" if layout is MEMORY else "source_told")
    else:
        first.until_stopped(phase)
    calls["second"] = second.receive(offer)
    if killed is first and layout is not MEMORY:
        source = calls["second"].passed("source_told")["source"]
        assert source == ("" if phase in ("manifest_asked", "manifest_there") else "first")
    killed.until_stopped(phase)
    killed.kill()

    del calls[victim]
    calls[victim] = scene.new_receiver(victim).receive(offer)
    for call in calls.values():
        checked(call.result(), 2)
    scene.deliver(3)
    scene.end(3)


@pytest.mark.parametrize("layout", [NETWORK, MEMORY, NEIGHBOURS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("phase", ["gathering", "published"])
def test_a_publisher_killed_before_anybody_has_heard_of_its_version_leaves_the_old_one_and_the_next_goes_on(
    parties: Template, layout: Layout, phase: str
):
    scene = Scene(parties, layout)
    scene.deliver(1)
    scene.publisher.stop_at(phase)
    scene.publisher.ask("publish", version=2)
    scene.publisher.until_stopped(phase)
    scene.publisher.kill()
    for receiver in scene.receivers.values():
        assert receiver.ask("state").result() == truth(1)
    scene.new_publisher()
    scene.deliver(2)
    scene.deliver(3)
    scene.end(3)


@pytest.mark.parametrize(
    ("layout", "phase"),
    [
        (NETWORK, "serving_manifest"),
        (NETWORK, "serving_source"),
        (NETWORK, "serving_first"),
        (NETWORK, "serving_middle"),
        (MEMORY, "serving_manifest"),
        (MEMORY, "serving_memory"),
        (NEIGHBOURS, "serving_manifest"),
        (NEIGHBOURS, "serving_middle"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_publisher_killed_while_it_serves_leaves_all_on_whole_versions_and_the_next_one_goes_on_where_it_stopped(
    parties: Template, layout: Layout, phase: str
):
    scene = Scene(parties, layout)
    scene.deliver(1)
    scene.publisher.stop_at(phase)
    offer = scene.publisher.publish(2)
    first, second = scene.receivers.values()
    calls = [first.receive(offer, GIVES_UP_S)]
    scene.publisher.until_stopped(phase)
    calls.append(second.receive(offer, GIVES_UP_S))
    scene.publisher.kill()
    for call, receiver in zip(calls, scene.receivers.values(), strict=True):
        assert call.outcome() == "weights_timeout"
        assert receiver.ask("state").result() == truth(1)

    scene.new_publisher()
    offer = scene.publisher.publish(2)
    results = [checked(receiver.receive(offer).result(), 2) for receiver in scene.receivers.values()]
    if phase == "serving_middle":
        assert results[0]["received_bytes"] < 0.8 * FULL_BYTES, "what had arrived needn't come again"
    scene.deliver(3)
    scene.end(3)


@pytest.mark.parametrize("phase", ["mapped", "half_checked", "checked", "received", "half_loaded"])
def test_who_has_mapped_a_version_loads_all_of_it_though_its_publisher_is_killed(parties: Template, phase: str):
    scene = Scene(parties, MEMORY)
    scene.deliver(1)
    offer = scene.publisher.publish(2)
    calls = [stopped(receiver, phase, offer) for receiver in scene.receivers.values()]
    scene.publisher.kill()
    for call in calls:
        call.party.go()
    # who has the memory mapped tells the publisher so and doesn't wait for an answer
    for call in calls:
        checked(call.result(), 2)
    scene.new_publisher()
    scene.deliver(2)
    scene.deliver(3)
    scene.end(3)


@pytest.mark.parametrize("phase", ["mapped", "half_checked", "checked", "received", "half_loaded"])
def test_who_has_mapped_a_neighbours_version_loads_all_of_it_though_the_neighbour_is_killed(
    parties: Template, phase: str
):
    scene = Scene(parties, NEIGHBOURS)
    scene.deliver(1)
    offer = scene.publisher.publish(2)
    checked(scene.receivers["first"].receive(offer).result(), 2)
    call = stopped(scene.receivers["second"], phase, offer)
    scene.receivers["first"].kill()
    call.party.go()
    assert checked(call.result(), 2)["route"] == "memory"
    scene.new_receiver("first")
    scene.deliver(3)
    scene.end(3)


@pytest.mark.parametrize("layout", [MEMORY, NEIGHBOURS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("phase", ["mapped", "half_checked", "received", "half_loaded"])
def test_who_is_slow_with_a_mapped_version_has_that_version_though_two_later_ones_are_out(
    parties: Template, layout: Layout, phase: str
):
    scene = Scene(parties, layout)
    scene.deliver(1)
    offer = scene.publisher.publish(2)
    first, second = scene.receivers.values()
    checked(first.receive(offer).result(), 2)
    slow = stopped(second, phase, offer)
    for version in (3, 4):
        offer = scene.publisher.publish(version)
        checked(first.receive(offer).result(), version)
    second.go()
    checked(slow.result(), 2)
    checked(second.receive(offer).result(), 4)
    scene.deliver(5)
    scene.end(5)


def stopped(receiver: Party, phase: str, offer: WeightsOffer) -> Call:
    """It receives, and has stopped at a phase."""
    receiver.stop_at(phase)
    call = receiver.receive(offer)
    receiver.until_stopped(phase)
    return call
