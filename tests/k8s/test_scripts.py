"""The scripts that pods run, with the real shell; `counterpoint` is a recorder on PATH, as no training is at stake."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from rollout.ledger import Ledger

K8S = Path(__file__).resolve().parents[2] / "k8s"
RECORDER = """#!/usr/bin/env bash
echo "$@" >>"$RECORD"
"""
STOPPABLE = """#!/usr/bin/env bash
trap 'sleep 0.5; echo whole >"$RECORD"; exit 130' TERM
touch "$RECORD.started"
while true; do sleep 0.1; done
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "counterpoint"
    command.write_text(RECORDER)
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "COUNTERPOINT_PID_FILE": str(tmp_path / "driver.pid"),
        "COUNTERPOINT_DRIVER_VOLUME": str(tmp_path / "driver"),
    }


def call(script: str, *arguments: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(K8S / script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_first_attempt_starts_and_a_second_resumes(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "runs" / "mine"
    assert call("entrypoint.sh", folder, "mine.yaml", "trainer.steps=3", env=environment).returncode == 0
    (folder / "config.yaml").write_text("written by the first attempt")
    assert call("entrypoint.sh", folder, "mine.yaml", "trainer.steps=3", env=environment).returncode == 0
    first, second = Path(environment["RECORD"]).read_text().splitlines()
    assert first == f"train mine.yaml run.folder={folder} trainer.steps=3"
    assert second == f"{first} --resume"


def test_the_ledger_and_its_write_ahead_log_are_on_the_drivers_volume(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    folder, own = tmp_path / "runs" / "mine", tmp_path / "driver" / "mine"
    call("entrypoint.sh", folder, "mine.yaml", env=environment)
    with Ledger(folder / "ledger.db"):
        assert (own / "ledger.db").is_file()
        assert (own / "ledger.db-wal").is_file()
        assert not (folder / "ledger.db-wal").exists()
    again = call("entrypoint.sh", folder, "mine.yaml", env=environment)
    assert again.returncode == 0
    assert (folder / "ledger.db").resolve() == own / "ledger.db"


def test_the_demo_warms_up_once(tmp_path: Path, environment: dict[str, str]) -> None:
    python = tmp_path / "bin" / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    folder = tmp_path / "demo"
    for _ in range(2):
        assert call("demo.sh", folder, "cluster.address=auto", env=environment).returncode == 0
    words = [line.split()[0] for line in Path(environment["RECORD"]).read_text().splitlines()]
    assert [word.rpartition("/")[2] for word in words] == ["digits.py", "sft", "train", "train"]


def test_a_pod_is_not_stopped_before_its_driver_has_ended(tmp_path: Path, environment: dict[str, str]) -> None:
    command = tmp_path / "bin" / "counterpoint"
    command.write_text(STOPPABLE)
    driver = subprocess.Popen(
        [str(K8S / "entrypoint.sh"), str(tmp_path / "run"), "mine.yaml"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while not Path(f"{environment['RECORD']}.started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        drain = subprocess.Popen([str(K8S / "drain.sh"), "driver", "30"], env=environment)
        assert driver.wait(timeout=30) == 130
        assert drain.wait(timeout=30) == 0
        assert Path(environment["RECORD"]).read_text() == "whole\n"
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()


def test_draining_ends_at_once_where_there_is_nothing_to_wait_for(environment: dict[str, str]) -> None:
    assert call("drain.sh", "driver", "50", env=environment).returncode == 0
    nobody = {**environment, "FQ_RAY_IP": "127.0.0.1", "RAY_PORT": "1"}
    assert call("drain.sh", "worker", "50", env=nobody).returncode == 0


@pytest.mark.parametrize("script", ["entrypoint.sh", "demo.sh", "drain.sh"])
def test_a_script_without_arguments_says_how_it_is_called(script: str, environment: dict[str, str]) -> None:
    done = call(script, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")
