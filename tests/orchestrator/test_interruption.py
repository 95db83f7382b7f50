"""Ctrl-C as a process of its own meets it: what the first lets finish, what the second cuts, and the exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGINNING = """
import asyncio, sys, time
from orchestrator import interruption
from orchestrator.interruption import Interruption, run_until_interrupted, uninterrupted
interruption.STOP_NOW_S = 1.0

async def act(seconds):
    print("acting", flush=True)
    await asyncio.sleep(seconds)
    print("acted", flush=True)

async def command(interruption):
    try:
        {body}
    finally:
        {ending}
    return 0

sys.exit(run_until_interrupted(command, "stopping"))
"""


class Program:
    """A Python program that is interrupted."""

    def __init__(self, body: str, ending: str = "pass") -> None:
        program = textwrap.dedent(BEGINNING).format(body=body, ending=ending)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def until_printed(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n"

    def end(self, within_s: float = 30.0) -> tuple[int, str, str]:
        """Exit code and what else it printed to standard output and standard error."""
        output, errors = self.process.communicate(timeout=within_s)
        return self.process.returncode, output, errors


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def begin(body: str, ending: str = "pass") -> Program:
        started.append(Program(body, ending))
        return started[-1]

    yield begin
    for program in started:
        program.process.kill()
        program.process.wait()


def test_a_command_that_is_not_interrupted_gives_its_own_exit_code(start: Callable[..., Program]) -> None:
    assert start("await act(0)").end()[0] == 0


def test_the_first_ctrl_c_finishes_what_must_be_whole_and_then_stops(start: Callable[..., Program]) -> None:
    program = start("await uninterrupted(act(0.5)); print('went on', flush=True)", "print('closed', flush=True)")
    program.until_printed("acting")
    program.interrupt()
    code, output, errors = program.end()
    assert (code, output) == (130, "acted\nclosed\n")
    assert "stopping" in errors


def test_the_second_ctrl_c_cuts_what_must_be_whole(start: Callable[..., Program]) -> None:
    program = start("await uninterrupted(act(60))", "print('closed', interruption.stops_now, flush=True)")
    program.until_printed("acting")
    program.interrupt()
    time.sleep(0.3)
    program.interrupt()
    code, output, errors = program.end(within_s=10.0)
    assert (code, output) == (130, "closed True\n")
    assert "stopping now" in errors


def test_the_second_ctrl_c_cuts_the_waits_of_the_clean_up_one_after_another(start: Callable[..., Program]) -> None:
    waits = "\n        ".join(
        [
            "for number in range(2):",
            "    try: await asyncio.sleep(60)",
            "    except asyncio.CancelledError: print('cut', flush=True)",
        ]
    )
    program = start("await act(60)", waits)
    program.until_printed("acting")
    program.interrupt()
    time.sleep(0.3)
    program.interrupt()
    code, output, _ = program.end(within_s=10.0)
    assert (code, output) == (130, "cut\ncut\n")


def test_what_no_cancellation_reaches_ends_by_force(start: Callable[..., Program]) -> None:
    program = start("print('acting', flush=True); await asyncio.to_thread(time.sleep, 60)")
    program.until_printed("acting")
    program.interrupt()
    time.sleep(0.3)
    program.interrupt()
    code, output, errors = program.end(within_s=10.0)
    assert (code, output) == (130, "")
    assert "Traceback" not in errors


def test_an_error_after_the_second_ctrl_c_does_not_change_the_exit_code(start: Callable[..., Program]) -> None:
    program = start("await act(60)", "1 / 0 if interruption.stops_now else await asyncio.sleep(60)")
    program.until_printed("acting")
    program.interrupt()
    time.sleep(0.3)
    program.interrupt()
    code, _, errors = program.end(within_s=10.0)
    assert code == 130
    assert "stopping now" in errors
