"""How the test suite is cut: kinds and parts of the slow tests, files that share an engine, recorded durations.

Pure, apart from reading and writing the table of durations. conftest.py is the hook to pytest, scripts/run_tests.py
runs what is planned here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("durations.json")
"""Seconds of every slow test, and of each other test that takes a second or more, set-up and teardown included."""

QUICK = "quick"
BUDGETS_S = {QUICK: 480.0, "chaos": 720.0, "learning": 720.0, "rest": 780.0}
"""Of `make test`, and of one part of each kind of slow test; together 45 minutes."""
KINDS = ("chaos", "learning", "rest")
UNKNOWN_S = 60.0
"""Taken for a slow test that was never measured."""
RECORDED_FROM_S = 1.0


def durations(table: Path = TABLE) -> dict[str, float]:
    """The recorded seconds, by the test's id."""
    found: dict[str, float] = json.loads(table.read_text())
    return found


def write_durations(measured: Mapping[str, float], slow: Iterable[str], table: Path = TABLE) -> None:
    """Put measurements into the table; those of other tests stay."""
    is_slow = set(slow)
    known = durations(table) if table.exists() else {}
    known |= {name: round(seconds, 1) for name, seconds in measured.items()}
    kept = {name: seconds for name, seconds in known.items() if seconds >= RECORDED_FROM_S or name in is_slow}
    table.write_text(json.dumps(dict(sorted(kept.items())), indent=0) + "\n")


def kind_of(markers: Iterable[str]) -> str:
    """Of a slow test: chaos, learning, or the rest."""
    return next((kind for kind in KINDS if kind in set(markers)), "rest")


def cut(tests: Iterable[str], seconds: Mapping[str, float], budget_s: float) -> list[list[str]]:
    """The fewest parts that each fit the budget, as even as the longest-first rule makes them.

    Args:
        tests: ids; the same ids in any order are cut in the same way.
        seconds: of each test; UNKNOWN_S where it isn't there.
        budget_s: of a part. A test that is longer than it gets a part of its own.
    Returns:
        Disjoint parts, which are all tests together; at least one part, sorted by id.
    """
    ordered = sorted(set(tests), key=lambda test: (-seconds.get(test, UNKNOWN_S), test))
    total_s = sum(seconds.get(test, UNKNOWN_S) for test in ordered)
    count = max(1, min(len(ordered), -int(-total_s // budget_s)))
    while True:
        parts: list[list[str]] = [[] for _ in range(count)]
        loads = [0.0] * count
        for test in ordered:
            least = loads.index(min(loads))
            parts[least].append(test)
            loads[least] += seconds.get(test, UNKNOWN_S)
        if max(loads) <= budget_s or count >= len(ordered):
            return [sorted(part) for part in parts]
        count += 1


def part_seconds(part: Iterable[str], seconds: Mapping[str, float]) -> float:
    """What a part takes by the table."""
    return sum(seconds.get(test, UNKNOWN_S) for test in part)


def plan(slow: Mapping[str, str], seconds: Mapping[str, float]) -> dict[str, list[list[str]]]:
    """Parts by kind.

    Args:
        slow: the kind of every slow test, by id.
        seconds: see :func:`cut`.
    """
    return {kind: cut((test for test, of in slow.items() if of == kind), seconds, BUDGETS_S[kind]) for kind in KINDS}


SHARED = ("shared_generator", "ray_session")
"""Fixtures that are made once in a process, for all files that name them."""


@functools.cache
def _group_of_file(file: str) -> str:
    text = (ROOT / file).read_text()
    asked = (fixture for fixture in SHARED if re.search(rf'\b{fixture}: |getfixturevalue\("{fixture}"', text))
    return next(asked, file)


def group_of(test: str) -> str:
    """Tests of one group run in one process: those of files that share an engine or Ray, else those of a file."""
    return _group_of_file(test.partition("::")[0])


def longest_first(tests: Iterable[str], seconds: Mapping[str, float] | None = None) -> list[str]:
    """The tests' groups, in the order in which two processes end together soonest."""
    seconds = durations() if seconds is None else seconds
    loads: dict[str, float] = {}
    for test in tests:
        loads[group_of(test)] = loads.get(group_of(test), 0.0) + seconds.get(test, 0.05)
    return sorted(loads, key=lambda group: (-loads[group], group))
