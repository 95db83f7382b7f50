"""What is known to fail is said before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from orchestrator.checkpoints import STATE
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.preflight import checks as module
from orchestrator.preflight.checks import memory_estimate, preflight

REWARD = """
from reward.registry import reward_function

@reward_function("preflight_length")
def length(request, target=3):
    return float(len(request.completion) == target)
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that registers a reward function, the same for all tests: a name belongs to one file."""
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARD)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with what a text model needs, without ever having been one."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 2048}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": np.zeros((10, 10), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def tree(model: Path, rewards: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that may start."""
    rows = [{"prompt": f"What is {n}?", "target": str(n), "response": str(n)} for n in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return {
        "run": {"folder": tmp_path / "run"},
        "model": {"path": model, "max_length": 1024},
        "data": {"train": {"path": data}, "evaluation": {"path": data}},
        "reward": {"components": [{"function": "preflight_length"}], "modules": [rewards]},
        "generator": {"kv_cache_gib": 0.01},
    }


def errors(tree: dict[str, Any], **how: bool) -> list[str]:
    return [f.message for f in preflight(Config.model_validate(tree), **how) if f.severity == "error"]


def warned(tree: dict[str, Any], **how: bool) -> list[str]:
    return [f.message for f in preflight(Config.model_validate(tree), **how) if f.severity == "warning"]


def test_a_run_that_may_start_has_no_errors(tree: dict[str, Any]) -> None:
    assert errors(tree) == []


def test_everything_wrong_is_said_at_once(tree: dict[str, Any]) -> None:
    tree["model"]["path"] = "/nowhere"
    tree["reward"]["components"] = [{"function": "preflight_lenght"}]
    tree["data"]["train"] = {"path": "/nowhere.jsonl"}
    assert len(errors(tree)) == 3


def test_a_model_folder_that_is_not_there_is_an_error(tree: dict[str, Any]) -> None:
    tree["model"]["path"] = "org/model"
    assert "model.path: the model folder org/model does not exist" in errors(tree)[0]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("chat_template.jinja", "has no chat template"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_a_part_of_the_model_that_is_missing_is_named(
    tree: dict[str, Any], model: Path, missing: str, expected: str
) -> None:
    (model / missing).unlink()
    (error,) = errors(tree)
    assert expected in error


def test_a_multimodal_model_needs_its_processor(tree: dict[str, Any], model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"vision_config": {}}))
    assert "without processor_config.json" in errors(tree)[0]


