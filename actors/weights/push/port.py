"""A generator as the trainer's rank 0 calls it during a push. Imports no torch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GeneratorPort:
    """A push target that is a Ray actor; implements :class:`actors.weights.push.recipients.PushTarget`.

    Attributes:
        name: the generator's name.
        actor: its Ray actor.
        workers: number of its vLLM engine's worker processes.
        version: the version to push.
    """

    name: str
    actor: Any
    workers: int
    version: int

    @property
    def incarnation(self) -> str:
        """The actor's id, which a restart changes."""
        identity: str = self.actor._actor_id.hex()
        return identity

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Future[Any]:
        """Join the transfer group."""
        return self._future(self.actor.push_connect.remote(init_info))

    def start_weight_update(self) -> Future[Any]:
        """Open the session."""
        return self._future(self.actor.push_begin.remote(self.version))

    def update_weights(self, update_info: dict[str, Any]) -> Future[Any]:
        """Receive tensors, or compare digests."""
        return self._future(self.actor.push_update.remote(update_info))

    def finish_weight_update(self, version: int, digest: str) -> Future[Any]:
        """Serve the version."""
        return self._future(self.actor.push_finish.remote(version, digest))

    @staticmethod
    def _future(reference: Any) -> Future[Any]:
        found: Future[Any] = reference.future()
        return found
