"""Run what proves Counterpoint, in sections that each keep a budget: `quick`, `ci`, `all`, `slow`, `table`.

quick   lint and import rules, then every test that is not slow, with the types checked beside them: `make test`.
ci      quick, then one part of each kind of slow test, drawn by the date or by CI_PART: `.ci/run`.
all     quick and every part; goes on where it was stopped: `make test-all`.
table   print the table of the slowest tests for docs/testing.md (`--write` puts it there).

docs/testing.md says what the sections hold. A section that takes twice its budget is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import parts  # noqa: E402

BIN = Path(sys.executable).parent
STATE = ROOT / "build" / "test-all.json"
DOCUMENT = ROOT / "docs" / "testing.md"
TABLE_HEAD = "| Seconds | Test |\n|---:|---|\n"
SLOWEST = 30
STOP_FACTOR = 2.0
"""Machines are shared: a section may take so many times its budget before it is stopped."""
CI_LIMIT_S = 80 * 60.0
"""Of `ci` altogether: what would begin later is not run, and that is a failure."""
INTERRUPT_S = 90.0
"""For pytest to end what its tests have started, after a section was stopped."""
MARK = "COUNTERPOINT_SECTION"
"""In the environment of everything that a section starts."""
OUTCOMES = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")


@dataclass(frozen=True)
class Section:
    """What one call of pytest runs.

    Attributes:
        name: quick, or kind-part ("chaos-2").
        budget_s: how long it should take on two idle cores.
        planned_s: how long it takes by the recorded durations; None for quick, which runs in two processes.
        arguments: of pytest.
    """

    name: str
    budget_s: float
    planned_s: float | None
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """How a section ended."""

    section: Section
    seconds: float
    counts: Counter[str]
    problem: str = ""


def quick_section(workers: int) -> Section:
    """Every test that is not slow, in so many processes."""
    spread = ("-n", str(workers), "--dist", "loadscope", "--no-loadscope-reorder") if workers > 1 else ()
    return Section(parts.QUICK, parts.BUDGETS_S[parts.QUICK], None, ("-m", "not slow", *spread))


def collected_plan() -> dict[str, list[list[str]]]:
    """The parts of every slow test that there is, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--plan", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"the tests can't be collected:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        found: dict[str, list[list[str]]] = json.loads(path.read_text())
        return found


def slow_section(kind: str, index: int, plan: dict[str, list[list[str]]]) -> Section:
    """A part of a kind, counted from 1; beyond the last part it begins again with the first."""
    number = (index - 1) % len(plan[kind]) + 1
    tests = plan[kind][number - 1]
    planned_s = parts.part_seconds(tests, parts.durations())
    return Section(f"{kind}-{number}", parts.BUDGETS_S[kind], planned_s, tuple(tests))


def drawn_part(plan: dict[str, list[list[str]]], asked: str | None, today: datetime.date) -> int:
    """The part that runs: the one asked for, else one by the date, so that as many days as there are parts run all."""
    count = max(map(len, plan.values()))
    if asked is None or not asked.strip():
        return today.toordinal() % count + 1
    if not asked.strip().isdigit() or not 1 <= int(asked) <= count:
        raise SystemExit(f"CI_PART = {asked}: there are the parts 1 to {count}")
    return int(asked)


def run_section(section: Section, deadline_s: float, more: Sequence[str] = ()) -> Result:
    """Run a section and show what it prints; interrupted at the deadline, killed if that doesn't end it."""
    planned = "" if section.planned_s is None else f", {section.planned_s / 60:.1f} min by the recorded durations"
    print(f"\n=== {section.name}: budget {section.budget_s / 60:.0f} min{planned}", flush=True)
    if not section.arguments:
        return Result(section, 0.0, Counter())
    command = [sys.executable, "-m", "pytest", *section.arguments, *more]
    started, mark, is_late, tail = time.monotonic(), uuid.uuid4().hex, False, deque[str](maxlen=50)
    # Torch's threads for operations on tiny tensors only wait for each other, and more so beside another process.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {MARK: mark}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    relay = threading.Thread(target=_relay, args=(process, tail), daemon=True)
    relay.start()
    try:
        process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        is_late = True
    finally:
        _stop(process, mark)
    relay.join(10.0)
    seconds = time.monotonic() - started
    said = next((found for line in reversed(tail) if (found := OUTCOMES.findall(line))), [])
    counts = Counter({name.removesuffix("s"): int(count) for count, name in said})
    problem = ""
    if is_late:
        problem = f"stopped after {seconds / 60:.1f} min, its deadline; the budget is {section.budget_s / 60:.0f} min"
    elif process.returncode != 0:
        problem = f"pytest ended with {process.returncode}"
    return Result(section, seconds, counts, problem)


def _relay(process: subprocess.Popen[str], tail: deque[str]) -> None:
    """Show what pytest prints, and keep its last lines."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        tail.append(line)


def _stop(process: subprocess.Popen[str], mark: str) -> None:
    """Interrupt pytest if it runs, which ends what its tests have started; kill what is left of it, by the mark."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPT_S)
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
    process.wait(10)


def lint() -> None:
    """Style and import rules, in seconds."""
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"]):
        if subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, check=False).returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed")


