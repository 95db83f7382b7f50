"""The ledger: accounts that balance across kills, interruptions, illegal writers and full disks."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.failures import FailureKind
from rollout.groups import (
    EDGES,
    Account,
    Admit,
    Consume,
    Drop,
    FinishGeneration,
    FinishScoring,
    Groups,
    GroupState,
    StartGeneration,
    Transition,
)
from rollout.ledger import RUN_INTERRUPTED, Ledger, LedgerError


def admitted(group_id: str) -> Transition:
    return Transition(group_id, None, GroupState.ADMITTED, 0.0, prompt_id=f"prompt-of-{group_id}", version=0)


def life(group_id: str) -> list[Transition]:
    groups, transitions = Groups(), []
    for event in (
        Admit(group_id, "p", 6, 10.0),
        StartGeneration(group_id, 11.0),
        FinishGeneration(group_id, "generator-1", 6, 7, 12.0),
        FinishScoring(group_id, 0.75, 13.0),
        Consume(group_id, 7, 14.0),
    ):
        groups, taken = groups.on(event)
        transitions += taken
    return transitions


def test_the_account_counts_consumed_open_and_dropped_by_reason(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append(life("a"))
        ledger.append([admitted("b"), admitted("c"), admitted("d")])
        dropped = Transition("c", GroupState.ADMITTED, GroupState.DROPPED, 1.0, reason="prompt_too_long")
        ledger.append([dropped])
        account = ledger.account()
    assert account == Account(admitted=4, consumed=1, dropped={"prompt_too_long": 1}, open=2)
    assert account.is_balanced


def test_a_group_keeps_its_lineage(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append(life("a"))
        record = ledger.group("a")
        assert ledger.group("never") is None
    assert record is not None
    assert (record.prompt_id, record.state, record.generator) == ("p", GroupState.CONSUMED, "generator-1")
    assert (record.served_version, record.min_version, record.max_version, record.consumed_version) == (6, 6, 7, 7)
    assert (record.mean_reward, record.admitted_at_s, record.changed_at_s) == (0.75, 10.0, 14.0)


def test_groups_that_a_cut_run_left_open_are_returned_once_and_dropped_as_interrupted(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append([*life("a"), *life("b")[:3], admitted("c")])
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.account().open == 2
        left = ledger.recover(at_s=20.0)
        assert [(group.group_id, group.prompt_id, group.state) for group in left] == [
            ("b", "p", GroupState.SCORING),
            ("c", "prompt-of-c", GroupState.ADMITTED),
        ]
        assert ledger.account() == Account(admitted=3, consumed=1, dropped={RUN_INTERRUPTED: 2}, open=0)
        assert ledger.recover(at_s=21.0) == []


@pytest.mark.parametrize(
    "wrong",
    [
        Transition("a", GroupState.ADMITTED, GroupState.READY, 1.0, mean_reward=1.0),
        Transition("a", GroupState.GENERATING, GroupState.SCORING, 1.0),
        Transition("a", None, GroupState.ADMITTED, 1.0, prompt_id="p"),
        Transition("a", GroupState.ADMITTED, GroupState.DROPPED, 1.0),
        Transition("other", GroupState.READY, GroupState.CONSUMED, 1.0),
    ],
    ids=["no such edge", "not where it is", "admitted twice", "dropped without a reason", "never admitted"],
)
def test_a_transition_that_can_not_have_happened_is_refused_with_its_whole_batch(
    tmp_path: Path, wrong: Transition
) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append([admitted("a")])
        with pytest.raises(LedgerError, match="refused a transition") as raised:
            ledger.append([admitted("b"), wrong])
        assert raised.value.failure.kind is FailureKind.BUG
        assert ledger.account() == Account(admitted=1, consumed=0, dropped={}, open=1)


@pytest.mark.parametrize("statement", ["DELETE FROM transitions", "UPDATE transitions SET at_s = 1"])
def test_nothing_recorded_can_be_changed_or_removed(tmp_path: Path, statement: str) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append([admitted("a")])
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120))
def test_the_ledger_agrees_with_the_state_machine_at_every_moment_and_after_reopening(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    random_, groups, ledger = random.Random(seed), Groups(), Ledger(path)
    for step in range(steps):
        if not groups.open or random_.random() < 0.3:
            groups, transitions = groups.on(Admit(f"g{groups.admitted}", f"p{step}", 0, 0.0))
        else:
            group = random_.choice(list(groups.open.values()))
            target = random_.choice(sorted(EDGES[group.state]))
            groups, transitions = groups.on(
                {
                    GroupState.GENERATING: StartGeneration(group.group_id, 0.0),
                    GroupState.SCORING: FinishGeneration(group.group_id, "x", 0, 0, 0.0),
                    GroupState.READY: FinishScoring(group.group_id, 0.0, 0.0),
                    GroupState.CONSUMED: Consume(group.group_id, 0, 0.0),
                    GroupState.DROPPED: Drop(group.group_id, random_.choice("ab"), 0.0),
                }[target]
            )
        ledger.append(transitions)
        if random_.random() < 0.1:
            ledger.close()
            ledger = Ledger(path)
        assert ledger.account() == groups.account()
    assert {g.group_id: g.state for g in ledger.open_groups()} == {g.group_id: g.state for g in groups.open.values()}
    ledger.close()


WRITER = """
import sys
from pathlib import Path
from rollout.groups import GroupState, Transition
from rollout.ledger import Ledger

