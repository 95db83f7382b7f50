"""One generator and one Ray session for all files whose tests leave them as they found them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import ray

from tests.tiny_model import build_tiny_vlm

if TYPE_CHECKING:
    from tests.actors.generator.test_generator import Setup

REACHES_INSIDE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
"""Lets a test run functions of its own in an engine's worker."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session_generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    """Ask for `shared_generator` instead."""
    from tests.actors.generator.test_generator import start

    root = tmp_path_factory.mktemp("generator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REACHES_INSIDE, "1")
        made = await start(build_tiny_vlm(root / "model"), root)
    yield made
    await made.generator.stop()
    made.policy.publisher.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_generator(session_generator: Setup) -> AsyncIterator[Setup]:
    """A generator with a plain policy, on a version of this module's own; whatever a test changes, it brings back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REACHES_INSIDE, "1")
        await session_generator.generator.load_weights(session_generator.policy.begin_anew())
        yield session_generator


@pytest.fixture(scope="module")
def ray_session() -> None:
    """Ray on this machine, started by the first who asks and left for the next."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
