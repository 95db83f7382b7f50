"""Weights over real hosts (namespaces with addresses, memory and processes of their own): who pulls from whom, what cut
and slow links do, and how generators that start late, restart or come back from a partition catch up. CURVE is on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from actors.weights.offer import WeightsOffer
from tests.actors.weights.sync_parties import Call, Party, Template, TransportError, left_behind, template, truth
from tests.hosts import Host, can_make_hosts, hosts
from tests.links import Link

REASON = can_make_hosts()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SCALE = 8
TRAINED_BYTES, FROZEN_BYTES = 7_232_000, 192_000
GENERATORS = ("a", "b", "c", "d", "e")
GIVES_UP_S = 1.0
"""Deadline of who receives behind a link that stays cut."""
STEADY_S = 10.0
"""Patience of those whose sources are alive, however busy the machine is."""


@dataclass
class Cluster:
    """A trainer's host and generators' hosts, with a template of parties in each."""

    trainer: Template
    generators: dict[str, Template]
    receivers: dict[str, Party] = field(default_factory=dict)

    def start(self, *names: str, **publisher: Any) -> None:
        """A publisher, and two receivers on each of these hosts."""
        assert self.trainer.host is not None
        self.publisher = self.trainer.publisher(host=self.trainer.host.address, scale=SCALE, **publisher)
        for name in names:
            self.start_receivers(name)

    def start_receivers(self, name: str, patience_s: float = STEADY_S) -> None:
        """The two of a host, "a0" and "a1"; they take the place of those before."""
        for number in (0, 1):
            self.start_receiver(f"{name}{number}", patience_s)

    def start_receiver(self, name: str, patience_s: float = STEADY_S, **settings: Any) -> Party:
        """One process on the host of its name."""
        own = self.generators[name[0]]
        assert own.host is not None
        self.receivers[name] = own.receiver(name, listen=own.host.address, patience_s=patience_s, **settings)
        return self.receivers[name]

    def host(self, name: str) -> Host:
        """A generators' host."""
        host = self.generators[name].host
        assert host is not None
        return host

    def deliver(self, offer: WeightsOffer, *names: str) -> dict[str, dict[str, Any]]:
        """Bring a version to receivers, to all by default, side by side; all of them have it afterwards."""
        calls = {name: self.receivers[name].receive(offer) for name in names or self.receivers}
        return {name: checked(call, offer.version) for name, call in calls.items()}

    def end(self) -> None:
        """End all parties; the hosts stay, with their links as new."""
        self.receivers.clear()
        for each in (self.trainer, *self.generators.values()):
            assert each.host is not None
            each.host.restore()
            each.end_parties()
        assert left_behind() == []


def checked(call: Call, version: int) -> dict[str, Any]:
    """The result, if it is this version and nothing else."""
    result = call.result()
    assert isinstance(result, dict)
    assert (result["version"], result["state"]) == (version, truth(version, 0, SCALE))
    return result


def reason_of(call: Call) -> str:
    """Why it failed."""
    with pytest.raises(TransportError) as caught:
        call.result()
    return caught.value.reason


@pytest.fixture(scope="module")
def network() -> Iterator[Cluster]:
    with ExitStack() as stack:
        trainer, *others = stack.enter_context(hosts("trainer", *GENERATORS))
        templates = [stack.enter_context(template(host)) for host in (trainer, *others)]
        yield Cluster(templates[0], dict(zip(GENERATORS, templates[1:], strict=True)))


@pytest.fixture
def cluster(network: Cluster) -> Iterator[Cluster]:
    yield network
    network.end()


