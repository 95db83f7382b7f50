"""Recipes and overrides: what loads, and the one message for what doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import yaml_dialect
from orchestrator.config.loading import ConfigError, load_config, save_config
from orchestrator.config.schema import Config, SFTConfig

GOOD = """
model: {path: ../model, max_length: 1024}
data:
  train: {path: data/train.jsonl}
  modules: [prompts.py]
reward:
  components: [{function: exact}]
  modules: [rewards.py]
rollout: {sampling: {max_tokens: 64}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that loads, in recipes/ below the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("recipes/mine.yaml")
    path.parent.mkdir()
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str, schema: type[Config] | type[SFTConfig] = Config) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, schema)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return caught.value.problems


def only(path: Path, *overrides: str, schema: type[Config] | type[SFTConfig] = Config) -> str:
    (problem,) = problems(path, *overrides, schema=schema)
    return problem


def test_an_unknown_key_names_the_nearest_setting(recipe: Path) -> None:
    recipe.write_text(GOOD.replace("rollout: {", "rollout: {max_stalenes: 1, "))
    assert only(recipe) == (
        "recipes/mine.yaml: rollout.max_stalenes is not a setting. Did you mean rollout.max_staleness?"
    )


def test_an_unknown_key_in_a_list_keeps_its_index(recipe: Path) -> None:
    recipe.write_text(GOOD.replace("{function: exact}", "{function: exact, wieght: 2}"))
    assert only(recipe).endswith(
        "reward.components.0.wieght is not a setting. Did you mean reward.components.0.weight?"
    )


def test_a_setting_in_the_wrong_section_is_found_where_it_belongs(recipe: Path) -> None:
    assert only(recipe, "evaluation.max_tokens=3").endswith("Did you mean evaluation.sampling.max_tokens?")


def test_a_wrong_type_shows_the_value_and_what_is_allowed(recipe: Path) -> None:
    recipe.write_text(GOOD + "trainer: {steps: many}\n")
    assert only(recipe) == (
        "recipes/mine.yaml: trainer.steps = many is not allowed: it must be a whole number of at least 1."
    )


@pytest.mark.parametrize(
    "setting", ["steps: true", 'steps: "10"', "steps: 1.5", "learning_rate: fast", "betas: [1]", "zero_stage: 1"]
)
def test_nothing_is_coerced_silently(recipe: Path, setting: str) -> None:
    recipe.write_text(GOOD + f"trainer: {{{setting}}}\n")
    assert "is not allowed: it must be" in only(recipe)


def test_a_misspelt_choice_names_the_nearest(recipe: Path) -> None:
    assert only(recipe, "algorithm.kl.placement=rewrad") == (
        "command line: algorithm.kl.placement = rewrad is not allowed: it must be one of loss, reward. Did you mean "
        "reward?"
    )


def test_a_misspelt_method_names_the_nearest_and_all_there_are(recipe: Path) -> None:
    assert only(recipe, "algorithm.aggregation=token_maen") == (
        "recipes/mine.yaml: algorithm.aggregation: there is no aggregation 'token_maen'. Did you mean 'token_mean'? "
        "Registered: constant_length, sequence_mean, sequence_sum, token_mean."
    )


def test_a_missing_setting_says_what_it_is_for(recipe: Path) -> None:
    recipe.write_text("data: {train: {path: a.jsonl}}\nreward: {components: [{function: exact}]}\n")
    assert only(recipe).startswith("recipes/mine.yaml: model.path is missing (A Hugging Face folder")


def test_every_problem_is_listed_at_once(recipe: Path) -> None:
    recipe.write_text(GOOD + "trainer: {steps: 0, learning_rat: 1.0}\nalgorithm: {loss: 3}\n")
    assert len(problems(recipe, "a.b=1")) == 4


def test_an_impossible_combination_gives_the_reason(recipe: Path) -> None:
    assert only(recipe, "trainer.micro_batch_tokens=512") == (
        "recipes/mine.yaml: trainer.micro_batch_tokens = 512 can't hold one sample of model.max_length (1,024 tokens). "
        "Raise it to at least 1024, or lower model.max_length."
    )


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_are_finite(recipe: Path, value: str) -> None:
    assert "is not a finite number" in "\n".join(problems(recipe, f"trainer.weight_decay={value}"))


def test_a_syntax_error_names_the_line(recipe: Path) -> None:
    recipe.write_text("model: {path: m\ntrainer: 3\n")
    assert only(recipe).startswith("recipes/mine.yaml: line 2, column 8:")


def test_a_key_given_twice_is_refused(recipe: Path) -> None:
    recipe.write_text(GOOD + "model: {path: other}\n")
    assert only(recipe) == "recipes/mine.yaml: line 10, column 1: model is given twice, first in line 2. Keep one."


