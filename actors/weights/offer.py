"""What a publisher hands to a generator so that it can pull a version, and what the generator answers.

The offer carries the run's keys: it travels only inside Ray calls between our own actors, and is never logged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.weights.manifest import WeightsPart


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one run (Z85, CURVE): all its generators share one pair, each server has its own.

    Attributes:
        client_public, client_secret: of this run's generators; servers admit no other.
    """

    client_public: bytes
    client_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PartOffer:
    """One part of a version: which, the hex digest of its manifest (which covers every byte), and its size."""

    part: WeightsPart
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightsOffer:
    """A policy version, where to pull it from, and with which keys.

    Attributes:
        epoch: of the publisher; a later publisher of the same run has a greater one.
        version: the policy version.
        endpoint: ZMQ address of the publisher.
        server_key: of the publisher; a client that expects another key doesn't connect. b"" without CURVE.
        keys: of this run's generators; None without CURVE, which only loopback allows.
        parts: the trained part, and the frozen one for generators that don't have it yet.
        host: of the publisher; processes of the same host map its memory.
        gather_s: for the trainer to read, cast and digest the weights.
        egress_bytes: what the publisher has sent over the network since the offer before.
        changed_share: of the elements, how many differ from the version before; None where that wasn't measured.
    """

    epoch: int
    version: int
    endpoint: str
    server_key: bytes
    keys: Keys | None
    parts: tuple[PartOffer, ...]
    host: str = ""
    gather_s: float = 0.0
    egress_bytes: int = 0
    changed_share: float | None = None

    @property
    def order(self) -> tuple[int, int]:
        """What makes one offer later than another."""
        return self.epoch, self.version

    @property
    def trained(self) -> PartOffer:
        """The part that changes."""
        return next(part for part in self.parts if part.part is not WeightsPart.FROZEN)

    @property
    def nbytes(self) -> int:
        """Size of what changes."""
        return self.trained.nbytes


@dataclass(frozen=True, slots=True)
class WeightsReceipt:
    """A generator's word that it has loaded a version.

    Attributes:
        version: the version it holds now.
        digest: hex digest of the manifest it loaded; delivery counts only where it equals the offer's.
        transfer_s: to receive and check the buckets, while generation went on.
        stage_s: to make them ready in the engine beside generation, where they are staged.
        load_s: to load them into the engine.
        pause_s: for which generation stood still, loading included.
        received_bytes: over the network.
        route: "memory" where the bytes were mapped, "network" where they came as whole buckets, "delta" where most of
            them came as changes.
        source: who served them; "" for the publisher.
        corrected: tensors of the engine that a full resend changed, though they were loaded before.
    """

    version: int
    digest: str
    transfer_s: float
    load_s: float
    pause_s: float
    stage_s: float = 0.0
    received_bytes: int = 0
    route: str = ""
    source: str = ""
    corrected: tuple[str, ...] = ()
