"""Settings of data, sampling and rollout. One sentence a field; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)


class DatasetConfig(BaseModel):
    """Where prompts come from: a file (JSON Lines or Parquet) or a registered builder, and how columns map."""

    model_config = STRICT

    path: Path | None = Field(None, description="A .jsonl or .parquet file; media paths in it are relative to it.")
    builder: str | None = Field(None, description="Name of a registered dataset builder, instead of a path.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments for the builder.")
    split: str = Field("train", description="Split passed to the builder.")
    prompt_column: str = Field("prompt", description="Column with the text, or with a list of chat messages.")
    images_column: str | None = Field(None, description="Column with a list of image paths, one for each placeholder.")
    target_column: str | None = Field("target", description="Column with the target; null where rewards need none.")
    system_prompt: str | None = Field(None, description="A system message put before every prompt.")
    limit: int | None = Field(None, ge=1, description="How many prompts to use, from the first on; all by default.")


class SamplingConfig(BaseModel):
    """How completions are sampled."""

    model_config = STRICT

    temperature: float = Field(
        1.0, ge=0.0, description="0 is greedy; log-probabilities are of the tempered distribution."
    )
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Nucleus sampling; a value below 1 biases the importance ratio."
    )
    top_k: int = Field(
        0, ge=0, description="Sample from the k likeliest tokens; 0 is off, a value above biases the importance ratio."
    )
    max_tokens: int = Field(512, ge=1, description="Token limit of a completion.")
    min_tokens: int = Field(0, ge=0, description="Fewest tokens of a completion before its end of turn.")
    stop: tuple[str, ...] = Field((), description="Strings that end a completion.")
    stop_token_ids: tuple[int, ...] = Field((), description="Token ids that end a completion, besides the end of turn.")
    ignore_eos: bool = Field(False, description="Continue past the end of turn, for benchmarks.")


class RolloutConfig(BaseModel):
    """How many samples a step takes, how stale they may be, and when failures end the run."""

    model_config = STRICT

    prompts_per_step: int = Field(32, ge=1, description="Groups in a training batch.")
    group_size: int = Field(8, ge=1, description="Completions for each prompt.")
    max_staleness: int = Field(
        0, ge=0, description="Policy versions a sample may lag behind; 0 is synchronous training."
    )
    sampling: SamplingConfig = SamplingConfig()
    max_attempts: int = Field(
        3, ge=1, description="How many times a group's generation is tried before the group is dropped."
    )
    drop_equal_rewards: bool = Field(
        False, description="Drop groups whose rewards are all equal, and sample others in their place."
    )
    max_dropped_share: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="Stop the run when more than this share of the last 200 groups failed and was dropped.",
    )
