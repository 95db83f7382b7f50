"""What a person sees of a run, on a terminal and in a file."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from orchestrator.record.progress import LINES_PER_HEADER, Mode, Progress, StderrHandler

METRICS = {
    "reward/mean": 0.5,
    "train/kl_reference": 0.0123,
    "rollout/mean_tokens": 19.25,
    "rollout/tokens_per_s": 1234.0,
    "rollout/mismatch_kl": 2e-6,
    "rollout/staleness": 0.5,
    "rollout/dropped": 3,
    "time/step_s": 1.25,
}


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A progress with a captured console."""

    def __init__(self, total: int, *, mode: Mode = "plain", terminal: bool = False) -> None:
        self.clock = Clock()
        self.file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        self.console = Console(file=self.file, force_terminal=terminal, width=100, color_system=None)
        self.progress = Progress(total, mode=mode, console=self.console, clock=self.clock)

    def steps(self, first: int, last: int, seconds: float = 10.0) -> None:
        for version in range(first, last + 1):
            self.clock.now += seconds
            self.progress.step(version, METRICS)

    @property
    def text(self) -> str:
        self.file.flush()
        return self.file.buffer.getvalue().decode()  # type: ignore[attr-defined]

    @property
    def shown(self) -> str:
        with self.console.capture() as captured:
            self.console.print(self.progress.display())
        return captured.get()


def test_every_figure_of_a_step_is_in_its_line() -> None:
    screen = Screen(10)
    screen.steps(1, 1)
    header, line = screen.text.splitlines()
    assert header.split() == [
        *("step", "reward", "KL", "length", "tokens/s", "staleness", "mismatch", "dropped", "s/step", "left")
    ]
    assert line.split() == ["1/10", "0.500", "0.0123", "19.2", "1,234", "0.50", "2.0e-06", "3", "1.25", "0:11"]


def test_lines_stand_under_their_header() -> None:
    screen = Screen(1000)
    screen.steps(1, 20)
    assert len({len(line) for line in screen.text.splitlines()}) == 1


def test_a_file_gets_no_control_characters() -> None:
    screen = Screen(3)
    with screen.progress:
        screen.progress.phase("starting\x1b[31m the \rgenerators")
        screen.steps(1, 3)
        screen.progress.note("odd \x1b]0;title\x07 text")
        screen.progress.finish({"run": "x\x08"})
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", screen.text)


def test_fast_steps_share_a_line_but_the_last_is_always_there() -> None:
    screen = Screen(50)
    screen.steps(1, 50, seconds=0.1)
    steps = [line.split()[0] for line in screen.text.splitlines() if "/50" in line]
    assert steps[0] == "1/50"
    assert steps[-1] == "50/50"
    assert len(steps) < 10


def test_the_header_comes_again_rarely() -> None:
    screen = Screen(2 * LINES_PER_HEADER)
    screen.steps(1, 2 * LINES_PER_HEADER)
    assert screen.text.count("tokens/s") == 2


def test_time_left_follows_the_recent_steps() -> None:
    screen = Screen(100)
    screen.steps(1, 40, seconds=30.0)
    screen.steps(41, 80, seconds=3.0)
    assert screen.text.splitlines()[-1].split()[-1] == "1:00"


def test_a_metric_that_is_not_there_is_a_dash() -> None:
    screen = Screen(2)
    screen.progress.step(1, {"reward/mean": 0.5})
    assert screen.text.splitlines()[-1].split() == ["1/2", "0.500", *"-" * 7, "?"]


def test_a_reward_that_is_not_finite_is_shown_and_leaves_the_trend_alone() -> None:
    screen = Screen(9, mode="live")
    for version, reward in enumerate([0.1, float("nan"), 0.9], start=1):
        screen.progress.step(version, {"reward/mean": reward})
    assert "▁█" in screen.shown


def test_a_phase_says_what_is_awaited_and_how_long_it_took() -> None:
    screen = Screen(2)
    screen.progress.phase("starting 2 generators")
    screen.clock.now += 33.3
    screen.progress.phase("evaluating")
    assert "starting 2 generators ..." in screen.text
    assert "starting 2 generators: 33.3 s" in screen.text


def test_the_display_shows_what_is_awaited_and_for_how_long() -> None:
    screen = Screen(2, mode="live")
    screen.progress.phase("starting 2 generators")
    screen.clock.now += 75
    assert "starting 2 generators for 1:15" in screen.shown


def test_the_display_shows_every_figure() -> None:
    screen = Screen(10, mode="live")
    screen.steps(1, 4)
    screen.progress.evaluation(4, {"eval/greedy/reward": 0.25, "eval/greedy/n": 10.0})
    for expected in ("4/10", "0.500", "version 4", "staleness 0.50", "KL 0.0123", "mismatch KL 2.0e-06", "1:00 left"):
        assert expected in screen.shown
    for expected in ("19.2 tokens long", "1,234 tokens/s", "3 groups dropped", "greedy 0.250"):
        assert expected in screen.shown


def test_an_evaluation_is_set_beside_the_first() -> None:
    screen = Screen(10)
    screen.progress.evaluation(0, {"eval/greedy/reward": 0.25, "eval/sampled/reward": 0.2, "eval/greedy/low": 0.1})
    screen.progress.evaluation(5, {"eval/greedy/reward": 0.5, "eval/sampled/reward": 0.2})
    assert screen.text.splitlines()[-1].endswith("version 5: greedy 0.500 (first 0.250), sampled 0.200")


def test_the_summary_is_aligned_and_stays_when_the_display_ends() -> None:
    screen = Screen(1, mode="live", terminal=True)
    with screen.progress:
        screen.steps(1, 1)
        screen.progress.finish({"run": "runs/x", "held out": "0.3 [0.2, 0.4]"})
    assert "run       runs/x" in screen.text
    assert "held out  0.3 [0.2, 0.4]" in screen.text


def test_quiet_prints_notes_and_the_summary_only() -> None:
    screen = Screen(3, mode="quiet")
    with screen.progress:
        screen.progress.phase("starting")
        screen.steps(1, 3)
        screen.progress.note("a checkpoint")
        screen.progress.finish({"run": "x"})
    assert screen.text.splitlines() == ["a checkpoint", "run  x"]


@pytest.mark.parametrize(("terminal", "expected"), [(True, "held out"), (False, "[0:00] held out")])
def test_the_way_of_showing_follows_the_terminal(terminal: bool, expected: str) -> None:
    screen = Screen(3, mode="auto", terminal=terminal)
    with screen.progress:
        screen.progress.evaluation(0, {"eval/greedy/reward": 0.25})
    assert any(line.startswith(expected) for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.text).splitlines())


def test_log_lines_go_where_standard_error_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    handler = StderrHandler()
    handler.emit(logging.LogRecord("room", logging.WARNING, "f", 1, "a %s", ("warning",), None))
    assert capsys.readouterr().err == "a warning\n"


def test_supervised_steps_show_the_loss_instead_of_rewards() -> None:
    screen = Screen(2)
    screen.progress.step(1, {"train/loss": 1.25, "train/grad_norm": 0.5, "time/step_s": 0.1})
    assert re.search(r"loss\s+grad norm", screen.text)
    assert "1.2500" in screen.text
    assert "reward" not in screen.text + screen.shown
