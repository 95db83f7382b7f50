"""The reward server: a Ray actor around ``reward.group_scoring``, and the driver's typed handle to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.calls import START, ActorResources, call
from reward.config import RewardConfig
from reward.group_scoring import GroupScorer
from rollout.failures import Failure, FailureError
from rollout.prompts import Prompt
from rollout.samples import Completion, Score


@dataclass(frozen=True)
class RewardSpec:
    """What a reward server is made from.

    Attributes:
        config: the components, the modules that register them, and the bounds.
        media_folder: the media store, on a file system the server's node sees.
        worker_start_s: for a worker process to import the modules.
    """

    config: RewardConfig
    media_folder: Path
    worker_start_s: float = 60.0

    def resolved(self) -> RewardSpec:
        """The same with absolute paths, because an actor has another working directory than the driver."""
        modules = tuple(path.resolve() for path in self.config.modules)
        config = self.config.model_copy(update={"modules": modules})
        return replace(self, config=config, media_folder=self.media_folder.resolve())


class RewardServer:
    """Scores groups. An asynchronous actor: it takes many groups at once; its worker processes take them in turn."""

    def __init__(self, spec: RewardSpec) -> None:
        self._scorer = GroupScorer(spec.config, spec.media_folder, start_s=spec.worker_start_s)

    async def ready(self) -> Failure | None:
        """None once every worker has imported the user's modules, or the failure of one that couldn't."""
        return await self._scorer.ready()

    async def check(self) -> Failure | None:
        """None if all functions exist and accept their arguments, or the failure of the first that doesn't."""
        return await self._scorer.check()

    async def score(self, prompt: Prompt, completions: tuple[Completion, ...]) -> tuple[Score, ...] | Failure:
        """A score for each completion, in order, or the failure for which the group is to be dropped."""
        return await self._scorer.score(prompt, completions)

    async def stop(self) -> None:
        """Kill the worker processes. Groups that are being scored end with a failure."""
        await asyncio.to_thread(self._scorer.stop)


class RewardHandle:
    """The driver's side of a reward server. Every call has a deadline.

    A server that died or doesn't answer raises FailureError of kind INFRASTRUCTURE. A failure of the user's code is
    returned.
    """

    def __init__(self, actor: Any, name: str = "reward") -> None:
        self.actor = actor
        self.name = name

    async def score(
        self, prompt: Prompt, completions: tuple[Completion, ...], *, deadline_s: float
    ) -> tuple[Score, ...] | Failure:
        """A score for each completion, or the failure for which the group is to be dropped.

        Raises:
            FailureError: INFRASTRUCTURE where the server died (``reward_server_died``) or didn't answer in time
                (``reward_server_timeout``; the call is cancelled); BUG where the server itself raised.
        """
        reference = self.actor.score.remote(prompt, completions)
        result: tuple[Score, ...] | Failure
        result = await self._call(reference, f"score prompt {prompt.prompt_id}", deadline_s)
        return result

    async def ready(self, *, deadline_s: float) -> None:
        """Wait until the workers have imported the user's modules. Raises FailureError if they can't."""
        _raise_if_failure(await self._call(self.actor.ready.remote(), START, deadline_s))

    async def check(self, *, deadline_s: float) -> None:
        """Raise FailureError where a function doesn't exist or doesn't accept its arguments."""
        _raise_if_failure(await self._call(self.actor.check.remote(), "check its functions", deadline_s))

    async def stop(self, *, deadline_s: float) -> None:
        """End the workers, then the actor. The actor is ended within the deadline in any case."""
        try:
            with contextlib.suppress(FailureError):  # it may be dead already
                await self._call(self.actor.stop.remote(), "stop", deadline_s)
        finally:
            ray.kill(self.actor)

    async def _call(self, reference: Any, what: str, deadline_s: float) -> Any:
        who = f"the reward server {self.name!r}"
        return await call(reference, role="reward_server", who=who, what=what, deadline_s=deadline_s)


async def start_reward_server(
    spec: RewardSpec, resources: ActorResources | None = None, *, deadline_s: float, name: str = "reward"
) -> RewardHandle:
    """Start a reward server, wait until its workers are ready, and check its functions. Ray must be initialised.

    Args:
        spec: what it is made from; relative paths are taken from the driver's working directory.
        resources: what to ask Ray for; nothing by default. Its worker processes live inside it.
        deadline_s: for all of it together.
        name: what messages call it.
    Raises:
        FailureError: USER_CODE where a module doesn't import (``module_failed``, ``module_missing``), or a function
            doesn't exist (``reward_unknown_function``) or refuses its arguments (``reward_bad_arguments``);
            INFRASTRUCTURE where the server didn't start in time. The actor is gone then.
    """
    actor: Any = (
        ray.remote(RewardServer).options(**(resources or ActorResources()).options(threads=1)).remote(spec.resolved())
    )
    handle = RewardHandle(actor, name)
    try:
        started = time.monotonic()
        await handle.ready(deadline_s=deadline_s)
        await handle.check(deadline_s=deadline_s - (time.monotonic() - started))
    except BaseException:
        ray.kill(actor)
        raise
    return handle


def _raise_if_failure(result: Failure | None) -> None:
    if result is not None:
        raise FailureError(result)
