"""Settings of the reward server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)


class RewardComponentConfig(BaseModel):
    """One registered reward function and its weight in the sum."""

    model_config = STRICT

    function: str = Field(description="Name under which the function was registered.")
    weight: float = Field(1.0, description="Factor of this component in the combined reward.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments for the function.")


class RewardConfig(BaseModel):
    """The components of the reward, and the bounds of their calls."""

    model_config = STRICT

    components: tuple[RewardComponentConfig, ...] = Field(
        min_length=1, description="The components; the reward is their sum by weight."
    )
    modules: tuple[Path, ...] = Field(
        (), description="Python files that register the functions; each worker imports them."
    )
    workers: int = Field(1, ge=1, description="Worker processes in which functions run, beside the server's own.")
    deadline_s: float = Field(
        10.0, gt=0.0, description="Time for one call of a function; a worker that takes longer is killed."
    )
    max_attempts: int = Field(2, ge=1, description="How many times a call is tried before the group is dropped.")
