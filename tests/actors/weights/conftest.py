"""Publishers and receivers that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from actors.weights.pull.publisher import WeightPublisher
from actors.weights.pull.pull import FlowControl, ReceiverSettings
from actors.weights.pull.receiver import WeightReceiver

NewPublisher = Callable[..., WeightPublisher]
NewReceiver = Callable[..., WeightReceiver]


@pytest.fixture
def new_publisher() -> Iterator[NewPublisher]:
    """Makes publishers of small buckets on loopback; takes what WeightPublisher takes."""
    made: list[WeightPublisher] = []

    def make(**options: Any) -> WeightPublisher:
        made.append(WeightPublisher(**{"bucket_bytes": 1024, "is_encrypted": False, **options}))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(params=["whole", "in slices"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's buckets travel in one message each, or in four."""
    if request.param == "in slices":
        for flow in ("ENCRYPTED", "PLAIN"):
            monkeypatch.setattr(f"actors.weights.pull.pull.{flow}", FlowControl(request.module.BUCKET_BYTES // 4, 3))


@pytest.fixture
def new_receiver() -> Iterator[NewReceiver]:
    """Makes receivers that are each a host of their own, unless they map memory; takes what ReceiverSettings takes."""
    made: list[WeightReceiver] = []

    def make(name: str = "a", **settings: Any) -> WeightReceiver:
        made.append(WeightReceiver(name, ReceiverSettings(**{"maps_memory": False, "patience_s": 10.0, **settings})))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context[Any]]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)
