"""Writes the report of a run from its run record: one self-contained HTML file, `summary.json` and `plots/*.png`."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from orchestrator.record.run_record import read_evaluations, read_events, read_metrics, read_samples
from orchestrator.report.plots import SERIES, draw_charts
from orchestrator.report.summary import TIME_PARTS, is_supervised, is_verified, summarise
from rollout.failures import FailureError
from rollout.media import MediaRef, MediaStore

REPORT = "report.html"
SUMMARY = "summary.json"
SHOWN_SAMPLES = 8
SHOWN_VERSIONS = 12
SHOWN_EVENTS = 20
HIDDEN_EVENTS = ("started", "checkpoint")
IMAGE_PIXELS = 320
TIME_WORDS = {
    "generate": "the generators sample completions",
    "score": "the reward server scores completions",
    "reference": "the reference computes log-probabilities",
    "learn": "the policy is updated",
    "sync": "the generators receive the new weights",
    "evaluate": "held-out prompts are evaluated",
    "checkpoint": "checkpoints are written",
    "other": "all other work and waiting of the driver",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the policy's first and last completions."""

    prompt: str
    images: tuple[str, ...]
    target: Any
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write `report.html`, `summary.json` and `plots/*.png` in a run folder, each whole or not at all.

    Works on a run in progress, an interrupted one and one without evaluations. Sections without data are left out.

    Returns:
        The path of `report.html`.
    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. Give the run folder that `counterpoint train` or `counterpoint sft` wrote."
        )
    summary = summarise(folder)
    _replace(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")
    metrics = read_metrics(folder)
    charts = draw_charts(metrics, read_evaluations(folder), folder / "plots")
    events = read_events(folder)
    source, pairs = sample_pairs(folder)
    config = folder / "config.yaml"
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            run=summary,
            charts=charts,
            pairs=pairs,
            pair_source=source,
            time_parts=_time_rows(summary["time"]),
            weights=_weight_rows(metrics),
            events=[_event_row(event) for event in events if event["kind"] not in HIDDEN_EVENTS][-SHOWN_EVENTS:],
            config=config.read_text("utf-8", "replace") if config.exists() else "",
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            has_share=_are_shares(summary["eval"]),
            is_supervised=is_supervised(metrics),
        )
    )
    path = folder / REPORT
    _replace(path, page)
    return path


def sample_pairs(folder: Path) -> tuple[str, list[Pair]]:
    """The first held-out prompts with their completions before and after; without evaluations, the latest rollouts.

    Returns:
        Where the samples come from ("eval/greedy", "train", or "" without any), and the pairs.
    """
    rows = read_samples(folder)
    sources = sorted({str(row["source"]) for row in rows if str(row["source"]).startswith("eval/")})
    source = sources[0] if sources else "train" if rows else ""
    rows = [row for row in rows if row["source"] == source]
    if not rows:
        return "", []
    first_step, last_step = min(row["step"] for row in rows), max(row["step"] for row in rows)
    store = MediaStore(folder / "media")
    firsts = {_identity(row): row for row in reversed(rows) if row["step"] == first_step < last_step}
    lasts = [row for row in rows if row["step"] == last_step][:SHOWN_SAMPLES]
    pairs = []
    for row in lasts:
        images = tuple(_inline(store, ref) for ref in row.get("media", ()))
        before = firsts.get(_identity(row)) if source != "train" else None
        pairs.append(Pair(row["prompt"], images, row.get("target"), before, row))
    return source, pairs


def _identity(row: Mapping[str, Any]) -> str:
    media = [ref.get("sha256") for ref in row.get("media", ())]
    return json.dumps([row["prompt"], media, row.get("target")], default=str, sort_keys=True)


def _inline(store: MediaStore, ref: Mapping[str, Any]) -> str:
    """An image as a data URI, at most IMAGE_PIXELS wide or high; empty where it is missing or not an image."""
    try:
        medium = MediaRef(ref["kind"], str(ref["sha256"]), str(ref["media_type"]))
        if medium.kind != "image":
            return ""
        image = store.load_image(medium)
    except (FailureError, KeyError):
        return ""
    if max(image.size) > IMAGE_PIXELS:
        image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _time_rows(breakdown: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not breakdown:
        return []
    return [
        {
            "name": part,
            "words": TIME_WORDS[part],
            "seconds": breakdown["seconds"][part],
            "share": breakdown["shares"][part],
            "colour": index % len(SERIES),
        }
        for index, part in enumerate(TIME_PARTS)
        if breakdown["seconds"][part] > 0 or part == "other"
    ]


def _weight_rows(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Weight updates: every one that was not verified, and a few others evenly over the run."""
    updates = [row for row in metrics if row.get("weights/version") is not None]
    stride = max(1, -(-len(updates) // SHOWN_VERSIONS))
    last = len(updates) - 1
    shown = [row for i, row in enumerate(updates) if (last - i) % stride == 0 or i == 0 or not is_verified(row)]
    names = ("bytes", "transfer_s", "load_s", "pause_s")
    return [
        {"version": int(row["weights/version"]), "step": row["step"], "is_verified": is_verified(row)}
        | {name: row.get(f"weights/{name}") for name in names}
        | {"gap": row.get("rollout/max_logprob_gap"), "kl": row.get("rollout/mismatch_kl")}
        for row in shown
    ]


def _event_row(event: Mapping[str, Any]) -> dict[str, str]:
    details = {key: value for key, value in event.items() if key not in ("time", "kind")}
    return {
        "time": time.strftime("%H:%M:%S", time.gmtime(event["time"])),
        "kind": str(event["kind"]).replace("_", " "),
        "details": ", ".join(f"{key} {value}" for key, value in details.items()),
    }


def _are_shares(evaluations: Mapping[str, Any]) -> bool:
    """Whether every mean lies in 0..1, so that it reads as a percentage."""
    results = [result for moment in ("before", "after", "best") for result in evaluations[moment].values()]
    return all(0.0 <= result["mean"] <= 1.0 for result in results)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "count": _count, "size": _size, "span": _span, "figure": _figure}
    return environment


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if abs(value) < 0.1 else f"{value:,.3g}"


def _size(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
