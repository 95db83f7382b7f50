"""A publisher or a receiver of weights as a process of its own, which stops at any phase until it is told to go on.

Transport only: neither Ray nor an engine. Run as a program it is a template: for each line of its input (the path of a
Unix socket) it forks a party, which connects to that socket and does what it is told there, in lines of JSON. The
test's side is tests/actors/weights/sync_parties.py. The phases are those of subclasses in this file; the transport
itself knows nothing of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from torch import Tensor

from actors.weights.manifest import Manifest, WeightsPart
from actors.weights.offer import WeightsOffer
from actors.weights.pull import memory as memory_module
from actors.weights.pull import publisher as publisher_module
from actors.weights.pull import receiver as receiver_module
from actors.weights.pull.connection import Answer, Connection
from actors.weights.pull.memory import Memory, MemoryAddress
from actors.weights.pull.publisher import WeightPublisher
from actors.weights.pull.pull import ReceiverSettings
from actors.weights.pull.receiver import ReceivedPart, ReceivedWeights, WeightReceiver
from actors.weights.pull.relays import Relay
from actors.weights.pull.server import HeldPart, WeightServer
from actors.weights.source import PolicyPartSource, SourceTensor
from rollout.failures import FailureError

TENSORS = 12
ELEMENTS = 24_000
"""Of each tensor; they are 96 KB in float32, laid across buckets of 64 KiB."""
BUCKET_BYTES = 64 << 10
STOPPED_S = 120.0


def trained_tensors(version: int, seed: int = 0, scale: int = 1) -> dict[str, Tensor]:
    """What training changes, in a version of a trainer: every other tensor wholly, the rest in a few elements."""
    tensors = {}
    for index in range(TENSORS):
        size = ELEMENTS * scale // TENSORS * (index + 6)
        is_new = index % 2 == 0
        generator = torch.Generator().manual_seed(1000 * seed + index + (100_000 * version if is_new else 0))
        tensor = torch.randn(size, generator=generator)
        if not is_new:
            tensor[:: size // 20] += version
        tensors[f"layers.{index}"] = tensor.bfloat16() if index % 3 == 2 else tensor
    return tensors


def frozen_tensors() -> dict[str, Tensor]:
    """What training leaves as it is."""
    generator = torch.Generator().manual_seed(7)
    return {f"frozen.{index}": torch.randn(ELEMENTS, generator=generator) for index in range(2)}


def version_digest(content: Any) -> str:
    """Of one tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(content)


def state_of(digests: dict[str, str]) -> str:
    """What all tensors by their names are known by."""
    return hashlib.blake2b(json.dumps(sorted(digests.items())).encode(), digest_size=8).hexdigest()


def truth(version: int, seed: int = 0, scale: int = 1) -> str:
    """The state of whoever holds exactly this version."""
    tensors = trained_tensors(version, seed, scale) | frozen_tensors()
    return state_of({name: version_digest(t.view(torch.uint8).numpy()) for name, t in tensors.items()})


def packed(offer: WeightsOffer) -> str:
    """An offer for a line of JSON."""
    return base64.b64encode(pickle.dumps(offer)).decode()


def unpacked(text: str) -> WeightsOffer:
    """See :func:`packed`."""
    offer = pickle.loads(base64.b64decode(text))
    assert isinstance(offer, WeightsOffer)
    return offer


class Steps:
    """Tells which phases are passed, and stops at the one that was named until it is told to go on."""

    def __init__(self) -> None:
        self.connection = socket.socket()
        self.stop_at: str | None = None
        self.go = threading.Event()
        self._lock = threading.Lock()

    def say(self, **fields: Any) -> None:
        """A line to the test."""
        with self._lock:
            self.connection.sendall(json.dumps(fields).encode() + b"\n")

    def reach(self, phase: str, **fields: Any) -> None:
        """This thread has come so far."""
        is_stop = self.stop_at == phase
        if is_stop:
            self.stop_at = None
            self.go.clear()
        self.say(phase=phase, is_stop=is_stop, **fields)
        if is_stop and not self.go.wait(STOPPED_S):
            os._exit(3)


STEPS = Steps()
"""Of this process; a party is forked before it is used."""


class SteppingConnection(Connection):
    """Phases `<operation>_asked`."""

    def ask(self, operation: str, digest: str, **fields: Any) -> None:
        super().ask(operation, digest, **fields)
        if operation in ("manifest", "memory"):
            STEPS.reach(f"{operation}_asked")


