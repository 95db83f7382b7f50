"""Supervised fine-tuning through the run shell with a stand-in for the trainer: resume, Ctrl-C, verdicts, report."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import interruption
from orchestrator import sft as module
from orchestrator.checkpoints import Checkpoints, read_state
from orchestrator.config.schema import SFTConfig
from orchestrator.report import page
from orchestrator.run_kinds import kind_named
from orchestrator.run_shell import run
from orchestrator.sft import Samples
from rollout.failures import Failure, FailureError, FailureKind
from rollout.samples import TokenSequence
from tests.conftest import overridden, rows, steps
from tests.orchestrator.stand_ins import prompt_set

STEPS = 7
PLAIN = {
    "run": {"seed": 5},
    "model": {"path": "model"},
    "data": {"train": {"path": "train.jsonl"}},
    "sft": {"batch_size": 4},
    "trainer": {"steps": STEPS},
    "checkpoint": {"every_steps": 2},
    "tracking": {"enabled": False},
}


class Trainer:
    """A trainer whose loss depends on every sample it was given, in order, across its checkpoints."""

    def __init__(self) -> None:
        self.total = 0.0
        self.updates = 0
        self.before: Callable[[int], None] = lambda update: None
        """Called with the number of the update that begins."""
        self.gate = asyncio.Event()
        self.gate.set()

    async def update(self, samples: list[TokenSequence], kl_coefficient: float) -> dict[str, float]:
        self.before(self.updates + 1)
        await self.gate.wait()
        for sample in samples:
            self.total = 0.9 * self.total + float(sample.prompt.target)
        self.updates += 1
        return {"train/loss": self.total, "train/learning_rate": 1e-3}

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps([self.total, self.updates]))

    async def load(self, folder: Path) -> None:
        self.total, self.updates = json.loads((folder / "trainer.json").read_text())

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model").write_text(str(self.total))


@pytest.fixture
def fine_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    """Runs `sft` in a folder with a trainer that is prepared first; gives the exit code and the folder."""

    def run_sft(
        name: str, *, resume: bool = False, prepare: Any = lambda trainer: None, has_charts: bool = False
    ) -> Any:
        folder = tmp_path / name
        config = SFTConfig(**overridden(PLAIN, run__folder=str(folder)))

        @contextlib.asynccontextmanager
        async def cluster(*_: Any) -> AsyncIterator[None]:
            yield

        @contextlib.asynccontextmanager
        async def roles(*_: Any, names: tuple[str, ...]) -> AsyncIterator[Any]:
            assert names == ("policy",)
            trainer = Trainer()
            prepare(trainer)
            yield type("Roles", (), {"policy": trainer})

        def samples(config: SFTConfig, media: Any) -> Samples:
            prompts = prompt_set(10)
            return Samples(prompts, {prompt.prompt_id: sample(prompt) for prompt in prompts.prompts})

        monkeypatch.setattr(module, "ray_cluster", cluster)
        monkeypatch.setattr(module, "start_roles", roles)
        monkeypatch.setattr(module, "load_samples", samples)
        monkeypatch.setattr(interruption, "STOP_NOW_S", 600.0)  # by force, the second Ctrl-C would end the tests
        if not has_charts:  # which take seconds
            monkeypatch.setattr(page, "draw_charts", lambda *_: [])
        return run(kind_named("sft"), config, resume=resume), folder

    return run_sft


def sample(prompt: Any) -> TokenSequence:
    return TokenSequence(
        prompt=prompt,
        prompt_token_ids=np.zeros(1, np.int32),
        token_ids=np.zeros(1, np.int32),
        loss_mask=np.ones(1, np.bool_),
    )


def losses(folder: Path) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in steps(folder).items()}


def lost(trainer: Trainer) -> None:
    """The trainer is lost in its fifth update."""

    def die(update: int) -> None:
        if update == 5:
            raise FailureError(Failure(FailureKind.INFRASTRUCTURE, "policy_died", "policy rank 0 was lost"))

    trainer.before = die


def ctrl_c(trainer: Trainer) -> None:
    """Ctrl-C in the third update, which takes another tenth of a second."""

    def press(update: int) -> None:
        if update == 3:
            os.kill(os.getpid(), signal.SIGINT)
            trainer.gate.clear()
            asyncio.get_running_loop().call_later(0.1, trainer.gate.set)

    trainer.before = press


def ctrl_c_twice(trainer: Trainer) -> None:
    """Ctrl-C in the third update, which does not end, and once more."""

    def press(update: int) -> None:
        if update == 3:
            trainer.gate.clear()
            for after_s in (0.0, 0.2):
                asyncio.get_running_loop().call_later(after_s, os.kill, os.getpid(), signal.SIGINT)

    trainer.before = press


def test_a_run_writes_checkpoints_a_report_and_the_model(
    fine_tune: Callable[..., tuple[int, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    code, folder = fine_tune("run", has_charts=True)
    assert code == 0
    assert [path.name for path in Checkpoints(folder, keep=2).whole()] == ["step-000006", "step-000007"]
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    assert "Training loss" in (folder / "report.html").read_text()
    assert (folder / "model" / "model").exists()
    (finished,) = rows(folder, "events", "finished")
    assert (finished["status"], finished["step"], finished["verdict"]) == ("FINISHED", STEPS, "done")
    printed = capfd.readouterr().out
    assert "at step 1 → " in printed
    assert f"7 steps in {0} s" in printed


@pytest.mark.parametrize(("how", "ends_with", "goes_on_from"), [(lost, 1, 4), (ctrl_c, 130, 3), (ctrl_c_twice, 130, 2)])
def test_a_run_that_was_cut_and_resumed_learns_exactly_what_an_uninterrupted_one_does(
    fine_tune: Callable[..., tuple[int, Path]], how: Any, ends_with: int, goes_on_from: int
) -> None:
    # 4 of 10 samples a step: epochs end within batches, and the order of the next epoch counts too.
    _, straight = fine_tune("straight")
    code, folder = fine_tune("cut", prepare=how)
    assert code == ends_with
    latest = Checkpoints(folder, keep=2).latest()
    assert latest is not None
    assert read_state(latest).version == goes_on_from
    assert not (folder / "model").exists()
    code, folder = fine_tune("cut", resume=True)
    assert code == 0
    assert losses(folder) == losses(straight)
    assert (folder / "model" / "model").read_text() == (straight / "model" / "model").read_text()
    assert [e["kind"] for e in rows(folder, "events") if e["kind"] in ("started", "resumed")] == ["started", "resumed"]


def test_the_first_ctrl_c_says_what_it_does_and_does_it(
    fine_tune: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = fine_tune("run", prepare=ctrl_c)
    assert code == 130
    said = "stopping after the current update and a checkpoint; press Ctrl-C again to stop now"
    assert said in capsys.readouterr().err.splitlines()
    assert list(losses(folder)) == [1, 2, 3]
    (finished,) = rows(folder, "events", "finished")
    assert (finished["status"], finished["verdict"]) == ("KILLED", "interrupted at step 3; continue with --resume")
    assert json.loads((folder / "summary.json").read_text())["state"] == "stopped"


def test_a_lost_trainer_ends_the_run_with_a_verdict(fine_tune: Callable[..., tuple[int, Path]]) -> None:
    code, folder = fine_tune("run", prepare=lost)
    assert code == 1
    (finished,) = rows(folder, "events", "finished")
    assert finished["verdict"] == "stopped at step 4: policy rank 0 was lost"
    (why,) = rows(folder, "events", "no_last_checkpoint")
    assert "an update was cut off" in why["why"]


def test_the_second_ctrl_c_leaves_no_half_written_checkpoint_and_says_where_the_run_stands(
    fine_tune: Callable[..., tuple[int, Path]],
) -> None:
    code, folder = fine_tune("run", prepare=ctrl_c_twice)
    assert code == 130
    (finished,) = rows(folder, "events", "finished")
    assert finished["verdict"].startswith("stopped at once at step 2; continue from the latest checkpoint")
    assert not list((folder / "checkpoints").glob(".writing-*"))