def test_a_missing_recipe_names_the_nearest_file(recipe: Path) -> None:
    assert only(Path("recipes/mien.yaml")) == (
        "recipes/mien.yaml: there is no such recipe. Did you mean recipes/mine.yaml?"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "is a list"),
        ("data: &a [*a]\n", "an anchor that contains itself"),
        ("model: 3\n" + GOOD.replace("model: {path: ../model, max_length: 1024}", ""), "must be a section"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_words(recipe: Path, content: str, expected: str) -> None:
    recipe.write_text(content)
    assert expected in only(recipe)


def test_a_recipe_that_is_not_text_is_refused(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xfe\x00model")
    assert "not text in UTF-8" in only(recipe)


def test_a_folder_is_not_a_recipe(recipe: Path) -> None:
    assert "is a folder" in only(recipe.parent)


def test_an_exponent_without_a_point_is_a_number(recipe: Path) -> None:
    recipe.write_text(GOOD + "trainer: {learning_rate: 1e-5}\n")
    assert load_config(recipe).trainer.learning_rate == 1e-5
    assert load_config(recipe, ["trainer.learning_rate=3e-4"]).trainer.learning_rate == 3e-4


def test_overrides_reach_lists_by_index_and_whole(recipe: Path) -> None:
    config = load_config(recipe, ["reward.components.0.weight=2", "trainer.betas=[0.8, 0.9]"])
    assert config.reward.components[0].weight == 2
    assert config.trainer.betas == (0.8, 0.9)


def test_an_override_makes_the_section_it_needs(recipe: Path) -> None:
    config = load_config(recipe, ["data.evaluation.path=test.jsonl"])
    assert config.data.evaluation is not None


def test_overrides_of_shared_anchors_stay_apart(recipe: Path) -> None:
    recipe.write_text(
        GOOD.replace("train: {path: data/train.jsonl}", "train: &set {builder: b, arguments: {n: 1}}").replace(
            "  modules: [prompts.py]", "  evaluation: *set"
        )
    )
    config = load_config(recipe, ["data.train.arguments.n=2"])
    assert config.data.evaluation is not None
    assert (config.data.train.arguments, config.data.evaluation.arguments) == ({"n": 2}, {"n": 1})


def test_text_on_the_command_line_needs_no_quotes(recipe: Path) -> None:
    config = load_config(recipe, ["run.name=123", "data.train.system_prompt=Answer: yes", "data.train.target_column="])
    assert (config.run.name, config.data.train.system_prompt) == ("123", "Answer: yes")
    assert config.data.train.target_column is None


def test_leading_dashes_before_an_override_are_ignored(recipe: Path) -> None:
    assert load_config(recipe, ["--trainer.steps=7"]).trainer.steps == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.steps", "Write key=value without spaces"),
        ("--resum", "is not an option"),
        ("=3", "names no setting"),
        ("trainer.steps.x=1", "trainer.steps is a single value"),
        ("reward.components.1.weight=3", "reward.components holds reward.components.0"),
        ("reward.components.first.weight=3", "write an index"),
        ("trainer.betas=[1", "is not YAML"),
        ("trainer.stepz=1", "Did you mean trainer.steps?"),
    ],
)
def test_a_bad_override_says_what_to_write(recipe: Path, override: str, expected: str) -> None:
    problem = only(recipe, override)
    assert problem.startswith("command line: ")
    assert expected in problem


def test_paths_in_a_recipe_are_relative_to_the_recipe(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    assert config.model.path == tmp_path / "model"
    assert config.data.train.path == tmp_path / "recipes/data/train.jsonl"
    assert config.data.modules == (tmp_path / "recipes/prompts.py",)
    assert config.reward.modules == (tmp_path / "recipes/rewards.py",)


def test_paths_on_the_command_line_are_relative_to_the_working_directory(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["model.path=here", "data.modules=[a.py]", "reward.modules.0=b.py"])
    assert config.model.path == tmp_path / "here"
    assert config.data.modules == (tmp_path / "a.py",)
    assert config.reward.modules == (tmp_path / "b.py",)


def test_what_a_run_writes_is_relative_to_the_working_directory(recipe: Path, tmp_path: Path) -> None:
    assert load_config(recipe).run.folder == tmp_path / "runs/run"
    recipe.write_text(GOOD + "run: {folder: runs/mine}\n")
    assert load_config(recipe).run.folder == tmp_path / "runs/mine"


def test_a_supervised_recipe_has_its_own_schema(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("model: {path: m}\ndata: {train: {path: d.jsonl}}\nsft: {batch_size: 4, export_folder: out}\n")
    config = load_config(recipe, [], SFTConfig)
    assert (config.sft.batch_size, config.export_folder) == (4, tmp_path / "out")
    assert "`counterpoint sft`" in "\n".join(problems(recipe))


def test_a_saved_configuration_loads_back_equal(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe, ["trainer.learning_rate=1e-6", "run.name='3e-4'", "data.train.system_prompt=no"])
    save_config(config, tmp_path / "saved/config.yaml")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "saved/config.yaml") == config


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_whatever_is_dumped_loads_back_equal(value: object) -> None:
    assert yaml_dialect.load(yaml_dialect.dump(value)) == value


def test_a_refusal_by_a_section_itself_reads_like_the_others(recipe: Path) -> None:
    problem = only(recipe, "algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=k1")
    assert problem.startswith("recipes/mine.yaml: algorithm.kl.estimator = k1 does nothing in the loss")
