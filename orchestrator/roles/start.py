"""Starts the roles of a run side by side, and stops every one of them at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config.schema import Config
from orchestrator.roles.table import ROLES, AnyConfig, OnEvent, Role, RunningRole, needed_roles
from rollout.user_code import import_modules

if TYPE_CHECKING:
    from actors.trainer.critic import CriticGroup
    from actors.trainer.policy import PolicyGroup
    from orchestrator.roles.fleet import GeneratorFleet
    from orchestrator.roles.reference import Reference
    from orchestrator.roles.rewards import Rewards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Roles:
    """The started roles of a run. A role that the run doesn't need, or that nobody asked for, is None."""

    policy: PolicyGroup | None = None
    critic: CriticGroup | None = None
    fleet: GeneratorFleet | None = None
    reference: Reference | None = None
    rewards: Rewards | None = None


FIELDS = {"generator": "fleet", "reward": "rewards"}
"""Fields of :class:`Roles` that are not named like their role."""


@contextlib.asynccontextmanager
async def start_roles(
    config: AnyConfig, media_folder: Path, on_event: OnEvent, names: Collection[str] | None = None
) -> AsyncIterator[Roles]:
    """Start roles side by side; at the end stop every one of them, also those of a start that failed.

    Args:
        media_folder: the media store, on a file system that every node sees.
        on_event: told of deaths and restarts (kind, data).
        names: of the roles to start, as far as the run needs them; None for all that it needs.
    Raises:
        FailureError: a role didn't start; says which and why.
        ValueError: a name is no role.
    """
    if isinstance(config, Config):
        import_modules(config.algorithm.modules)  # they decide which roles are needed
    starts = {
        role.name: asyncio.create_task(_start(role, config, media_folder, on_event)) for role in _asked(config, names)
    }
    try:
        await asyncio.gather(*starts.values())
        running: dict[str, Any] = {FIELDS.get(name, name): start.result() for name, start in starts.items()}
        yield Roles(**running)
    finally:
        await _stop(list(starts.values()), config.deadlines.stop_s)


def _asked(config: AnyConfig, names: Collection[str] | None) -> list[Role]:
    known = [role.name for role in ROLES]
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"there is no role {', '.join(unknown)}; the roles are {', '.join(known)}")
    return [role for role in needed_roles(config) if names is None or role.name in names]


async def _start(role: Role, config: AnyConfig, media_folder: Path, on_event: OnEvent) -> RunningRole:
    return await role.start(config, media_folder, on_event)


async def _stop(starts: list[asyncio.Task[RunningRole]], stop_s: float) -> None:
    """Cut the starts that are under way, then stop what runs. Each of the two gets at most twice `stop_s`."""
    for start in starts:
        start.cancel()
    if starts:
        await asyncio.wait(starts, timeout=2 * stop_s)
    running = [start.result() for start in starts if start.done() and not start.cancelled() and not start.exception()]
    stops = [asyncio.ensure_future(role.stop()) for role in running]
    _, late = await asyncio.wait(stops, timeout=2 * stop_s) if stops else (set(), set())
    for stop in late:
        stop.cancel()
    if late:
        logger.warning("%d of %d roles did not stop within %g s", len(late), len(running), 2 * stop_s)
    await asyncio.gather(*(stop for stop in stops if stop.done()), return_exceptions=True)
