"""Settings of the roles: model, policy trainer, generators, reference, critic, weight transfer and deadlines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)

Precision = Literal["float32", "bfloat16"]


class FreezeConfig(BaseModel):
    """The parts of the model that training leaves unchanged."""

    model_config = STRICT

    vision_tower: bool = Field(False, description="Freeze the vision encoder.")
    projector: bool = Field(False, description="Freeze the projector between vision encoder and language model.")
    language_model: bool = Field(False, description="Freeze the language model.")


class LoraConfig(BaseModel):
    """Low-rank adapters (LoRA) on the language model's linear layers. They are trained, everything else is frozen."""

    model_config = STRICT

    rank: int = Field(16, ge=1, le=512, description="Rank of an adapter's two matrices.")
    alpha: float = Field(
        32.0, gt=0.0, description="Scale of the adapters: their output is multiplied by alpha / rank (see use_rslora)."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapters' inputs, in training only.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Linear layers of the language model that get an adapter, given by the ends of their names.",
    )
    use_rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead of alpha / rank, so that high ranks learn as fast as low "
        "ones.",
    )
    sync: Literal["adapter", "merged"] = Field(
        "adapter",
        description="What generators receive. adapter: the adapter alone, which is small and exact but slows "
        "generation "
        "(on CPU to less than half the speed). merged: the matrices with the adapter added, rounded to "
        "model.precision.",
    )


class ModelConfig(BaseModel):
    """The model that all roles start from."""

    model_config = STRICT

    path: Path = Field(description="A Hugging Face folder with weights, tokenizer, processor and chat template.")
    precision: Precision = Field(
        "bfloat16", description="Dtype of parameters and activations in trainer and generator."
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation in trainer and reference."
    )
    max_length: int = Field(4096, ge=8, description="Maximum number of tokens of prompt and completion together.")
    freeze: FreezeConfig = FreezeConfig()
    lora: LoraConfig | None = Field(None, description="Train adapters instead of the policy's own weights.")
    trust_remote_code: bool = Field(False, description="Execute code that comes with the model folder.")


class ScheduleConfig(BaseModel):
    """Learning rate over optimiser steps."""

    model_config = STRICT

    kind: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Optimiser steps of linear warm-up from 0.")
    final_share: float = Field(0.0, ge=0.0, le=1.0, description="Final learning rate as a share of the peak.")


