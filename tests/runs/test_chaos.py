"""Processes killed, stopped and interrupted at every stage of real runs: what goes on, what ends, in which words."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from orchestrator.checkpoints import Checkpoints, read_state
from tests.conftest import MARK, Command, overridden, rows, steps

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.chaos]

STOPS_WITHIN_S = 60.0
NOW_WITHIN_S = 10.0
"""After the second Ctrl-C."""


def kill_one(command: Command, named: str) -> None:
    """SIGKILL the first process of the run with this in its command line."""
    command.until(lambda: command.processes(named), f"process {named}")[0].kill()


def event(command: Command, kind: str, count: int = 1) -> Callable[[], bool]:
    """Whether an event was recorded so often."""
    return lambda: len(rows(command.folder, "events", kind)) >= count


def assert_interrupted(command: Command, version: int | None = None) -> None:
    """It ends in time by Ctrl-C's exit code, leaves a whole checkpoint where there is a policy, and no process."""
    assert command.wait(STOPS_WITHIN_S) == 130, command.output
    assert "Traceback" not in command.output, command.output
    assert command.left_behind() == []
    (finished,) = rows(command.folder, "events", "finished")
    assert finished["status"] == "KILLED"
    if version is not None:
        assert_whole_checkpoint(command.folder, at_least=version)


def assert_whole_checkpoint(folder: Path, at_least: int) -> None:
    """The newest checkpoint is of this version or a later one and can be read to its end."""
    latest = Checkpoints(folder, keep=2).latest()
    assert latest is not None
    assert read_state(latest).version >= at_least
    assert not list(latest.parent.glob(".writing-*"))
    (model_file,) = (latest / "policy").rglob("*model_states.pt")
    assert torch.load(model_file, map_location="cpu", weights_only=False)["module"]


def test_generators_engines_reward_server_and_mlflow_may_all_be_lost_and_the_run_goes_on(
    slow_recipe: dict[str, Any], start: Callable[..., Command]
) -> None:
    (port,) = free_ports(1)
    recipe = overridden(
        slow_recipe,
        generator__replicas=2,
        trainer__steps=2000,
        tracking__uri=f"http://127.0.0.1:{port}",
        rollout__max_staleness=1,
    )
    run = start(recipe)
    run.until_step(2)

    kill_one(run, "ray::Generator")
    run.until(event(run, "generator_restarted"), "restart of the generator")
    kill_one(run, "EngineCore")
    run.until(event(run, "generator_restarted", 2), "restart of the engine's generator")
    kill_one(run, "ray::RewardServer")
    run.until(event(run, "reward_server_restarted"), "restart of the reward server")
    done = rows(run.folder, "metrics")[-1]["step"]
    run.until_step(done + 4)
    run.until(lambda: list(steps(run.folder).values())[-1].get("weights/delivered") == 2, "both generators current")

    run.interrupt()
    assert_interrupted(run, version=done)
    told = list(steps(run.folder))
    assert told == list(range(1, len(told) + 1))
    for metrics in steps(run.folder).values():
        assert metrics["rollout/max_staleness"] <= 1
        assert metrics.get("rollout/max_logprob_gap", 0.0) < 1e-4
    assert "are kept in" in run.output, "what MLflow did not take is kept, and it is said"
    assert_tracking_arrives_later(run, port, told)


def assert_tracking_arrives_later(run: Command, port: int, told: list[int]) -> None:
    """Start an MLflow server where the run had looked for one, send what was kept, and find every step there once."""
    from mlflow import MlflowClient

    from orchestrator.tracking.tracker import flush_spool

    store = f"sqlite:///{run.folder / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(run.folder / "served"), "--workers", "1"]
    environment = os.environ | {MARK: run.mark}
    log = (run.folder / "server.txt").open("wb")
    with log, subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as server:
        try:
            end = time.monotonic() + 90
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
                time.sleep(0.2)
            status = flush_spool(run.folder, deadline_s=90.0)
            assert (status.waiting, status.refused) == (0, 0), status
            client = MlflowClient(f"http://127.0.0.1:{port}")
            history = client.get_metric_history(str(status.run_id), "train/loss")
            assert sorted(point.step for point in history) == told
            assert client.get_run(str(status.run_id)).info.status == "KILLED"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_a_lost_trainer_ends_the_run_with_a_verdict_and_a_resume_goes_on(
    slow_recipe: dict[str, Any], start: Callable[..., Command]
) -> None:
    recipe = overridden(slow_recipe, trainer__steps=2000)
    run = start(recipe)
    run.until_step(3)
    kill_one(run, "ray::PolicyRank")
    assert run.wait(60) == 1, run.output
    assert "policy rank 0 died" in run.output
    assert "defect of counterpoint" not in run.output
    assert run.left_behind() == []
    assert_whole_checkpoint(run.folder, at_least=2)
    before = list(steps(run.folder))

    resumed = start(overridden(recipe, trainer__steps=len(before) + 2), "--resume")
    assert resumed.wait() == 0, resumed.output
    assert list(steps(resumed.folder)) == list(range(1, len(before) + 3))


