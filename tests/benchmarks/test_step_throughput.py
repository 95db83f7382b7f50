"""The throughput benchmark's policy has the lengths it is meant to have, and its figures leave no time out."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peer_trl
import step_throughput
from throughput_case import CASES, Case, write_case

from orchestrator.config.loading import load_config


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    folder = tmp_path_factory.mktemp(request.param.name)
    write_case(request.param, folder, prompts=4)
    return request.param, folder


@torch.no_grad()
def test_the_policy_ends_its_turn_with_the_chosen_probability_also_after_images(written: tuple[Case, Path]) -> None:
    case, folder = written
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    row = peer_trl.read_prompts(folder / "prompts.jsonl")[0]
    content = [{"type": "image", "image": Image.open(image)} for image in row["images"]]
    content.append({"type": "text", "text": row["prompt"][0]["content"]})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    special = processor.tokenizer.all_special_ids
    found = model(**inputs).logits[0, -1].softmax(-1)
    wanted = 1 / case.mean_tokens if case.mean_tokens else 0.0
    assert float(found[processor.tokenizer.eos_token_id]) == pytest.approx(wanted, rel=0.03, abs=1e-12)
    assert all(float(found[token]) < 1e-12 for token in special if token != processor.tokenizer.eos_token_id)


def test_the_peer_gets_text_and_images_apart(written: tuple[Case, Path]) -> None:
    rows = peer_trl.read_prompts(written[1] / "prompts.jsonl")
    assert len(rows) == 4
    assert "<image>" not in rows[0]["prompt"][0]["content"]
    assert all(Path(image).is_file() for image in rows[0]["images"])


def test_the_expected_length_is_that_worked_by_hand() -> None:
    # Half of the completions end after the first token, the other half reach the limit of 2.
    assert Case("tiny", max_tokens=2, mean_tokens=2.0).expected_tokens == pytest.approx(1.5)
    assert Case("fixed", max_tokens=32, mean_tokens=None).expected_tokens == 32


def test_figures_count_the_time_between_steps_as_other(tmp_path: Path) -> None:
    # Steps end at 10, 12, 15 and 18 s; the first is warm-up, so 2, 3 and 3 s are counted.
    values = {"time/step_s": 1.5, "time/generate_s": 1.0, "time/learn_s": 0.5, "rollout/completions": 6.0}
    values |= {"rollout/mean_tokens": 7.0, "rollout/max_tokens": 9.0}
    rows = [{"step": n, "time": t, "values": values} for n, t in enumerate((10.0, 12.0, 15.0, 18.0), start=1)]
    rows.insert(1, {"step": 1, "time": 11.0, "values": {"time/checkpoint_s": 0.1}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = step_throughput.read_figures(path, warmup=1)
    assert figures["step_s"] == [2.0, 3.0, 3.0]
    assert figures["median_step_s"] == 3.0
    assert figures["completions_per_s"] == pytest.approx(2.0)
    assert figures["parts_s"]["generate"] == 1.0
    assert figures["parts_s"]["other"] == pytest.approx(1.5)


def test_the_recipe_of_every_workload_loads(tmp_path: Path) -> None:
    for case in CASES:
        (tmp_path / "model").mkdir(exist_ok=True)
        recipe = tmp_path / f"{case.name}.yaml"
        recipe.write_text(yaml.safe_dump(step_throughput.recipe(case, tmp_path, steps=5)))
        assert load_config(recipe).rollout.sampling.max_tokens == case.max_tokens
