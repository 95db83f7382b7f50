"""The reward server: a Ray actor around ``reward.group_scoring``, and the driver's typed handle to it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.calls import ActorResources
from reward.config import RewardConfig
from reward.group_scoring import GroupScorer, RewardCounters
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Prompt
from rollout.samples import Completion, Score


@dataclass(frozen=True)
class RewardSpec:
    """Everything the server is made from.

    Attributes:
        config: the components, the modules that register them, and the bounds.
        media_folder: the media store, on a file system the server's node sees.
        worker_start_s: for a worker process to import the modules.
    """

    config: RewardConfig
    media_folder: Path
    worker_start_s: float = 60.0

    def resolved(self) -> RewardSpec:
        """The same with absolute paths: an actor's working directory isn't the driver's."""
        modules = tuple(path.resolve() for path in self.config.modules)
        config = self.config.model_copy(update={"modules": modules})
        return replace(self, config=config, media_folder=self.media_folder.resolve())


class RewardServer:
    """Scores groups. An asynchronous actor: many groups are in flight at once, as far as the workers go."""

    def __init__(self, spec: RewardSpec) -> None:
        self._workers = GroupScorer(spec.config, spec.media_folder, start_s=spec.worker_start_s)

    async def ready(self) -> Failure | None:
        """None once every worker has imported the user's modules, or why one couldn't."""
        return await self._workers.ready()

    async def check(self) -> Failure | None:
        """None where all functions exist and accept their arguments, or the first problem."""
        return await self._workers.check()

    async def score(self, prompt: Prompt, completions: tuple[Completion, ...]) -> tuple[Score, ...] | Failure:
        """A score for each completion, in order, or the failure for which the group is to be dropped."""
        return await self._workers.score(prompt, completions)

    async def counters(self) -> RewardCounters:
        """What was done since the start."""
        return self._workers.counters()

    async def stop(self) -> None:
        """Kill the worker processes; groups in flight end with a failure."""
        await asyncio.to_thread(self._workers.stop)


class RewardHandle:
    """The driver's side of a reward server. Every call has a deadline.

    A dead or silent server raises FailureError of kind INFRASTRUCTURE; a failure of the user's code is returned.
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
        what = f"score prompt {prompt.prompt_id}"
        result: tuple[Score, ...] | Failure
        result = await self._call("score", what, deadline_s, prompt, completions)
        return result

    async def ready(self, *, deadline_s: float) -> None:
        """Wait until the workers have imported the user's modules. Raises FailureError if they can't."""
        _raise_if_failure(await self._call("ready", "start", deadline_s))

    async def check(self, *, deadline_s: float) -> None:
        """Raise FailureError where a function doesn't exist or doesn't accept its arguments."""
        _raise_if_failure(await self._call("check", "check its functions", deadline_s))

    async def counters(self, *, deadline_s: float) -> RewardCounters:
        """What the server has done since its start."""
        result: RewardCounters = await self._call("counters", "count", deadline_s)
        return result

    async def stop(self, *, deadline_s: float) -> None:
        """End the workers, then the actor; the actor in any case, within the deadline."""
        try:
            with contextlib.suppress(FailureError):  # it may be dead already, which is what we want
                await self._call("stop", "stop", deadline_s)
        finally:
            ray.kill(self.actor)

    async def _call(self, method: str, what: str, deadline_s: float, *arguments: Any) -> Any:
        ref = getattr(self.actor, method).remote(*arguments)
        try:
            async with asyncio.timeout(deadline_s):  # wait_for may forget that it was cancelled, before Python 3.12
                return await asyncio.wrap_future(ref.future())
        except TimeoutError:
            ray.cancel(ref)
            raise self._timeout(what, deadline_s) from None
        except RayError as error:
            raise self._died(what, error) from error

    def _timeout(self, what: str, deadline_s: float) -> FailureError:
        message = f"the reward server {self.name!r} didn't {what} within {deadline_s:g} s"
        return FailureError(Failure(FailureKind.INFRASTRUCTURE, "reward_server_timeout", message))

    def _died(self, what: str, error: RayError) -> FailureError:
        if isinstance(error, RayTaskError):
            message = f"the reward server {self.name!r} raised when asked to {what}: {error}"
            return FailureError(Failure(FailureKind.BUG, "reward_server_raised", message))
        message = f"the reward server {self.name!r} couldn't {what}: {type(error).__name__}: {error}"
        return FailureError(Failure(FailureKind.INFRASTRUCTURE, "reward_server_died", message))


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
        async with asyncio.timeout(deadline_s):
            await handle.ready(deadline_s=deadline_s)
            await handle.check(deadline_s=deadline_s)
    except BaseException as error:
        ray.kill(actor)
        if isinstance(error, TimeoutError):
            raise handle._timeout("start (are its resources there?)", deadline_s) from None
        raise
    return handle


def _raise_if_failure(result: Failure | None) -> None:
    if result is not None:
        raise FailureError(result)