class TrainerConfig(BaseModel):
    """The policy trainer: one DeepSpeed engine per rank."""

    model_config = STRICT

    steps: int = Field(100, ge=1, description="Training steps; each consumes one batch of rollouts.")
    ranks: int = Field(1, ge=1, description="Data-parallel trainer processes.")
    zero_stage: Literal[0, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    learning_rate: float = Field(1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's beta1 and beta2.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Global norm to which gradients are clipped.")
    schedule: ScheduleConfig = ScheduleConfig()
    updates_per_step: int = Field(
        1, ge=1, description="Optimiser steps per batch; the batch is split in order of generation."
    )
    micro_batch_tokens: int = Field(
        16384, ge=1, description="Maximum number of padded tokens in one forward pass of a rank."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, which saves memory."
    )
    threads: int = Field(1, ge=1, description="Torch threads of a rank on CPU.")


class GeneratorConfig(BaseModel):
    """The rollout generators, each an asynchronous vLLM engine."""

    model_config = STRICT

    replicas: int = Field(1, ge=1, description="Number of generators.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs per generator.")
    max_sequences: int = Field(256, ge=1, description="Maximum number of sequences that a generator decodes at once.")
    kv_cache_gib: float = Field(1.0, gt=0.0, description="Size of the KV cache on CPU, in GiB.")
    gpu_memory_share: float = Field(
        0.85, gt=0.0, le=1.0, description="Share of a GPU's memory that the vLLM engine may take."
    )
    enforce_eager: bool = Field(False, description="Run without CUDA graphs and compilation.")
    threads: int = Field(1, ge=1, description="Torch threads of the vLLM engine on CPU.")
    prefix_caching: bool = Field(True, description="Share the KV cache of common prefixes within one policy version.")
    max_images: int = Field(8, ge=1, description="Maximum number of images in a prompt.")
    sleep_level: Literal[0, 1, 2] = Field(
        0,
        description="Give the GPU's memory to the trainer while it learns, for generators that share its GPUs. 1 "
        "frees the KV "
        "cache and keeps the weights in host memory, 2 frees the KV cache and discards the weights, 0 disables sleep.",
    )


class ReferenceConfig(BaseModel):
    """The frozen reference model."""

    model_config = STRICT

    path: Path | None = Field(None, description="Model folder of the reference; null: the policy's starting weights.")
    replicas: int = Field(1, ge=1, description="Number of reference servers.")
    micro_batch_tokens: int = Field(32768, ge=1, description="Maximum number of padded tokens in one forward pass.")
    threads: int = Field(1, ge=1, description="Torch threads on CPU.")


class CriticConfig(BaseModel):
    """The critic, for estimators that need values (gae). It is trained with the policy's `trainer` settings."""

    model_config = STRICT

    path: Path | None = Field(
        None, description="Model folder that the critic's body starts from; null: the policy's folder."
    )
    learning_rate: float = Field(1e-5, gt=0.0, description="Peak learning rate of the critic.")
    trace_decay: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="Lambda of the returns that the critic learns; 1 gives the unbiased sum of future rewards.",
    )
    clip: float | None = Field(0.2, gt=0.0, description="Bound on the change of a value in the loss; null: no bound.")
    warmup_steps: int = Field(0, ge=0, description="First training steps, in which only the critic is trained.")


class WeightsConfig(BaseModel):
    """How a new policy version reaches the generators, and how its arrival is verified."""

    model_config = STRICT

    backend: Literal["zmq", "nccl", "ipc"] = Field(
        "zmq",
        description="Transport. zmq: generators pull, on any platform. nccl: broadcast between GPUs. ipc: trainer and "
        "generators "
        "on the same GPUs. Generators that join late pull through zmq with every backend.",
    )
    bucket_mib: int = Field(8, ge=1, description="Size of a bucket, the unit of transfer and of digests, in MiB.")
    listen: Literal["loopback", "node"] = Field(
        "loopback",
        description="Where weights are served. loopback: to this host. node: to every host that reaches the node.",
    )
    encryption: bool = Field(
        True, description="Encrypt with CURVE, under keys made for the run; false is allowed on loopback only."
    )
    shared_memory: bool = Field(
        True, description="Generators map a version from the memory of a process on their host, where one has it."
    )
    fan_out: int = Field(
        2,
        ge=0,
        description="Number of generators that pull from the trainer and from each relay; 0: all pull from the "
        "trainer.",
    )
    delta: bool = Field(
        True, description="Send lossless deltas from the previous version to generators that pull over a network."
    )
    patience_s: float = Field(
        5.0, gt=0.0, description="Seconds without an answer after which a generator replaces its source."
    )
    grace_s: float = Field(
        10.0,
        ge=0.0,
        description="Seconds to wait for the other generators after the first has a version; later ones catch up by "
        "themselves.",
    )
    stage_from_mib: int | None = Field(
        64,
        ge=0,
        description="Size in MiB from which a version is staged while generation runs, which shortens the pause to "
        "milliseconds and takes memory for a second copy of the weights. CPU only; null disables staging.",
    )
    in_flight: Literal["keep", "wait", "abort"] = Field(
        "keep",
        description="Running requests during a weight update. keep: they continue with the new weights. wait: they "
        "finish "
        "first. abort: they start again.",
    )
    recompute_cache: bool = Field(
        False, description="Recompute the KV cache of running requests with the new weights (in_flight: keep)."
    )
    canaries: int = Field(
        4,
        ge=0,
        description="Number of canaries: sequences whose log-probabilities must agree after each update; 0: digests "
        "only.",
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0.0,
        description="Largest mean gap of a canary's log-probabilities, in nats; null: 1e-4 in float32, 0.05 in "
        "bfloat16.",
    )
    max_logprob_gap: float = Field(
        0.5,
        gt=0.0,
        description="Alarm threshold: gap between trainer's and generator's log-probability of a token, in nats.",
    )
    max_mismatch_kl: float = Field(
        0.02, gt=0.0, description="Alarm threshold: mean KL per token between generator and trainer, in nats."
    )
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="Action of an alarm: a warning, or the end of the run."
    )


class RestartsConfig(BaseModel):
    """How often and how soon the reference and the reward server are started again when they die."""

    model_config = STRICT

    budget: int = Field(
        3, ge=0, le=100, description="Restarts of each of them before the run stops; 0 stops at the first death."
    )
    backoff_s: float = Field(
        1.0,
        ge=0.0,
        description="Seconds before the second restart in a row; each further one waits twice as long. The first "
        "restart comes at once.",
    )
    backoff_max_s: float = Field(30.0, ge=0.0, description="Longest wait before a restart, in seconds.")
    refill_after: int = Field(
        50, ge=1, description="Answers in a row (scored groups, reference passes) after which the budget is full again."
    )


class DeadlineConfig(BaseModel):
    """Deadlines of all waits, in seconds."""

    model_config = STRICT

    start_s: float = Field(600.0, gt=0.0, description="Start of an actor.")
    generate_s: float = Field(600.0, gt=0.0, description="Generation of one group.")
    score_s: float = Field(300.0, gt=0.0, description="Rewards of one group, including its wait for a worker.")
    update_s: float = Field(1800.0, gt=0.0, description="One training update.")
    sync_s: float = Field(300.0, gt=0.0, description="One weight update of a generator.")
    collective_s: float = Field(600.0, gt=0.0, description="One collective between trainer ranks.")
    stop_s: float = Field(10.0, gt=0.0, description="Stop of all actors.")
