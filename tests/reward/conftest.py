"""Requests, started scorers and a file of misbehaving reward functions, which note each of their calls in a file."""

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
import ctypes, functools, os, pathlib, time
import numpy as np
from reward.registry import reward_function
from reward.verifiers import numeric_match

CALLS = pathlib.Path(__file__).with_name("calls")

def noting(name, **options):
    # Registers a function that first notes its name and the (first) completion that it is called with.
    def register(function):
        @functools.wraps(function)
        def call(given, **arguments):
            first = given[0] if isinstance(given, list) else given
            with CALLS.open("a") as out:
                out.write(f"{name} {first.completion}\\n")
            return function(given, **arguments)
        return reward_function(name, **options)(call)
    return register

noting("number")(numeric_match)

@noting("length")
def length(request):
    return len(request.completion)

@noting("raises")
def raises(request):
    raise KeyError("no such column")

@noting("exits")
def exits(request):
    raise SystemExit(3)

@noting("hangs")
def hangs(request):
    while True:
        time.sleep(60)

@noting("hangs_on_stop")
def hangs_on_stop(request):
    while request.completion == "stop":
        time.sleep(60)
    return 1.0

@noting("returns")
def returns(request, *, what):
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "list": [1.0], "bool": True}[what]

@noting("wrong_count", batched=True)
def wrong_count(requests):
    return [1.0] * (len(requests) + 1)

@noting("dies")
def dies(request, *, code):
    os._exit(code)

@noting("segfaults")
def segfaults(request):
    ctypes.string_at(0)

@noting("flaky")
def flaky(request):
    seen = CALLS.read_text().split()
    if request.completion == "b" and seen.count("b") == 1:
        raise RuntimeError("try again")
    return seen.count(request.completion)

@noting("process")
def process(request):
    return os.getpid()

@noting("red", batched=True)
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


@pytest.fixture
def calls_of(functions: Path) -> Callable[[str], list[str]]:
    """The completions that a function of the file was called with, in order; of a group, the first."""

    def read(function: str) -> list[str]:
        lines = functions.with_name("calls").read_text().splitlines()
        return [completion for name, completion in map(str.split, lines) if name == function]

    return read


@pytest_asyncio.fixture
async def start_scorer(functions: Path, tmp_path: Path) -> AsyncIterator[Callable[..., GroupScorer]]:
    """Starts a scorer with components, given by name or in full, and stops it at the end."""
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