def test_weights_that_are_cut_off_are_an_error(tree: dict[str, Any], model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "is not a whole safetensors file" in errors(tree)[0]


def test_a_shard_that_is_missing_is_named(tree: dict[str, Any], model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors" in errors(tree)[0]


def test_a_context_longer_than_the_model_has_is_an_error(tree: dict[str, Any]) -> None:
    tree["model"]["max_length"] = 4096
    assert "Lower it to 2048" in errors(tree)[0]


def test_a_column_that_is_not_there_is_an_error(tree: dict[str, Any]) -> None:
    tree["data"]["train"]["prompt_column"] = "promt"
    (error,) = errors(tree)
    assert error.startswith("data.train: ")
    assert "Did you mean 'prompt'?" in error


def test_a_builder_that_is_not_registered_is_an_error(tree: dict[str, Any]) -> None:
    tree["data"]["train"] = {"builder": "nobodys"}
    assert "no dataset builder is registered as 'nobodys'" in errors(tree)[0]


def test_rows_that_cannot_be_used_are_warned_of(tree: dict[str, Any]) -> None:
    data = Path(tree["data"]["train"]["path"])
    data.write_text("not json\n" + data.read_text())
    assert any("rows can't be used" in message for message in warned(tree))


def test_images_for_a_text_model_are_an_error(tree: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"prompt": "<image> What?", "images": ["a.png"], "target": "x"}
    (tmp_path / "images.jsonl").write_text(json.dumps(row))
    tree["data"]["train"] = {"path": tmp_path / "images.jsonl", "images_column": "images"}
    assert "is a text model" in errors(tree)[0]


@pytest.mark.parametrize("section", ["data", "reward"])
def test_user_code_that_does_not_import_names_the_line(tree: dict[str, Any], tmp_path: Path, section: str) -> None:
    broken = tmp_path / f"broken_{section}.py"
    broken.write_text("import nothing_of_that_name\n")
    tree[section]["modules"] = [broken]
    (error,) = errors(tree)
    assert error.startswith(f"{section}.modules: ")
    assert f"broken_{section}.py:1: ModuleNotFoundError" in error


def test_a_misspelt_reward_function_names_the_nearest(tree: dict[str, Any]) -> None:
    tree["reward"]["components"] = [{"function": "preflight_lenght"}]
    (error,) = errors(tree)
    assert error.startswith("reward.components.0.function: ")
    assert "Did you mean 'preflight_length'?" in error


def test_arguments_a_reward_function_does_not_take_are_an_error(tree: dict[str, Any]) -> None:
    tree["reward"]["components"] = [{"function": "preflight_length", "arguments": {"targets": 3}}]
    (error,) = errors(tree)
    assert error.startswith("reward.components.0.arguments: preflight_length can't be called")


def test_a_method_that_the_users_file_does_not_register_names_the_nearest(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from algorithms.registry import advantage_estimator\n"
        "@advantage_estimator('preflight_sign')\n"
        "def sign(inputs, options):\n"
        "    return inputs.rewards.sign()\n"
    )
    tree["algorithm"] = {"modules": [str(tmp_path / "mine.py")], "advantage": "preflight_sing"}
    (error,) = errors(tree)
    assert error.startswith("algorithm.advantage: there is no advantage estimator 'preflight_sing'.")
    assert "Did you mean 'preflight_sign'?" in error
    tree["algorithm"]["advantage"] = "preflight_sign"
    assert errors(tree) == []


def test_a_file_of_methods_that_fails_is_named(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    tree["algorithm"] = {"modules": [str(tmp_path / "broken.py")]}
    (error,) = errors(tree)
    assert error.startswith("algorithm.modules: ")
    assert "broken.py:1" in error


def test_an_existing_run_is_not_overwritten(tree: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE).write_text("{}")
    (error,) = errors(tree)
    assert "already holds a run (checkpoint of step 12)" in error
    assert "--resume" in error
    assert errors(tree, resume=True) == []


def test_resuming_where_no_run_is_is_an_error(tree: dict[str, Any]) -> None:
    assert "holds no run to go on with" in errors(tree, resume=True)[0]


def test_a_run_cut_before_its_first_checkpoint_starts_over_when_resumed(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    assert "Start it over with --resume" in errors(tree)[0]
    assert errors(tree, resume=True) == []
    assert any("it starts over" in message for message in warned(tree, resume=True))


def test_resuming_a_run_that_is_done_is_warned_of(tree: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE).write_text("{}")
    assert any("Raise trainer.steps" in message for message in warned(tree, resume=True))


def test_a_run_folder_that_cannot_be_written_is_an_error(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tree["run"]["folder"] = tmp_path / "file/run"
    assert "can't be written to" in errors(tree)[0]


def test_an_evaluation_may_run_beside_an_existing_run(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    assert errors(tree, starts_run=False) == []


def test_looking_ahead_writes_nothing(tree: dict[str, Any], tmp_path: Path) -> None:
    assert errors(tree) == []
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_the_checkpoints_is_an_error(tree: dict[str, Any]) -> None:
    tree["checkpoint"] = {"keep": 10**12}
    assert "GiB free" in errors(tree)[0]


def test_too_little_memory_is_warned_of(tree: dict[str, Any]) -> None:
    tree["generator"]["kv_cache_gib"] = 1e6
    assert any("GiB of memory are available" in message for message in warned(tree))


def test_memory_of_the_trainer_is_sixteen_bytes_a_parameter_in_float32(tree: dict[str, Any]) -> None:
    tree["model"]["precision"] = "float32"
    config = Config.model_validate(tree)
    # Parameters, gradients and AdamW's two moments at 4 bytes, the published version and the generator's weights at 4.
    assert memory_estimate(config, 1000) - memory_estimate(config, 0) == 1000 * (16 + 4 + 4)


@pytest.mark.parametrize(("lora", "copies"), [(None, 3), ({"sync": "merged"}, 3), ({"sync": "adapter"}, 0)])
def test_versions_that_are_staged_take_a_second_copy_in_each_generator(
    tree: dict[str, Any], lora: dict[str, Any] | None, copies: int
) -> None:
    tree["model"]["lora"] = lora
    tree["generator"]["replicas"] = 3
    tree["weights"] = {"stage_from_mib": 64}
    staged, parameters = Config.model_validate(tree), (64 << 20) // 2
    in_place = Config.model_validate(tree | {"weights": {"stage_from_mib": None}})
    assert memory_estimate(staged, parameters) - memory_estimate(in_place, parameters) == copies * (64 << 20)
    assert memory_estimate(staged, parameters - 1) == memory_estimate(in_place, parameters - 1)


@pytest.mark.parametrize(("zero_stage", "copies"), [(0, 2), (2, 2), (3, 1)])
def test_memory_of_a_trainer_of_adapters_is_its_weights_on_each_rank_or_sharded_with_zero_3(
    tree: dict[str, Any], zero_stage: int, copies: int
) -> None:
    tree["model"] |= {"precision": "float32", "lora": {}}
    tree["trainer"] = {"ranks": 2, "zero_stage": zero_stage}
    config = Config.model_validate(tree)
    assert memory_estimate(config, 1000) - memory_estimate(config, 0) == 1000 * (4 * copies + 4 + 4)


def test_checkpoints_of_adapters_need_no_disk_for_the_model(tree: dict[str, Any]) -> None:
    tree["checkpoint"] = {"keep": 10**12}
    tree["model"]["lora"] = {}
    assert errors(tree) == []


def test_gpus_that_are_not_there_are_an_error(tree: dict[str, Any]) -> None:
    tree["cluster"] = {"generator": {"gpus": 500}}
    assert "cluster asks for 500 GPUs" in errors(tree)[0]


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_cluster_that_cannot_be_reached_is_an_error(tree: dict[str, Any]) -> None:
    tree["cluster"] = {"address": f"127.0.0.1:{_closed_port()}"}
    assert "can't be reached" in errors(tree)[0]


@pytest.mark.parametrize("address", ["ray://127.0.0.1:99999", "ray://"])
def test_an_address_that_is_none_is_an_error(tree: dict[str, Any], address: str) -> None:
    tree["cluster"] = {"address": address}
    assert f"cluster.address = {address}" in errors(tree)[0]


def test_a_cluster_to_be_found_has_to_be_there(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "RAY_CURRENT_CLUSTER", tmp_path / "none")
    tree["cluster"] = {"address": "auto"}
    assert "finds no running Ray cluster" in errors(tree)[0]


def test_a_cluster_that_answers_is_fine(tree: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        tree["cluster"] = {"address": f"127.0.0.1:{server.getsockname()[1]}"}
        assert errors(tree) == []


def test_a_tracking_server_that_is_down_is_only_a_warning(tree: dict[str, Any]) -> None:
    tree["tracking"] = {"uri": f"http://127.0.0.1:{_closed_port()}"}
    assert errors(tree) == []
    assert any("tracking.uri" in message and "is kept" in message for message in warned(tree))


def test_settings_that_surprise_are_among_the_warnings(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"sampling": {"top_p": 0.9}}
    assert any("top_p = 0.9" in message for message in warned(tree))


def test_prompts_to_imitate_need_an_answer(tree: dict[str, Any]) -> None:
    supervised = {key: tree[key] for key in ("run", "model", "data")}
    assert not [f for f in preflight(SFTConfig.model_validate(supervised)) if f.severity == "error"]
    found = preflight(SFTConfig.model_validate({**supervised, "sft": {"response_key": "answer"}}))
    assert "its metadata holds response" in next(f.message for f in found if f.severity == "error")


def test_supervised_fine_tuning_needs_a_run_folder_of_its_own_and_room_for_its_checkpoints(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    supervised = {key: tree[key] for key in ("run", "model", "data")}

    def refused(*, resume: bool = False, **more: Any) -> list[str]:
        found = preflight(SFTConfig.model_validate(supervised | more), resume=resume)
        return [finding.message for finding in found if finding.severity == "error"]

    assert "holds no run to go on with" in refused(resume=True)[0]
    assert "GiB free" in refused(checkpoint={"keep": 10**12})[0]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE).write_text("{}")
    assert "already holds a run (checkpoint of step 5)" in refused()[0]
    assert refused(resume=True) == []
