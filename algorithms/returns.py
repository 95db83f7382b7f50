"""Returns along the tokens of a sample, and the advantage estimators that give one advantage a token.

Only tokens that the policy chose count: a recursion steps from one to the next, over tokens that a tool or an
environment wrote between them, whose token rewards are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from algorithms.advantages import STD_EPSILON
from algorithms.group_statistics import Groups
from algorithms.inputs import AdvantageInputs
from algorithms.registry import Need, Options, advantage_estimator

ENERGY_FLOOR = 1e-8
"""Added to the optimal token baseline's weights, so that where nothing is uncertain it is the plain mean."""


def discounted_sums(values: Tensor, last: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor * y_{t+1} within each segment, y = x at its last entry.

    Without a loop over entries: each of about log2(longest segment) rounds doubles how far sums reach. With a factor
    of 1 it is a difference of running sums.

    Args:
        values: [entries] float, segments end to end.
        last: [entries] int64, for each entry the index of its segment's last.
        factor: 0 to 1.
    Returns:
        [entries] float.
    """
    if factor == 0.0 or values.numel() == 0:
        return values.clone()
    if factor == 1.0:
        running = values.cumsum(0)
        return running[last] - running + values
    left = (last - torch.arange(len(values), device=values.device)).to(torch.int32)
    sums, reach, longest = values.clone(), 1, int(left.max())
    # Once factor^reach is below the smallest normal number, what lies further away no longer counts.
    while reach <= longest and (weight := factor**reach) > torch.finfo(values.dtype).tiny:
        further = sums[reach:] * weight
        sums[:-reach] += further.masked_fill_(left[:-reach] < reach, 0.0)
        reach *= 2
    return sums


@dataclass(frozen=True)
class Actions:
    """The tokens the policy chose, end to end.

    Attributes:
        index: [actions] int64, which of the batch's tokens they are.
        sample: [actions] int64, the sample of each.
        counts: [samples] int64, actions of each sample.
    """

    index: Tensor
    sample: Tensor
    counts: Tensor

    @classmethod
    def of(cls, inputs: AdvantageInputs) -> Actions:
        """The actions of a batch."""
        index = inputs.mask.nonzero().squeeze(-1)
        sample = inputs.sample[index]
        return cls(index, sample, torch.bincount(sample, minlength=len(inputs.lengths)))

    @cached_property
    def closing(self) -> Tensor:
        """[samples with an action] int64, the places among the actions of the last ones, in order."""
        return self.counts.cumsum(0)[self.counts > 0] - 1

    @cached_property
    def last(self) -> Tensor:
        """[actions] int64, for each the place of its sample's last."""
        return torch.repeat_interleave(self.counts.cumsum(0) - 1, self.counts, output_size=len(self.index))

    @cached_property
    def number(self) -> Tensor:
        """[actions] int64, the place of each within its sample, from 0."""
        places = torch.arange(len(self.index), device=self.index.device)
        starts = self.counts.cumsum(0) - self.counts
        return places - torch.repeat_interleave(starts, self.counts, output_size=len(self.index))

    def scatter(self, values: Tensor, like: Tensor) -> Tensor:
        """Values by action as [tokens], 0 elsewhere; `like` is any [tokens] tensor."""
        return values.new_zeros(like.shape).index_copy_(0, self.index, values)


def rewards_to_go(inputs: AdvantageInputs, actions: Actions, discount: float) -> Tensor:
    """Discounted sum of the token rewards from each action on and of the sample's reward, which comes with the last.

    Returns:
        [actions] float. Without discount and token rewards exactly the sample's reward.
    """
    terminal = inputs.rewards[actions.sample]
    if discount < 1.0:
        left = actions.last - torch.arange(len(actions.index), device=actions.index.device)
        terminal = terminal * torch.pow(torch.as_tensor(discount, dtype=terminal.dtype, device=left.device), left)
    if inputs.token_rewards is None:
        return terminal
    return terminal + discounted_sums(inputs.token_rewards[actions.index], actions.last, discount)


def generalised_advantages(inputs: AdvantageInputs, discount: float, trace_decay: float) -> Tensor:
    """A_t = delta_t + discount * trace_decay * A_{t+1}, delta_t = r_t + discount * V_{t+1} - V_t (GAE, arXiv
    1506.02438, eq. 11 to 16), without normalisation.

    r is the token reward, with the sample's reward added at its last action. The value behind the last action is 0:
    a completion ends there, by itself or at the length limit.

    Args:
        inputs: with `values`.
        discount: gamma, 0 to 1.
        trace_decay: lambda, 0 to 1. At 1 the advantage is the return minus the value, at 0 the one-step error.
    Returns:
        [tokens] float, 0 outside the action mask.
    """
    assert inputs.values is not None
    actions = Actions.of(inputs)
    if len(actions.index) == 0:
        return torch.zeros_like(inputs.values)
    values = inputs.values[actions.index]
    # The error at the last action has no next value, but the sample's reward.
    errors = values.roll(-1).mul_(discount)
    errors[actions.closing] = inputs.rewards[actions.counts > 0].to(values.dtype)
    errors -= values
    if inputs.token_rewards is not None:
        errors += inputs.token_rewards[actions.index]
    return actions.scatter(discounted_sums(errors, actions.last, discount * trace_decay), inputs.mask)


class GAEOptions(Options):
    """Discounts of later rewards."""

    discount: float = Field(1.0, ge=0.0, le=1.0, description="Gamma: weight of a reward one token later.")
    trace_decay: float = Field(
        0.95, ge=0.0, le=1.0, description="Lambda: 1 trusts returns alone, 0 the critic's next value alone."
    )
    whiten: bool = Field(True, description="Bring the batch's advantages to mean 0 and standard deviation 1.")


@advantage_estimator(
    "gae",
    options=GAEOptions,
    level="token",
    needs=frozenset({Need.VALUES}),
    formula="Aₜ = δₜ + γλ·Aₜ₊₁, δₜ = rₜ + γ·V(sₜ₊₁) − V(sₜ)",
    source="GAE, arXiv 1506.02438, eq. 11 to 16",
    use_when="Long completions, dense rewards or one sample a prompt, which are worth the cost of a critic.",
)
def gae(inputs: AdvantageInputs, options: GAEOptions) -> Tensor:
    """:func:`generalised_advantages`, then whitened over all action tokens of the batch, if so chosen.

    Returns:
        [tokens] float, 0 outside the action mask. What the critic should have said is made before whitening: see
        :func:`algorithms.values.lambda_returns`.
    """
    advantages = generalised_advantages(inputs, options.discount, options.trace_decay)
    return whitened(advantages, inputs.mask) if options.whiten else advantages


class DiscountOptions(Options):
    """Discounts of later rewards."""

    discount: float = Field(1.0, ge=0.0, le=1.0, description="Gamma: weight of a reward one token later.")


@advantage_estimator(
    "reinforce_plus_plus",
    options=DiscountOptions,
    level="token",
    formula="(Gₜ − mean(batch)) / (std(batch) + 1e-6), Gₜ = Σₛ₌ₜ γˢ⁻ᵗ·rₛ",
    source="REINFORCE++, arXiv 2501.03262, the token-level return and its global normalisation",
    use_when="One sample a prompt and no critic; the KL penalty in the reward, token by token.",
)
def reinforce_plus_plus(inputs: AdvantageInputs, options: DiscountOptions) -> Tensor:
    """The return from each token on, normalised over all action tokens of the batch (REINFORCE++, arXiv 2501.03262).

    The return is the sample's reward and the token rewards still to come. Mean and standard deviation (n - 1, plus
    1e-6) are over tokens. Groups play no part, so a group of one isn't 0 here.

    Returns:
        [tokens] float, 0 outside the action mask. Exactly 0 where all rewards of the batch are equal, there is no
        discount and there are no token rewards.
    """
    actions = Actions.of(inputs)
    return whitened(actions.scatter(rewards_to_go(inputs, actions, options.discount), inputs.mask), inputs.mask)


@advantage_estimator(
    "optimal_token_baseline",
    level="token",
    compares_group=True,
    needs=frozenset({Need.PROXIMAL_LOG_PROBS, Need.COLLISION}),
    formula="Gₜ − Σ(Gₜ·Wₜ) / Σ Wₜ over samples of the group that reach t, Wₜ = Σₛ₌₁..ₜ (1 − 2πₛ + Σᵥ πᵥ²)",
    source="The Optimal Token Baseline, arXiv 2602.07078",
    use_when="Long completions and small groups, where the gradient's variance grows along the tokens.",
)
def optimal_token_baseline(inputs: AdvantageInputs, options: Options) -> Tensor:
    """The return from each token on, minus a baseline of its own for each token (arXiv 2602.07078).

    The baseline of least variance at a token weighs each sample's return by its squared gradient norm so far, W_t.
    A token's share of it is taken from the output layer alone: |one-hot - probabilities|^2 = 1 - 2 pi + sum of pi_v^2.
    Tokens are counted over those the policy chose. Where one sample of a group goes on alone, it is its own baseline
    and its advantage is 0; a public implementation sets the baseline to 0 there, so that equal rewards would be
    reinforced for being long.

    Returns:
        [tokens] float, 0 outside the action mask. Exactly 0 for a group of one, and for a group whose rewards are all
        equal where there are no token rewards.
    """
    assert inputs.log_probs is not None
    assert inputs.collision is not None
    actions = Actions.of(inputs)
    groups = Groups.of(inputs.group)
    # Returns relative to the group's smallest reward, so that equal rewards give exactly 0.
    least = groups.least(inputs.rewards)[groups.index][actions.sample]
    returns = rewards_to_go(inputs, actions, 1.0) - least
    energy = 1 - 2 * inputs.log_probs[actions.index].exp() + inputs.collision[actions.index]
    running = energy.clamp(min=0).cumsum(0)
    before = torch.cat([running.new_zeros(1), running])[actions.last + 1 - actions.counts[actions.sample]]
    weights = (running - before).clamp(min=0) + ENERGY_FLOOR
    # One cell for each place within a completion, up to the group's longest.
    longest = actions.counts.new_zeros(groups.count).scatter_reduce(0, groups.index, actions.counts, "amax")
    cell = (longest.cumsum(0) - longest)[groups.index][actions.sample] + actions.number
    cells = int(longest.sum())
    weight_sum = weights.new_zeros(cells).index_add_(0, cell, weights)
    baseline = weights.new_zeros(cells).index_add_(0, cell, weights * returns) / weight_sum
    alone = torch.bincount(cell, minlength=cells) == 1
    return actions.scatter((returns - baseline[cell]).masked_fill(alone[cell], 0.0), inputs.mask)


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Values inside the mask brought to mean 0 and standard deviation 1 (n - 1, plus 1e-6); 0 outside.

    Exactly 0 where all are equal.

    Args:
        values: [tokens] float.
        mask: [tokens] bool.
    """
    inside = values[mask]
    if len(inside) == 0:
        return torch.zeros_like(values)
    shifted = inside - inside.min()
    centred = shifted - shifted.mean()
    std = (centred.square().sum() / max(1, len(centred) - 1)).sqrt()
    return torch.zeros_like(values).masked_scatter(mask, centred / (std + STD_EPSILON))
