"""What the terminal shows of a run: a live display, or plain lines where standard output is not a terminal."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Mode = Literal["auto", "live", "plain", "quiet"]

LINE_INTERVAL_S = 2.0
LINES_PER_HEADER = 40
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
RECENT_STEPS = 20

Columns = tuple[tuple[str, str, str, int], ...]
"""Heading, metric, format and width of each column of the plain lines."""

_ROLLOUT_COLUMNS: Columns = (
    ("reward", "reward/mean", ".3f", 8),
    ("KL", "train/kl_reference", ".4f", 8),
    ("length", "rollout/mean_tokens", ".1f", 7),
    ("tokens/s", "rollout/tokens_per_s", ",.0f", 9),
    ("staleness", "rollout/staleness", ".2f", 10),
    ("mismatch", "rollout/mismatch_kl", ".1e", 10),
    ("dropped", "rollout/dropped", ".0f", 8),
    ("s/step", "time/step_s", ".2f", 8),
)
_SUPERVISED_COLUMNS: Columns = (
    ("loss", "train/loss", ".4f", 9),
    ("grad norm", "train/grad_norm", ".3f", 11),
    ("learning rate", "train/learning_rate", ".2e", 15),
    ("tokens/s", "train/tokens_per_second", ",.0f", 10),
    ("s/step", "time/step_s", ".2f", 8),
)


class StderrHandler(logging.Handler):
    """Writes log lines to the current ``sys.stderr``, which a live display redirects to appear above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a line."""
        try:
            sys.stderr.write(self.format(record) + "\n")
        except (OSError, ValueError):
            self.handleError(record)


class Progress:
    """The terminal's display of one run. Use as a context manager; call from one thread.

    Args:
        total_steps: training steps of the whole run.
        first_step: steps already done when the run was resumed.
        mode: "auto" is live on a terminal and plain elsewhere; "quiet" prints notes and the summary only.
        console: where to print; by default standard output.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        mode: Mode = "auto",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._done = first_step
        self._console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        animated = self._console.is_terminal and not self._console.is_dumb_terminal
        self._mode: Mode = ("live" if animated else "plain") if mode == "auto" else mode
        self._clock = clock
        self._start = clock()
        self._phase: tuple[str, float] | None = None
        self._metrics: dict[str, float] = {}
        self._rewards: list[float] = []
        self._step_times: list[float] = []
        self._first_evaluation: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}
        self._lines = 0
        self._last_line = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._start = self._clock()
        if self._mode == "live":
            self._live = Live(
                get_renderable=self.display,
                console=self._console,
                refresh_per_second=4,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_live()

    def phase(self, name: str) -> None:
        """Show what the run waits for ("starting 2 generators") until the next phase or step."""
        self._end_phase()
        self._phase = (_clean(name), self._clock())
        if self._mode == "plain":
            self._line(f"[{_duration(self._clock() - self._start)}] {_clean(name)} ...")

    def step(self, version: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a training step; ``version`` is the number of steps done."""
        self._end_phase()
        self._done = version
        self._metrics = dict(metrics)
        self._step_times = [*self._step_times[-RECENT_STEPS:], self._clock()]
        if math.isfinite(reward := metrics.get("reward/mean", math.nan)):
            self._rewards.append(reward)
        is_due = self._clock() - self._last_line >= LINE_INTERVAL_S or version >= self._total
        if self._mode == "plain" and is_due:
            self._step_line()

    def evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Show held-out results of the policy at ``version`` (``eval/greedy/reward``, ``eval/sampled/reward``)."""
        self._end_phase()
        rewards = {name.split("/")[1]: value for name, value in metrics.items() if _is_held_out_reward(name)}
        self._evaluation |= rewards
        self._first_evaluation = rewards | self._first_evaluation
        if self._mode == "plain":
            self._line(f"[{_duration(self._clock() - self._start)}] held out at version {version}: {self._held_out()}")

    def note(self, text: str) -> None:
        """Print text that stays above the live display."""
        for line in text.splitlines() or [""]:
            self._line(_clean(line))

    def finish(self, summary: Mapping[str, object]) -> None:
        """Stop the live display and print the summary, a line for each entry."""
        self._end_phase()
        self._stop_live()
        width = max((len(name) for name in summary), default=0)
        for name, value in summary.items():
            first, *more = str(value).splitlines() or [""]
            self._line(f"{_clean(name):<{width}}  {_clean(first)}")
            for line in more:  # a verdict may end in a traceback
                self._line(f"{'':<{width}}  {_clean(line)}")

    def display(self) -> RenderableType:
        """The live display as it is now."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        elapsed = _duration(self._clock() - self._start)
        if self._phase is not None:
            name, since = self._phase
            waited = _duration(self._clock() - since)
            table.add_row("now", Text.assemble((name, "cyan"), f" for {waited}"))
        bar = Table.grid(padding=(0, 2, 0, 0))
        width = min(max(self._console.width - 66, 8), 32)
        rest = f"{self._done}/{self._total}  {self._rate()}{elapsed} elapsed, {self._left()} left"
        bar.add_row(ProgressBar(total=self._total, completed=self._done, width=width), rest)
        table.add_row("step", bar)
        if "reward/mean" in self._metrics:
            table.add_row("reward", self._reward())
            table.add_row("policy", self._policy())
            table.add_row("samples", self._samples())
        elif self._metrics:
            shown = (f"{name} {self._shown(metric, style)}" for name, metric, style, _ in _SUPERVISED_COLUMNS)
            table.add_row("policy", ", ".join(shown))
        if self._evaluation:
            table.add_row("held out", self._held_out())
        return table

    def _reward(self) -> Text:
        first, trend = self._rewards[:1], self._spark()
        text = Text(self._shown("reward/mean", ".3f"), style="green")
        if trend:
            text.append(f"  {trend}", style="cyan")
        if first and len(self._rewards) > 1:
            text.append(f"  from {first[0]:.3f}", style="default")
        return text

    def _policy(self) -> str:
        return (
            f"version {self._done}, staleness {self._shown('rollout/staleness', '.2f')}, "
            f"KL {self._shown('train/kl_reference', '.4f')}, mismatch KL {self._shown('rollout/mismatch_kl', '.1e')}"
        )

    def _samples(self) -> str:
        return (
            f"{self._shown('rollout/mean_tokens', '.1f')} tokens long, "
            f"{self._shown('rollout/tokens_per_s', ',.0f')} tokens/s, "
            f"{self._shown('rollout/dropped', '.0f')} groups dropped"
        )

    def _held_out(self) -> str:
        parts = []
        for mode, value in self._evaluation.items():
            first = self._first_evaluation[mode]
            parts.append(f"{mode} {value:.3f}" + (f" (first {first:.3f})" if value != first else ""))
        return ", ".join(parts) or "nothing"

    def _shown(self, metric: str, style: str) -> str:
        value = self._metrics.get(metric)
        return "-" if value is None else format(value, style)

    def _spark(self) -> str:
        values = self._rewards[-SPARK_WIDTH:]
        if len(values) < 2 or "utf" not in (self._console.encoding or "").lower():
            return ""
        low, span = min(values), max(values) - min(values)
        top = len(SPARKS) - 1
        return "".join(SPARKS[round((value - low) / span * top) if span > 0 else 0] for value in values)

    def _seconds_a_step(self) -> float | None:
        if len(self._step_times) < 2:
            return self._metrics.get("time/step_s")
        return (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1)

    def _rate(self) -> str:
        each = self._metrics.get("time/step_s", self._seconds_a_step())
        return "" if each is None else f"{each:.2f} s each, "

    def _left(self) -> str:
        each = self._seconds_a_step()
        if each is None or not math.isfinite(each):
            return "?"
        return _duration(each * max(self._total - self._done, 0))

    @property
    def _columns(self) -> Columns:
        return _ROLLOUT_COLUMNS if "reward/mean" in self._metrics else _SUPERVISED_COLUMNS

    def _step_line(self) -> None:
        width = max(len(str(self._total)), 4)
        if self._lines % LINES_PER_HEADER == 0:
            names = "".join(f"{name:>{size}}" for name, _, _, size in self._columns)
            self._line(f"{'step':>{2 * width + 1}}{names}{'left':>9}")
        values = "".join(f"{self._shown(metric, style):>{size}}" for _, metric, style, size in self._columns)
        self._line(f"{self._done:>{width}}/{self._total:<{width}}{values}{self._left():>9}")
        self._lines += 1
        self._last_line = self._clock()

    def _end_phase(self) -> None:
        if self._phase is not None and self._mode == "plain":
            name, since = self._phase
            self._line(f"[{_duration(self._clock() - self._start)}] {name}: {self._clock() - since:.1f} s")
        self._phase = None

    def _line(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True, highlight=False, emoji=False)
        if self._mode != "live":
            self._console.file.flush()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _is_held_out_reward(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == "eval" and parts[2] == "reward"


def _clean(text: str) -> str:
    """The text with its control characters replaced, which the terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
