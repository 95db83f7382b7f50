"""Ctrl-C: the first lets what must be whole finish, the second stops the command now. SIGTERM counts as Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped."""
STOP_NOW_S = 6.0
"""How long closing may take after the second Ctrl-C; then the process ends as it is."""
CANCEL_EVERY_S = 0.5


class Interruption:
    """How often the user has asked a command to stop.

    Attributes:
        times: how often.
        on_second: called at once by the second Ctrl-C, since what closes the command then may be cut off.
    """

    def __init__(self) -> None:
        self.times = 0
        self.on_second: Callable[[], None] | None = None

    @property
    def stops_now(self) -> bool:
        """Whether nothing more is finished: no checkpoint, no report."""
        return self.times >= 2


def run_until_interrupted(command: Callable[[Interruption], Coroutine[Any, Any, int]], message: str) -> int:
    """Run a command to its end and return its exit code; 130 where Ctrl-C stopped it.

    The first Ctrl-C cancels the command once; what it does in :func:`uninterrupted` is finished first. The second
    cancels whatever the command waits for until it has ended. After `STOP_NOW_S` the process ends by force; its Ray
    cluster and MLflow sender then end by themselves, because both watch it.

    Args:
        message: what the first Ctrl-C says.
    """
    interruption = Interruption()
    by_force = threading.Timer(STOP_NOW_S, _end_process)
    by_force.daemon = True

    async def main() -> int:
        task = asyncio.ensure_future(command(interruption))
        loop = asyncio.get_running_loop()
        endings: set[asyncio.Task[None]] = set()

        def stop() -> None:
            interruption.times += 1
            if interruption.times == 1:
                _say(message)
                task.cancel()
            elif interruption.times == 2:
                _say("stopping now")
                by_force.start()
                if interruption.on_second is not None:
                    interruption.on_second()
                endings.add(asyncio.ensure_future(_cancel_until_done(task)))

        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, stop)
        try:
            code = await task
        except asyncio.CancelledError:
            return INTERRUPTED
        except Exception as error:
            if not interruption.stops_now:
                raise
            logger.debug("the command raised %s: %s after the second Ctrl-C", type(error).__name__, error)
            return INTERRUPTED
        return INTERRUPTED if interruption.stops_now else code

    try:
        return asyncio.run(main())  # which waits for threads, too
    finally:
        by_force.cancel()


async def uninterrupted(act: Coroutine[Any, Any, T]) -> T:
    """Finish an act that must not be left half-done, even if the command is being stopped; then stop.

    A second cancellation cuts the act off.
    """
    task = asyncio.ensure_future(act)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def _cancel_until_done(task: asyncio.Task[int]) -> None:
    """Cut every wait of a task, those of its clean-up too."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_EVERY_S)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _end_process() -> None:
    """End the process without any clean-up."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a live display hides the cursor
        sys.stdout.flush()
    os._exit(INTERRUPTED)