def test_a_lost_reference_is_started_again(small_recipe: dict[str, Any], start: Callable[..., Command]) -> None:
    slow = [{"function": "slowly", "arguments": {"seconds": 0.04}}]
    run = start(overridden(small_recipe, trainer__steps=2000, evaluation__every_steps=0, reward__components=slow))
    run.until_step(2)
    kill_one(run, "ray::ReferenceServer")
    run.until(event(run, "reference_restarted"), "restart of the reference")
    run.until_step(rows(run.folder, "metrics")[-1]["step"] + 2)
    run.interrupt()
    assert_interrupted(run, version=2)


@pytest.mark.parametrize("printed", ["starting Ray", "starting trainer, generators"])
def test_ctrl_c_during_the_start_leaves_nothing(
    slow_recipe: dict[str, Any], start: Callable[..., Command], printed: str
) -> None:
    run = start(slow_recipe)
    run.until_printed(printed)
    time.sleep(1.0)  # into the middle of it
    run.interrupt()
    assert_interrupted(run)


def test_ctrl_c_during_an_evaluation_stops_at_once(
    small_recipe: dict[str, Any], start: Callable[..., Command], tmp_path: Path
) -> None:
    log = tmp_path / "called.txt"
    arguments = {"seconds": 3.0, "log": str(log)}
    run = start(overridden(small_recipe, reward__components=[{"function": "slowly", "arguments": arguments}]))
    run.until(log.exists, "the evaluation before training")
    run.interrupt()
    assert_interrupted(run)


def test_ctrl_c_during_an_update_lets_it_end_and_leaves_a_checkpoint_of_it(
    slow_recipe: dict[str, Any], start: Callable[..., Command]
) -> None:
    run = start(overridden(slow_recipe, trainer__steps=2000))
    run.until_step(3)  # no checkpoint is due after this one, so that the next thing the trainer does is an update
    (rank,) = run.processes("ray::PolicyRank")
    rank.send_signal(signal.SIGSTOP)  # the update that comes next takes as long as we like
    time.sleep(4.0)
    before = rows(run.folder, "metrics")[-1]["step"]
    run.interrupt()
    time.sleep(1.0)
    assert run.process.poll() is None
    rank.send_signal(signal.SIGCONT)
    assert_interrupted(run, version=before + 1)
    assert list(steps(run.folder)) == list(range(1, before + 2))


@pytest.mark.parametrize(
    ("seconds_a_reward", "wait_s"), [(0.04, 4.0), (1.0, 0.0)], ids=["update", "last checkpoint after generation"]
)
def test_a_second_ctrl_c_waits_neither_for_the_update_nor_for_the_last_checkpoint(
    slow_recipe: dict[str, Any], start: Callable[..., Command], seconds_a_reward: float, wait_s: float
) -> None:
    rewards = [{"function": "slowly", "arguments": {"seconds": seconds_a_reward}}]
    run = start(overridden(slow_recipe, trainer__steps=2000, reward__components=rewards))
    run.until_step(3)
    (rank,) = run.processes("ray::PolicyRank")
    rank.send_signal(signal.SIGSTOP)
    time.sleep(wait_s)
    run.interrupt()
    time.sleep(1.0)
    assert run.process.poll() is None, "the first Ctrl-C waits for the trainer"
    run.interrupt()
    assert run.wait(NOW_WITHIN_S) == 130, run.output
    assert "stopping now" in run.output
    assert_interrupted(run, version=2)


