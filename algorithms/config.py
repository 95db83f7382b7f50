"""Settings of what is learned from a batch: each choice is the name of a registered method, with options of its own.

choices.py checks that the methods exist, have these options and can be combined, once the user's files that register
methods have been imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)


class KLConfig(BaseModel):
    """The KL divergence from the reference: its weight, its estimator and where it counts."""

    model_config = STRICT

    coefficient: float = Field(0.0, ge=0.0, description="Weight of the KL term; 0 needs no reference model.")
    estimator: str = Field("k3", description="A registered KL estimator.")
    placement: Literal["loss", "reward"] = Field(
        "loss", description="In the loss, or subtracted from the rewards, token by token."
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="Fixed, or adapted towards the target (Ziegler et al., 2019)."
    )
    target_nats: float = Field(0.05, gt=0.0, description="KL a token that the adaptive controller aims at.")
    horizon: int = Field(100, ge=1, description="Updates over which the adaptive controller acts.")


class CorrectionConfig(BaseModel):
    """Correction for the gap between the generator's and the trainer's distribution."""

    model_config = STRICT

    method: str = Field("token_truncated", description="A registered rollout correction.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")
    veto: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Leave out a whole sequence if the importance ratio of one of its tokens is below this.",
    )


class ShapingConfig(BaseModel):
    """One adjustment of the rewards, made before advantages are taken."""

    model_config = STRICT

    name: str = Field(description="A registered reward shape.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")


class AlgorithmConfig(BaseModel):
    """Advantage estimator x policy loss x aggregation x KL x correction, and how many rewards become one."""

    model_config = STRICT

    modules: tuple[Path, ...] = Field((), description="Python files to import first; they register methods.")
    combination: str = Field("weighted_sum", description="How reward components become one reward.")
    combination_options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")
    shaping: tuple[ShapingConfig, ...] = Field((), description="Adjustments of the rewards, in order.")
    train_on_truncated: bool = Field(
        True, description="Whether to learn from completions that the token limit cut off; they are scored in any case."
    )
    advantage: str = Field("grpo", description="A registered advantage estimator.")
    advantage_options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")
    credit: Literal["trajectory", "turn"] = Field(
        "trajectory", description="Compare and credit whole completions, or each turn of the policy."
    )
    turn_discount: float = Field(
        1.0, ge=0.0, le=1.0, description="With credit by turn: weight of the next turn's reward in this turn's return."
    )
    answer_pattern: str | None = Field(
        None,
        description="Regular expression of a completion's final answer, its first group counts; null takes all of it. "
        "For methods that ask which completions agree.",
    )
    difficulty_weighting: bool = Field(
        False, description="Weigh groups by 4 p(1 - p), with p the group's mean reward between its bounds."
    )
    loss: str = Field("clip", description="A registered policy loss.")
    loss_options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")
    aggregation: str = Field("token_mean", description="A registered aggregation of token losses.")
    aggregation_options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")
    gradient_combination: str | None = Field(
        None, description="Combine the gradients of the reward components, one backward pass each, instead of rewards."
    )
    gradient_options: dict[str, Any] = Field(default_factory=dict, description="Options of that method.")
    entropy_coefficient: float = Field(0.0, ge=0.0, description="Weight of the entropy bonus.")
    kl: KLConfig = KLConfig()
    correction: CorrectionConfig = CorrectionConfig()
