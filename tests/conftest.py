"""Shared by tests of whole runs: a tiny model, data and recipes on disk, and the command as a real process.

Every process that a command starts inherits a mark in its environment, so that a test can tell what was left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import settings
from PIL import Image

from tests import parts
from tests.tiny_model import build_tiny_vlm

# A test is judged by what it finds; how long it takes says more of the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

MARK = "COUNTERPOINT_TEST_MARK"
COMMAND = Path(sys.prefix, "bin", "counterpoint")
POLL_S = 0.1

REWARDS = """
import pathlib, time
from reward.registry import reward_function

@reward_function("share_of_vowels")
def share_of_vowels(request):
    text = request.completion.lower()
    return sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text))

@reward_function("short")
def short(request):
    return -len(request.token_ids) / 100

@reward_function("slowly")
def slowly(request, *, seconds, log=None):
    time.sleep(seconds)
    if log is not None:
        with pathlib.Path(log).open("a") as out:
            out.write("called\\n")
    return share_of_vowels(request)
"""

SLOW = pytest.StashKey[dict[str, str]]()
"""Every slow test that was collected, with its kind."""
ENGINE_TIMEOUT_S, SLOW_TIMEOUT_S = 1800.0, 2400.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", type=Path, help="write the parts of all slow tests into this file")
    parser.addoption("--record", action="store_true", help="write what each test took into tests/durations.json")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before anything is deselected: kinds and time-outs; with several processes, the longest groups come first."""
    config.stash[SLOW] = {}
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        if "slow" in names:
            config.stash[SLOW][item.nodeid] = parts.kind_of(names)
        if names & {"slow", "engine"} and "timeout" not in names:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S if "slow" in names else ENGINE_TIMEOUT_S))
    if hasattr(config, "workerinput"):
        rank = {group: index for index, group in enumerate(parts.longest_first(item.nodeid for item in items))}
        items.sort(key=lambda item: rank[parts.group_of(item.nodeid)])
    if config.getoption("--plan"):
        config.getoption("--plan").write_text(json.dumps(parts.plan(config.stash[SLOW], parts.durations())))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one group run in one process, in the order of their collection."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return parts.group_of(nodeid)

    return GroupScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Durations are recorded by the process that hears of all tests."""
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(DurationRecorder())


class DurationRecorder:
    """Adds up what each test took, and writes it into the table at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.slow: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        parts.write_durations(self.seconds, self.slow)


@dataclass
class Command:
    """A command of `counterpoint` as a process of its own, in a session of its own, as a terminal would start it."""

    arguments: tuple[str, ...]
    folder: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    code: int | None = None
    """Its exit code, where a fixture waited for it."""

    @classmethod
    def on(
        cls, recipe: dict[str, Any], folder: Path, *arguments: str, command: str = "train", **environment: str
    ) -> Command:
        """Start a command on a recipe, which is written into `folder` together with what it prints."""
        number = len(list(folder.glob("recipe-*.yaml")))
        path = folder / f"recipe-{number}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        arguments = (command, str(path), *arguments)
        return cls(arguments, Path(recipe["run"]["folder"]), folder / f"output-{number}.txt", environment)

    def __post_init__(self) -> None:
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | self.environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(COMMAND), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.log.parent,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def wait(self, deadline_s: float = 1200.0) -> int:
        """Its exit code."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s:g} s:\n{self.output[-5000:]}") from None

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of the driver alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def until(self, happened: Callable[[], Any], what: str, deadline_s: float = 900.0) -> Any:
        """Wait for something to have happened while the command runs; returns what `happened` returned."""
        end = time.monotonic() + deadline_s
        while not (found := happened()):
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before {what}:\n{self.output[-5000:]}")
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {deadline_s:g} s:\n{self.output[-5000:]}")
            time.sleep(POLL_S)
        return found

    def until_printed(self, text: str, deadline_s: float = 900.0) -> None:
        """Wait until it has printed this."""
        self.until(lambda: text in self.output, f"'{text}' printed", deadline_s)

    def until_step(self, step: int, deadline_s: float = 900.0) -> None:
        """Wait until this training step is recorded."""
        self.until(lambda: any(row["step"] >= step for row in rows(self.folder, "metrics")), f"step {step}", deadline_s)

    def processes(self, named: str = "") -> list[psutil.Process]:
        """Every living process that it started, directly or not, with `named` in its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                if process.environ().get(MARK) == self.mark and named in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left_behind(self, deadline_s: float = 60.0) -> list[str]:
        """What is still running of it after so long; empty once nothing is."""
        end = time.monotonic() + deadline_s
        while (alive := self.processes()) and time.monotonic() < end:
            time.sleep(POLL_S)
        return [describe(process) for process in alive]

    def clear_away(self) -> None:
        """End whatever is left."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue
        if self.process.poll() is None:
            self.process.wait(10)


def describe(process: psutil.Process) -> str:
    """A process for an assertion's message."""
    try:
        return f"{process.pid} {process.name()}: {' '.join(process.cmdline())[:150]}"
    except psutil.Error:
        return f"{process.pid} (gone)"


