"""Decides what follows each attempt to bring a policy version to one generator. Pure: outcomes in, next step out.

The fleet carries the steps out. A generator counts as current when its digest and its canaries agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

MAX_FAILURES = 2
"""Failed attempts at one version before the generator is started again."""
MAX_SILENCES = 3
"""Silent attempts before a generator is started again. It is alive, and its link may come back."""
MAX_RETURNS = 8
"""Versions in a row that were overtaken before a generator had them, before it is started again."""


class DeliveryOutcome(StrEnum):
    """How an attempt ended."""

    PROVEN = "proven"
    """Loaded, with the right digest and the right log-probabilities."""
    FAILED = "failed"
    """Not received or not loaded, for a reason that another attempt may cure."""
    SILENT = "silent"
    """Nothing came through to the generator in time, though it answers us."""
    OVERTAKEN = "overtaken"
    """The version is no longer served, or the generator has a later one."""
    DISAGREES = "disagrees"
    """Loaded, but its log-probabilities differ from the trainer's."""
    DEAD = "dead"
    """The generator or its engine is gone."""


class Step(StrEnum):
    """What to do next."""

    DONE = "done"
    """It may serve."""
    SEND = "send"
    """Send it the current version; see :attr:`Delivery.in_full`."""
    SEND_LATER = "send_later"
    """Send it the current version after a pause; until then it serves nothing."""
    RESTART = "restart"
    """Start it again."""
    STOP = "stop"
    """End the run: it disagreed after a full resend and after a restart."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """The attempts at one generator so far.

    Attributes:
        failures: failed attempts since the last success or restart.
        silences: silent attempts since then.
        returns: overtaken attempts since then.
        disagreements: since it last agreed; a restart does not reset them.
    """

    failures: int = 0
    silences: int = 0
    returns: int = 0
    disagreements: int = 0

    @property
    def in_full(self) -> bool:
        """Whether all weights are sent, frozen ones too: from its first disagreement until it agrees."""
        return self.disagreements == 1

    def after(self, outcome: DeliveryOutcome) -> tuple[Delivery, Step]:
        """The next state and step.

        Invariants: DONE follows only PROVEN; the first disagreement is answered by a full resend, the second by a
        restart, the third by STOP; every other outcome reaches DONE or RESTART after a bounded number of attempts.
        """
        match outcome:
            case DeliveryOutcome.PROVEN:
                return Delivery(), Step.DONE
            case DeliveryOutcome.DISAGREES:
                count = self.disagreements + 1
                step = {1: Step.SEND, 2: Step.RESTART}.get(count, Step.STOP)
                return Delivery(disagreements=count), step
            case DeliveryOutcome.SILENT:
                silent = replace(self, silences=self.silences + 1)
                return self._or_restart(silent, silent.silences < MAX_SILENCES, Step.SEND_LATER)
            case DeliveryOutcome.OVERTAKEN:
                overtaken = replace(self, returns=self.returns + 1)
                return self._or_restart(overtaken, overtaken.returns < MAX_RETURNS, Step.SEND)
            case DeliveryOutcome.FAILED:
                failed = replace(self, failures=self.failures + 1)
                return self._or_restart(failed, failed.failures < MAX_FAILURES, Step.SEND)
            case DeliveryOutcome.DEAD:
                return self._or_restart(self, False, Step.SEND)

    @staticmethod
    def _or_restart(state: Delivery, may_go_on: bool, step: Step) -> tuple[Delivery, Step]:
        if may_go_on:
            return state, step
        return Delivery(disagreements=state.disagreements), Step.RESTART


def outcome_of(reason: str) -> DeliveryOutcome:
    """The outcome of an attempt that failed for this reason."""
    return {
        "weights_timeout": DeliveryOutcome.SILENT,
        "weights_gone": DeliveryOutcome.OVERTAKEN,
        "weights_superseded": DeliveryOutcome.OVERTAKEN,
        "canary_version": DeliveryOutcome.OVERTAKEN,
        "generator_died": DeliveryOutcome.DEAD,
        "generator_timeout": DeliveryOutcome.DEAD,
        "engine_dead": DeliveryOutcome.DEAD,
    }.get(reason, DeliveryOutcome.FAILED)


@dataclass(frozen=True)
class Publication:
    """How one policy version reached the fleet. Seconds and gaps are those of the worst generator.

    Attributes:
        version: the policy version.
        delivered: generators that were proven to have it.
        bytes: size of what changes.
        seconds: from the offer until then.
        gather_s: for the trainer to read, cast and digest it, before the offer.
        transfer_s, stage_s, load_s, pause_s: see :class:`actors.weights.offer.WeightsReceipt`.
        verify_s: for a generator to compute the canaries.
        canary_gap: mean of the worst canary, nats; None without canaries.
        received_bytes: over the network, of all generators together.
        egress_bytes: what the publisher had sent for the version before.
        changed_share: of the elements; None where it wasn't measured.
        routes: how many generators took it from memory, over the network, as a delta.
        verified: proven version of each generator.
    """

    version: int
    delivered: int
    bytes: int
    seconds: float
    gather_s: float
    transfer_s: float
    stage_s: float
    load_s: float
    pause_s: float
    verify_s: float
    canary_gap: float | None
    received_bytes: int
    egress_bytes: int
    changed_share: float | None
    routes: dict[str, int]
    verified: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """Its metrics, under `weights/`."""
        found = {
            "version": self.version,
            "verified_version": min(self.verified.values(), default=-1),
            "delivered": self.delivered,
            "bytes": self.bytes,
            "sync_s": self.gather_s + self.seconds,
            "gather_s": self.gather_s,
            "transfer_s": self.transfer_s,
            "stage_s": self.stage_s,
            "load_s": self.load_s,
            "pause_s": self.pause_s,
            "verify_s": self.verify_s,
            "received_bytes": self.received_bytes,
            "egress_bytes": self.egress_bytes,
            **{f"route_{route}": count for route, count in self.routes.items()},
            **{f"verified_version/{name}": version for name, version in self.verified.items()},
        }
        if self.canary_gap is not None:
            found["canary_gap"] = self.canary_gap
        if self.changed_share is not None:
            found["changed_share"] = self.changed_share
        return {f"weights/{name}": float(value) for name, value in found.items()}
