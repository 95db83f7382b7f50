"""Draws the report's charts, each as a PNG file and as an SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.report.summary import TIME_PARTS, is_supervised

Rows = Sequence[Mapping[str, Any]]

INK, MUTED, GRID = "#22283a", "#6b7286", "#e3e5ec"
SERIES = ("#3b5bdb", "#e8590c", "#0c8f7a", "#b83280", "#8a6d00", "#5b6472", "#7048e8", "#a0a6b5")
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--s{index})" for index, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}
SIZE = (4.4, 2.6)
SMOOTHED_STEPS = 9


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the report.

    Attributes:
        name: file name without ending.
        title: what it shows.
        note: one sentence on how to read it.
        description: its first and last figures, for readers who can't see it.
        svg: the picture, ready to stand in the page.
    """

    name: str
    title: str
    note: str
    description: str
    svg: str


def draw_charts(metrics: Rows, evaluations: Rows, folder: Path) -> list[Chart]:
    """Draw every chart that has data, write `plots/*.png` (with `overview.png` of all), and return them."""
    wanted = [chart for chart in _charts(metrics, evaluations) if chart.points >= 1]
    folder.mkdir(parents=True, exist_ok=True)
    charts = []
    with matplotlib.rc_context(STYLE):
        for chart in wanted:
            figure = Figure(figsize=SIZE, layout="constrained")
            chart.draw(figure.add_subplot())
            figure.savefig(folder / f"{chart.name}.png", dpi=160, facecolor="white")
            charts.append(Chart(chart.name, chart.title, chart.note, chart.description, _svg(figure, chart)))
        if wanted:
            _overview(wanted, folder / "overview.png")
    return charts


def _overview(wanted: Sequence[_Drawing], path: Path) -> None:
    columns = min(3, len(wanted))
    rows = -(-len(wanted) // columns)
    figure = Figure(figsize=(SIZE[0] * columns, (SIZE[1] + 0.3) * rows), layout="constrained")
    for index, chart in enumerate(wanted):
        axes = figure.add_subplot(rows, columns, index + 1)
        chart.draw(axes)
        axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=130, facecolor="white")


