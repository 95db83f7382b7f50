"""A whole synchronous run through the command line, with every engine real: what it did and what it left behind."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import Command, overridden, rows, steps

pytestmark = pytest.mark.engine

STEPS = 3
PORTS_OFTEN_TAKEN = (6379, 8265, 10001, 5000)


@pytest.fixture(scope="module")
def run(small_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A finished run, made while the ports that Ray and MLflow like best are in use."""
    folder = tmp_path_factory.mktemp("training")
    with ExitStack() as stack:
        for port in PORTS_OFTEN_TAKEN:
            taken = stack.enter_context(closing(socket.socket()))
            with suppress(OSError):  # then it is in use already
                taken.bind(("127.0.0.1", port))
                taken.listen()
        recipe = overridden(small_recipe, run__folder=str(folder / "run"), trainer__steps=STEPS)
        command = Command.on(recipe, folder)
        try:
            command.code = command.wait()
            yield command
        finally:
            command.clear_away()


@pytest.fixture(scope="module")
def exported(run: Command) -> Any:
    return AutoModelForImageTextToText.from_pretrained(run.folder / "export").eval()


def test_the_run_ends_well_and_says_so(run: Command) -> None:
    assert run.code == 0, run.output
    assert "verdict" in run.output
    assert "Traceback" not in run.output
    (finished,) = rows(run.folder, "events", "finished")
    assert (finished["status"], finished["step"], finished["verdict"]) == ("FINISHED", STEPS, "done")


def test_no_process_is_left(run: Command) -> None:
    assert run.left_behind() == []


def test_every_step_is_told_once_with_every_part_of_it(run: Command) -> None:
    told = steps(run.folder)
    assert list(told) == list(range(1, STEPS + 1))
    wanted = {
        *("train/loss", "train/kl_reference", "train/kl_coefficient", "train/learning_rate"),
        *("reward/mean", "reward/component/short", "rollout/tokens", "rollout/dropped", "rollout/max_staleness"),
        *("weights/version", "weights/bytes", "time/generate_s", "time/learn_s", "time/sync_s", "time/other_s"),
    }
    for metrics in told.values():
        assert wanted <= metrics.keys()
        assert metrics["rollout/groups"] == 4
        assert metrics["rollout/completions"] == 12
        assert metrics["rollout/max_staleness"] == 0


def test_trainer_and_generator_agree_at_every_step(run: Command) -> None:
    for metrics in steps(run.folder).values():
        assert abs(metrics["rollout/mismatch_kl"]) < 1e-5
        assert metrics["rollout/max_logprob_gap"] < 1e-4


def test_every_version_was_delivered_and_verified(run: Command) -> None:
    for step, metrics in steps(run.folder).items():
        assert (metrics["weights/version"], metrics["weights/verified_version"]) == (step, step)
        assert metrics["weights/delivered"] == 1


def test_the_policy_starts_at_the_reference_and_moves_away_from_it(run: Command) -> None:
    told = steps(run.folder)
    assert abs(told[1]["train/kl_reference"]) < 1e-5
    assert told[STEPS]["train/kl_reference"] > 1e-4


def test_held_out_prompts_were_evaluated_greedily_and_sampled(run: Command) -> None:
    found = [(row["step"], row["mode"], row["n"]) for row in rows(run.folder, "evaluations")]
    assert found == [(step, mode, 6) for step in (0, 2, 3) for mode in ("greedy", "sampled")]
    for row in rows(run.folder, "evaluations"):
        assert row["low"] <= row["reward"] <= row["high"]


def test_the_ledger_is_balanced_and_nothing_is_open(run: Command) -> None:
    with closing(sqlite3.connect(run.folder / "ledger.db")) as ledger:
        counts = dict(ledger.execute("SELECT to_state, count(*) FROM transitions GROUP BY to_state"))
    assert counts["admitted"] == counts["consumed"] == 4 * STEPS
    assert "dropped" not in counts


def test_mlflow_has_the_whole_run(run: Command) -> None:
    client = MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "counterpoint"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["trainer.learning_rate"] == "0.001"
    namespaces = {name.partition("/")[0] for name in found.data.metrics}
    assert {"train", "rollout", "reward", "weights", "time", "eval", "system"} <= namespaces
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    contexts = {use.tags[0].value for use in found.inputs.dataset_inputs}
    assert contexts == {"training", "evaluation"}
    artifacts = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "report.html", "summary.json", "plots", "samples"} <= artifacts
    tables = client.list_artifacts(found.info.run_id, "samples")
    assert client.list_artifacts(found.info.run_id, "table_images")
    table = json.loads(Path(client.download_artifacts(found.info.run_id, tables[0].path)).read_text())
    assert {"completion", "reward", "image_1"} <= set(table["columns"])


def test_report_and_summary_are_written(run: Command) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["eval"]["before"].keys() == summary["eval"]["after"].keys() == {"greedy", "sampled"}
    assert "<html" in (run.folder / "report.html").read_text()
    assert list((run.folder / "plots").glob("*.png"))


def test_the_export_holds_the_weights_of_the_last_checkpoint(run: Command, exported: Any) -> None:
    (state_file,) = (run.folder / "checkpoints" / f"step-{STEPS:06d}" / "policy").rglob("*model_states.pt")
    trained = torch.load(state_file, map_location="cpu", weights_only=False)["module"]
    weights = exported.state_dict()
    shared = trained.keys() & weights.keys()
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(trained[name].float(), weights[name].float()), name


@torch.no_grad()
def test_the_export_answers_as_the_last_version_did(run: Command, exported: Any) -> None:
    processor = AutoProcessor.from_pretrained(run.folder / "export")
    answered = [row for row in rows(run.folder, "samples") if row["source"] == "eval/greedy" and row["step"] == STEPS]
    assert answered
    from PIL import Image

    for row in answered:
        (media,) = row["media"]
        image = Image.open(run.folder / "media" / media["sha256"][:2] / media["sha256"])
        question = row["prompt"].removeprefix("[image] ")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        banned = [[i] for i in (exported.config.image_token_id, exported.config.video_token_id)]
        out = exported.generate(**inputs, do_sample=False, max_new_tokens=12, bad_words_ids=banned)
        said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said == row["completion"]
