"""Every slow test is in exactly one part, each part fits its budget, and a stopped section says so."""

from __future__ import annotations

import datetime
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import parts
from tests.conftest import SLOW

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "scripts" / "run_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_tests"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def slow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The kind of every slow test that there is; collected anew where only some files were."""
    known: dict[str, str] = request.config.stash[SLOW]
    if any("test_chaos" in test for test in known):
        return known
    plan = tmp_path_factory.mktemp("plan") / "plan.json"
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "--plan", str(plan)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=500)
    found = json.loads(plan.read_text())
    return {test: kind for kind, cut in found.items() for part in cut for test in part}


def test_the_parts_of_all_kinds_are_every_slow_test_once_and_each_fits_its_budget(slow: dict[str, str]) -> None:
    seconds = parts.durations()
    plan = parts.plan(slow, seconds)
    assert sorted(test for cut in plan.values() for part in cut for test in part) == sorted(slow)
    for kind, cut in plan.items():
        assert cut[0], f"no test of the kind {kind}"
        for part in cut:
            assert parts.part_seconds(part, seconds) <= parts.BUDGETS_S[kind]


def test_every_slow_test_was_measured_once(slow: dict[str, str]) -> None:
    unknown = sorted(slow.keys() - parts.durations().keys())
    assert not unknown, "run them with --record, which puts what they take into tests/durations.json"


def test_all_parts_together_take_at_most_150_minutes(slow: dict[str, str]) -> None:
    seconds = parts.durations()
    total_s = parts.BUDGETS_S[parts.QUICK] + sum(seconds[test] for test in slow)
    assert total_s <= 150 * 60


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0.1, 100.0), min_size=1), st.floats(1.0, 300.0))
def test_a_cut_loses_nothing_doubles_nothing_and_does_not_depend_on_the_order(
    seconds: dict[str, float], budget_s: float
) -> None:
    found = parts.cut(seconds, seconds, budget_s)
    assert Counter(test for part in found for test in part) == Counter(list(seconds))
    assert parts.cut(reversed(list(seconds)), seconds, budget_s) == found
    for part in found:
        assert len(part) <= 1 or len(found) == len(seconds) or parts.part_seconds(part, seconds) <= budget_s


def test_a_cut_by_hand() -> None:
    # 5 + 4 + 3 + 2 + 2 = 16 in parts of at most 9: two. Longest first: a=5, b=4, c=3 with b, d=2 with a, e=2 with the
    # lesser of 7 and 7, which is the first.
    seconds = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0, "e": 2.0}
    assert parts.cut(seconds, seconds, 9.0) == [["a", "d", "e"], ["b", "c"]]
    assert parts.cut(["new"], {}, 9.0) == [["new"]]
    assert parts.cut([], {}, 9.0) == [[]]


def test_a_slow_test_without_a_kind_is_of_the_rest() -> None:
    assert [parts.kind_of(names) for names in ({"slow"}, {"slow", "chaos"}, {"learning"})] == [
        "rest",
        "chaos",
        "learning",
    ]


def test_files_that_share_an_engine_run_in_one_process_and_the_longest_come_first() -> None:
    generator, updates, policy = (
        f"tests/actors/{name}.py::test"
        for name in ("generator/test_generator", "generator/test_generator_updates", "trainer/test_policy")
    )
    assert parts.group_of(generator) == parts.group_of(updates) == "shared_generator"
    assert parts.group_of(policy) == "ray_session"
    assert parts.group_of("tests/test_parts.py::test[a::b]") == "tests/test_parts.py"
    tests = ["tests/test_parts.py::a", generator, policy, updates]
    seconds = {generator: 3.0, updates: 3.0, policy: 5.0}
    assert parts.longest_first(tests, seconds) == ["shared_generator", "ray_session", "tests/test_parts.py"]


def test_measured_seconds_join_the_table_and_quick_ones_stay_out(tmp_path: Path) -> None:
    table = tmp_path / "durations.json"
    parts.write_durations({"fast": 0.4, "long": 9.04, "slow": 0.2}, ["slow"], table)
    parts.write_durations({"long": 8.0}, [], table)
    assert parts.durations(table) == {"long": 8.0}
    parts.write_durations({"slow": 0.2}, ["slow"], table)
    assert parts.durations(table) == {"long": 8.0, "slow": 0.2}


def test_as_many_days_as_there_are_parts_run_all_of_them_and_one_can_be_asked_for(runner: ModuleType) -> None:
    plan = {"chaos": [["a"], ["b"], ["c"]], "learning": [["d"]], "rest": [["e"], ["f"]]}
    days = [datetime.date(2026, 12, 30) + datetime.timedelta(days=number) for number in range(3)]
    drawn = [runner.drawn_part(plan, None, day) for day in days]
    assert sorted(drawn) == [1, 2, 3]
    ran = {test for part in drawn for kind in plan for test in runner.slow_section(kind, part, plan).arguments}
    assert ran == set("abcdef")
    assert runner.drawn_part(plan, "2", days[0]) == 2
    with pytest.raises(SystemExit, match="parts 1 to 3"):
        runner.drawn_part(plan, "4", days[0])


@pytest.mark.parametrize(
    ("body", "deadline_s", "code", "said"),
    [
        ("def test_one(): pass", 120.0, 0, "1 passed, 0 failed"),
        ("def test_one(): assert False\ndef test_two(): pass", 120.0, 1, "1 passed, 1 failed"),
        ("def test_one():\n    import time\n    time.sleep(600)", 5.0, 1, "0 passed, 1 failed"),
    ],
)
def test_a_section_ends_at_its_deadline_and_the_last_line_counts_what_ran(
    runner: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    body: str,
    deadline_s: float,
    code: int,
    said: str,
) -> None:
    (tmp_path / "test_it.py").write_text(body)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    section = runner.Section(
        "x", 60.0, None, ("-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), str(tmp_path))
    )
    result = runner.run_section(section, deadline_s)
    assert runner.closing([result], True, 1.0) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert said in last
    assert bool(result.problem) == bool(code)
    assert ("its deadline" in result.problem) == (deadline_s == 5.0)


def test_the_table_of_the_slowest_tests_is_the_recorded_one(runner: ModuleType) -> None:
    document = runner.DOCUMENT.read_text()
    assert runner.with_table(document, runner.slowest_table()) == document, "scripts/run_tests.py table --write"