def test_each_host_pulls_once_its_neighbours_map_that_and_the_publisher_sends_no_more_than_two_models(cluster: Cluster):
    cluster.start(*GENERATORS, fan_out=2)
    cluster.deliver(cluster.publisher.publish(1))
    sent = cluster.publisher.ask("egress").result()
    assert sent <= 2 * (TRAINED_BYTES + FROZEN_BYTES)
    for version in (2, 3):
        results = cluster.deliver(cluster.publisher.publish(version))
        for name in GENERATORS:
            both = [results[f"{name}{number}"] for number in (0, 1)]
            (leader,) = (result for result in both if result["received_bytes"])
            (neighbour,) = (result for result in both if not result["received_bytes"])
            assert leader["route"] in ("network", "delta")
            assert neighbour["route"] == "memory"
            assert neighbour["source"][0] == name
        children = Counter(result["source"] for result in results.values() if result["received_bytes"])
        assert sum(children.values()) == len(GENERATORS)
        assert max(children.values()) <= 2
        egress = cluster.publisher.ask("egress").result()
        assert 0 < egress - sent <= 2 * TRAINED_BYTES
        sent = egress


def test_only_what_changed_travels_to_those_who_have_the_version_before(cluster: Cluster):
    cluster.start("a", "b", fan_out=1)
    first = cluster.deliver(cluster.publisher.publish(1))
    second = cluster.deliver(cluster.publisher.publish(2))
    for results, least, most in ((first, 1.0, 1.1), (second, 0.4, 0.7)):  # half of the tensors changed as a whole
        received = sum(result["received_bytes"] for result in results.values())
        assert 2 * least * TRAINED_BYTES <= received <= 2 * most * TRAINED_BYTES


def test_a_link_cut_in_the_middle_and_restored_delays_the_same_call_and_nothing_comes_twice(cluster: Cluster):
    cluster.start()
    receiver = cluster.start_receiver("a0", patience_s=0.5)
    receiver.stop_at("middle_bucket")
    call = receiver.receive(cluster.publisher.publish(1))
    receiver.until_stopped("middle_bucket")
    cluster.host("a").cut()
    receiver.go()
    time.sleep(1.5)  # it notices, asks again, and nobody hears it
    cluster.host("a").restore()
    assert checked(call, 1)["received_bytes"] <= TRAINED_BYTES + 2 * FROZEN_BYTES


def test_a_link_that_stays_cut_ends_the_call_in_time_and_the_next_one_goes_on_with_what_had_arrived(cluster: Cluster):
    cluster.start()
    receiver = cluster.start_receiver("a0", patience_s=0.5)
    checked(receiver.receive(cluster.publisher.publish(1)), 1)
    offer = cluster.publisher.publish(2)
    receiver.stop_at("middle_bucket")
    call = receiver.receive(offer, GIVES_UP_S)
    receiver.until_stopped("middle_bucket")
    cluster.host("a").cut()
    receiver.go()
    assert reason_of(call) == "weights_timeout"
    assert receiver.ask("state").result() == truth(1, 0, SCALE)
    cluster.host("a").restore()
    assert checked(receiver.receive(offer), 2)["received_bytes"] < 0.6 * TRAINED_BYTES


@pytest.mark.parametrize("phase", ["manifest_asked", "source_told", "first_bucket", "last_bucket"])
def test_a_relay_cut_off_at_any_phase_holds_up_no_other_host_and_comes_back(cluster: Cluster, phase: str):
    cluster.start(fan_out=1)
    for name in ("a0", "b0", "b1"):
        cluster.start_receiver(name, patience_s=0.5)
    offer = cluster.publisher.publish(1)
    relay = cluster.receivers["a0"]
    relay.stop_at(phase)
    call = relay.receive(offer)
    relay.until_stopped(phase)
    cluster.host("a").cut()
    relay.go()
    cluster.deliver(offer, "b0", "b1")
    cluster.host("a").restore()
    checked(call, 1)
    cluster.deliver(cluster.publisher.publish(2))


