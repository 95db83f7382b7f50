"""Data-parallel ranks of a model under training as Ray actors, and the group that the driver calls. Imports no torch.

The policy (policy.py) and the critic (critic.py) are such groups.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import ray

from actors.calls import ActorResources, gather
from actors.trainer.spec import LearnerSpec


class Rank(ABC):
    """One data-parallel rank. Every method that touches the model must be called on all ranks together."""

    def __init__(self, spec: Any, rank: int, device: str) -> None:
        self.spec = spec
        self.rank = rank
        self.device: Any = device
        self.store: Any = None
        self.learner: Any = None
        """What :meth:`learner_maker` made, once joined."""

    @abstractmethod
    def learner_maker(self) -> Callable[[Any, Any, Any], Any]:
        """Imports DeepSpeed. Returns what makes the learner of a spec, a place and a rendezvous store."""

    def prepare(self) -> tuple[str, int]:
        """Import DeepSpeed; rank 0 also opens the rendezvous store. Returns the node's address and the port."""
        self.learner_maker()  # heavy: all ranks import side by side
        from actors.trainer.deepspeed_engine import open_store

        if self.rank:
            return "", 0
        self.store = open_store(self.spec.deadlines.start_s, self.spec.trainer.ranks)
        return ray.util.get_node_ip_address(), self.store.port

    def join(self, address: str, port: int) -> None:
        """Join the other ranks, and load the model."""
        from actors.trainer.deepspeed_engine import Place

        place = Place(self.rank, self.spec.trainer.ranks, self.device, address, port)
        self.learner = self.learner_maker()(self.spec, place, self.store)

    def save(self, folder: Path) -> None:
        """See :meth:`actors.trainer.learner.Learner.save`."""
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        """See :meth:`actors.trainer.learner.Learner.load`."""
        self.learner.load(folder)


class RankGroup:
    """All ranks of a role, as one. Make it with :meth:`start`. Every call has a deadline from the spec.

    Calls raise :class:`FailureError`: the ranks' own failures, INFRASTRUCTURE where a rank died (`<role>_died`) or
    didn't answer in time (`<role>_timeout`), BUG where it raised (`<role>_raised`). After any but a refusal of the
    samples, the ranks are in an unknown state: stop the group and start another from the last checkpoint.
    """

    role: ClassVar[str]
    rank_class: ClassVar[type[Rank]]

    def __init__(self, spec: Any, actors: Sequence[Any]) -> None:
        self.spec = spec
        self.actors = tuple(actors)
        """The Ray actors, rank by rank."""

    @classmethod
    async def start(cls, spec: LearnerSpec, resources: ActorResources | None = None) -> Self:
        """Start all ranks and wait until their models are loaded. Ray must be initialised.

        Args:
            resources: what each rank asks Ray for; with a GPU, it trains on it.
        """
        resources = resources or ActorResources()
        device = "cuda" if resources.num_gpus > 0 else "cpu"
        rank_class: Any = ray.remote(cls.rank_class).options(**resources.options(spec.trainer.threads))
        group = cls(spec, [rank_class.remote(spec, rank, device) for rank in range(spec.trainer.ranks)])
        try:
            started = time.monotonic()
            places = await group._all("prepare", "start", spec.deadlines.start_s)
            left_s = max(1.0, spec.deadlines.start_s - (time.monotonic() - started))
            await group._all("join", "load its model", left_s, *places[0])
        except BaseException:
            group._kill()
            raise
        return group

    async def save(self, folder: Path) -> None:
        """Write model, optimiser, schedule and random states of all ranks, for :meth:`load`."""
        await self._all("save", "save its state", self.spec.deadlines.update_s, folder.absolute())

    async def load(self, folder: Path) -> None:
        """Continue from :meth:`save`, with as many ranks and the same ZeRO stage."""
        await self._all("load", "load its state", self.spec.deadlines.start_s, folder.absolute())

    async def stop(self) -> None:
        """End all ranks at once; they hold nothing that isn't in a checkpoint."""
        self._kill()

    def _kill(self) -> None:
        for actor in self.actors:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be gone already
                ray.kill(actor)

    async def _all(self, method: str, what: str, deadline_s: float, *arguments: Any) -> list[Any]:
        calls = {f"rank {rank}": getattr(actor, method).remote(*arguments) for rank, actor in enumerate(self.actors)}
        results = await gather(calls, self.role, what, deadline_s)
        return [results[name] for name in calls]

    async def _by_sample(self, method: str, what: str, samples: Sequence[Any], *arguments: Any) -> list[Any]:
        """Results of a method that gives each rank's share of the samples by index, in the samples' order."""
        shares = await self._all(method, what, self.spec.deadlines.update_s, ray.put(samples), *arguments)
        by_index = {index: values for share in shares for index, values in share.items()}
        return [by_index[index] for index in range(len(samples))]