class SteppingPull(receiver_module.Pull):
    """Phases `manifest_there`, `source_told`, `address_told`, and `first_bucket`, `middle_bucket`, `last_bucket`."""

    _wanted = _taken = 0

    def manifest(self, digest: str) -> Manifest:
        manifest = super().manifest(digest)
        STEPS.reach("manifest_there")
        return manifest

    def source(self, digest: str, member: Relay, lost: str | None) -> Relay | None:
        source = super().source(digest, member, lost)
        STEPS.reach("source_told", source="" if source is None else source.name)
        return source

    def address(self, *arguments: Any) -> MemoryAddress | None:
        address = super().address(*arguments)
        STEPS.reach("address_told")
        return address

    def buckets(self, own: Any, *arguments: Any) -> None:
        self._wanted, self._taken = len(own.held.missing), 0
        super().buckets(own, *arguments)

    def _accept(self, own: Any, answer: Answer, wanted: Any) -> bool | None:
        is_taken = super()._accept(own, answer, wanted)
        self._taken += is_taken is True
        names = {1: "first_bucket", self._wanted // 2: "middle_bucket", self._wanted: "last_bucket"}
        if is_taken and self._taken in names:
            STEPS.reach(names[self._taken])
        return is_taken


class SteppingMemory(Memory):
    """Phases `mapped`, and `half_checked` of mapped memory."""

    _looked_at = 0

    @classmethod
    def open(cls, address: MemoryAddress) -> Memory | None:
        memory = super().open(address)
        STEPS.reach("mapped")
        return memory

    def try_lease(self) -> bool:
        is_leased = super().try_lease()
        STEPS.reach("mapped")
        return is_leased

    def is_checked(self, bucket: int, digest: bytes) -> bool:
        self._looked_at += 1
        if self._looked_at == self.nbytes // BUCKET_BYTES // 2:
            STEPS.reach("half_checked")
        return super().is_checked(bucket, digest)

    def unclaim(self) -> None:
        super().unclaim()
        self._looked_at = 0


class SteppingReceiver(WeightReceiver):
    """Phase `checked`: all of it is there, and nobody has been told."""

    def _obtain(self, *arguments: Any) -> ReceivedPart:
        part = super()._obtain(*arguments)
        STEPS.reach("checked")
        return part


class SteppingServer(WeightServer):
    """Phases `serving_manifest`, `serving_source`, `serving_memory`, `serving_first`, `serving_middle`: an answer is
    ready and not sent."""

    def __init__(self, **settings: Any) -> None:
        self._buckets: Counter[str] = Counter()
        super().__init__(**settings)

    def _send(self, client: bytes, header: dict[str, Any], payload: Any) -> None:
        digest = header.get("digest", "")
        if "encoding" in header:
            self._buckets[digest] += 1
            held = self._held_parts.get(digest)
            count = 0 if held is None else len(held.manifest.digests)
            names = {1: "serving_first", count // 2: "serving_middle"}
            if self._buckets[digest] in names:
                STEPS.reach(names[self._buckets[digest]])
        elif header.get("op") == "manifest" and "error" not in header:
            STEPS.reach("serving_manifest")
        elif "source" in header:
            STEPS.reach("serving_source")
        elif "memory" in header:
            STEPS.reach("serving_memory")
        super()._send(client, header, payload)


class Publishes:
    """Commands of a publisher. Phases `gathering` (a version is half read), `published` (nobody has heard of it)."""

    def __init__(self, *, scale: int = 1, is_elsewhere: bool = False, **settings: Any) -> None:
        self.publisher = WeightPublisher(bucket_bytes=BUCKET_BYTES * scale, **settings)
        self._scale = scale
        if is_elsewhere:  # for those who look at the offer, it is on another host
            self.publisher._host_identity = "elsewhere"

    def publish(self, version: int, seed: int = 0) -> str:
        trained = self._source(trained_tensors(version, seed, self._scale), WeightsPart.TRAINED)
        offer = self.publisher.publish(version, trained, self._source(frozen_tensors(), WeightsPart.FROZEN))
        STEPS.reach("published")
        return packed(offer)

    def egress(self) -> int:
        return self.publisher.server.egress_bytes

    def _source(self, tensors: dict[str, Tensor], part: WeightsPart) -> PolicyPartSource:
        middle = list(tensors)[len(tensors) // 2] if part is WeightsPart.TRAINED else None

        def read(name: str) -> Tensor:
            if name == middle:
                STEPS.reach("gathering")
            return tensors[name]

        sources = [
            SourceTensor(
                name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), (), lambda n=name: read(n)
            )
            for name, tensor in tensors.items()
        ]
        return PolicyPartSource(sources, gather_bytes=1 << 20, part=part)


class Receives:
    """Commands of a receiver. Phases of loading: `received`, `half_loaded`, `loaded`."""

    def __init__(self, *, name: str, folder: str | None = None, **settings: Any) -> None:
        where = None if folder is None else Path(folder)
        self.receiver = SteppingReceiver(name, ReceiverSettings(folder=where, **settings))
        self._digests: dict[str, str] = {}
        self._updating = threading.Lock()

    def receive(self, offer: str, deadline_s: float, anew: bool = False) -> dict[str, Any]:
        with self._updating:
            return self._receive(offer, deadline_s, anew)

    def _receive(self, offer: str, deadline_s: float, anew: bool) -> dict[str, Any]:
        received = self.receiver.receive(unpacked(offer), deadline_s, anew=anew)
        STEPS.reach("received")
        self._load(received)
        self.receiver.loaded(received)
        STEPS.reach("loaded")
        return {
            "version": received.parts[-1].manifest.version,
            "state": self.state(),
            "route": received.route,
            "source": received.source,
            "received_bytes": received.received_bytes,
            "on_disk": any(part.held.memory.is_on_disk for part in received.parts),
        }

    def state(self) -> str:
        """Of what is loaded now."""
        return state_of(self._digests)

    def damage(self, part: str = "trained") -> None:
        """Flip a bit of what this process serves."""
        held: HeldPart = self.receiver._own[WeightsPart(part)].held
        held.memory.view[held.manifest.nbytes // 2] ^= 1

    def limit(self, spare_bytes: int | None) -> None:
        """Let this process map only so much more memory; None lifts that."""
        most = resource.RLIM_INFINITY if spare_bytes is None else psutil.Process().memory_info().vms + spare_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def pretend(self, available_bytes: int) -> None:
        """Take the machine for one with so little memory left."""
        memory_module.available_memory = lambda: available_bytes

    def served(self) -> int:
        server = self.receiver._server
        return 0 if server is None else server.egress_bytes

    def _load(self, received: ReceivedWeights) -> None:
        """As an engine does: by path, mapped by nobody else's leave, tensor after tensor."""
        tensors = [(part, entry) for part in received.parts for entry in part.manifest.tensors]
        maps: dict[str, mmap.mmap] = {}
        for part in received.parts:
            with open(part.path, "rb") as file:
                maps[part.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for index, (part, entry) in enumerate(tensors):
            if index == len(tensors) // 2:
                STEPS.reach("half_loaded")
            content = memoryview(maps[part.path])[entry.offset : entry.offset + entry.nbytes]
            self._digests[entry.name] = version_digest(content)


class Told(logging.Handler):
    """Passes warnings on to the test."""

    def emit(self, record: logging.LogRecord) -> None:
        STEPS.say(log=record.getMessage())


def serve(path: str) -> None:
    """Be a party: do what the lines say, each command in a thread of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    torch.set_num_threads(1)
    receiver_module.Connection = SteppingConnection  # type: ignore[misc]
    receiver_module.Memory = SteppingMemory  # type: ignore[misc]
    receiver_module.WeightServer = publisher_module.WeightServer = SteppingServer  # type: ignore[misc]
    receiver_module.Pull = SteppingPull  # type: ignore[misc]
    logging.getLogger().addHandler(Told(logging.WARNING))
    STEPS.connection = socket.socket(socket.AF_UNIX)
    STEPS.connection.connect(path)
    role: Any = None
    with STEPS.connection.makefile() as lines:
        for line in lines:
            command = json.loads(line)
            match command.pop("do"):
                case "stop_at":
                    STEPS.stop_at = command["phase"]
                case "go":
                    STEPS.go.set()
                case "be_publisher":
                    role = Publishes(**command)
                case "be_receiver":
                    role = Receives(**command)
                case method:
                    threading.Thread(target=_carry_out, args=(getattr(role, method), command), daemon=True).start()


def _carry_out(method: Any, command: dict[str, Any]) -> None:
    number = command.pop("number")
    try:
        STEPS.say(number=number, result=method(**command))
    except FailureError as error:
        STEPS.say(number=number, failure=error.failure.reason, message=error.failure.message)
    except Exception as error:
        STEPS.say(number=number, failure="defect", message=repr(error))
        raise


def main() -> None:
    """The template: everything is imported once, and each party costs a fork."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        if os.fork() == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            serve(line.strip())
            os._exit(0)


if __name__ == "__main__":
    main()
