"""A weight server on a real socket: what it answers, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq

from actors.weights.manifest import Manifest
from actors.weights.pull import server as server_module
from actors.weights.pull.connection import Connection, NoAnswerError, NotServedError
from actors.weights.pull.memory import Memory, MemoryAddress
from actors.weights.pull.relays import Relay, RelayTree
from actors.weights.pull.server import MAX_SLICE_BYTES, HeldPart, WeightServer
from tests.actors.weights.served import DEADLINE_S, SILENCE_S, TreeDirectory, asked, holding_of, new_keys, serving
from tests.actors.weights.versions import bytes_of, source_of, written


@pytest.fixture
def relay() -> Iterator[WeightServer]:
    """As generators have it: it names no sources."""
    yield from serving()


@pytest.fixture
def publisher() -> Iterator[WeightServer]:
    tree = RelayTree(1, "trainer")
    yield from serving(assigner=TreeDirectory(tree))


@pytest.fixture
def client(context: zmq.Context[Any], request: pytest.FixtureRequest) -> Iterator[Connection]:
    name = "publisher" if "publisher" in request.fixturenames else "relay"
    made = Connection(context, request.getfixturevalue(name).endpoint, b"", None)
    yield made
    made.close(linger_ms=0)


def test_a_client_gets_the_manifest_and_every_bucket(relay, client):
    held = holding_of()
    relay.hold(held)
    digest = held.manifest.digest
    manifest = Manifest.unpack(bytes(asked(client, "manifest", digest).payload))
    answers = [asked(client, "bucket", digest, index=i) for i in range(len(manifest.digests))]
    assert manifest == held.manifest
    assert [answer.index for answer in answers] == list(range(len(answers)))
    assert b"".join(bytes(answer.payload) for answer in answers) == bytes(held.memory.view)


def test_those_who_have_the_version_before_get_the_changes(relay, client):
    held = holding_of()
    held.deltas = {"before": {1: b"changes"}}
    relay.hold(held)
    digest = held.manifest.digest
    found = [
        asked(client, "bucket", digest, index=i, base=base) for i, base in ((1, "before"), (1, "x"), (0, "before"))
    ]
    assert [answer.header["encoding"] for answer in found] == ["delta", "full", "full"]
    assert bytes(found[0].payload) == b"changes"


def test_memory_is_named_to_processes_that_can_map_it(relay, client):
    held = holding_of()
    relay.hold(held)
    address = MemoryAddress.of_fields(asked(client, "memory", held.manifest.digest).header["memory"])
    found = Memory.open(address)
    assert found is not None
    assert bytes(found.view) == bytes(held.memory.view)


def test_the_publisher_names_sources_and_a_relay_doesnt(publisher, client, context):
    held = holding_of()
    publisher.hold(held)
    digest = held.manifest.digest
    first, second = (Relay(name, name, f"tcp://{name}", "key") for name in "ab")
    members = [[r.name, r.host, r.endpoint, r.server_key] for r in (first, second)]
    assert asked(client, "sources", digest, member=members[0]).header["source"] is None
    assert asked(client, "sources", digest, member=members[1]).header["source"] == members[0]
    assert asked(client, "sources", digest, member=members[1], lost=members[0][2]).header["source"] is None
    for server in serving():
        server.hold(held)
        other = Connection(context, server.endpoint, b"", None)
        with pytest.raises(NotServedError, match="there is no sources"):
            asked(other, "sources", digest, member=members[0])
        other.close(linger_ms=0)


def test_the_publisher_says_at_once_that_a_version_is_gone(publisher, client):
    with pytest.raises(NotServedError, match="no longer served here"):
        asked(client, "manifest", "unknown")


def test_a_relay_answers_what_it_doesnt_have_yet_when_it_has_it(relay, client):
    held = holding_of()
    digest = held.manifest.digest
    held.missing = {0, 1}
    for operation, fields in (("manifest", {}), ("bucket", {"index": 1}), ("memory", {})):
        client.ask(operation, digest, **fields)
    with pytest.raises(NoAnswerError):
        client.answer("manifest", digest, time.monotonic() + SILENCE_S)
    relay.hold(held)
    assert client.answer("manifest", digest, time.monotonic() + DEADLINE_S)
    with pytest.raises(NoAnswerError):
        client.answer("bucket", digest, time.monotonic() + SILENCE_S)
    held.missing.discard(1)
    relay.arrived()
    assert bytes(client.answer("bucket", digest, time.monotonic() + DEADLINE_S).payload) == held.content(1)
    with pytest.raises(NoAnswerError):
        client.answer("memory", digest, time.monotonic() + SILENCE_S)
    held.missing.clear()
    relay.arrived()
    assert "memory" in client.answer("memory", digest, time.monotonic() + DEADLINE_S).header


def test_who_waits_for_a_version_that_a_relay_gives_up_is_told_so(relay, client):
    held = holding_of()
    held.missing = {0}
    relay.hold(held)
    client.ask("bucket", held.manifest.digest, index=0)
    with pytest.raises(NoAnswerError):
        client.answer("bucket", held.manifest.digest, time.monotonic() + SILENCE_S)
    relay.drop(held.manifest.digest)
    with pytest.raises(NotServedError):
        client.answer("bucket", held.manifest.digest, time.monotonic() + DEADLINE_S)


def test_who_asks_again_while_waiting_is_answered_once(relay, client):
    held = holding_of()
    digest = held.manifest.digest
    for _ in range(3):
        client.ask("bucket", digest, index=0)
    with pytest.raises(NoAnswerError):
        client.answer("bucket", digest, time.monotonic() + SILENCE_S)
    relay.hold(held)
    client.answer("bucket", digest, time.monotonic() + DEADLINE_S)
    with pytest.raises(NoAnswerError):
        client.answer("bucket", digest, time.monotonic() + SILENCE_S)


def test_only_so_many_requests_wait(relay, client, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_WAITING", 3)
    held = holding_of()
    digest = held.manifest.digest
    for index in range(5):
        client.ask("bucket", digest, index=index)
    with pytest.raises(NoAnswerError):
        client.answer("bucket", digest, time.monotonic() + SILENCE_S)
    relay.hold(held)
    found = [client.answer("bucket", digest, time.monotonic() + DEADLINE_S).index for _ in range(3)]
    assert sorted(found) == [2, 3, 4]


def test_a_version_is_being_pulled_until_its_client_is_done_or_has_given_up(relay, client, monkeypatch):
    held = holding_of()
    relay.hold(held)
    digest = held.manifest.digest
    assert not relay.is_pulled(digest)
    asked(client, "bucket", digest, index=0)
    assert relay.is_pulled(digest)
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "IDLE_S", 0.0)
        assert not relay.is_pulled(digest)
    client.ask("done", digest)
    asked(client, "bucket", other_digest := held_beside(relay), index=0)
    assert (relay.is_pulled(digest), relay.is_pulled(other_digest)) == (False, True)


def held_beside(server: WeightServer) -> str:
    held = holding_of(seed=1)
    server.hold(held)
    return held.manifest.digest


def test_egress_is_the_size_of_the_buckets_that_were_sent_in_whatever_form(relay, client):
    held = holding_of(100)  # 400 bytes: one bucket of 256, one of 144
    held.deltas = {"before": {1: b"changes"}}
    relay.hold(held)
    digest = held.manifest.digest
    asked(client, "manifest", digest)
    asked(client, "memory", digest)
    assert relay.egress_bytes == 0
    for fields in ({"index": 0}, {"index": 1}, {"index": 1, "base": "before"}):
        asked(client, "bucket", digest, **fields)
    assert relay.egress_bytes == 256 + 144 + len(b"changes")


def test_what_is_for_a_client_that_is_gone_isnt_counted_as_sent(relay, client, context):
    held = holding_of()
    digest = held.manifest.digest
    gone = Connection(context, relay.endpoint, b"", None)
    gone.ask("bucket", digest, index=0)
    with pytest.raises(NoAnswerError):
        gone.answer("bucket", digest, time.monotonic() + SILENCE_S)
    gone.close(linger_ms=0)
    with pytest.raises(NoAnswerError):  # by now the server knows that it is gone
        asked(client, "manifest", "unknown", SILENCE_S)
    relay.hold(held)
    asked(client, "manifest", digest)
    assert relay.egress_bytes == 0


def test_large_buckets_are_sent_in_parts_and_there_is_nothing_behind_the_last(relay, client):
    size = 1 << 20
    source = source_of([torch.arange(2 * size // 4, dtype=torch.float32)])
    memory = Memory.create(source.nbytes)
    manifest, _ = written(source, memory, 2 * size)
    relay.hold(HeldPart(manifest, memory))
    parts = []
    for part in (0, 1):
        client.ask("bucket", manifest.digest, index=0, slice=part, size=size)
        answer = client.answer("bucket", manifest.digest, time.monotonic() + DEADLINE_S)
        assert (answer.index, answer.slice) == (0, part)
        parts.append(bytes(answer.payload))
    assert [len(part) for part in parts] == [size, size]
    assert b"".join(parts) == bytes_of(source)
    for part, wrong in ((-1, size), (2, size), (0, 0), (0, -1), (0, MAX_SLICE_BYTES + 1)):
        client.ask("bucket", manifest.digest, index=0, slice=part, size=wrong)
        with pytest.raises(NotServedError):
            client.answer("bucket", manifest.digest, time.monotonic() + DEADLINE_S)


def test_a_stopped_server_frees_its_port():
    keys = new_keys()
    for server in serving(keys=keys):
        port = int(server.endpoint.rsplit(":", 1)[1])
        server.stop()
        server.stop()
    for server in serving(keys=keys, port=port):
        assert server.endpoint.endswith(f":{port}")
