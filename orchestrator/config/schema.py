"""The one configuration: the rooms' settings put together. What must hold between them is in cross_checks.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.config import (
    CriticConfig,
    DeadlineConfig,
    GeneratorConfig,
    ModelConfig,
    ReferenceConfig,
    TrainerConfig,
    WeightsConfig,
)
from algorithms.config import AlgorithmConfig
from orchestrator.config import cross_checks
from reward.config import RewardConfig
from rollout.config import DatasetConfig, RolloutConfig, SamplingConfig

STRICT = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Output:
    """Marks a path the run writes to. It is relative to the working directory; all other paths to their recipe."""


OutputPath = Annotated[Path, Output()]


class ImpossibleCombinationError(ValueError):
    """Settings that are each allowed but not together.

    Attributes:
        problems: one sentence each: which settings, why they don't go together, what to do.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class RunConfig(BaseModel):
    """Name, place and seed of the run."""

    model_config = STRICT

    name: str = Field("run", description="Name of the run.")
    folder: OutputPath = Field(Path("runs/run"), description="Where the run writes everything.")
    seed: int = Field(0, ge=0, description="Seed of data order, sampling and initialisation.")


class DataConfig(BaseModel):
    """Training and held-out prompts."""

    model_config = STRICT

    train: DatasetConfig
    evaluation: DatasetConfig | None = Field(None, description="Held-out prompts; without them nothing is evaluated.")
    modules: tuple[Path, ...] = Field((), description="Python files to import first; they register dataset builders.")


class EvaluationConfig(BaseModel):
    """Evaluation on held-out prompts, before, during and after training."""

    model_config = STRICT

    every_steps: int = Field(20, ge=0, description="Evaluate every so many steps; 0 only before and after.")
    prompts: int | None = Field(None, ge=1, description="Use only so many held-out prompts during training.")
    modes: tuple[Literal["greedy", "sampled"], ...] = Field(("greedy", "sampled"), description="Decoding modes.")
    sampling: SamplingConfig = Field(SamplingConfig(), description="Of the sampled mode; greedy sets temperature 0.")


class CheckpointSchedule(BaseModel):
    """When checkpoints are written and how many are kept."""

    model_config = STRICT

    every_steps: int = Field(20, ge=1, description="Write one every so many steps, and at the end.")
    keep: int = Field(2, ge=1, description="Whole checkpoints kept, besides the best.")


class CheckpointConfig(CheckpointSchedule):
    """When checkpoints of reinforcement learning are written, and which is the best."""

    metric: str = Field(
        "eval/greedy/reward",
        description="Metric the best checkpoint is chosen by, higher is better; without evaluation the latest counts.",
    )
    export: bool = Field(True, description="Write a Hugging Face folder at the end.")


class TrackingConfig(BaseModel):
    """MLflow."""

    model_config = STRICT

    enabled: bool = Field(True, description="Record in MLflow; metrics.jsonl is written in any case.")
    uri: str | None = Field(None, description="Tracking server; by default SQLite in the run folder.")
    experiment: str = Field("counterpoint", description="MLflow experiment.")
    samples_every_steps: int = Field(
        10, ge=0, description="Log a table of samples with their media every so many steps; 0 never."
    )
    samples: int = Field(8, ge=1, description="Samples in that table.")
    system_metrics: bool = Field(True, description="CPU, memory and GPU use.")


class RoleResources(BaseModel):
    """What one actor of a role asks Ray for."""

    model_config = STRICT

    cpus: float = Field(0.0, ge=0.0, description="Logical CPUs.")
    gpus: float = Field(0.0, ge=0.0, description="GPUs.")
    custom: dict[str, float] = Field(
        default_factory=dict, description="Ray custom resources, which pin the role to nodes."
    )


class ClusterConfig(BaseModel):
    """The Ray cluster and the share of it each role asks for."""

    model_config = STRICT

    address: str | None = Field(
        None, description="Address of a running Ray cluster ('auto' finds one); null starts a local one."
    )
    policy: RoleResources = RoleResources()
    critic: RoleResources = RoleResources()
    generator: RoleResources = RoleResources()
    reference: RoleResources = RoleResources()
    reward: RoleResources = RoleResources()


class Config(BaseModel):
    """Everything a run is made of."""

    model_config = STRICT

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    critic: CriticConfig = CriticConfig()
    generator: GeneratorConfig = GeneratorConfig()
    reference: ReferenceConfig = ReferenceConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def has_critic(self) -> bool:
        """Whether the advantage estimator needs values; the user's own methods must have been imported."""
        from algorithms import choices  # torch, which a look at a recipe without a run needn't load
        from algorithms.registry import ADVANTAGE_ESTIMATORS, Need

        return self.algorithm.advantage in ADVANTAGE_ESTIMATORS and Need.VALUES in choices.needs(self.algorithm)

    @property
    def export_folder(self) -> Path | None:
        """Where the trained policy is written as a Hugging Face folder, or None where the recipe wants none."""
        return self.run.folder / "export" if self.checkpoint.export else None

    @property
    def best_metric(self) -> str | None:
        """The metric the best checkpoint is chosen by, or None where nothing is evaluated."""
        return self.checkpoint.metric if self.data.evaluation is not None else None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if problems := cross_checks.problems(self):
            raise ImpossibleCombinationError(problems)
        return self


class SupervisedConfig(BaseModel):
    """What is imitated, and how much of it a step."""

    model_config = STRICT

    response_key: str = Field(
        "response", description="Key of a prompt's metadata (its column) with the text to imitate."
    )
    batch_size: int = Field(32, ge=1, description="Samples a training step.")
    export_folder: Annotated[Path | None, Output()] = Field(
        None, description="Where the Hugging Face folder is written; by default 'model' in the run folder."
    )


class SFTConfig(BaseModel):
    """Everything a supervised fine-tuning run is made of: the policy trainer with the loss "nll", and no rollouts."""

    model_config = STRICT

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    sft: SupervisedConfig = SupervisedConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointSchedule = CheckpointSchedule()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def export_folder(self) -> Path:
        """Where the fine-tuned model is written."""
        return self.sft.export_folder or self.run.folder / "model"

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if problems := cross_checks.sft_problems(self):
            raise ImpossibleCombinationError(problems)
        return self
