"""Starts the local Ray cluster of a run, or connects to the cluster that the recipe names."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import AsyncIterator

from actors.config import DeadlineConfig
from orchestrator.config.schema import ClusterConfig
from orchestrator.roles.table import ROLES
from rollout.failures import Failure, FailureError, FailureKind

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 2**20
"""Object store of a local cluster. Token ids cross it; pixels and weights do not."""
MAX_LOCAL_ACTORS = 64
"""Actors of one role that a local cluster has room for: it shares the machine's resources and reserves none."""


@contextlib.asynccontextmanager
async def ray_cluster(config: ClusterConfig, deadlines: DeadlineConfig) -> AsyncIterator[None]:
    """Ray for the length of a run: a cluster of its own on this machine, or the one that the recipe names.

    A local cluster ends with the run, with every process it started. On a running cluster only this run's actors end.

    Raises:
        FailureError: INFRASTRUCTURE (`ray_unavailable`): Ray didn't start, or didn't answer, in time.
    """
    import ray

    where = config.address or "a local cluster"
    connection = _Connection(config)
    try:
        try:
            await asyncio.wait_for(asyncio.shield(connection.made), deadlines.start_s)
        except TimeoutError as error:
            raise _unavailable(where, f"it didn't answer within deadlines.start_s = {deadlines.start_s:g} s") from error
        except asyncio.CancelledError:
            await asyncio.wait({connection.made}, timeout=deadlines.stop_s)  # a start can only be undone, below
            raise
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise _unavailable(where, f"{type(error).__name__} {error}") from error
        yield
    finally:
        if connection.made.done():
            await asyncio.to_thread(ray.shutdown)
        connection.ended.set()


class _Connection:
    """Connects in a thread of its own, so that nothing waits for Ray, which looks for a cluster for minutes.

    The thread lives until `ended`: the kernel ends a local cluster's processes with the thread that started them.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(config, self.made.get_loop()), name="ray", daemon=True)
        thread.start()

    def _run(self, config: ClusterConfig, loop: asyncio.AbstractEventLoop) -> None:
        error: Exception | None = None
        try:
            _connect(config)
        except Exception as caught:  # whatever it is, it is raised where the connection is awaited
            error = caught
        with contextlib.suppress(RuntimeError):  # the event loop is closed and nobody waits any more
            loop.call_soon_threadsafe(self._settle, error)
            self.ended.wait()

    def _settle(self, error: Exception | None) -> None:
        if self.made.cancelled():
            return
        if error is None:
            self.made.set_result(None)
        else:
            self.made.set_exception(error)


def _unavailable(where: str, why: str) -> FailureError:
    message = (
        f"Ray ({where}) can't be used: {why}. Check cluster.address, and that the cluster runs. If Ray's log says "
        "InvalidAuthToken, set RAY_AUTH_MODE=token in the environment of the run."
    )
    return FailureError(Failure(FailureKind.INFRASTRUCTURE, "ray_unavailable", message))


def _connect(config: ClusterConfig) -> None:
    import ray

    if config.address is not None:
        ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",  # never the cluster that an environment variable or an earlier start points to
        num_cpus=max(1, math.ceil(MAX_LOCAL_ACTORS * sum(role.resources(config).cpus for role in ROLES))),
        resources=_custom(config) or None,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Ray's idle workers, which a run never uses, would compete with the actors' start for the cores.
        _system_config={"enable_worker_prestart": False, "prestart_worker_first_driver": False},
    )


def _custom(config: ClusterConfig) -> dict[str, float]:
    """Custom resources that a local cluster offers, so that recipes for a real one run on it too."""
    offered: dict[str, float] = {}
    for role in ROLES:
        for name, amount in role.resources(config).custom.items():
            offered[name] = offered.get(name, 0.0) + amount * MAX_LOCAL_ACTORS
    return offered