ledger, run = Ledger(Path(sys.argv[1])), sys.argv[2]
for number in range(10**9):
    names = [f"{run}-{number}-{k}" for k in range(50)]
    ledger.append(
        t
        for name in names
        for t in (
            Transition(name, None, GroupState.ADMITTED, 0.0, prompt_id="p", version=0),
            Transition(name, GroupState.ADMITTED, GroupState.DROPPED, 0.0, reason="killed_test"),
        )
    )
    if number % 3 == 0:
        ledger.append([Transition(f"{run}-{number}-open", None, GroupState.ADMITTED, 0.0, prompt_id="q", version=0)])
    print(number, flush=True)
"""


def test_a_writer_killed_in_the_midst_leaves_whole_batches_and_a_balanced_account(tmp_path: Path) -> None:
    path, random_ = tmp_path / "ledger.sqlite", random.Random(0)
    for run in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(run)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        confirmed = [int(writer.stdout.readline()) for _ in range(random_.randint(5, 60))]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(timeout=30)
        writer.stdout.close()
        with Ledger(path) as ledger:
            before = ledger.account()
            assert before.is_balanced
            assert before.dropped["killed_test"] % 50 == 0
            for number in confirmed:
                record = ledger.group(f"{run}-{number}-49")
                assert record is not None
                assert record.state is GroupState.DROPPED
            assert len(ledger.recover(at_s=1.0)) == before.open > 0
            assert ledger.account().open == 0
            assert ledger.account().is_balanced


def test_a_reporter_in_another_process_reads_a_balanced_account_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), "run"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        with Ledger(path, read_only=True) as reader:
            counts = []
            for _ in range(30):
                account = reader.account()
                assert account.is_balanced
                assert account.dropped["killed_test"] % 50 == 0
                counts.append(account.admitted)
                writer.stdout.readline()
            assert counts[-1] > counts[0]
            with pytest.raises(LedgerError, match="readonly"):
                reader.append([admitted("mine")])
    finally:
        writer.kill()
        writer.communicate(timeout=30)


def test_threads_may_append_at_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        threads = [
            threading.Thread(target=lambda n=n: [ledger.append(life(f"{n}-{k}")) for k in range(25)]) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert ledger.account() == Account(admitted=100, consumed=100, dropped={}, open=0)


def test_a_full_disk_is_named_and_what_was_recorded_stays(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append([admitted("a")])
        # SQLite's own limit gives the error of a full disk.
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(LedgerError, match=r"disk of the ledger .* is full") as raised:
            ledger.append(admitted(f"b{number}") for number in range(5000))
        assert raised.value.failure.reason == "ledger_disk_full"
        ledger._connection.execute("PRAGMA max_page_count = 1000000")
        ledger.append([admitted("c")])
        assert ledger.account() == Account(admitted=2, consumed=0, dropped={}, open=2)


def test_a_ledger_locked_by_another_run_is_named_within_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, deadline_s=0.05) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="Stop the run that uses this folder") as raised:
            ledger.append([admitted("a")])
        assert raised.value.failure.reason == "ledger_locked"
        other.execute("ROLLBACK")
        other.close()
        ledger.append([admitted("a")])


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is a letter, not a ledger" * 100)
    with pytest.raises(LedgerError, match="not a ledger") as raised:
        Ledger(path)
    assert raised.value.failure.reason == "ledger_corrupt"


@pytest.mark.parametrize("read_only", [False, True])
def test_a_ledger_in_a_folder_that_does_not_exist_is_named(tmp_path: Path, read_only: bool) -> None:
    with pytest.raises(LedgerError, match=r"Its folder must exist") as raised:
        Ledger(tmp_path / "nowhere" / "ledger.sqlite", read_only=read_only)
    assert raised.value.failure.reason == "ledger_unavailable"
