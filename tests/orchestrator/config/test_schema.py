"""Settings that can't work together are refused with the reason, those that surprise are warned of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.cross_checks import problems, warnings
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.config.setting_list import settings


def tree(*changes: tuple[str, Any]) -> dict[str, Any]:
    """A configuration that works, with dotted changes."""
    made: dict[str, Any] = {
        "model": {"path": "m", "max_length": 1024},
        "data": {"train": {"path": "a.jsonl"}, "evaluation": {"path": "b.jsonl"}},
        "reward": {"components": [{"function": "exact"}]},
    }
    for key, value in changes:
        node = made
        *sections, leaf = key.split(".")
        for name in sections:
            node = node.setdefault(name, {})
        node[leaf] = value
    return made


def refusal(made: dict[str, Any], schema: type[Config] | type[SFTConfig] = Config) -> str:
    return "\n".join(problems(schema.model_validate(made)))


def test_the_plain_configuration_works_without_warnings() -> None:
    config = Config.model_validate(tree())
    assert problems(config) == []
    assert warnings(config) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("trainer.micro_batch_tokens", 512)], "can't hold one sample of model.max_length (1,024 tokens)"),
        ([("model.lora", {}), ("model.freeze.language_model", True)], "adapters sit in the language model"),
        ([("rollout.sampling.max_tokens", 1024)], "leaves no room for a prompt"),
        ([("evaluation.sampling", {"max_tokens": 1024})], "evaluation.sampling.max_tokens = 1024 leaves no room"),
        ([("rollout.sampling.min_tokens", 513)], "no completion could end"),
        ([("rollout.sampling.temperature", 0.0)], "makes all samples of a prompt equal"),
        (
            [("rollout.prompts_per_step", 1), ("rollout.group_size", 2), ("trainer.ranks", 4)],
            "fewer than trainer.ranks",
        ),
        ([("rollout.group_size", 1)], "makes every advantage zero"),
        ([("rollout.group_size", 1), ("algorithm.advantage", "rloo")], "makes every advantage zero"),
        (
            [
                ("rollout.group_size", 1),
                ("rollout.drop_equal_rewards", True),
                ("algorithm.advantage", "reinforce"),
            ],
            "would drop every group",
        ),
        ([("algorithm.loss", "nll")], "counterpoint sft"),
        ([("algorithm.kl.controller", "adaptive")], "0 stays 0"),
        ([("algorithm.correction.options", {"high": 0.5})], "Set it to at least 1"),
        (
            [("algorithm.correction", {"method": "token_masked", "options": {"low": 1.5}})],
            "Set it below 1",
        ),
        ([("algorithm.advantage", "grppo")], "Did you mean 'grpo'?"),
        ([("algorithm.loss_options", {"hihg": 0.3})], "algorithm.loss_options.hihg is not an option of 'clip'"),
        ([("algorithm.loss_options", {"low": 2})], "algorithm.loss_options.low = 2"),
        ([("algorithm.advantage", "gae"), ("algorithm.loss", "gspo")], "one ratio for a whole sequence"),
        ([("algorithm.loss", "topr")], "would correct the mismatch twice"),
        ([("algorithm.advantage", "gdpo"), ("algorithm.combination", "minimum")], "combines them itself"),
        ([("algorithm.advantage", "gae"), ("algorithm.credit", "turn")], "gives each token a credit of its own"),
        ([("algorithm.gradient_combination", "mgda")], "has only one"),
        ([("algorithm.credit", "turn"), ("algorithm.loss", "gspo")], "Use gspo_token"),
        ([("critic", {"learning_rate": 1e-4})], "needs no values"),
        ([("algorithm.advantage", "gae"), ("critic", {"warmup_steps": 100})], "the policy would never learn"),
        ([("algorithm.credit", "turn"), ("algorithm.advantage", "remax")], "greedy rewards are of whole completions"),
        ([("algorithm.advantage", "grpo_pass_at_k"), ("rollout.group_size", 4)], "every subset is the group"),
        (
            [
                ("algorithm.advantage", "gdpo"),
                ("algorithm.kl", {"coefficient": 0.1, "estimator": "k1", "placement": "reward"}),
            ],
            "looks at the components",
        ),
        ([("algorithm.gradient_combination", "mgda")], "Set trainer.zero_stage to 2 or 3"),
        ([("algorithm.kl", {"coefficient": 0.1, "estimator": "k1"})], "algorithm.kl.estimator = k1"),
        ([("algorithm.kl", {"coefficient": 0.1, "estimator": "k3", "placement": "reward"})], "estimator = k3"),
        ([("algorithm.kl.coefficient", 0.1), ("reference.micro_batch_tokens", 512)], "reference.micro_batch_tokens"),
        ([("data.train", {})], "says neither path nor builder"),
        ([("data.train.builder", "digits")], "both name the prompts"),
        ([("data.evaluation", None), ("evaluation.every_steps", 5)], "names no held-out prompts"),
        ([("data.evaluation", None), ("checkpoint.metric", "eval/sampled/reward")], "never measured"),
        ([("checkpoint.metric", "train/loss")], "eval/greedy/reward or eval/sampled/reward"),
        ([("evaluation.modes", ["sampled"])], "checkpoint.metric = eval/greedy/reward is never measured"),
        ([("evaluation.modes", [])], "evaluation.modes is empty"),
        (
            [("model.freeze", {"vision_tower": True, "projector": True, "language_model": True})],
            "nothing is left to train",
        ),
        ([("model.attention", "flash_attention_2"), ("model.precision", "float32")], "no float32 kernels"),
        ([("trainer.schedule", {"warmup_steps": 100})], "never reaches trainer.learning_rate"),
        ([("trainer.betas", [0.9, 1.0])], "trainer.betas.1 = 1.0"),
        ([("reward.components", [{"function": "exact", "weight": 0.0}])], "every reward is 0"),
        ([("reward.components", [{"function": "exact"}, {"function": "exact"}])], "names exact twice"),
        ([("cluster.generator.gpus", 1), ("generator.tensor_parallel", 2)], "needs its own GPU"),
        ([("weights", {"encryption": False, "listen": "node"})], "in the clear"),
        ([("weights", {"recompute_cache": True, "in_flight": "wait"})], "nothing to recompute"),
        ([("generator.sleep_level", 2), ("rollout.max_staleness", 1)], "wants them to generate meanwhile"),
        ([("weights", {"backend": "ipc", "listen": "node"})], "shares GPU memory between processes of one host"),
        ([("weights.backend", "nccl"), ("model.lora", {"rank": 8})], "loads from a folder"),
    ],
)
def test_an_impossible_combination_is_refused_with_the_reason(changes: list[tuple[str, Any]], reason: str) -> None:
    assert reason in refusal(tree(*changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("rollout.sampling.top_p", 0.9)], "top_p = 0.9 samples from a cut-off distribution"),
        ([("rollout.sampling.top_k", 50)], "top_k = 50 samples from a cut-off distribution"),
        ([("rollout.max_staleness", 1), ("algorithm.correction.method", "none")], "as if they were the current one's"),
        ([("rollout.sampling.min_tokens", 2)], "min_tokens = 2 forbids the end of turn"),
        ([("rollout.sampling.ignore_eos", True)], "never learns to stop"),
        ([("model.lora", {"dropout": 0.1})], "adds noise to every importance ratio"),
        ([("data.evaluation", None)], "nothing is evaluated"),
        ([("evaluation.sampling", {"temperature": 0.0})], "greedy as well"),
    ],
)
def test_a_combination_that_surprises_is_warned_of(changes: list[tuple[str, Any]], reason: str) -> None:
    (warning,) = warnings(Config.model_validate(tree(*changes)))
    assert reason in warning


def test_reference_settings_without_a_kl_term_are_fine() -> None:
    assert refusal(tree(("reference.micro_batch_tokens", 512), ("algorithm.kl.coefficient", 0.0))) == ""


def test_all_impossible_combinations_are_named_at_once() -> None:
    text = refusal(tree(("rollout.group_size", 1), ("trainer.micro_batch_tokens", 512)))
    assert "every advantage zero" in text
    assert "can't hold one sample" in text


def test_supervised_batches_hold_a_sample_for_every_rank() -> None:
    made = tree(("sft.batch_size", 1), ("trainer.ranks", 2))
    del made["reward"]
    assert "each rank needs a sample" in refusal(made, SFTConfig)


def test_a_supervised_run_exports_into_its_folder_by_default() -> None:
    made = tree(("run.folder", "runs/warm"))
    del made["reward"]
    config = SFTConfig.model_validate(made)
    assert problems(config) == []
    assert str(config.export_folder) == "runs/warm/model"


def test_the_configuration_document_is_current() -> None:
    script = Path(__file__).parents[3] / "scripts" / "write_configuration_doc.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("schema", [Config, SFTConfig])
def test_every_setting_is_described_in_a_sentence(schema: type[Config] | type[SFTConfig]) -> None:
    assert [setting.key for setting in settings(schema) if not setting.description.endswith(".")] == []
