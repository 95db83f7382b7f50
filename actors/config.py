"""Settings of the roles: model, policy trainer, generators, reference, weight transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)

Precision = Literal["float32", "bfloat16"]


class FreezeConfig(BaseModel):
    """Which parts of the model are not trained."""

    model_config = STRICT

    vision_tower: bool = Field(False, description="Freeze the vision encoder.")
    projector: bool = Field(False, description="Freeze the projector between vision encoder and language model.")
    language_model: bool = Field(False, description="Freeze the language model.")


class LoraConfig(BaseModel):
    """Low-rank adapters on the language model's linear layers. They alone are trained: all else is frozen."""

    model_config = STRICT

    rank: int = Field(16, ge=1, le=512, description="Rank of an adapter's two matrices.")
    alpha: float = Field(
        32.0, gt=0.0, description="What adapters add is multiplied by alpha / rank (see model.lora.use_rslora)."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout of what an adapter reads, in training only.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Linear layers of the language model that get an adapter, by how their names end.",
    )
    use_rslora: bool = Field(
        False, description="Multiply by alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones."
    )
    sync: Literal["adapter", "merged"] = Field(
        "adapter",
        description="What generators receive: the adapter alone, which is small and exact but slows generation (on "
        "CPU to less than half), or the changed matrices with it added, rounded to model.precision.",
    )


class ModelConfig(BaseModel):
    """The model all roles start from."""

    model_config = STRICT

    path: Path = Field(description="A Hugging Face folder with weights, tokenizer, processor and chat template.")
    precision: Precision = Field("bfloat16", description="Of parameters and activations in trainer and generator.")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="Attention in trainer and reference."
    )
    max_length: int = Field(4096, ge=8, description="Tokens of prompt and completion together.")
    freeze: FreezeConfig = FreezeConfig()
    lora: LoraConfig | None = Field(None, description="Train adapters instead of the policy's own weights.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model folder.")


class ScheduleConfig(BaseModel):
    """Learning rate over optimiser steps."""

    model_config = STRICT

    kind: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Optimiser steps of linear warm-up from 0.")
    final_share: float = Field(0.0, ge=0.0, le=1.0, description="Last learning rate as a share of the first.")


