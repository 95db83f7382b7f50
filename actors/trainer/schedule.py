"""Learning rate by optimiser step. Pure."""

from __future__ import annotations

import math

from actors.config import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """Learning rate of an optimiser step.

    Linear warm-up reaches the peak at step `warmup_steps`; then constant, or linear or cosine decay that reaches
    `final_share` of the peak at the last step.

    Args:
        step: 0 for the first.
        total_steps: optimiser steps of the whole run.
        peak: highest learning rate.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    decay = 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (config.final_share + (1.0 - config.final_share) * decay)
