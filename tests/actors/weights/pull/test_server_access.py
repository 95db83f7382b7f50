"""Whom a weight server answers, what it isn't believed, and what it outlives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from actors.weights.offer import Keys
from actors.weights.pull import server as server_module
from actors.weights.pull.connection import Connection, KeysRefusedError, NoAnswerError
from actors.weights.pull.relays import RelayTree
from actors.weights.pull.server import LOOPBACK, NotLoopbackError, WeightServer, is_loopback
from tests.actors.weights.served import DEADLINE_S, SILENCE_S, TreeDirectory, asked, holding_of, new_keys, serving


@pytest.fixture
def encrypted() -> Iterator[tuple[WeightServer, Keys]]:
    keys = new_keys()
    for server in serving(keys=keys):
        yield server, keys


def test_a_client_with_the_runs_key_is_served_encrypted(encrypted, context):
    server, keys = encrypted
    held = holding_of()
    server.hold(held)
    client = Connection(context, server.endpoint, server.server_key, keys)
    assert bytes(asked(client, "bucket", held.manifest.digest, index=1).payload) == held.content(1)
    client.close(linger_ms=0)


def test_a_client_with_another_key_is_refused_and_logged_once_however_often_it_tries(encrypted, context, caplog):
    server, _ = encrypted
    server.hold(holding_of())
    with caplog.at_level(logging.WARNING):
        for keys in [new_keys()] * 4 + [new_keys()]:
            client = Connection(context, server.endpoint, server.server_key, keys)
            with pytest.raises(KeysRefusedError, match="refused this run's keys"):
                asked(client, "manifest", "any")
            client.close(linger_ms=0)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [f"weight server {server.endpoint} refused a client with another key than this run's"] * 2


@pytest.mark.parametrize("kind", ["another server key", "no encryption"])
def test_nothing_is_believed_of_a_server_that_isnt_the_one_that_was_offered(encrypted, context, kind):
    server, keys = encrypted
    held = holding_of()
    server.hold(held)
    is_plain = kind == "no encryption"
    client = Connection(context, server.endpoint, zmq.curve_keypair()[0], None if is_plain else keys)
    with pytest.raises((KeysRefusedError, NoAnswerError)):
        asked(client, "manifest", held.manifest.digest, 2.0)
    client.close(linger_ms=0)
    assert server.egress_bytes == 0


def test_an_encrypting_client_gets_nothing_from_a_server_that_doesnt(context):
    for server in serving():
        server.hold(held := holding_of())
        client = Connection(context, server.endpoint, zmq.curve_keypair()[0], new_keys())
        with pytest.raises((KeysRefusedError, NoAnswerError)):
            asked(client, "manifest", held.manifest.digest, 2.0)
        client.close(linger_ms=0)


@pytest.mark.parametrize("nbytes", [server_module.MAX_REQUEST_BYTES // 2, server_module.MAX_REQUEST_BYTES + 1])
def test_a_request_that_is_no_request_by_its_size_ends_its_connection_and_no_other(context, nbytes):
    for server in serving():
        held = holding_of()
        server.hold(held)
        digest = held.manifest.digest
        clients = [Connection(context, server.endpoint, b"", None) for _ in range(2)]
        clients[0].ask("manifest", digest, padding=bytes(nbytes))
        if nbytes > server_module.MAX_REQUEST_BYTES:
            with pytest.raises(NoAnswerError):
                clients[0].answer("manifest", digest, time.monotonic() + SILENCE_S)
        else:
            assert clients[0].answer("manifest", digest, time.monotonic() + DEADLINE_S).payload
        assert asked(clients[1], "manifest", digest).payload
        for client in clients:
            client.close(linger_ms=0)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "node7.cluster", "1270.0.0.1"])
def test_without_encryption_weights_dont_leave_the_host(host):
    assert not is_loopback(host)
    with pytest.raises(NotLoopbackError, match=r"encryption = false is for loopback only, and .* is another address"):
        WeightServer(host=host, keys=None)


def test_loopback_goes_without_encryption():
    for server in serving(host="127.0.0.1"):
        assert server.server_key == b""
        assert server.endpoint.startswith(f"tcp://{LOOPBACK}:")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OPERATIONS = st.sampled_from(["manifest", "bucket", "memory", "sources", "done", "other"])


@st.composite
def nearly_requests(draw: st.DrawFn) -> bytes:
    """A request for what is there, with one or two fields that are missing or anything at all."""
    fields: dict[str, Any] = {
        "op": draw(OPERATIONS),
        "digest": GARBAGE_DIGEST,
        "index": 0,
        "base": "",
        "member": ["a"] * 4,
    }
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=2)):
        if draw(st.booleans()):
            fields.pop(name, None)
        else:
            fields[name] = draw(ANYTHING)
    return msgpack.packb(fields)


GARBAGE_HOLDING = holding_of()
GARBAGE_DIGEST = GARBAGE_HOLDING.manifest.digest
DEEP = b"\x91" * 1000 + b"\xc0"
"""A list in a list in a list."""


@pytest.fixture(scope="module")
def harassed(context: zmq.Context[Any]) -> Iterator[zmq.Socket[bytes]]:
    """A plain socket to a publisher's server."""
    tree = RelayTree(1, "trainer")
    for server in serving(assigner=TreeDirectory(tree)):
        server.hold(GARBAGE_HOLDING)
        socket = context.socket(zmq.DEALER)
        socket.connect(server.endpoint)
        yield socket
        socket.close(linger=0)


@given(st.lists(st.binary(max_size=60) | ANYTHING.map(msgpack.packb) | nearly_requests(), min_size=1, max_size=3))
@example([msgpack.packb({"op": "sources", "digest": GARBAGE_DIGEST})])
@example([msgpack.packb({"op": "bucket", "digest": GARBAGE_DIGEST, "index": float("inf")})])
@example([msgpack.packb({"op": "bucket", "digest": GARBAGE_DIGEST, "index": "9" * 99})])
@example([msgpack.packb({"op": "bucket", "digest": GARBAGE_DIGEST, "index": -1})])
@example([b"\x82\xa2op" + DEEP + b"\xa6digest\xa1d"])
@example([b"\x83\xa2op\xa7sources\xa6digest\xd9\x20" + GARBAGE_DIGEST.encode() + b"\xa6member\x91" + DEEP])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_the_server_answers_and_lives_on(harassed, frames):
    harassed.send_multipart(frames)
    harassed.send(msgpack.packb({"op": "bucket", "digest": GARBAGE_DIGEST, "index": 1, "last": True}))
    answers = []
    while True:
        assert harassed.poll(1000 * DEADLINE_S), "the server doesn't answer any more"
        head, payload = harassed.recv_multipart()
        answers.append(msgpack.unpackb(head))
        if answers[-1].get("index") == 1 and answers[-1].get("op") == "bucket":
            break
    assert payload == bytes(GARBAGE_HOLDING.content(1))
    assert len(answers) <= 2, "one answer to each request, and none to who is done"
    if len(answers) == 2 and not {"encoding", "memory", "source"} & answers[0].keys():
        assert "error" in answers[0] or answers[0]["op"] == "manifest"
