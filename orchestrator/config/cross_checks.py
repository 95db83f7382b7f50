"""Checks what must hold between settings: each sentence says which settings, why, and what to do.

Settings that can't work together are problems and refuse the configuration; those that work but surprise are warnings.
"""

from __future__ import annotations

from actors.config import ModelConfig, TrainerConfig
from orchestrator.config.derived import has_critic
from orchestrator.config.schema import Config, DataConfig, SFTConfig
from reward.config import RewardConfig


def problems(config: Config | SFTConfig) -> list[str]:
    """Settings that can't work together, one sentence each."""
    return _sft_problems(config) if isinstance(config, SFTConfig) else _training_problems(config)


def warnings(config: Config) -> list[str]:
    """Settings that work but will probably surprise, one sentence each, with the reason and what to do."""
    found = []
    sampling = config.rollout.sampling
    if sampling.top_p < 1.0 or sampling.top_k > 0:
        key = f"top_p = {sampling.top_p}" if sampling.top_p < 1.0 else f"top_k = {sampling.top_k}"
        found.append(
            f"rollout.sampling.{key} samples from a cut-off distribution while the trainer's log-probabilities are of "
            "the whole one, which biases the importance ratio. Set top_p: 1.0 and top_k: 0 for training."
        )
    if sampling.min_tokens > 0:
        found.append(
            f"rollout.sampling.min_tokens = {sampling.min_tokens} forbids the end of turn in the first tokens and the "
            "trainer does not, which biases the importance ratio of those tokens. Set it to 0 for training."
        )
    if config.rollout.max_staleness > 0 and config.algorithm.correction.method == "none":
        found.append(
            f"rollout.max_staleness = {config.rollout.max_staleness} with algorithm.correction.method = none trains "
            "on samples of older policies as if they were the current one's. Set it to token_truncated."
        )
    if config.model.lora is not None and config.model.lora.dropout > 0.0:
        found.append(
            f"model.lora.dropout = {config.model.lora.dropout:g} makes the trained policy differ from the sampled one "
            "at random, which adds noise to every importance ratio. Set it to 0 outside supervised fine-tuning."
        )
    if sampling.ignore_eos:
        found.append(
            "rollout.sampling.ignore_eos = true runs every completion to rollout.sampling.max_tokens, so the policy "
            "never learns to stop. Leave it for benchmarks."
        )
    if config.data.evaluation is None:
        found.append(
            "data.evaluation names no held-out prompts, so nothing is evaluated and the latest checkpoint counts as "
            "the best."
        )
    if "sampled" in config.evaluation.modes and config.evaluation.sampling.temperature == 0.0:
        found.append(
            "evaluation.sampling.temperature = 0 makes the sampled evaluation greedy as well. Raise it, or leave "
            "sampled out of evaluation.modes."
        )
    return found


def _training_problems(config: Config) -> list[str]:
    return [
        *_data_problems(config.data),
        *_trainer_problems(config.model, config.trainer),
        *_rollout_problems(config),
        *_algorithm_problems(config),
        *_reward_problems(config.reward),
        *_evaluation_problems(config),
        *_placement_problems(config),
        *_weights_problems(config),
    ]


def _sft_problems(config: SFTConfig) -> list[str]:
    found = [*_data_problems(config.data), *_trainer_problems(config.model, config.trainer)]
    shares = config.trainer.ranks * config.trainer.updates_per_step
    if config.sft.batch_size < shares:
        found.append(
            f"sft.batch_size = {config.sft.batch_size} is fewer than trainer.ranks x trainer.updates_per_step "
            f"({shares}), and each rank needs a sample for each update. Raise it to at least {shares}."
        )
    return found


def _data_problems(data: DataConfig) -> list[str]:
    found = []
    for key, dataset in (("data.train", data.train), ("data.evaluation", data.evaluation)):
        if dataset is None:
            continue
        if dataset.path is None and dataset.builder is None:
            found.append(f"{key} says neither path nor builder, so there are no prompts. Set one of them.")
        if dataset.path is not None and dataset.builder is not None:
            found.append(
                f"{key}.path = {dataset.path} and {key}.builder = {dataset.builder} both name the prompts. Keep one."
            )
    return found


