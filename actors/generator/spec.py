"""The specification of a generator: everything its actor is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from actors.config import DeadlineConfig, GeneratorConfig, ModelConfig, WeightsConfig


@dataclass(frozen=True)
class GeneratorSpec:
    """Everything a generator is built from. Frozen and serialisable.

    Attributes:
        model: the model folder; its weights are version `initial_version`.
        config: size and resources of the vLLM engine.
        deadlines: for receiving weights and for stopping.
        media_folder: the media store, on a file system that the generator's node can read.
        name: its name in messages.
        seed: of the engine's random state, used by requests without a seed.
        initial_version: policy version of the weights in the model folder.
        weights: how versions are received, loaded and verified.
        address: its node's address for other hosts, at which it relays versions; by default the one that Ray knows.
        weights_folder: folder for received versions; by default they lie in memory, or on disk where memory is short.
    """

    model: ModelConfig
    config: GeneratorConfig
    deadlines: DeadlineConfig
    media_folder: Path
    name: str = "generator-0"
    seed: int = 0
    initial_version: int = 0
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    address: str | None = None
    weights_folder: Path | None = None
