"""What a publisher hands to a generator so that it can pull a version, and what the generator answers.

The offer carries the run's keys: it travels only inside Ray calls between our own actors, and is never logged.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WeightsOffer:
    """A policy version, where to pull it from, and with which keys (Z85, CURVE).

    Attributes:
        version: the policy version.
        endpoint: ZMQ address of the publisher.
        server_public_key: of the publisher; a client that expects another key doesn't connect.
        client_public_key: of this run's generators; the publisher admits no other.
        client_secret_key: of this run's generators.
        manifest_digest: hex digest of the manifest, which covers every byte.
        nbytes: size of the version.
    """

    version: int
    endpoint: str
    server_public_key: bytes
    client_public_key: bytes
    client_secret_key: bytes = field(repr=False)
    manifest_digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightsReceipt:
    """A generator's word that it serves a version.

    Attributes:
        version: the version it serves now.
        digest: hex digest of the manifest it loaded; delivery counts only where it equals the offer's.
        transfer_s: to pull and check the buckets, while generation went on.
        load_s: to load them into the engine.
        pause_s: for which generation stood still, loading included.
    """

    version: int
    digest: str
    transfer_s: float
    load_s: float
    pause_s: float
