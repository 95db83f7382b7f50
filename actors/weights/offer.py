"""The offer with which a generator pulls a version, and the receipt that it returns.

The offer carries the run's keys: it travels only in Ray calls between our own actors, and is never logged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.weights.manifest import WeightsPart


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys of one run (Z85): its generators share one pair, each server has a pair of its own.

    Attributes:
        client_public, client_secret: the pair of this run's generators; servers admit no other client.
    """

    client_public: bytes
    client_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PartOffer:
    """One part of a version: its kind, the hex digest of its manifest (which covers every byte), and its size."""

    part: WeightsPart
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightsOffer:
    """A policy version, the address of its publisher and the keys to pull it with.

    Attributes:
        epoch: number of the publisher; a later publisher of the same run has a greater one.
        version: the policy version.
        endpoint: ZMQ address of the publisher.
        server_key: CURVE key of the publisher; a client that expects another key does not connect. b"" without CURVE.
        keys: keys of this run's generators; None without CURVE, which is allowed on loopback only.
        parts: the frozen part, if there is one, and the trained part.
        host: identity of the publisher's host; processes of the same host map its memory.
        gather_s: seconds in which the trainer read, cast and digested the weights.
        egress_bytes: bytes that the publisher has sent over the network since the previous offer.
        changed_share: share of the elements that differ from the previous version; None where it was not measured.
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
        """Sort key: a later offer is greater."""
        return self.epoch, self.version

    @property
    def trained(self) -> PartOffer:
        """The part that training changes."""
        return next(part for part in self.parts if part.part is not WeightsPart.FROZEN)

    @property
    def nbytes(self) -> int:
        """Size of the trained part."""
        return self.trained.nbytes


@dataclass(frozen=True, slots=True)
class WeightsReceipt:
    """A generator's confirmation that it has loaded a version.

    Attributes:
        version: the loaded version.
        digest: hex digest of the loaded manifest (after a push, of the version's device digests); a version counts as
            delivered only where it equals the offer's.
        transfer_s: seconds to receive and check the buckets, while generation runs.
        stage_s: seconds to stage the version in the vLLM engine, while generation runs.
        load_s: seconds to load it into the vLLM engine.
        pause_s: seconds for which generation was paused, loading included.
        received_bytes: bytes received over the network.
        route: "memory" where the bytes were mapped, "network" where most buckets came whole, "delta" where most came as
            deltas, "push" where the trainer sent them from device to device.
        source: name of the generator that served them; "" for the publisher.
        corrected: tensors of the vLLM engine that a full resend changed.
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
