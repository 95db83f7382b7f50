"""Turns the items of the spool into MLflow requests, each of which may be repeated without effect.

Imported only by the sender's process: importing MLflow takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import posixpath
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from orchestrator.tracking.spool import Item, Spool

logger = logging.getLogger("counterpoint.tracking")

RUN_KEY = "counterpoint.run_key"
METRICS_A_BATCH = 1000
PARAMS_A_BATCH = 100
TABLES_LISTED = 100
"""Tables that the tag of MLflow's table view names; the tag's length is limited."""
THUMBNAIL_PIXELS = 256
LOGGED_ARTIFACTS = "mlflow.loggedArtifacts"
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "REQUEST_LIMIT_EXCEEDED"}


def is_refusal(error: Exception) -> bool:
    """Whether the server refuses the item itself, so that sending it again is of no use."""
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, (ValueError, TypeError, KeyError, FileNotFoundError))


def is_gone(error: Exception) -> bool:
    """Whether the server has no such run."""
    return isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST"


@dataclass
class RunWriter:
    """Sends items to one MLflow run, and knows the last step sent of each metric."""

    client: MlflowClient
    run_id: str
    reached: dict[str, int]
    _uploaded: set[str] = field(default_factory=set)

    @classmethod
    def connect(cls, spool: Spool) -> RunWriter:
        """Find the run of this spool, or create it. Raises whatever MLflow raises when the server is not there."""
        client = MlflowClient(spool.fact("uri"))
        run_id = spool.fact("run_id")
        run = None
        if run_id:
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if not is_gone(error):
                    raise
                logger.warning("MLflow run %s is not on %s; another run is started", run_id, spool.fact("uri"))
        if run is None:
            spool.clear_reached()
            run = _create_run(client, spool)
            if run_id:
                client.set_tag(run.info.run_id, "counterpoint.replaces_run", run_id)
        if run.info.lifecycle_stage == LifecycleStage.DELETED:
            client.restore_run(run.info.run_id)
        spool.set_facts(run_id=run.info.run_id)
        if not spool.reached() and run.data.metrics:
            histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
            spool.set_reached({key: max(point.step for point in points) for key, points in histories.items() if points})
        return cls(client, run.info.run_id, spool.reached())

    def is_run_active(self) -> bool:
        """Whether the run can be written to."""
        return bool(self.client.get_run(self.run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)

    def send(self, group: list[Item]) -> dict[str, int]:
        """Send items of one kind; returns the last step reached by each metric sent."""
        item = group[0]
        if item.kind == "metrics":
            return self._metrics(group)
        body = item.body
        match item.kind:
            case "params":
                self._params(body["params"], item)
            case "tags":
                self._tags(body["tags"])
            case "table":
                self._table(body)
            case "dataset":
                self._dataset(body)
            case "artifact":
                self._artifact(Path(body["path"]), body["folder"])
            case "running":
                self.client.update_run(self.run_id, status="RUNNING")
            case "finish":
                self.client.set_terminated(self.run_id, body["status"], end_time=int(item.time * 1000))
            case _:
                raise ValueError(f"unknown kind of item {item.kind!r}")
        return {}

    def _metrics(self, group: list[Item]) -> dict[str, int]:
        points: list[Metric] = []
        reached: dict[str, int] = {}
        for item in group:
            step, timestamp = int(item.body["step"]), int(item.time * 1000)
            values, count = finite_values(item.body["values"])
            if count:
                values["record/non_finite"] = float(count)
            for key, value in sanitise_keys(values).items():
                if step <= reached.get(key, self.reached.get(key, -1)):
                    continue  # sent before a resume, which did this step again
                reached[key] = step
                points.append(Metric(key, value, timestamp, step))
        for start in range(0, len(points), METRICS_A_BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + METRICS_A_BATCH])
        return reached

    def _params(self, params: Mapping[str, str], item: Item) -> None:
        have = self.client.get_run(self.run_id).data.params
        wanted = {key: str(value)[:6000] for key, value in sanitise_keys(params).items()}
        changed = {
            key: {"was": have[key], "is": value} for key, value in wanted.items() if have.get(key, value) != value
        }
        new = [Param(key, value) for key, value in wanted.items() if key not in have]
        for start in range(0, len(new), PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=new[start : start + PARAMS_A_BATCH])
        if changed:
            name = f"config_changes/{int(item.time)}.json"
            self.client.log_text(self.run_id, json.dumps(changed, indent=2, ensure_ascii=False), name)
            self._tags({"counterpoint.config_changed": ", ".join(sorted(changed))})

    def _tags(self, tags: Mapping[str, str]) -> None:
        entries = [RunTag(key, str(value)[:5000]) for key, value in sanitise_keys(tags).items()]
        self.client.log_batch(self.run_id, tags=entries)

    def _dataset(self, body: Mapping[str, Any]) -> None:
        source = json.dumps({"uri": body["source"] or body["name"]})
        profile = json.dumps({"num_rows": body["rows"]})
        dataset = Dataset(body["name"][:500], body["digest"], "local", source, profile=profile)
        tag = InputTag("mlflow.data.context", body["context"])
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def _artifact(self, path: Path, folder: str) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder or path.name)
        elif path.is_file():
            self.client.log_artifact(self.run_id, str(path), folder or None)
        else:
            raise FileNotFoundError(f"{path} does not exist any more, so it can't be sent")

    def _table(self, body: Mapping[str, Any]) -> None:
        name = f"{body['name']}/step_{body['step']:06d}.json"
        columns = max((len(row["media"]) for row in body["rows"]), default=0)
        rows = []
        for row in body["rows"]:
            images = [self._image(Path(path)) for path in row["media"]]
            flat: dict[str, Any] = {"step": body["step"], "prompt": row["prompt"]}
            flat |= {f"image_{i + 1}": images[i] if i < len(images) else self._image(None) for i in range(columns)}
            flat |= {
                key: row[key] for key in ("completion", "target", "reward", "advantage", "policy_version", "tokens")
            }
            flat |= {"finish_reason": row["finish_reason"], "components": json.dumps(row["components"])}
            rows.append(flat)
        if not rows:
            return
        table = {"columns": list(rows[0]), "data": [[_cell(value) for value in row.values()] for row in rows]}
        self.client.log_text(self.run_id, json.dumps(table, ensure_ascii=False, allow_nan=False, default=str), name)
        listed = json.loads(self.client.get_run(self.run_id).data.tags.get(LOGGED_ARTIFACTS, "[]"))
        entry = {"path": name, "type": "table"}
        if entry not in listed:
            listed = [*listed, entry][-TABLES_LISTED:]
            self.client.set_tag(self.run_id, LOGGED_ARTIFACTS, json.dumps(listed))

    def _image(self, path: Path | None) -> dict[str, str]:
        """Upload an image as MLflow's table view wants it: the picture, and a small one beside it.

        The view takes only images in a column of images: where there is none, or it can't be read, it gets a blank.
        """
        name = path.stem if path is not None else "none"
        entry = {"type": "image"} | {
            "filepath": f"table_images/{name}.png",
            "compressed_filepath": f"table_images/{name}.webp",
        }
        if name in self._uploaded:
            return entry
        try:
            image = Image.open(path).convert("RGB") if path is not None else Image.new("RGB", (8, 8), "#d0d3dc")
        except (OSError, ValueError) as error:
            logger.warning("%s can't be shown in the table of samples: %s", path, error)
            return self._image(None)
        with tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder) / f"{name}.png")
            image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            image.save(Path(folder) / f"{name}.webp")
            self.client.log_artifacts(self.run_id, folder, "table_images")
        self._uploaded.add(name)
        return entry


def _create_run(client: MlflowClient, spool: Spool) -> Any:
    name, key = spool.fact("experiment") or "counterpoint", spool.fact("run_key") or ""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            experiment_id = client.create_experiment(name, artifact_location=spool.fact("artifacts"))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _create_run(client, spool)  # another run made it in between
    else:
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            client.restore_experiment(experiment_id)
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    if found:  # created, but the answer never arrived
        return found[0]
    return client.create_run(experiment_id, run_name=spool.fact("run_name"), tags={RUN_KEY: key})


def finite_values(values: Mapping[str, str]) -> tuple[dict[str, float], int]:
    """Numbers from text, infinities as NaN (MLflow would store 1.8e308), and how many were not finite."""
    numbers = {key: float(value) for key, value in values.items()}
    count = sum(not math.isfinite(value) for value in numbers.values())
    return {key: value if math.isfinite(value) else math.nan for key, value in numbers.items()}, count


def sanitise_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under names that MLflow takes; where two become equal, one gets a short hash."""
    clean: dict[str, Any] = {}
    for key in sorted(values, key=lambda key: (sanitise(key) != key, key)):  # names that need no change keep theirs
        name = sanitise(key)
        if name in clean:
            name = f"{name[:240]}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"
        clean[name] = values[key]
    return clean


def sanitise(key: str) -> str:
    """A name by MLflow's rules: letters, digits and ``_-. :/``, a normal path, at most 250 characters."""
    name = re.sub(r"[^\w.\-: /]+", "_", key)
    name = posixpath.normpath("/".join(part for part in name.split("/") if part.strip(". ")) or "_")
    return name if len(name) <= 250 else f"{name[:240]}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else json.dumps(value, default=str)
