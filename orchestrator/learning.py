"""From scored groups to what the trainer learns from: samples, advantages, and the figures that describe a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from algorithms.advantages import estimate_advantages
from algorithms.config import AlgorithmConfig
from algorithms.kl import kl_penalised_rewards
from rollout.samples import FinishReason, ScoredGroup, TrainingSample


def as_samples(groups: Sequence[ScoredGroup]) -> list[TrainingSample]:
    """Every completion as a training sample whose advantages are still 0, group after group."""
    return [
        TrainingSample(
            prompt=group.prompt,
            prompt_token_ids=group.generation.prompt_token_ids,
            token_ids=completion.token_ids,
            loss_mask=np.ones(len(completion), dtype=np.bool_),
            advantages=np.zeros(len(completion), dtype=np.float32),
            behaviour_log_probs=completion.log_probs,
            policy_versions=completion.policy_versions,
        )
        for group in groups
        for completion in group.generation.completions
    ]


def with_reference(samples: Sequence[TrainingSample], log_probs: Sequence[NDArray[np.float32]]) -> list[TrainingSample]:
    """The samples with the reference model's log-probabilities, one [tokens] array each."""
    return [replace(s, reference_log_probs=r) for s, r in zip(samples, log_probs, strict=True)]


def with_proximal(samples: Sequence[TrainingSample], log_probs: Sequence[NDArray[np.float32]]) -> list[TrainingSample]:
    """The samples with the trainer's own log-probabilities at the start of the update."""
    return [replace(s, proximal_log_probs=p) for s, p in zip(samples, log_probs, strict=True)]


def with_advantages(
    samples: Sequence[TrainingSample], groups: Sequence[ScoredGroup], config: AlgorithmConfig, kl_coefficient: float
) -> list[TrainingSample]:
    """The samples with the advantage of their completion on every token.

    Where the recipe places the KL in the reward, each reward is first lowered by the coefficient times the
    completion's KL to the reference, under the distribution it was sampled from.

    Raises:
        NonFiniteError: a reward or advantage is NaN or infinite; names the sample.
    """
    rewards = torch.tensor([s.value for g in groups for s in g.scores], dtype=torch.float64)
    group = torch.tensor([i for i, g in enumerate(groups) for _ in g.scores], dtype=torch.int64)
    if config.kl.placement == "reward" and kl_coefficient > 0:
        lengths = torch.tensor([len(s.token_ids) for s in samples])
        owner = torch.repeat_interleave(torch.arange(len(samples)), lengths)
        behaviour = torch.from_numpy(np.concatenate([s.behaviour_log_probs for s in samples]))
        reference = torch.from_numpy(np.concatenate([_reference(s) for s in samples]))
        rewards, _ = kl_penalised_rewards(rewards, behaviour, reference, owner, kl_coefficient)
    advantages = estimate_advantages(config.advantage, rewards, group).tolist()
    return [
        replace(s, advantages=np.full(len(s.token_ids), a, dtype=np.float32))
        for s, a in zip(samples, advantages, strict=True)
    ]


def _reference(sample: TrainingSample) -> NDArray[np.float32]:
    if sample.reference_log_probs is None:
        raise ValueError("algorithm.kl.placement = reward needs the reference model's log-probabilities")
    return sample.reference_log_probs


def batch_metrics(groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """What a batch looks like: rewards, lengths, staleness. `version` is the policy version that learns from it."""
    rewards = np.array([[s.value for s in g.scores] for g in groups if g.scores], dtype=object)
    flat = np.array([s.value for g in groups for s in g.scores], dtype=np.float64)
    completions = [c for g in groups for c in g.generation.completions]
    lengths = np.array([len(c) for c in completions], dtype=np.float64)
    oldest = np.array([version - int(c.policy_versions.min(initial=version)) for c in completions], dtype=np.float64)
    newest = np.array([version - int(c.policy_versions.max(initial=version)) for c in completions], dtype=np.float64)
    metrics = {
        "reward/mean": float(flat.mean()),
        "reward/std": float(flat.std()),
        "reward/min": float(flat.min()),
        "reward/max": float(flat.max()),
        "reward/equal_groups_share": float(np.mean([len(set(row)) == 1 for row in rewards])),
        "rollout/groups": float(len(groups)),
        "rollout/completions": float(len(completions)),
        "rollout/tokens": float(lengths.sum()),
        "rollout/mean_tokens": float(lengths.mean()),
        "rollout/max_tokens": float(lengths.max()),
        "rollout/truncated_share": float(np.mean([c.finish_reason is FinishReason.LENGTH for c in completions])),
        "rollout/staleness": float(oldest.mean()),
        "rollout/max_staleness": float(oldest.max()),
        "rollout/min_staleness": float(newest.min()),
    }
    names = sorted({name for g in groups for s in g.scores for name in s.components})
    for name in names:
        values = [s.components[name] for g in groups for s in g.scores if name in s.components]
        metrics[f"reward/component/{name}"] = float(np.mean(values))
    return metrics
