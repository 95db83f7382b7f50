"""Sending a run to a real MLflow: SQLite in the run folder, and a server that comes and goes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.config.schema import TrackingConfig
from orchestrator.record.run_record import SampleRow
from orchestrator.tracking.spool import Spool
from orchestrator.tracking.tracker import Tracker, flatten, flush_spool, resolve_uri
from rollout.media import MediaRef

QUIET = TrackingConfig(system_metrics=False)
LONG_S = 90.0


class Folder:
    """Media as files named by their hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, ref: MediaRef, /) -> Path:
        return self.folder / f"{ref.sha256}.png"


def row(**values: object) -> SampleRow:
    fields = {"prompt": "What is it?", "media": (), "target": "3", "completion": "3", "reward": 1.0} | values
    return SampleRow(**fields)  # type: ignore[arg-type]


def client(folder: Path, uri: str | None = None):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(resolve_uri(uri, folder))


def points(mlflow, run_id: str, key: str) -> list[tuple[int, float]]:  # type: ignore[no-untyped-def]
    return sorted((point.step, point.value) for point in mlflow.get_metric_history(run_id, key))


def until(condition: Callable[[], object], what: str, deadline_s: float = LONG_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A real MLflow server process; killed at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "store"),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        until(lambda: answers(port), f"the MLflow server answers, see {folder}/server.log")
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait(10)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run recorded in SQLite, with everything a run can record, cut and resumed once."""
    folder = tmp_path_factory.mktemp("run")
    Image.new("RGB", (8, 8), "red").save(folder / "aa.png")
    config = TrackingConfig(system_metrics=True)
    tracker = Tracker.start(config, folder, "digits", {"trainer": {"learning_rate": 1e-3, "betas": [0.9, 0.95]}})
    for step in range(3):
        tracker.metrics(
            step, {"train/loss": 1.0 - step, "reward/exact (strict)@8": 0.5, "eval//x": 1.0, "a@b": 1, "a(b": 2}
        )
    tracker.metrics(3, {"train/loss": math.nan, "train/grad_norm": math.inf})
    tracker.samples(2, [row(media=(MediaRef("image", "aa", "image/png"),)), row(reward=math.nan)], Folder(folder))
    tracker.dataset("digits", "0123456789abcdef", 128, "training")
    (folder / "report.html").write_text("<p>hello</p>")
    tracker.artifact(folder / "report.html")
    tracker.artifact(folder / "never-written.txt")
    until(lambda: Spool(folder).fact("system_step"), "system metrics measured")
    tracker.finish("FAILED", LONG_S)
    first = tracker.run_id

    again = Tracker.start(QUIET, folder, "digits", {"trainer": {"learning_rate": 5e-4, "betas": [0.9, 0.95]}}, first)
    for step in range(2, 5):
        again.metrics(step, {"train/loss": 10.0 + step})
    status = again.finish("FINISHED", LONG_S)
    assert (status.waiting, status.refused, status.error) == (0, 1, None)
    assert status.run_id == first
    return folder, str(first)


@pytest.mark.engine
def test_a_step_done_again_after_a_resume_is_in_mlflow_once(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    values = points(client(folder), run_id, "train/loss")
    assert [step for step, _ in values] == [0, 1, 2, 3, 4]
    assert [value for step, value in values if step != 3] == [1.0, 0.0, -1.0, 14.0]


@pytest.mark.engine
def test_infinity_and_nan_arrive_as_nan_and_are_counted(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    assert math.isnan(dict(points(client(folder), run_id, "train/loss"))[3])
    assert math.isnan(points(client(folder), run_id, "train/grad_norm")[0][1])
    assert points(client(folder), run_id, "record/non_finite") == [(3, 2.0)]


@pytest.mark.engine
def test_odd_names_are_made_valid_and_stay_apart(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    mlflow = client(folder)
    metrics = mlflow.get_run(run_id).data.metrics
    assert points(mlflow, run_id, "reward/exact _strict_8") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert points(mlflow, run_id, "eval/x") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert sorted(value for key, value in metrics.items() if key.startswith("a_b")) == [1.0, 2.0]


@pytest.mark.engine
def test_a_changed_parameter_keeps_its_first_value_and_the_change_is_told(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    mlflow = client(folder)
    run = mlflow.get_run(run_id)
    assert run.data.params == {"trainer.learning_rate": "0.001", "trainer.betas": "[0.9, 0.95]"}
    assert run.data.tags["counterpoint.config_changed"] == "trainer.learning_rate"
    (change,) = mlflow.list_artifacts(run_id, "config_changes")
    text = Path(mlflow.download_artifacts(run_id, change.path)).read_text()
    assert json.loads(text) == {"trainer.learning_rate": {"was": "0.001", "is": "0.0005"}}


@pytest.mark.engine
def test_the_table_of_samples_shows_their_images(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    mlflow = client(folder)
    listed = json.loads(mlflow.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": "samples/step_000002.json", "type": "table"}]
    table = json.loads(Path(mlflow.download_artifacts(run_id, listed[0]["path"])).read_text())
    rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    assert [(row["completion"], row["reward"]) for row in rows] == [("3", 1.0), ("3", None)]
    image = rows[0]["image_1"]
    assert rows[1]["image_1"]["type"] == "image"  # a blank: the view takes no other cell in a column of images
    assert Image.open(mlflow.download_artifacts(run_id, image["filepath"])).getpixel((0, 0)) == (255, 0, 0)
    assert Image.open(mlflow.download_artifacts(run_id, image["compressed_filepath"])).size == (8, 8)


@pytest.mark.engine
def test_lineage_status_system_metrics_and_files_are_there(finished: tuple[Path, str]) -> None:
    folder, run_id = finished
    mlflow = client(folder)
    run = mlflow.get_run(run_id)
    (use,) = run.inputs.dataset_inputs
    assert (use.dataset.name, use.dataset.digest, json.loads(use.dataset.profile)) == (
        "digits",
        "0123456789abcdef",
        {"num_rows": 128},
    )
    assert [(tag.key, tag.value) for tag in use.tags] == [("mlflow.data.context", "training")]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "digits"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert Path(mlflow.download_artifacts(run_id, "report.html")).read_text() == "<p>hello</p>"


@pytest.mark.engine
def test_a_run_goes_on_without_its_server_and_everything_arrives_once_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    config = TrackingConfig(uri=f"http://127.0.0.1:{port}", system_metrics=False)
    tracker = Tracker.start(config, tmp_path / "run", "digits", {"a": 1})
    for step in range(5):
        tracker.metrics(step, {"train/loss": float(step)})
    until(lambda: tracker.status().error, "the missing server is noticed")
    assert tracker.run_id is None
    with server(tmp_path / "server", port):
        until(lambda: tracker.status().waiting == 0, "what waited is sent")
        run_id = tracker.run_id
        assert tracker.status().error is None
    for step in range(5, 10):
        tracker.metrics(step, {"train/loss": float(step)})
    left = tracker.finish("FINISHED", 5.0)
    assert (left.waiting, left.run_id) == (6, run_id)
    with server(tmp_path / "server", port):
        assert flush_spool(tmp_path / "run", LONG_S).waiting == 0
        assert flush_spool(tmp_path / "run", LONG_S).waiting == 0
        mlflow = client(tmp_path, config.uri)
        assert points(mlflow, str(run_id), "train/loss") == [(step, float(step)) for step in range(10)]
        assert mlflow.get_run(str(run_id)).info.status == "FINISHED"
        assert len(mlflow.search_runs([mlflow.get_experiment_by_name("counterpoint").experiment_id])) == 1


@pytest.mark.engine
def test_the_sender_dies_with_a_killed_driver_and_a_resume_goes_on_with_the_run(tmp_path: Path) -> None:
    driver = (
        "import sys, time; from pathlib import Path; from orchestrator.config.schema import TrackingConfig\n"
        "from orchestrator.tracking.tracker import Tracker\n"
        "t = Tracker.start(TrackingConfig(system_metrics=False), Path(sys.argv[1]), 'r', {})\n"
        "t.metrics(0, {'train/loss': 1.0}); print(t._sender.pid, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    sender = int(process.stdout.readline())
    # MLflow's making of its database isn't atomic: a driver killed within it is another case than this one.
    until(lambda: Spool(tmp_path).fact("run_id"), "the run has been made")
    process.kill()
    process.wait(10)
    process.stdout.close()
    until(lambda: not Path(f"/proc/{sender}").exists() or "Z" in _state(sender), "the sender has ended")
    killed = Spool(tmp_path).fact("run_id")
    tracker = Tracker.start(QUIET, tmp_path, "r", {})
    tracker.metrics(1, {"train/loss": 2.0})
    status = tracker.finish("FINISHED", LONG_S)
    assert status.waiting == 0
    assert status.run_id == killed
    mlflow = client(tmp_path)
    assert points(mlflow, str(status.run_id), "train/loss") == [(0, 1.0), (1, 2.0)]
    assert mlflow.get_run(str(status.run_id)).info.status == "FINISHED"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.engine
def test_a_run_started_anew_in_a_used_folder_is_another_mlflow_run(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", system_metrics=False)
    first = Tracker.start(config, tmp_path, "r", {})
    first.metrics(0, {"train/loss": 1.0})
    assert first.finish("KILLED", 1.0).waiting == 4
    second = Tracker.start(QUIET, tmp_path, "r", {}, is_resumed=False)
    second.metrics(0, {"train/loss": 2.0})
    status = second.finish("FINISHED", LONG_S)
    assert status.waiting == 0
    assert points(client(tmp_path), str(status.run_id), "train/loss") == [(0, 2.0)]
    (previous,) = (tmp_path / "previous").iterdir()
    assert Spool(previous).counts() == (4, 0)


@pytest.mark.engine
def test_what_was_sent_but_not_noted_leaves_one_point_when_sent_again(tmp_path: Path) -> None:
    from orchestrator.tracking.items import RunWriter

    spool = Spool(tmp_path)
    spool.set_facts(uri=resolve_uri(None, tmp_path), experiment="e", run_name="r", run_key="k")
    spool.put("metrics", {"step": 7, "values": {"train/loss": "0.25", "train/kl": "nan"}})
    for _ in range(2):  # a crash after MLflow's commit and before the spool's
        writer = RunWriter.connect(spool)
        writer.send(spool.take(10))
    assert points(writer.client, writer.run_id, "train/loss") == [(7, 0.25)]
    assert len(points(writer.client, writer.run_id, "train/kl")) == 1


def test_a_tracker_that_is_off_does_nothing(tmp_path: Path) -> None:
    tracker = Tracker.start(TrackingConfig(enabled=False), tmp_path / "run", "r", {"a": 1})
    tracker.metrics(0, {"train/loss": 1.0})
    assert tracker.finish().waiting == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "runs"])
def test_a_plain_folder_as_tracking_uri_is_refused_with_what_to_use_instead(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match="sqlite:///path"):
        Tracker.start(TrackingConfig(uri=uri), tmp_path, "r", {})


def test_flushing_a_folder_that_was_never_tracked_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not the folder of a tracked run"):
        flush_spool(tmp_path)


def test_nested_settings_become_dotted_parameters() -> None:
    nested: dict[str, object] = {"trainer": {"betas": (0.9, 0.95), "lr": 0.1}, "names": [], "off": None, "empty": {}}
    assert flatten(nested) == {
        "trainer.betas": "[0.9, 0.95]",
        "trainer.lr": "0.1",
        "names": "[]",
        "off": "None",
        "empty": "{}",
    }


def test_items_wait_in_memory_while_the_spool_is_locked_and_are_written_later(tmp_path: Path) -> None:
    import sqlite3

    spool = Spool(tmp_path)
    blocker = sqlite3.connect(tmp_path / "spool.db")
    blocker.execute("BEGIN IMMEDIATE")
    spool.put("tags", {"tags": {"a": "1"}})
    assert spool.error is not None
    assert spool.counts() == (1, 0)
    blocker.rollback()
    spool.put("tags", {"tags": {"a": "2"}})
    assert [item.body["tags"]["a"] for item in spool.take(10)] == ["1", "2"]
