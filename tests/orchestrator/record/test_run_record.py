"""The local record: what a crash, a full disk, a NaN or a resume leaves in it."""

from __future__ import annotations

import io
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.record.jsonl import read_lines
from orchestrator.record.run_record import (
    EvaluationResult,
    RunRecord,
    SampleRow,
    read_evaluations,
    read_events,
    read_metrics,
    read_samples,
    sample_rows,
)
from rollout.media import MediaRef
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from rollout.samples import Completion, FinishReason, Generation, Score, ScoredGroup

RED = MediaRef("image", "ab" * 32, "image/png")


def result(reward: float) -> EvaluationResult:
    return EvaluationResult(reward=reward, low=reward - 0.1, high=reward + 0.1, n=64)


def test_metrics_of_one_step_are_read_together_in_order_of_steps(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.metrics(1, {"train/loss": float(np.float32(0.5))})
        record.metrics(0, {"train/loss": 1.0})
        record.metrics(1, {"eval/greedy/reward": 0.25})
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["train/loss"]) == (0, 1.0)
    assert (second["step"], second["train/loss"], second["eval/greedy/reward"]) == (1, 0.5, 0.25)
    assert second["time"] > 1e9


def test_every_row_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.metrics(0, {"train/loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1


def test_values_that_are_not_finite_become_null_and_are_counted(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.metrics(0, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/kl": 0.5})
        record.samples(0, [SampleRow("p", (), None, "c", math.nan, {"exact": -math.inf})])
    assert read_metrics(tmp_path)[0] | {"time": 0} == {
        "step": 0,
        "time": 0,
        "train/loss": None,
        "train/grad_norm": None,
        "train/kl": 0.5,
    }
    assert read_samples(tmp_path)[0]["components"] == {"exact": None}
    counts = [row["non_finite"] for name in ("metrics", "samples") for row in read_lines(tmp_path / f"{name}.jsonl")]
    assert counts == [2, 2]


def test_a_line_cut_short_by_a_crash_is_skipped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.metrics(0, {"train/loss": 1.0})
        record.metrics(1, {"train/loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    with RunRecord(tmp_path, resume_step=1) as record:
        record.metrics(2, {"train/loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 2]


def test_a_resume_leaves_each_step_once_and_tells_what_it_removed(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        for step in range(6):
            record.metrics(step, {"train/loss": float(step)})
            record.samples(step, [SampleRow("p", (), None, f"first {step}", 1.0)])
        record.evaluation(0, "greedy", result(0.3))
        record.evaluation(5, "greedy", result(0.5))
    with RunRecord(tmp_path, resume_step=3) as record:
        for step in range(4, 8):
            record.metrics(step, {"train/loss": 100.0 + step})
        record.evaluation(5, "greedy", result(0.6))
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0), (7, 107.0),
    ]  # fmt: skip
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 8
    assert [row["completion"] for row in read_samples(tmp_path)] == [f"first {step}" for step in range(4)]
    assert [(row["step"], row["reward"]) for row in read_evaluations(tmp_path)] == [(0, 0.3), (5, 0.6)]
    (event,) = read_events(tmp_path, "resumed")
    assert (event["step"], event["trimmed"]) == (3, {"metrics.jsonl": 2, "samples.jsonl": 2, "evaluations.jsonl": 1})


def test_events_of_the_cut_run_stay_after_a_resume(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.event("alarm", step=9, metric="rollout/mismatch_kl", value=math.nan)
    with RunRecord(tmp_path, resume_step=3):
        pass
    assert [event["kind"] for event in read_events(tmp_path)] == ["alarm", "resumed"]


def test_a_run_started_anew_in_a_used_folder_keeps_the_old_record_apart(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.metrics(5, {"train/loss": 1.0})
    with RunRecord(tmp_path) as record:
        record.metrics(1, {"train/loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    (previous,) = (tmp_path / "previous").iterdir()
    assert [row["step"] for row in read_metrics(previous)] == [5]


def test_an_empty_folder_reads_as_an_empty_record(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_samples(tmp_path) == read_evaluations(tmp_path) == read_events(tmp_path) == []


def test_a_scored_group_becomes_one_row_a_completion(tmp_path: Path) -> None:
    prompt = Prompt((Message("user", (MediaPart(RED), TextPart("Which digit?"))),), target="7")
    tokens = np.arange(3, dtype=np.int32)
    completion = Completion(tokens, np.zeros(3, np.float32), np.array([4, 4, 5], np.int32), FinishReason.STOP, "7")
    generation = Generation(tokens, (completion, completion), "generator-0", 0.1)
    group = ScoredGroup("g1", prompt, generation, (Score(1.0, {"exact": 1.0}), Score(0.0, {"exact": 0.0})))
    rows = sample_rows(group, [1.0, -1.0])
    assert [(row.reward, row.advantage, row.policy_version, row.tokens) for row in rows] == [
        (1.0, 1.0, 5, 3),
        (0.0, -1.0, 5, 3),
    ]
    assert rows[0].prompt == "[image] Which digit?"
    with RunRecord(tmp_path) as record:
        record.samples(0, rows)
    assert read_samples(tmp_path, "train")[0]["media"] == [
        {"kind": "image", "sha256": "ab" * 32, "media_type": "image/png"}
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=10).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def _write_until_full(file: io.FileIO) -> None:
    while True:
        file.write(b"x" * 512)


def test_a_full_disk_neither_stops_the_run_nor_loses_or_halves_a_row(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with RunRecord(small_disk) as record:
        record.metrics(0, {"train/loss": 0.0})
        filler.write_bytes(b"x" * 40_000)
        with filler.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            _write_until_full(file)
        for step in range(1, 200):
            record.metrics(step, {"train/loss": float(step)})
        assert record.unwritten > 0
        text = (small_disk / "metrics.jsonl").read_text()
        assert text.endswith("\n")
        filler.unlink()
        record.metrics(200, {"train/loss": 200.0})
        assert record.unwritten == 0
    assert [row["step"] for row in read_metrics(small_disk)] == list(range(201))


def test_the_spool_keeps_items_in_memory_while_the_disk_is_full(small_disk: Path) -> None:
    from orchestrator.tracking.spool import Spool

    spool = Spool(small_disk)
    for number in range(300):
        spool.put("tags", {"tags": {"n": str(number), "text": "x" * 500}})
    assert spool.error is not None
    assert spool.counts()[0] == 300