class TrainerConfig(BaseModel):
    """The policy trainer: one DeepSpeed engine a rank."""

    model_config = STRICT

    steps: int = Field(100, ge=1, description="Training steps (batches of rollouts).")
    ranks: int = Field(1, ge=1, description="Data-parallel trainer processes.")
    zero_stage: Literal[0, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    learning_rate: float = Field(1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moments.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are clipped to this global norm.")
    schedule: ScheduleConfig = ScheduleConfig()
    updates_per_step: int = Field(1, ge=1, description="Optimiser steps a batch is split into, in order of generation.")
    micro_batch_tokens: int = Field(16384, ge=1, description="Padded tokens in one forward pass of one rank.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    threads: int = Field(1, ge=1, description="Torch threads of a rank on CPU.")


class GeneratorConfig(BaseModel):
    """The rollout generators: one asynchronous vLLM engine each."""

    model_config = STRICT

    replicas: int = Field(1, ge=1, description="Generators.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs a generator.")
    max_sequences: int = Field(256, ge=1, description="Sequences decoded at once.")
    kv_cache_gib: float = Field(1.0, gt=0.0, description="KV cache on CPU.")
    gpu_memory_share: float = Field(0.85, gt=0.0, le=1.0, description="Share of a GPU's memory the engine may take.")
    enforce_eager: bool = Field(False, description="No CUDA graphs or compilation.")
    threads: int = Field(1, ge=1, description="Torch threads of the engine on CPU.")
    prefix_caching: bool = Field(True, description="Share the KV cache of common prefixes, within one policy version.")
    max_images: int = Field(8, ge=1, description="Images a prompt may hold.")
    sleep_level: Literal[0, 1, 2] = Field(
        0,
        description="While the trainer learns, give it the GPU's memory: cache, and weights kept on the host (1) or "
        "thrown away (2). For generators that share the trainer's GPUs; 0 never sleeps.",
    )


class ReferenceConfig(BaseModel):
    """The frozen reference model."""

    model_config = STRICT

    path: Path | None = Field(None, description="Its folder; by default the policy's starting weights.")
    replicas: int = Field(1, ge=1, description="Reference servers.")
    micro_batch_tokens: int = Field(32768, ge=1, description="Padded tokens in one forward pass.")
    threads: int = Field(1, ge=1, description="Torch threads on CPU.")


class CriticConfig(BaseModel):
    """The critic of estimators that need values (gae); trained like the policy, with its `trainer` settings."""

    model_config = STRICT

    path: Path | None = Field(None, description="Folder its body starts from; by default the policy's.")
    learning_rate: float = Field(1e-5, gt=0.0, description="Peak learning rate.")
    trace_decay: float = Field(
        1.0, ge=0.0, le=1.0, description="Lambda of the returns it learns; 1 is the reward to come, without bias."
    )
    clip: float | None = Field(
        0.2, gt=0.0, description="Keep a new value within this of the old one in the loss; null for no bound."
    )
    warmup_steps: int = Field(0, ge=0, description="First training steps in which the critic alone learns.")


class WeightsConfig(BaseModel):
    """How a new policy version reaches the generators, and how it is proven that it did."""

    model_config = STRICT

    backend: Literal["zmq", "nccl", "ipc"] = Field(
        "zmq",
        description="Transport: zmq (generators pull; everywhere), nccl (broadcast between GPUs) or ipc (trainer and "
        "generator share a GPU). Generators that come late catch up through zmq in any case.",
    )
    bucket_mib: int = Field(8, ge=1, description="Size of a bucket, the unit of transfer and of digests.")
    listen: Literal["loopback", "node"] = Field(
        "loopback", description="Who may pull: generators on this host, or on every host that reaches the node."
    )
    encryption: bool = Field(True, description="CURVE with keys made per run; only loopback goes without.")
    shared_memory: bool = Field(True, description="Generators map the memory of a process on their host that has it.")
    fan_out: int = Field(
        2, ge=0, description="Generators that pull from the trainer, and from each that serves onward; 0 for all."
    )
    delta: bool = Field(
        True, description="Send what changed since the version before, without loss, to those that pull over a network."
    )
    patience_s: float = Field(5.0, gt=0.0, description="A source that is silent for so long is replaced.")
    grace_s: float = Field(
        10.0, ge=0.0, description="Wait so long for further generators once one has a version; they catch up alone."
    )
    stage_from_mib: int | None = Field(
        64,
        ge=0,
        description="Versions from this size on are made ready beside generation, which then pauses for a moment only; "
        "the engine needs memory for a second copy of the weights. On CPU, where loading means packing; null: never.",
    )
    in_flight: Literal["keep", "wait", "abort"] = Field(
        "keep", description="Running requests go on with the new weights, are finished first, or are begun anew."
    )
    recompute_cache: bool = Field(
        False, description="Recompute what running requests have cached with the new weights (in_flight: keep)."
    )
    canaries: int = Field(
        4, ge=0, description="Sequences whose log-probabilities must agree after each update; 0 proves by digest only."
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0.0,
        description="Mean gap a canary's token may have, in nats; null: 1e-4 in float32, 0.05 in bfloat16.",
    )
    max_logprob_gap: float = Field(
        0.5, gt=0.0, description="Alarm: gap between trainer's and generator's log-probability of a token, in nats."
    )
    max_mismatch_kl: float = Field(
        0.02, gt=0.0, description="Alarm: mean KL a token between generator and trainer, in nats."
    )
    on_alarm: Literal["warn", "stop"] = Field("warn", description="What an alarm does.")


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
    """No wait without a bound, in seconds."""

    model_config = STRICT

    start_s: float = Field(600.0, gt=0.0, description="For an actor to be ready.")
    generate_s: float = Field(600.0, gt=0.0, description="For one group's generation.")
    score_s: float = Field(300.0, gt=0.0, description="For one group's rewards, its wait for a worker included.")
    update_s: float = Field(1800.0, gt=0.0, description="For one training update.")
    sync_s: float = Field(300.0, gt=0.0, description="For one weight update to reach a generator.")
    collective_s: float = Field(600.0, gt=0.0, description="For one collective between trainer ranks.")
    stop_s: float = Field(10.0, gt=0.0, description="For everything to stop.")