def test_a_host_cut_off_for_two_versions_comes_back_to_the_current_one(cluster: Cluster):
    cluster.start("b", fan_out=2)
    cluster.start_receivers("a", patience_s=0.3)
    cluster.deliver(cluster.publisher.publish(1))
    cluster.host("a").cut()
    for version in (2, 3):
        offer = cluster.publisher.publish(version)
        calls = [cluster.receivers[name].receive(offer, GIVES_UP_S) for name in ("a0", "a1")]
        cluster.deliver(offer, "b0", "b1")
        for call in calls:
            assert reason_of(call) == "weights_timeout"
            assert call.party.ask("state").result() == truth(1, 0, SCALE)
    cluster.host("a").restore()
    cluster.deliver(offer)
    cluster.deliver(cluster.publisher.publish(4))


def test_a_whole_host_that_fails_and_starts_again_and_a_new_one_catch_up_from_their_neighbours(cluster: Cluster):
    cluster.start("a", "b", fan_out=1)
    cluster.deliver(cluster.publisher.publish(1))
    offer = cluster.publisher.publish(2)
    cluster.deliver(offer)
    for name in ("a0", "a1"):
        cluster.receivers[name].kill()
    cluster.start_receivers("a")
    cluster.start_receivers("c")  # for the first time
    egress = cluster.publisher.ask("egress").result()
    calls = []
    for name in ("a0", "a1", "c0", "c1"):
        calls.append(cluster.receivers[name].receive(offer))
        calls[-1].passed("source_told")
    results = [checked(call, 2) for call in calls]
    for host in (results[:2], results[2:]):
        assert sum(result["received_bytes"] for result in host) == TRAINED_BYTES + FROZEN_BYTES
    assert cluster.publisher.ask("egress").result() - egress <= 2 * (TRAINED_BYTES + FROZEN_BYTES)
    cluster.deliver(cluster.publisher.publish(3))


@pytest.mark.parametrize("phase", ["first_bucket", "middle_bucket", "checked", "half_loaded"])
def test_a_leader_killed_in_the_middle_leaves_its_neighbour_to_lead(cluster: Cluster, phase: str):
    cluster.start("a", "b", fan_out=2)
    cluster.deliver(cluster.publisher.publish(1))
    offer = cluster.publisher.publish(2)
    leader = cluster.receivers["a0"]
    leader.stop_at(phase)
    leader.receive(offer)
    leader.until_stopped(phase)
    calls = [cluster.receivers[name].receive(offer) for name in ("a1", "b0", "b1")]
    calls[0].passed("source_told")
    leader.kill()
    for call in calls:
        checked(call, 2)
    checked(cluster.start_receiver("a0").receive(offer), 2)
    cluster.deliver(cluster.publisher.publish(3))


def test_a_host_behind_a_slow_link_delays_no_other_and_gets_its_version(cluster: Cluster):
    cluster.start("a", "b", fan_out=0)
    slow = cluster.start_receiver("c0")
    offer = cluster.publisher.publish(1)
    with cluster.host("c").network():
        link = Link(offer.endpoint.removeprefix("tcp://"), rate_bytes_per_s=3e6)
    with link:
        by_link = replace(offer, endpoint=f"tcp://{link.address}")
        call = slow.receive(by_link)
        call.passed("first_bucket")
        for version in (1, 2, 3):
            if version > 1:
                offer = cluster.publisher.publish(version)
            cluster.deliver(offer, "a0", "a1", "b0", "b1")
        assert not any("number" in event for event in slow.events), "the others didn't wait for it"
        checked(call, 1)
        link.rate_bytes_per_s = None
        checked(slow.receive(replace(offer, endpoint=by_link.endpoint)), 3)


def test_full_shared_memory_and_full_folders_hinder_nobody(cluster: Cluster):
    cluster.start("a", fan_out=1)
    cluster.host("a").fill()
    full = cluster.start_receiver("b0", folder="/dev/shm")
    cluster.host("b").fill(leaving_bytes=1 << 20)
    results = cluster.deliver(cluster.publisher.publish(1))
    assert results["a1"]["route"] == "memory" or results["a0"]["route"] == "memory"
    assert not results["b0"]["on_disk"]
    assert any("weights are put in memory: /dev/shm" in line for line in full.logs)
    cluster.deliver(cluster.publisher.publish(2))
