"""One generator of the fleet: its health, the policy version it is proven to have, its death and its restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from orchestrator.roles.delivery import Delivery, Publication

if TYPE_CHECKING:
    from actors.generator.handle import GeneratorHandle
    from actors.weights.canary import CanaryReport
    from actors.weights.offer import WeightsOffer, WeightsReceipt


class Health(StrEnum):
    """What a generator may be used for."""

    HEALTHY = "healthy"
    """It is proven to have a version that it may serve."""
    STALE = "stale"
    """It runs, but is not proven to have the current version; it serves nothing."""
    DEAD = "dead"
    """It is gone. The only way back is a restart, which ends in STALE."""


@dataclass
class Member:
    """One generator of the fleet."""

    name: str
    handle: GeneratorHandle
    health: Health
    version: int = -1
    """The last version that it was proven to have."""
    order: tuple[int, int] = (-1, -1)
    """The same, with the publisher's epoch."""
    delivery: Delivery = field(default_factory=Delivery)
    receipt: WeightsReceipt | None = None
    pushed: WeightsReceipt | None = None
    """Receipt of a version that the trainer has pushed into its engine and that is not proven yet."""
    report: CanaryReport | None = None
    running: int = 0
    """Requests it is working on."""
    restarts: int = 0
    why: str = ""
    """The last thing that was wrong with it."""
    corrected: tuple[str, ...] = ()
    """Tensors of its engine that a full resend changed, when its log-probabilities disagreed."""

    @property
    def is_alive(self) -> bool:
        """Whether it runs, healthy or stale."""
        return self.health is not Health.DEAD

    def die(self, why: str) -> None:
        """It is gone, with whatever version it had."""
        self.health, self.version, self.order, self.why = Health.DEAD, -1, (-1, -1), why

    def restart(self, handle: GeneratorHandle) -> None:
        """A new process takes its place and serves nothing until it has the current version."""
        self.health, self.handle = Health.STALE, handle

    def set_proven(self, offer: WeightsOffer) -> None:
        """It has loaded the version; digest and canaries agree."""
        self.version, self.order, self.corrected = offer.version, offer.order, ()


def publication_of(offer: WeightsOffer, members: Sequence[Member], seconds: float) -> Publication:
    """How an offered version reached the members, so many seconds after the offer."""
    current = [m for m in members if m.order == offer.order]
    receipts = [m.receipt for m in current if m.receipt is not None]
    reports = [m.report for m in current if m.report is not None]
    return Publication(
        version=offer.version,
        delivered=len(current),
        bytes=offer.nbytes,
        seconds=seconds,
        gather_s=offer.gather_s,
        transfer_s=max((r.transfer_s for r in receipts), default=0.0),
        stage_s=max((r.stage_s for r in receipts), default=0.0),
        load_s=max((r.load_s for r in receipts), default=0.0),
        pause_s=max((r.pause_s for r in receipts), default=0.0),
        verify_s=max((r.seconds for r in reports), default=0.0),
        canary_gap=max((r.mean_gap for r in reports), default=None),
        received_bytes=sum(r.received_bytes for r in receipts),
        egress_bytes=offer.egress_bytes,
        changed_share=offer.changed_share,
        routes=dict(Counter(r.route for r in receipts if r.route)),
        verified={m.name: m.version for m in members},
    )