class TypeCheck:
    """mypy, beside the tests."""

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen([str(BIN / "mypy")], cwd=ROOT, stdout=self._output, stderr=subprocess.STDOUT)

    def finish(self) -> bool:
        """Wait for it and show what it says; whether all is well."""
        code = self._process.wait()
        self._output.seek(0)
        print(f"\n=== types\n{self._output.read().strip()}", flush=True)
        return code == 0

    def stop(self) -> None:
        """Not needed any more."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def closing(results: Sequence[Result], has_types: bool, seconds: float) -> int:
    """Print what each section took and, as the last line, the outcomes of all; the exit code."""
    print("\n=== budget")
    for result in results:
        used = f"{result.seconds / 60:5.1f} of {result.section.budget_s / 60:.0f} min"
        print(f"{result.section.name:12} {used}  {result.problem or 'passed'}")
    counts = sum((result.counts for result in results), Counter[str]())
    if not has_types:
        print("types        mypy found errors, see above")
    is_well = has_types and not any(result.problem for result in results)
    print(f"=== {'passed' if is_well else 'FAILED'} in {seconds:.0f} s")
    failed = counts["failed"] + counts["error"] + (not is_well and not counts["failed"] + counts["error"])
    print(f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped", flush=True)
    return 0 if is_well else 1


def quick(workers: int, more: Sequence[str]) -> int:
    """`make test`."""
    started = time.monotonic()
    lint()
    types = TypeCheck()
    try:
        section = quick_section(workers)
        result = run_section(section, STOP_FACTOR * section.budget_s, more)
        return closing([result], types.finish(), time.monotonic() - started)
    finally:
        types.stop()


def ci(workers: int, more: Sequence[str]) -> int:
    """`.ci/run`."""
    started = time.monotonic()
    lint()
    plan = collected_plan()
    part = drawn_part(plan, os.environ.get("CI_PART"), datetime.datetime.now(datetime.UTC).date())
    sections = [quick_section(workers), *(slow_section(kind, part, plan) for kind in parts.KINDS)]
    print(f"=== part {part} of {max(map(len, plan.values()))}; repeat it with CI_PART={part} .ci/run")
    for section in sections:
        print(f"{section.name:12} budget {section.budget_s / 60:.0f} min")
    types, results = TypeCheck(), []
    try:
        for section in sections:
            left_s = CI_LIMIT_S - (time.monotonic() - started)
            if left_s < section.budget_s / 2:
                results.append(Result(section, 0.0, Counter(), f"not run: {left_s / 60:.0f} min are left of all"))
            else:
                results.append(run_section(section, min(STOP_FACTOR * section.budget_s, left_s), more))
        return closing(results, types.finish(), time.monotonic() - started)
    finally:
        types.stop()


def tree_digest() -> str:
    """Of the commit and of what was changed since."""
    words = [["rev-parse", "HEAD"], ["diff", "HEAD", "--binary"], ["status", "--porcelain"]]
    outputs = [subprocess.run(["git", *each], cwd=ROOT, capture_output=True, check=True).stdout for each in words]
    return hashlib.sha256(b"\0".join(outputs)).hexdigest()


def everything(workers: int, first: str | None, more: Sequence[str]) -> int:
    """`make test-all`: every section that has not passed on this very tree, or those from a named one on."""
    started, digest, plan = time.monotonic(), tree_digest(), collected_plan()
    sections = [quick_section(workers)]
    sections += [slow_section(kind, number + 1, plan) for kind in parts.KINDS for number in range(len(plan[kind]))]
    names = [section.name for section in sections]
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    passed: list[str] = state.get("passed", []) if state.get("tree") == digest else []
    if first is not None:
        if first not in names:
            raise SystemExit(f"--from {first}: there are {', '.join(names)}")
        passed = names[: names.index(first)]
    lint()
    print(f"=== sections: {', '.join(names)}\n=== passed before or left out: {', '.join(passed) or 'none'}")
    types, results = TypeCheck(), []
    try:
        for section in sections:
            if section.name in passed:
                continue
            results.append(run_section(section, STOP_FACTOR * section.budget_s, more))
            if not results[-1].problem:
                passed.append(section.name)
                STATE.parent.mkdir(exist_ok=True)
                STATE.write_text(json.dumps({"tree": digest, "passed": passed}))
        return closing(results, types.finish(), time.monotonic() - started)
    finally:
        types.stop()


def slow(more: Sequence[str]) -> int:
    """Every slow test, with no budget."""
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "slow", *more], cwd=ROOT, check=False).returncode


def slowest_table() -> str:
    """The slowest tests, in Markdown."""
    slowest = sorted(parts.durations().items(), key=lambda item: (-item[1], item[0]))[:SLOWEST]
    return TABLE_HEAD + "".join(f"| {seconds:.0f} | `{test}` |\n" for test, seconds in slowest)


def with_table(document: str, table: str) -> str:
    """The document with its table replaced."""
    before, head, rest = document.partition(TABLE_HEAD)
    assert head, f"{DOCUMENT} has no table of the slowest tests"
    after = re.sub(r"\A(\|.*\n)*", "", rest)
    return before + table + after


def main() -> int:
    """Run the command that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["quick", "ci", "all", "slow", "table"])
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))), help="processes of quick")
    parser.add_argument("--from", dest="first", help="with all: the section to go on with, such as chaos-2")
    parser.add_argument("--record", action="store_true", help="write what tests take into tests/durations.json")
    parser.add_argument("--write", action="store_true", help="with table: put it into docs/testing.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    more = ["--record"] if options.record else []
    match options.command:
        case "quick":
            return quick(options.workers, more)
        case "ci":
            return ci(options.workers, more)
        case "all":
            return everything(options.workers, options.first, more)
        case "slow":
            return slow(more)
    if options.write:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), slowest_table()))
    else:
        print(slowest_table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
