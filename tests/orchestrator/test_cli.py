"""The command line: exit codes and messages, as a shell sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.preflight.checks import Finding
from orchestrator.run_kinds import RUN_KINDS, RunKind
from rollout.failures import DataError, Failure, FailureError, FailureKind

RECIPE = """
model: {path: ../model, max_length: 1024}
data: {train: {path: data.jsonl}, evaluation: {path: data.jsonl}}
reward: {components: [{function: exact_match}]}
generator: {kv_cache_gib: 0.01}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe that may start, below the working directory."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": np.zeros((10, 10), np.float32)}, model / "model.safetensors")
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "target": "2", "response": "2"}))
    return "recipes/mine.yaml"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the commands hand over, recorded in place of engines; each call answers with an exit code of 0."""
    made: list[tuple[str, Any]] = []

    def recorder(name: str) -> Any:
        def record(*arguments: Any, **named: Any) -> int:
            made.append((name, (*arguments, *named.values())))
            return 0

        return record

    for module, names in (("run_shell", ["run"]), ("evaluate_export", ["evaluate", "export"])):
        stand_in = ModuleType(f"orchestrator.{module}")
        for name in names:
            setattr(stand_in, name, recorder(name))
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_starts_without_the_engines() -> None:
    program = "import sys, orchestrator.cli as c; print(sorted({'torch','ray','vllm','pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_version_is_printed() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("counterpoint 0.")


def test_training_gets_the_configuration_and_the_overrides(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("train", recipe, "trainer.learning_rate=3e-4", "--trainer.steps=7")
    assert result.exit_code == 0, result.output
    ((name, (kind, config, resume)),) = calls
    assert (name, kind.command, resume) == ("run", "train", False)
    assert (config.trainer.learning_rate, config.trainer.steps) == (3e-4, 7)


def test_a_bad_configuration_exits_with_2_and_starts_nothing(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("train", recipe, "rollout.max_stalenes=1", "trainer.steps=0")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: command line: rollout.max_stalenes is not a setting. Did you mean rollout.max_staleness?",
        "error: command line: trainer.steps = 0 is not allowed: it must be a whole number of at least 1.",
    ]
    assert calls == []


def test_what_preflight_finds_is_all_printed(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("train", recipe, "model.path=/nowhere", "data.train.path=/nowhere.jsonl", "rollout.sampling.top_p=0.9")
    assert result.exit_code == 2
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "error", "warning"]
    assert calls == []


def test_warnings_do_not_stop_a_run(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("train", recipe, "rollout.sampling.top_p=0.9")
    assert (result.exit_code, len(calls)) == (0, 1)
    assert "warning: rollout.sampling.top_p" in result.stderr


def test_a_misspelt_option_is_named(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("train", recipe, "--resum")
    assert result.exit_code == 2
    assert "--resum is not an option" in result.stderr


def test_resuming_without_a_run_exits_with_2(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("train", recipe, "--resume")
    assert result.exit_code == 2
    assert "holds no run to continue" in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (DataError("no_prompts", "data.train has no prompts left"), 2, "data.train has no prompts left"),
        (FailureError(Failure(FailureKind.BUG, "ledger", "groups were lost")), 1, "groups were lost (bug: ledger)"),
        (RuntimeError("odd"), 1, "a defect of counterpoint"),
    ],
)
def test_every_end_has_its_exit_code(
    recipe: str, calls: list[tuple[str, Any]], raised: BaseException, code: int, message: str
) -> None:
    def end(*_: Any, **__: Any) -> int:
        raise raised

    sys.modules["orchestrator.run_shell"].run = end  # type: ignore[attr-defined]
    result = run("train", recipe)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]
    assert ("Traceback" in result.stderr) == isinstance(raised, RuntimeError)


def test_the_exit_code_of_a_run_that_failed_is_passed_on(recipe: str, calls: list[tuple[str, Any]]) -> None:
    sys.modules["orchestrator.run_shell"].run = lambda *_, **__: 1  # type: ignore[attr-defined]
    assert run("train", recipe).exit_code == 1


def test_supervised_fine_tuning_has_its_own_recipe(recipe: str, calls: list[tuple[str, Any]]) -> None:
    Path(recipe).write_text("model: {path: ../model, max_length: 64}\ndata: {train: {path: data.jsonl}}\nsft: {}\n")
    assert run("sft", recipe, "sft.batch_size=4").exit_code == 0
    kind, config, resume = calls[0][1]
    assert (kind.command, config.sft.batch_size, resume) == ("sft", 4, False)
    refused = run("train", recipe)
    assert refused.exit_code == 2
    assert "`counterpoint sft`" in refused.stderr


def test_evaluation_takes_a_checkpoint(recipe: str, calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    assert run("evaluate", recipe, "--checkpoint", "step").exit_code == 0
    assert calls[0][1][1] == tmp_path / "step"
    assert run("evaluate", recipe, "--checkpoint", "nowhere").exit_code == 2
    assert run("evaluate", recipe, "data.evaluation=null").exit_code == 2


def test_an_export_overwrites_nothing(recipe: str, calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run("export", "run", "model").exit_code == 2
    assert run("export", "nowhere", "out").exit_code == 2
    assert run("export", "run", "out").exit_code == 0
    assert calls == [("export", (tmp_path / "run", tmp_path / "out"))]


def test_tracking_needs_a_run_that_was_tracked(recipe: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["track", str(tmp_path)])
    assert result.exit_code == 2
    assert "not the folder of a tracked run" in result.stderr


def test_a_report_needs_a_run(recipe: str) -> None:
    result = run("report", "nowhere")
    assert result.exit_code == 2
    assert "nowhere is not the folder of a run" in result.stderr


def test_check_prints_the_plan_and_starts_nothing(recipe: str, calls: list[tuple[str, Any]]) -> None:
    result = run("check", recipe, "rollout.prompts_per_step=4", "rollout.group_size=3")
    assert result.exit_code == 0, result.output
    assert "4 prompts x 3 = 12 samples, synchronous" in result.stdout
    assert result.stdout.rstrip().endswith("Ready to run.")
    assert calls == []


def test_the_settings_are_listed_with_their_descriptions() -> None:
    result = run("config", "trainer.learning_rate")
    assert (
        result.stdout == "trainer.learning_rate\n    Peak learning rate of AdamW. (a number above 0; default 1e-06)\n"
    )
    assert run("config", "nothing").exit_code == 2


def test_each_kind_of_run_is_a_command_with_its_own_schema_and_checks(
    recipe: str, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def noting(kind: RunKind) -> RunKind:
        def checks() -> Any:
            def check(config: Any, **_: Any) -> list[Finding]:
                seen.append((kind.command, type(config).__name__))
                return [Finding("error", f"the checks of {kind.command} say no")]

            return check

        return replace(kind, checks=checks)

    monkeypatch.setattr("orchestrator.run_kinds.RUN_KINDS", tuple(map(noting, RUN_KINDS)))
    Path("recipes/imitate.yaml").write_text(
        "model: {path: ../model, max_length: 64}\ndata: {train: {path: data.jsonl}}\nsft: {}\n"
    )
    for given, command in ((recipe, "train"), ("recipes/imitate.yaml", "sft")):
        result = run("check", given)
        assert (result.exit_code, result.stderr) == (2, f"error: the checks of {command} say no\n")
    assert seen == [("train", "Config"), ("sft", "SFTConfig")]
    assert calls == []


@pytest.mark.parametrize("command", [kind.command for kind in RUN_KINDS])
def test_every_kind_of_run_can_be_resumed_and_lists_its_settings(recipe: str, command: str) -> None:
    Path(recipe).write_text(
        "model: {path: ../model, max_length: 1024}\ndata: {train: {path: data.jsonl}}\n"
        + ("sft: {}\n" if command == "sft" else "reward: {components: [{function: exact_match}]}\n")
    )
    result = run(command, recipe, "--resume")
    assert (result.exit_code, "holds no run to continue" in result.stderr) == (2, True)
    listed = run("config", "--kind", command)
    assert listed.exit_code == 0
    assert ("sft.batch_size" in listed.stdout) == (command == "sft")


def test_a_recipe_of_no_kind_or_of_two_is_refused_with_the_kinds_there_are(recipe: str) -> None:
    Path(recipe).write_text("model: {path: ../model}\ndata: {train: {path: data.jsonl}}\nsff: {}\n")
    none = run("check", recipe)
    assert none.exit_code == 2
    assert none.stderr == (
        "error: recipes/mine.yaml: no section says which kind of run it is. Add one of: reward or rollout or algorithm "
        "for `counterpoint train`; sft for `counterpoint sft`.\n"
    )
    Path(recipe).write_text(RECIPE + "sft: {}\n")
    two = run("check", recipe)
    assert two.exit_code == 2
    assert "it mixes sections of several kinds of run: reward (of `counterpoint train`) and sft" in two.stderr
    unknown = run("config", "--kind", "stf")
    assert (unknown.exit_code, unknown.stderr) == (
        2,
        "error: --kind: stf is not a kind of run. Choose one of: train, sft.\n",
    )


def test_a_refusal_through_the_real_command_has_no_traceback(recipe: str) -> None:
    program = [sys.executable, "-c", "from orchestrator.cli import main; main()", "train", "recipes/mien.yaml"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "40"})
    assert done.returncode == 2
    assert done.stderr == "error: recipes/mien.yaml: there is no such recipe. Did you mean recipes/mine.yaml?\n"
