"""A weight server with something to serve, and how a test asks it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import zmq

from actors.weights.offer import Keys
from actors.weights.pull.connection import Answer, Connection
from actors.weights.pull.memory import Memory
from actors.weights.pull.relays import Relay, RelayTree
from actors.weights.pull.server import HeldPart, WeightServer
from tests.actors.weights.versions import random_tensors, source_of, written

DEADLINE_S = 20.0
SILENCE_S = 0.5
"""Long enough for an answer, if there were one."""
BUCKET_BYTES = 256


def new_keys() -> Keys:
    """Of another run."""
    return Keys(*zmq.curve_keypair())


def holding_of(count: int = 500, seed: int = 0) -> HeldPart:
    """A version of so many floats; by default 2,000 bytes in 8 buckets."""
    source = source_of(random_tensors(count, seed=seed))
    memory = Memory.create(source.nbytes)
    manifest, _ = written(source, memory, BUCKET_BYTES)
    memory.unclaim()
    return HeldPart(manifest, memory)


def serving(**options: Any) -> Iterator[WeightServer]:
    """One server, stopped after the loop over it; takes what WeightServer takes, and is unencrypted by default."""
    server = WeightServer(**{"keys": None, **options})
    yield server
    server.stop()


def asked(connection: Connection, operation: str, digest: str, within_s: float = DEADLINE_S, **fields: Any) -> Answer:
    """The answer to one request."""
    connection.ask(operation, digest, **fields)
    return connection.answer(operation, digest, time.monotonic() + within_s)


class TreeDirectory:
    """What a publisher knows of one version's tree."""

    def __init__(self, tree: RelayTree) -> None:
        self._tree = tree

    def source(self, digest: str, member: Relay, lost: str | None, *, waits: bool) -> Relay | None:
        """See :class:`actors.weights.pull.server.SourceAssigner`."""
        return self._tree.reassign(member) if waits else self._tree.join(member, lost)

    def done(self, digest: str, name: str) -> None:
        """See :class:`actors.weights.pull.server.SourceAssigner`."""
        self._tree.done(name)