def rows(folder: Path, name: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Whole rows of a record's file ("metrics", "events", "evaluations", "samples"), of events optionally one kind."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if kind is None or row["kind"] == kind]


def steps(folder: Path) -> dict[int, dict[str, float]]:
    """Every metric of each training step, in the order of the record; fails where a metric was told twice."""
    told: dict[int, dict[str, float]] = {}
    for row in rows(folder, "metrics"):
        if row["step"] == 0:
            continue  # the time of what comes before training
        twice = told.setdefault(row["step"], {}).keys() & row["values"].keys()
        assert not twice, f"step {row['step']} has {twice} twice"
        told[row["step"]] |= row["values"]
    return told


def overridden(tree: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """A copy of a recipe with other values, keys dotted by double underscores (trainer__steps=3)."""
    tree = deepcopy(tree)
    for name, value in overrides.items():
        *parents, last = name.split("__")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return tree


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of half a million random parameters."""
    return build_tiny_vlm(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 training and 6 held-out questions about images of one colour, and a file of rewards."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "rewards.py").write_text(REWARDS)
    random = np.random.default_rng(0)
    for name, count in (("train", 24), ("held_out", 6)):
        lines = []
        for index in range(count):
            image = f"{name}_{index}.png"
            colour = random.integers(0, 255, 3, dtype=np.uint8)
            Image.fromarray(np.broadcast_to(colour, (56, 56, 3)).copy()).save(folder / image)
            row = {"prompt": f"<image>What is {index}?", "images": [image], "target": str(index), "response": "a ha"}
            lines.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_recipe(tiny_vlm: Path, questions: Path) -> dict[str, Any]:
    """A recipe of a few quick steps with everything on. Paths are absolute."""
    columns = {"images_column": "images"}
    return {
        "run": {"name": "small", "seed": 3},
        "model": {"path": str(tiny_vlm), "precision": "float32", "max_length": 128},
        "data": {
            "train": {"path": str(questions / "train.jsonl"), **columns},
            "evaluation": {"path": str(questions / "held_out.jsonl"), **columns},
        },
        "rollout": {"prompts_per_step": 4, "group_size": 3, "sampling": {"max_tokens": 12}},
        "reward": {
            "modules": [str(questions / "rewards.py")],
            "components": [{"function": "share_of_vowels"}, {"function": "short", "weight": 0.1}],
        },
        "algorithm": {"kl": {"coefficient": 0.05, "estimator": "k3", "placement": "loss"}},
        "trainer": {"steps": 3, "learning_rate": 1.0e-3, "micro_batch_tokens": 1024},
        "generator": {"enforce_eager": True, "kv_cache_gib": 0.1, "max_sequences": 32},
        "evaluation": {"every_steps": 2, "sampling": {"max_tokens": 12}},
        "checkpoint": {"every_steps": 1},
        "tracking": {"samples_every_steps": 2, "samples": 4},
        "deadlines": {"start_s": 600.0, "generate_s": 300.0, "score_s": 300.0, "update_s": 300.0, "sync_s": 300.0},
    }


@pytest.fixture(scope="session")
def slow_recipe(small_recipe: dict[str, Any]) -> dict[str, Any]:
    """The small recipe without reference and evaluation, whose rewards take about half a second a step."""
    recipe = overridden(
        small_recipe,
        reward__components=[{"function": "slowly", "arguments": {"seconds": 0.04}}],
        algorithm={},
        trainer__steps=8,
        checkpoint__every_steps=2,
        checkpoint__export=False,
        tracking__samples_every_steps=0,
    )
    del recipe["data"]["evaluation"], recipe["evaluation"]
    return recipe


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands on a recipe; at the end of the test, whatever is left of them is killed."""
    started: list[Command] = []

    def start_command(recipe: dict[str, Any], *arguments: str, command: str = "train", **environment: str) -> Command:
        if "folder" not in recipe["run"]:
            recipe = overridden(recipe, run__folder=str(tmp_path / "run"))
        started.append(Command.on(recipe, tmp_path, *arguments, command=command, **environment))
        return started[-1]

    yield start_command
    for command in started:
        command.clear_away()
