"""The trainer's side of a generator during a push: calls to its actor whose answers are futures. Imports no torch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GeneratorPort:
    """One generator, as the trainer's rank 0 calls it; see :class:`actors.weights.push.recipients.GeneratorPort`.

    Attributes:
        name: of the generator.
        actor: its Ray actor.
        workers: its engine's processes.
        version: that is being pushed.
    """

    name: str
    actor: Any
    workers: int
    version: int

    @property
    def incarnation(self) -> str:
        """Another one after a restart."""
        identity: str = self.actor._actor_id.hex()
        return identity

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]:
        """Join the group."""
        return self._future(self.actor.push_connect.remote(init_info))

    def start_weight_update(self) -> Future[Any]:
        """Open the session."""
        return self._future(self.actor.push_begin.remote(self.version))

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]:
        """Receive."""
        return self._future(self.actor.push_update.remote(update_info))

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]:
        """Serve the version."""
        return self._future(self.actor.push_finish.remote(version, digest))

    @staticmethod
    def _future(reference: Any) -> Future[Any]:
        found: Future[Any] = reference.future()
        return found