def _trainer_problems(model: ModelConfig, trainer: TrainerConfig) -> list[str]:
    found = []
    if trainer.micro_batch_tokens < model.max_length:
        found.append(
            f"trainer.micro_batch_tokens = {trainer.micro_batch_tokens} can't hold one sample of model.max_length "
            f"({model.max_length:,} tokens). Raise it to at least {model.max_length}, or lower model.max_length."
        )
    if model.freeze.vision_tower and model.freeze.projector and model.freeze.language_model:
        found.append("model.freeze freezes every part of the model, so nothing is left to train. Set one to false.")
    if model.lora is not None and model.freeze.language_model:
        found.append(
            "model.freeze.language_model = true with model.lora leaves nothing to train, because adapters sit in the "
            "language model. Set it to false: with model.lora all but the adapters is frozen anyway."
        )
    if model.attention == "flash_attention_2" and model.precision == "float32":
        found.append(
            "model.attention = flash_attention_2 has no float32 kernels. Set model.precision to bfloat16, or "
            "model.attention to sdpa."
        )
    updates = trainer.steps * trainer.updates_per_step
    if trainer.schedule.warmup_steps >= updates and trainer.schedule.warmup_steps > 0:
        found.append(
            f"trainer.schedule.warmup_steps = {trainer.schedule.warmup_steps} is not shorter than the run "
            f"({updates} optimiser steps), so the learning rate never reaches trainer.learning_rate. Lower it."
        )
    for index, beta in enumerate(trainer.betas):
        if not 0.0 <= beta < 1.0:
            found.append(f"trainer.betas.{index} = {beta} must be at least 0 and below 1, or AdamW diverges.")
    return found


def _rollout_problems(config: Config) -> list[str]:
    found = []
    rollout, limit = config.rollout, config.model.max_length
    for key, sampling in (("rollout", rollout.sampling), ("evaluation", config.evaluation.sampling)):
        if key == "evaluation" and config.data.evaluation is None:
            continue
        if sampling.max_tokens >= limit:
            found.append(
                f"{key}.sampling.max_tokens = {sampling.max_tokens} leaves no room for a prompt within "
                f"model.max_length ({limit:,} tokens). Lower it, or raise model.max_length."
            )
        if sampling.min_tokens > sampling.max_tokens:
            found.append(
                f"{key}.sampling.min_tokens = {sampling.min_tokens} is more than max_tokens ({sampling.max_tokens}), "
                "so no completion could end. Lower it."
            )
    if rollout.sampling.temperature == 0.0:
        found.append(
            "rollout.sampling.temperature = 0 makes all samples of a prompt equal, so there is nothing to learn from "
            "their differences. Set it above 0 (1.0 is usual); evaluation has its own greedy mode."
        )
    samples = rollout.prompts_per_step * rollout.group_size
    shares = config.trainer.ranks * config.trainer.updates_per_step
    if samples < shares:
        found.append(
            f"rollout.prompts_per_step x rollout.group_size = {samples} samples a step are fewer than trainer.ranks x "
            f"trainer.updates_per_step ({shares}), and each rank needs a sample for each update. Raise the former, or "
            "lower the latter."
        )
    if rollout.group_size == 1 and rollout.drop_equal_rewards:
        found.append(
            "rollout.drop_equal_rewards = true with rollout.group_size = 1 would drop every group. Set it to false."
        )
    return found


def _algorithm_problems(config: Config) -> list[str]:
    from algorithms import choices  # it loads torch, which a recipe with a misspelt key never needs
    from algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES

    algorithm = config.algorithm
    found = choices.problems(algorithm, modules_imported=False)
    known = algorithm.advantage in ADVANTAGE_ESTIMATORS
    if known and config.rollout.group_size == 1 and ADVANTAGE_ESTIMATORS.get(algorithm.advantage).compares_group:
        found.append(
            f"rollout.group_size = 1 with algorithm.advantage = {algorithm.advantage} makes every advantage zero, "
            "because it compares the samples of one prompt. Raise it to at least 2, or choose another estimator."
        )
    default = ADVANTAGE_ESTIMATORS.get("grpo_pass_at_k").options.model_fields["k"].default
    if has_critic(config) and config.critic.warmup_steps >= config.trainer.steps:
        found.append(
            f"critic.warmup_steps = {config.critic.warmup_steps} is not shorter than trainer.steps "
            f"({config.trainer.steps}), so the policy would never learn. Lower it."
        )
    if known and algorithm.loss in POLICY_LOSSES and not has_critic(config) and config.critic != type(config.critic)():
        found.append(
            f"critic is set, but algorithm.advantage = {algorithm.advantage} needs no values. Choose gae, or leave the "
            "critic section out."
        )
    subset = algorithm.advantage_options.get("k", default)
    if algorithm.advantage == "grpo_pass_at_k" and isinstance(subset, int) and config.rollout.group_size <= subset:
        found.append(
            f"algorithm.advantage_options.k = {subset} with rollout.group_size = {config.rollout.group_size} leaves "
            f"nothing to compare: every subset is the group. Raise the group size above {subset}, or lower k."
        )
    if algorithm.gradient_combination is not None and len(config.reward.components) < 2:
        found.append(
            f"algorithm.gradient_combination = {algorithm.gradient_combination} combines the gradients of reward "
            "components, and reward.components has only one. Name at least two, or leave it out."
        )
    is_hidden = config.trainer.zero_stage == 0 and config.model.precision == "bfloat16"
    if algorithm.gradient_combination is not None and is_hidden:
        found.append(
            f"algorithm.gradient_combination = {algorithm.gradient_combination} reads gradients where DeepSpeed's "
            "optimiser for bfloat16 without ZeRO doesn't show them. Set trainer.zero_stage to 2 or 3."
        )
    if algorithm.kl.coefficient > 0.0 and config.reference.micro_batch_tokens < config.model.max_length:
        found.append(
            f"reference.micro_batch_tokens = {config.reference.micro_batch_tokens} can't hold one sample of "
            f"model.max_length ({config.model.max_length:,} tokens). Raise it to at least {config.model.max_length}."
        )
    return found


