"""Declares every setting of a run: sections, types, bounds, defaults, descriptions. It checks one setting at a time;
what must hold between settings is in cross_checks.py, which loading.py asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.config import (
    CriticConfig,
    DeadlineConfig,
    GeneratorConfig,
    ModelConfig,
    ReferenceConfig,
    RestartsConfig,
    TrainerConfig,
    WeightsConfig,
)
from algorithms.config import AlgorithmConfig
from reward.config import RewardConfig
from rollout.config import DatasetConfig, RolloutConfig, SamplingConfig

STRICT = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Output:
    """Marks a path the run writes to. It is relative to the working directory; all other paths to their recipe."""


OutputPath = Annotated[Path, Output()]


class RunConfig(BaseModel):
    """Name, folder and seed of the run."""

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
    sampling: SamplingConfig = Field(
        SamplingConfig(), description="Sampling of the sampled mode; the greedy mode sets temperature 0."
    )


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
    """What is recorded in MLflow."""

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
    """The Ray cluster, and the resources that each role asks for."""

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
    """All settings of a training run."""

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
    restarts: RestartsConfig = RestartsConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def export_folder(self) -> Path | None:
        """Where the trained policy is written as a Hugging Face folder, or None where the recipe wants none."""
        return self.run.folder / "export" if self.checkpoint.export else None


class SupervisedConfig(BaseModel):
    """The text to imitate, and the size of a batch."""

    model_config = STRICT

    response_key: str = Field(
        "response", description="Key of a prompt's metadata (its column) with the text to imitate."
    )
    batch_size: int = Field(32, ge=1, description="Samples a training step.")
    export_folder: Annotated[Path | None, Output()] = Field(
        None, description="Where the Hugging Face folder is written; by default 'model' in the run folder."
    )


class SFTConfig(BaseModel):
    """All settings of a supervised fine-tuning run: the policy trainer with the loss "nll", without rollouts."""

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