def _svg(figure: Figure, chart: _Drawing) -> str:
    with matplotlib.rc_context({"svg.hashsalt": chart.name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{chart.name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{chart.name}-", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    width, height = SIZE
    label = f'role="img" aria-label="{_escape(f"{chart.title}. {chart.description}")}"'
    head = f'<svg {label} viewBox="0 0 {width * 72:g} {height * 72:g}" xmlns="http://www.w3.org/2000/svg" '
    head += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


@dataclass(frozen=True, slots=True)
class _Drawing:
    name: str
    title: str
    note: str
    description: str
    points: int
    draw: Callable[[Axes], None]


def _charts(metrics: Rows, evaluations: Rows) -> list[_Drawing]:
    lines = _supervised_lines(metrics) if is_supervised(metrics) else _rollout_lines(metrics)
    return [_evaluation_chart(evaluations), *lines, _time_chart(metrics)]


def _supervised_lines(metrics: Rows) -> list[_Drawing]:
    return [
        _lines("loss", "Training loss", "Mean of each batch, nats a token.", metrics, ["train/loss"]),
        _lines("learning_rate", "Learning rate", "By the schedule.", metrics, ["train/learning_rate"], is_exact=True),
        _lines("grad_norm", "Gradient norm", "Before clipping.", metrics, ["train/grad_norm"]),
        _lines("throughput", "Throughput", "Tokens trained on a second.", metrics, ["train/tokens_per_second"]),
    ]


def _rollout_lines(metrics: Rows) -> list[_Drawing]:
    lines = [
        _lines("reward", "Training reward", "Mean of each batch, and its moving average.", metrics, ["reward/mean"]),
        _lines("kl", "KL to the reference", "Nats a token, mean.", metrics, ["train/kl_reference"]),
        _lines("entropy", "Entropy", "Nats a token, mean.", metrics, ["train/entropy"]),
        _lines("length", "Completion length", "Tokens a completion, mean.", metrics, ["rollout/mean_tokens"]),
        _lines(
            "truncated",
            "Truncated",
            "Share of completions cut at the token limit.",
            metrics,
            ["rollout/truncated_share"],
        ),
        _lines(
            "mismatch",
            "Agreement of trainer and generators",
            "Differences of log-probabilities under the same weights, nats. They should stay near 0.",
            metrics,
            ["rollout/max_logprob_gap", "rollout/mismatch_kl"],
            labels=("largest gap of a token", "mean KL"),
            is_log=True,
        ),
        _lines(
            "staleness",
            "Staleness",
            "Policy versions between sampling and training, mean.",
            metrics,
            ["rollout/staleness"],
        ),
        _lines("throughput", "Throughput", "Tokens generated a second.", metrics, ["rollout/tokens_per_s"]),
    ]
    if any("critic/loss" in row for row in metrics):
        note = "Share of the returns' variance that its values explain."
        lines.insert(2, _lines("critic", "Critic", note, metrics, ["critic/explained_variance"]))
    return lines


def _series(metrics: Rows, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in metrics if row.get(name) is not None]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def _lines(
    name: str,
    title: str,
    note: str,
    metrics: Rows,
    keys: Sequence[str],
    *,
    labels: Sequence[str] = (),
    is_log: bool = False,
    is_exact: bool = False,
) -> _Drawing:
    series = [_series(metrics, key) for key in keys]

    def draw(axes: Axes) -> None:
        for index, (steps, values) in enumerate(series):
            if not steps:
                continue
            colour, label = SERIES[index], labels[index] if labels else None
            smooth = len(values) >= 3 * SMOOTHED_STEPS and not (is_log or is_exact)
            axes.plot(steps, values, color=colour, alpha=0.3 if smooth else 1.0, lw=1.2 if smooth else 1.8, label=label)
            if smooth:
                axes.plot(steps, _moving_average(values), color=colour)
            if len(steps) == 1:
                axes.plot(steps, values, "o", color=colour)
        if is_log and all(value > 0 for _, values in series for value in values):
            axes.set_yscale("log")
        if labels:
            axes.legend(loc="best")
        axes.set_xlabel("step")

    return _Drawing(name, title, note, _ends(series[0]), max(len(steps) for steps, _ in series), draw)


def _moving_average(values: Sequence[float]) -> list[float]:
    half = SMOOTHED_STEPS // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _ends(series: tuple[list[int], list[float]]) -> str:
    steps, values = series
    if not steps:
        return ""
    return f"From {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}."


def _evaluation_chart(evaluations: Rows) -> _Drawing:
    rows = [row for row in evaluations if row.get("reward") is not None]
    modes = sorted({str(row["mode"]) for row in rows})

    def draw(axes: Axes) -> None:
        for index, mode in enumerate(modes):
            mine = [row for row in rows if row["mode"] == mode]
            steps, means = [row["step"] for row in mine], [row["reward"] for row in mine]
            lows = [row["reward"] if row.get("low") is None else row["low"] for row in mine]
            highs = [row["reward"] if row.get("high") is None else row["high"] for row in mine]
            axes.fill_between(steps, lows, highs, color=SERIES[index], alpha=0.16, lw=0)
            if len(steps) == 1:
                axes.vlines(steps, lows, highs, color=SERIES[index], alpha=0.4)
            axes.plot(steps, means, color=SERIES[index], marker="o", ms=4, label=mode)
        axes.legend(loc="best")
        axes.set_xlabel("step")

    described = []
    for mode in modes:
        mine = [row for row in rows if row["mode"] == mode]
        described.append(f"{mode}: {_ends(([row['step'] for row in mine], [row['reward'] for row in mine]))}")
    note = "Mean reward on held-out prompts, with 95% intervals."
    return _Drawing("evaluation", "Held-out reward", note, " ".join(described), len(rows), draw)


def _time_chart(metrics: Rows) -> _Drawing:
    rows = [row for row in metrics if any(row.get(f"time/{part}_s") is not None for part in TIME_PARTS)]
    steps = [int(row["step"]) for row in rows]
    parts = [part for part in TIME_PARTS if any(row.get(f"time/{part}_s") for row in rows)]
    values = [[float(row.get(f"time/{part}_s") or 0.0) for row in rows] for part in parts]

    def draw(axes: Axes) -> None:
        colours = [SERIES[TIME_PARTS.index(part)] for part in parts]
        bottom = np.zeros(len(steps))
        width = max(0.8, (max(steps) - min(steps)) / max(1, len(steps)))
        for part, seconds, colour in zip(parts, values, colours, strict=True):
            axes.bar(steps, seconds, bottom=bottom, width=width, color=colour, label=part, lw=0)
            bottom += np.asarray(seconds)
        axes.set_xlabel("step")
        axes.set_ylabel("seconds")

    described = ", ".join(f"{part} {sum(seconds):.1f} s" for part, seconds in zip(parts, values, strict=True))
    return _Drawing(
        "time", "Seconds of each step", "By part; the table has the colours.", described, len(parts) and len(rows), draw
    )
