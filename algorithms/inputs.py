"""Inputs of advantage estimators and policy losses: typed tensors, shapes in brackets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageInputs:
    """One batch: samples in groups that answer the same prompt, and the completion tokens of all samples end to end.

    Attributes:
        rewards: [samples] float64, the combined reward of each.
        group: [samples] int64, the prompt each sample answers; groups may differ in size and be in any order.
        lengths: [samples] int64, completion tokens of each, at least 1.
        mask: [tokens] bool, the tokens the policy chose (its actions); False on what tools or environments wrote.
        token_rewards: [tokens] float64, dense rewards in addition to `rewards` (a KL penalty, a process reward, the
            reward of a turn on its last token); None for none.
        components: [samples, components] float64, rewards by component; anything where `is_present` is False.
        is_present: [samples, components] bool, whether the sample has the component.
        component_weights: [components] float64.
        greedy_rewards: [samples] float64, the reward of the greedy completion of each sample's prompt.
        values: [tokens] float64, a critic's value before each token.
        log_probs: [tokens] float64, nats, of the policy that is trained, at the start of the update.
        collision: [tokens] float64, sum over the vocabulary of its squared probabilities at each token.
        component_names: the components' names, in the order of their columns.
        answers: [samples] int64, equal within a group where two samples give the same final answer; below 0 for a
            sample without one, which agrees with no other.
    """

    rewards: Tensor
    group: Tensor
    lengths: Tensor
    mask: Tensor
    token_rewards: Tensor | None = None
    components: Tensor | None = None
    is_present: Tensor | None = None
    component_weights: Tensor | None = None
    greedy_rewards: Tensor | None = None
    values: Tensor | None = None
    log_probs: Tensor | None = None
    collision: Tensor | None = None
    component_names: tuple[str, ...] | None = None
    answers: Tensor | None = None

    @cached_property
    def sample(self) -> Tensor:
        """[tokens] int64, the sample each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """[samples] int64, index of each sample's first token."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def actions(self) -> Tensor:
        """[samples] int64, tokens of each that the policy chose."""
        return torch.zeros_like(self.lengths).index_add_(0, self.sample, self.mask.to(self.lengths.dtype))


@dataclass(frozen=True)
class BatchTokens:
    """The whole optimiser batch, tokens of all samples end to end, as every rank holds it before the first micro-batch.

    Attributes:
        sample: [tokens] int64, the sample each token belongs to, 0 to samples - 1, in order.
        mask: [tokens] bool, the trained tokens. Entries of the others mean nothing.
        advantages: [tokens] float32.
        behaviour_log_probs: [tokens] float32, nats, of the distribution sampled from.
        proximal_log_probs: [tokens] float32, nats, of the policy at the start of the update; where the recipe has no
            pass for them, the behaviour log-probabilities.
    """

    sample: Tensor
    mask: Tensor
    advantages: Tensor
    behaviour_log_probs: Tensor
    proximal_log_probs: Tensor


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a policy loss. Rows are whole sequences; entries outside `mask` are 0 in every tensor.

    Attributes:
        log_probs: [B, T] float, nats, of the policy being trained; carries the gradient.
        proximal_log_probs: [B, T] float, of the policy at the start of the update; no gradient.
        behaviour_log_probs: [B, T] float, of the distribution sampled from; no gradient.
        advantages: [B, T] float.
        mask: [B, T] bool, the trained tokens.
        marks: [B, T] float, what the loss's `prepare` made of the whole optimiser batch; None where it has none.
    """

    log_probs: Tensor
    proximal_log_probs: Tensor
    behaviour_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    marks: Tensor | None = None


@dataclass(frozen=True)
class TokenLoss:
    """A policy loss by token, before the rollout correction and aggregation.

    Attributes:
        values: [B, T] float, to be minimised.
        is_clipped_low: [B, T] bool, tokens whose gradient was cut because the ratio is too small; None if it never is.
        is_clipped_high: [B, T] bool, the same for too large a ratio.
    """

    values: Tensor
    is_clipped_low: Tensor | None = None
    is_clipped_high: Tensor | None = None