def test_ctrl_c_stops_supervised_fine_tuning_too(
    small_recipe: dict[str, Any], start: Callable[..., Command], tmp_path: Path
) -> None:
    recipe = {
        "run": {"folder": str(tmp_path / "sft")},
        "model": small_recipe["model"],
        "data": {"train": small_recipe["data"]["train"]},
        "sft": {"batch_size": 8},
        "trainer": overridden(small_recipe["trainer"], steps=20_000),
    }
    run = start(recipe, command="sft")
    run.until_step(3)
    run.interrupt()
    assert_interrupted(run)
    assert not (tmp_path / "sft" / "model").exists(), "what was not learned to the end is not exported as a model"


def test_a_full_disk_ends_the_run_in_words_and_keeps_the_last_checkpoint_whole(
    slow_recipe: dict[str, Any], start: Callable[..., Command], small_disk: Path
) -> None:
    folder = small_disk / "run"
    recipe = overridden(slow_recipe, run__folder=str(folder), trainer__steps=2000, checkpoint__keep=1)
    run = start(recipe)
    run.until(lambda: Checkpoints(folder, keep=1).latest(), "checkpoint")
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        try:
            while file.write(b"\0" * (1 << 16)):
                file.flush()
        except OSError:
            pass
    assert run.wait(90) == 1, run.output
    assert "disk" in run.output
    assert "full" in run.output
    assert "defect of counterpoint" not in run.output
    assert run.left_behind() == []
    assert_whole_checkpoint(folder, at_least=2)
    filler.unlink()
    latest = Checkpoints(folder, keep=1).latest()
    assert latest is not None
    resumed = start(overridden(recipe, trainer__steps=read_state(latest).version + 2), "--resume")
    assert resumed.wait() == 0, resumed.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB, enough for three checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def ray_already(tmp_path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """A Ray cluster that was there before: its address, its mark, and the token it wants, as environment."""
    mark = uuid.uuid4().hex
    port, client_port = free_ports(2)
    address = f"127.0.0.1:{port}"
    files = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: sockets lie in it
    ray = [str(Path(sys.prefix, "bin", "ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    ray += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={files}"]
    ray += [f"--ray-client-server-port={client_port}", "--object-store-memory=100000000"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"} | token
    log = (tmp_path / "ray.txt").open("wb")
    with log, subprocess.Popen(ray, stdout=log, stderr=log, env=environment, start_new_session=True) as head:
        try:
            end = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
                assert head.poll() is None, (tmp_path / "ray.txt").read_text()
                time.sleep(0.2)
            time.sleep(3.0)
            yield address, mark, token
        finally:
            for process in marked(mark):
                process.kill()
            shutil.rmtree(files, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def marked(mark: str) -> list[psutil.Process]:
    """Living processes with this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_cluster_that_is_there_is_used_where_the_recipe_names_it_and_left_alone_where_not(
    slow_recipe: dict[str, Any],
    start: Callable[..., Command],
    ray_already: tuple[str, str, dict[str, str]],
    tmp_path: Path,
) -> None:
    address, mark, token = ray_already
    own = start(overridden(slow_recipe, run__folder=str(tmp_path / "own")), RAY_ADDRESS=address)
    own.until_step(1)
    assert own.processes("raylet")
    assert not [p for p in marked(mark) if "ray::PolicyRank" in " ".join(p.cmdline())]
    own.interrupt()
    assert_interrupted(own, version=1)

    used = start(overridden(slow_recipe, cluster__address=address, trainer__steps=2), **token)
    assert used.wait() == 0, used.output
    assert not used.processes("raylet")
    assert list(steps(used.folder)) == [1, 2]
    end = time.monotonic() + 30
    while any("ray::PolicyRank" in " ".join(p.cmdline()) for p in marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    left = [" ".join(p.cmdline()) for p in marked(mark)]
    assert any("raylet" in line for line in left), "the cluster goes on without us"
    assert not [line for line in left if "EngineCore" in line or "ray::PolicyRank" in line]


def test_an_address_behind_which_is_no_ray_ends_in_words_within_the_deadline(
    slow_recipe: dict[str, Any], start: Callable[..., Command]
) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        run = start(overridden(slow_recipe, cluster__address=address, deadlines__start_s=15.0))
        assert run.wait(90) == 1, run.output
    assert f"Ray ({address}) can't be used" in run.output
    assert "cluster.address" in run.output
    assert run.left_behind() == []
