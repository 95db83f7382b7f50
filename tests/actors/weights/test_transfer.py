"""Publisher and receiver over real sockets: digests, keys, interruptions. No engine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import msgpack
import pytest
import torch
import zmq
from torch import nn

from actors.weights.manifest import Manifest, ManifestError, plan_buckets
from actors.weights.offer import WeightsOffer
from actors.weights.publisher import WeightPublisher
from actors.weights.receiver import WeightReceiver
from actors.weights.source import WeightSource
from rollout.failures import FailureError


class TiedModel(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def publisher() -> Iterator[WeightPublisher]:
    made = WeightPublisher()
    yield made
    made.stop()


@pytest.fixture
def receiver(tmp_path) -> Iterator[WeightReceiver]:
    made = WeightReceiver(retry_s=0.2, folder=tmp_path)
    yield made
    made.close()


def snapshot_of(model: nn.Module, version: int = 1, precision: str = "float32", bucket_bytes: int = 700):
    snapshot = WeightSource(model, precision=precision, bucket_bytes=bucket_bytes).snapshot(version, keep=True)
    assert snapshot is not None
    return snapshot


def tensors_in(manifest: Manifest, content: bytes) -> dict[str, torch.Tensor]:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        t.name: torch.frombuffer(
            bytearray(content[(start := manifest.starts[t.bucket] + t.offset) : start + t.nbytes]),
            dtype=dtypes[t.dtype],
        ).reshape(t.shape)
        for t in manifest.tensors
    }


def test_buckets_are_filled_in_order_and_a_large_tensor_gets_its_own():
    # 4-byte floats: 10 + 10 fit in 100 bytes, 30 more don't, 100 are alone, 1 starts a new one
    entries, sizes = plan_buckets(
        [(n, "float32", (k,)) for n, k in zip("abcde", (10, 10, 30, 100, 1), strict=True)], 100
    )
    assert sizes == (80, 120, 400, 4)
    assert [(e.bucket, e.offset) for e in entries] == [(0, 0), (0, 40), (1, 0), (2, 0), (3, 0)]


def test_a_manifest_survives_packing_and_any_change_changes_its_digest():
    manifest = snapshot_of(TiedModel()).manifest
    assert Manifest.unpack(manifest.pack()) == manifest
    assert replace(manifest, version=2).digest != manifest.digest
    assert snapshot_of(TiedModel(seed=1)).manifest.digest != manifest.digest


@pytest.mark.parametrize("packed", [b"", b"\x00", b"\x80", msgpack.packb({"format": 99}), b"\xc1" * 40])
def test_bytes_that_are_no_manifest_are_refused(packed):
    with pytest.raises(ManifestError):
        Manifest.unpack(packed)


def test_a_tensor_outside_its_bucket_is_refused():
    manifest = snapshot_of(TiedModel()).manifest
    wrong = replace(manifest, tensors=(replace(manifest.tensors[0], offset=1), *manifest.tensors[1:]))
    with pytest.raises(ManifestError, match="outside its bucket"):
        Manifest.unpack(wrong.pack())


def test_tied_weights_travel_once_and_frozen_ones_not_at_all():
    model = TiedModel()
    model.layers[0].requires_grad_(False)
    names = [tensor.name for tensor in snapshot_of(model).manifest.tensors]
    assert names.count("embed.weight") == 1
    assert "head.weight" not in names
    assert not any(name.startswith("layers.0.") for name in names)


def test_what_arrives_is_what_was_published_in_the_generators_precision(publisher, receiver):
    model = TiedModel()
    received = receiver.receive(publisher.publish(snapshot_of(model, precision="bfloat16")), 10.0)
    tensors = tensors_in(received.manifest, received.path.read_bytes())
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter.detach().bfloat16())


def test_the_oldest_of_three_versions_is_no_longer_served(publisher, receiver):
    offers = [publisher.publish(snapshot_of(TiedModel(), version)) for version in (1, 2, 3)]
    assert receiver.receive(offers[1], 10.0).manifest.version == 2
    with pytest.raises(FailureError, match="no longer served"):
        receiver.receive(offers[0], 10.0)


def test_a_client_with_another_key_is_refused(publisher, receiver):
    offer = publisher.publish(snapshot_of(TiedModel()))
    public, secret = zmq.curve_keypair()
    with pytest.raises(FailureError) as caught:
        receiver.receive(replace(offer, client_public_key=public, client_secret_key=secret), 10.0)
    assert caught.value.failure.reason == "weights_refused"


def test_a_publisher_with_another_key_is_not_believed(publisher, receiver):
    offer = publisher.publish(snapshot_of(TiedModel()))
    with pytest.raises(FailureError) as caught:
        receiver.receive(replace(offer, server_public_key=zmq.curve_keypair()[0]), 1.0)
    assert caught.value.failure.reason in ("weights_timeout", "weights_refused")


class FlippingProxy:
    """A relay that holds the keys of both sides and changes one byte of the first buckets that pass through."""

    def __init__(self, offer: WeightsOffer, flips: int) -> None:
        self.flips, self.requests, self._offer = flips, 0, offer
        self._context, self._stopping = zmq.Context(), threading.Event()
        public, secret = zmq.curve_keypair()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.curve_server, self._front.curve_secretkey = True, secret
        port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self._back = self._context.socket(zmq.DEALER)
        self._back.curve_serverkey = offer.server_public_key
        self._back.curve_publickey, self._back.curve_secretkey = offer.client_public_key, offer.client_secret_key
        self._back.connect(offer.endpoint)
        self.offer = replace(offer, endpoint=f"tcp://127.0.0.1:{port}", server_public_key=public)
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(5)
        self._context.destroy(linger=0)

    def _relay(self) -> None:
        client = b""
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll(50))
            if self._front in ready:
                client, request = self._front.recv_multipart()
                self.requests += msgpack.unpackb(request)["op"] == "bucket"
                self._back.send(request)
            if self._back in ready:
                header, payload = self._back.recv_multipart()
                if self.flips and msgpack.unpackb(header)["op"] == "bucket":
                    self.flips -= 1
                    payload = bytes([payload[0] ^ 1]) + payload[1:]
                self._front.send_multipart([client, header, payload])


def test_a_byte_flipped_on_the_way_is_caught_and_the_bucket_asked_for_again(publisher, receiver):
    snapshot = snapshot_of(TiedModel())
    proxy = FlippingProxy(publisher.publish(snapshot), flips=2)
    try:
        received = receiver.receive(proxy.offer, 10.0)
    finally:
        proxy.stop()
    assert received.path.read_bytes() == b"".join(snapshot.buckets)
    assert proxy.requests == len(snapshot.buckets) + 2


def test_buckets_that_are_always_wrong_end_in_a_failure(publisher, receiver):
    proxy = FlippingProxy(publisher.publish(snapshot_of(TiedModel())), flips=1000)
    try:
        with pytest.raises(FailureError) as caught:
            receiver.receive(proxy.offer, 10.0)
    finally:
        proxy.stop()
    assert caught.value.failure.reason == "weights_corrupt"


class CuttableLink:
    """A TCP relay that can be cut after so many bytes, and restored."""

    def __init__(self, endpoint: str, cut_after: int) -> None:
        self._target = int(endpoint.rsplit(":", 1)[1])
        self.left: float = cut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self._cut()

    def _cut(self) -> None:
        for each in self._open:
            each.close()
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            if self.left <= 0:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            for a, b in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while chunk := source.recv(4096):
                self.left -= len(chunk)
                if self.left <= 0:
                    for each in (source, sink):
                        each.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(chunk)
        except OSError:
            return


def test_a_cut_transfer_fails_in_time_and_resumes_with_what_had_arrived(publisher, receiver):
    model = nn.Linear(300, 300)
    snapshot = snapshot_of(nn.Sequential(*(model for _ in range(1)), nn.Linear(300, 300)), bucket_bytes=1)
    offer = publisher.publish(snapshot)
    link = CuttableLink(offer.endpoint, cut_after=450_000)
    linked = replace(offer, endpoint=link.endpoint)
    with pytest.raises(FailureError) as caught:
        receiver.receive(linked, 1.0)
    assert caught.value.failure.reason == "weights_timeout"
    assert receiver._partial is not None
    arrived = len(snapshot.buckets) - len(receiver._partial.missing)
    assert 0 < arrived < len(snapshot.buckets)
    link.left = 550_000  # enough for the rest, not for everything again
    received = receiver.receive(linked, 10.0)
    link.close()
    assert received.path.read_bytes() == b"".join(snapshot.buckets)
