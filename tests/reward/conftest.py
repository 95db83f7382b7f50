"""Requests and started workers for the reward tests, and a file of misbehaving reward functions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from reward.config import RewardComponentConfig, RewardConfig
from reward.group_scoring import GroupScorer
from reward.registry import RewardRequest
from rollout.prompts import Prompt

FUNCTIONS = """
import ctypes, os, pathlib, time
import numpy as np
from reward.registry import reward_function

@reward_function("length")
def length(request):
    return len(request.completion)

@reward_function("raises")
def raises(request):
    raise KeyError("no such column")

@reward_function("exits")
def exits(request):
    raise SystemExit(3)

@reward_function("hangs")
def hangs(request):
    while True:
        time.sleep(60)

@reward_function("hangs_on_stop")
def hangs_on_stop(request):
    while request.completion == "stop":
        time.sleep(60)
    return 1.0

@reward_function("returns")
def returns(request, *, what):
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "list": [1.0], "bool": True}[what]

@reward_function("wrong_count", batched=True)
def wrong_count(requests):
    return [1.0] * (len(requests) + 1)

@reward_function("dies")
def dies(request, *, code):
    os._exit(code)

@reward_function("segfaults")
def segfaults(request):
    ctypes.string_at(0)

@reward_function("flaky")
def flaky(request, *, file):
    file = pathlib.Path(file)
    with file.open("a") as out:
        out.write(request.completion + "\\n")
    seen = file.read_text().split()
    if request.completion == "b" and seen.count("b") == 1:
        raise RuntimeError("try again")
    return seen.count(request.completion)

@reward_function("process")
def process(request):
    return os.getpid()

@reward_function("red", batched=True)
def red(requests):
    return [r.images[0].getpixel((0, 0))[0] for r in requests]
"""


@pytest.fixture
def request_for() -> Callable[..., RewardRequest]:
    """A request from a completion's text and a target."""

    def make(completion: str, target: Any = None, tokens: int = 0) -> RewardRequest:
        return RewardRequest(Prompt((), target), completion, np.zeros(tokens, np.int32))

    return make


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    """A user's file of reward functions, most of which misbehave."""
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest_asyncio.fixture
async def workers(functions: Path, tmp_path: Path) -> AsyncIterator[Callable[..., GroupScorer]]:
    """Starts workers for components, given by name or in full, and stops them at the end."""
    started: list[GroupScorer] = []

    def start(*components: str | RewardComponentConfig, **settings: Any) -> GroupScorer:
        config = RewardConfig(
            components=tuple(RewardComponentConfig(function=c) if isinstance(c, str) else c for c in components),
            **{"modules": (functions,), "deadline_s": 20.0, **settings},
        )
        started.append(GroupScorer(config, tmp_path / "media"))
        return started[-1]

    yield start
    for one in started:
        one.stop()
