"""The weight-sync benchmark goes through every case on a tiny model, and its table says what it measured."""

import functools
import io
import math
import sys
from pathlib import Path

import pytest
import ray
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import weight_sync
from weight_sync_processes import Peer, Row, Sink, Sync, Trainer, Workload, interleaved

TINY = ["--gib", "0.02", "--repeats", "1", "--dtype", "bfloat16", "--generators", "3", "--bucket-mib", "1"]

# Lines of each case, and how many of them are held against something.
LINES = {"shared-memory": (3, 1), "tcp": (4, 2), "fleet": (4, 3), "delta": (6, 3), "memory": (6, 6)}


@functools.cache
def rows_of(*words: str) -> list[Row]:
    return list(weight_sync.measure(weight_sync.arguments([*TINY, *words])))


def assert_finite(rows: list[Row]) -> None:
    for row in rows:
        assert row.seconds is not None or row.ratio is not None
        for number in (row.seconds, row.ratio):
            assert number is None or math.isfinite(number)
        assert row.seconds is None or row.seconds > 0


@pytest.mark.parametrize("case", LINES)
def test_a_case_has_all_its_lines_with_finite_numbers(case: str) -> None:
    rows = rows_of("--only", case)
    assert_finite(rows)
    assert (len(rows), sum(row.is_met is not None for row in rows)) == LINES[case]


def test_the_delta_is_a_small_part_of_the_bytes_and_a_relay_takes_load_off_the_publisher() -> None:
    by_name = {row.case: row for case in ("delta", "fleet") for row in rows_of("--only", case)}
    # 1% of the words changed at random: for each of them a distance of a byte and about a byte of changed bits.
    assert by_name["delta of 1%, TCP, CURVE, bfloat16: bytes"].is_met
    assert by_name["delta of 1%, TCP, CURVE, bfloat16: words"].ratio == pytest.approx(0.01, rel=0.05)
    # The publisher serves two of the three, and those the third.
    assert by_name["3 generators, TCP, CURVE, relays, bfloat16: publisher's egress"].ratio == pytest.approx(2.0)


@pytest.mark.engine
def test_what_a_user_would_do_without_us_is_measured_too() -> None:
    ray.shutdown()  # of the session that other files share: the benchmark starts its own
    rows = rows_of("--only", "alternatives")
    assert_finite(rows)
    assert [row.case.split(",")[0] for row in rows] == ["safetensors on disk", "Ray's object store"]


@pytest.mark.engine
@pytest.mark.slow
def test_the_engine_case_tells_transfer_load_and_pause_apart() -> None:
    rows = rows_of("--only", "engine", "--engine-gib", "0.002")
    assert_finite(rows)
    assert len(rows) == 16
    whole, _, transfer, _, load, pause = (row.seconds or 0.0 for row in rows[:6])
    assert transfer + load < whole
    assert load <= pause < whole
    assert rows[6].case.endswith("engine's memory")
    assert [row.case.split(", ")[1] for row in rows[-2:]] == ["staged", "in place"]


@pytest.mark.engine
@pytest.mark.slow
def test_the_demo_case_tells_where_a_sync_s_time_goes() -> None:
    rows = rows_of("--only", "demo", "--versions", "2")
    assert_finite(rows)
    assert len(rows) == 8
    assert rows[0].ratio == pytest.approx((rows[0].seconds or 0.0) / 0.06)


def test_the_table_says_what_is_met() -> None:
    rows = [
        Row("fast", 0.5, 2_000_000_000, "a copy: 0.4 s", 0.8, at_least=0.7),
        Row("slow", 0.5, None, "one: 0.1 s", 5.0, at_most=2.5),
        Row("told", 0.1),
    ]
    assert [row.is_met for row in rows] == [True, False, None]
    shown = io.StringIO()
    weight_sync.show(weight_sync.arguments([]), rows, Console(file=shown, width=200))
    lines = [line.split("│") for line in shown.getvalue().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert cells[0] == ["fast", "0.5000", "4.00", "a copy: 0.4 s", "0.800", ">= 0.7", "yes"]
    assert cells[1] == ["slow", "0.5000", "", "one: 0.1 s", "5.000", "<= 2.5", "no"]
    assert cells[2] == ["told", "0.1000", "", "", "", "", ""]


def test_every_round_takes_its_turn_and_the_first_ones_do_not_count() -> None:
    turns: list[str] = []

    def measured(name: str) -> dict[str, float]:
        turns.append(name)
        return {"seconds": float(len(turns))}

    rounds = {name: (lambda name=name: measured(name)) for name in ("limit", "case")}
    # Turns 1 to 4 are warm-up; "limit" has turns 5, 7 and 9, "case" 6, 8 and 10.
    found = interleaved(rounds, 3)
    assert turns == ["limit", "case"] * 5
    assert found == {"limit": {"seconds": 7.0}, "case": {"seconds": 8.0}}


def test_a_change_leaves_no_word_as_it_was_so_that_nothing_is_skipped() -> None:
    trainer = Trainer.of(Workload(4 << 20, "bfloat16", 1 << 20))
    try:
        before = [words.clone() for words in trainer._words]
        trainer.change(1.0)
        assert all(bool((old != new).all()) for old, new in zip(before, trainer._words, strict=True))
    finally:
        trainer.close()


def test_a_version_that_came_by_another_way_than_measured_is_an_error() -> None:
    workload = Workload(2 << 20, "bfloat16", 1 << 20)
    with Peer(Trainer.of, workload) as trainer, Peer(Sink, "one", True) as sink:
        sync = Sync(trainer, [sink])
        sync.once("memory")
        with pytest.raises(RuntimeError, match=r"version 2 came by route \['memory'\], not by network"):
            sync.once("network")
