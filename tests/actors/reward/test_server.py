"""The reward server as a real Ray actor, and the driver's handle to it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.calls import ActorResources
from actors.reward.server import RewardSpec, start_reward_server
from reward.config import RewardComponentConfig, RewardConfig
from rollout.failures import Failure, FailureError, FailureKind
from rollout.prompts import Message, Prompt, TextPart
from rollout.samples import Completion, FinishReason

pytestmark = pytest.mark.engine

FUNCTIONS = """
import os, time
from reward.registry import reward_function

@reward_function("behaves")
def behaves(request):
    if request.completion == "hang":
        time.sleep(600)
    if request.completion == "raise":
        raise KeyError("no such column")
    return {"length": len(request.completion), "parent": os.getppid()}
"""
PROMPT = Prompt((Message("user", (TextPart("How many?"),)),), "7")


def group(*texts: str) -> tuple[Completion, ...]:
    ids = np.zeros(2, np.int32)
    return tuple(Completion(ids, np.zeros(2, np.float32), ids, FinishReason.STOP, text) for text in texts)


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_session: None) -> None:
    """All tests here have actors."""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's, which isn't the actors': the module is named relative to it."""
    monkeypatch.chdir(tmp_path)


def spec(folder: Path, function: str = "behaves", **arguments: object) -> RewardSpec:
    (folder / "functions.py").write_text(FUNCTIONS)
    components = (RewardComponentConfig(function=function, arguments=arguments),)
    config = RewardConfig(
        components=components, modules=(Path("functions.py"),), workers=2, deadline_s=30.0, max_attempts=1
    )
    return RewardSpec(config, folder / "media")


async def test_a_server_scores_reports_failures_times_out_and_its_death_is_infrastructure(tmp_path: Path) -> None:
    handle = await start_reward_server(spec(tmp_path), deadline_s=120)
    try:
        scores = await handle.score(PROMPT, group("a", "bcd"), deadline_s=30)
        assert not isinstance(scores, Failure)
        assert [s.components["behaves/length"] for s in scores] == [1.0, 3.0]
        server = psutil.Process(int(scores[0].components["behaves/parent"]))
        workers = server.children()
        assert len(workers) == 2

        failure = await handle.score(PROMPT, group("a", "raise"), deadline_s=30)
        assert isinstance(failure, Failure)
        assert failure.reason == "reward_raised"

        with pytest.raises(FailureError, match=r"didn't score prompt .* within 1 s") as late:
            await handle.score(PROMPT, group("hang"), deadline_s=1)
        assert (late.value.failure.kind, late.value.failure.reason) == (
            FailureKind.INFRASTRUCTURE,
            "reward_server_timeout",
        )
        assert isinstance(await handle.score(PROMPT, group("a"), deadline_s=30), tuple)

        flying = asyncio.create_task(handle.score(PROMPT, group("hang"), deadline_s=60))
        await asyncio.sleep(0.2)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(FailureError) as dead:
            await flying
        assert (dead.value.failure.kind, dead.value.failure.reason) == (
            FailureKind.INFRASTRUCTURE,
            "reward_server_died",
        )
        _, left = await asyncio.to_thread(psutil.wait_procs, workers, 20)
        assert not left, "the workers outlived their server"
    finally:
        await handle.stop(deadline_s=10)


async def test_a_server_whose_function_does_not_exist_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match="Did you mean 'behaves'") as caught:
        await start_reward_server(spec(tmp_path, "behave"), deadline_s=120)
    assert caught.value.failure.reason == "reward_unknown_function"


async def test_a_server_whose_resources_are_nowhere_gives_up_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match="resources") as caught:
        await start_reward_server(spec(tmp_path), ActorResources(custom={"nowhere": 1}), deadline_s=3)
    assert caught.value.failure.kind is FailureKind.INFRASTRUCTURE