def _reward_problems(reward: RewardConfig) -> list[str]:
    found = []
    if all(component.weight == 0.0 for component in reward.components):
        found.append("reward.components all have weight 0, so every reward is 0. Give one of them a weight.")
    names = [component.function for component in reward.components]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(
            f"reward.components names {name} twice, and values are kept by that name. Register the second under a "
            "name of its own."
        )
    return found


def _evaluation_problems(config: Config) -> list[str]:
    evaluation, metric = config.evaluation, config.checkpoint.metric
    default_metric = metric == type(config.checkpoint)().metric
    if config.data.evaluation is None:
        found = []
        if evaluation != type(evaluation)():
            found.append(
                "evaluation is set, but data.evaluation names no held-out prompts. Add them, or leave the evaluation "
                "section out (evaluation={} on the command line)."
            )
        if not default_metric:
            found.append(
                f"checkpoint.metric = {metric} is never measured without data.evaluation. Add held-out prompts, or "
                "leave checkpoint.metric out."
            )
        return found
    if not evaluation.modes:
        return ["evaluation.modes is empty, so nothing would be evaluated. Name greedy, sampled or both."]
    if not any(metric.startswith(f"eval/{mode}/") for mode in evaluation.modes):
        allowed = " or ".join(f"eval/{mode}/reward" for mode in evaluation.modes)
        return [
            f"checkpoint.metric = {metric} is never measured with evaluation.modes = "
            f"[{', '.join(evaluation.modes)}]. Set it to {allowed}."
        ]
    return []


def _weights_problems(config: Config) -> list[str]:
    found = []
    weights, generator = config.weights, config.generator
    if not weights.encryption and weights.listen == "node":
        found.append(
            "weights.encryption = false with weights.listen = node would send the weights over the network in the "
            "clear, to anybody who asks. Set encryption to true, or listen to loopback."
        )
    if weights.recompute_cache and weights.in_flight != "keep":
        found.append(
            f"weights.recompute_cache = true with weights.in_flight = {weights.in_flight} has nothing to recompute, "
            "because no request runs across an update. Set in_flight to keep, or recompute_cache to false."
        )
    if generator.sleep_level > 0 and config.rollout.max_staleness > 0:
        found.append(
            f"generator.sleep_level = {generator.sleep_level} puts generators to sleep while the trainer learns, and "
            f"rollout.max_staleness = {config.rollout.max_staleness} wants them to generate meanwhile. Set one to 0."
        )
    if weights.backend == "ipc" and weights.listen == "node":
        found.append(
            "weights.backend = ipc shares GPU memory between processes of one host, and weights.listen = node is for "
            "generators on others. Set listen to loopback, or backend to zmq or nccl."
        )
    if weights.backend != "zmq" and config.model.lora is not None and config.model.lora.sync == "adapter":
        found.append(
            f"weights.backend = {weights.backend} sends whole weights, and model.lora.sync = adapter sends a small "
            "adapter that vLLM loads from a folder. Set backend to zmq, or model.lora.sync to merged."
        )
    return found


def _placement_problems(config: Config) -> list[str]:
    gpus, needed = config.cluster.generator.gpus, config.generator.tensor_parallel
    if 0 < gpus < needed:
        return [
            f"cluster.generator.gpus = {gpus:g} is fewer than generator.tensor_parallel ({needed}), and each part of "
            f"the model needs its own GPU. Set it to {needed}."
        ]
    return []
