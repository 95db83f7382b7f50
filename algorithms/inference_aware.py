"""Advantages for a policy whose completions go through best-of-N, a vote or another inference-time transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.inputs import AdvantageInputs
from algorithms.majority import MOST_VOTES, majority_gradients
from algorithms.registry import Need, Options, advantage_estimator

STD_EPSILON = 1e-6
_OPTIONS_OF = {
    "identity": frozenset[str](),
    "best_of_n": frozenset({"n"}),
    "soft_best_of_n": frozenset({"temperature"}),
    "tempered": frozenset({"temperature"}),
    "pass_at_k": frozenset({"n", "threshold"}),
    "majority": frozenset({"n"}),
}
_NEEDS_ANSWERS = frozenset({"tempered", "majority"})


class Term(Options):
    """One expected reward under one use of the policy."""

    transform: Literal["identity", "best_of_n", "soft_best_of_n", "tempered", "pass_at_k", "majority"] = Field(
        description="How the policy is used: one sample, the best of n, one picked in proportion to exp(reward / "
        "temperature), answers drawn in proportion to share^(1 / temperature), n tries of which one must succeed, or "
        "the answer most of n samples give."
    )
    component: str | None = Field(None, description="The reward component it looks at; none for the combined reward.")
    weight: float = Field(1.0, gt=0.0, description="Its weight in the objective; the minimum takes none.")
    n: int | None = Field(None, ge=1, description="Samples drawn, of best_of_n, pass_at_k and majority.")
    temperature: float | None = Field(None, gt=0.0, description="Of soft_best_of_n and tempered.")
    threshold: float = Field(0.5, description="Reward from which a sample counts as a success, of pass_at_k.")

    @model_validator(mode="after")
    def _has_the_options_of_its_transform(self) -> Term:
        has = _OPTIONS_OF[self.transform]
        for name in ("n", "temperature", "threshold"):
            if name in self.model_fields_set and name not in has:
                raise ValueError(f"{self.transform} has no {name}; leave it out")
            if name in has and getattr(self, name) is None:
                raise ValueError(f"{self.transform} needs {name}; set it")
        if self.transform == "majority" and self.n is not None and self.n > MOST_VOTES:
            raise ValueError(f"a majority of n = {self.n} votes is not summed exactly; set n to at most {MOST_VOTES}")
        return self


class InferenceAwareOptions(Options):
    """Which expected rewards, and how they make one objective."""

    terms: tuple[Term, ...] = Field(
        (Term(transform="best_of_n", n=2),), min_length=1, description="The expected rewards R_i of the objective."
    )
    combine: Literal["weighted_sum", "minimum", "soft_minimum"] = Field(
        "weighted_sum", description="The objective g: sum w R, min R, or -(1 / gamma) log sum w exp(-gamma R)."
    )
    gamma: float | None = Field(None, gt=0.0, description="Sharpness of the soft minimum.")
    normalise: Literal["mean", "std"] = Field(
        "mean",
        description="mean takes the group's mean off. std also divides by the group's standard deviation, which "
        "cancels the transform for one binary reward: the best-of-N reward is then the plain one times a constant.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> InferenceAwareOptions:
        if (self.combine == "soft_minimum") != (self.gamma is not None):
            needed = "needs gamma; set it" if self.gamma is None else "has no gamma; leave it out"
            raise ValueError(f"combine = {self.combine} {needed}")
        if self.combine == "minimum" and any(term.weight != 1.0 for term in self.terms):
            raise ValueError("combine = minimum takes no weights; leave them out, or use soft_minimum")
        return self


@advantage_estimator(
    "inference_aware",
    options=InferenceAwareOptions,
    compares_group=True,
    needs=frozenset({Need.COMPONENTS}),
    formula="Σᵢ ∂g/∂Rᵢ · ∂Rᵢ/∂π − mean(group)",
    source="Inference-Aware Meta-Alignment via non-linear GRPO, arXiv 2602.01603",
    use_when="The policy will be used through best-of-N, repeated tries or a vote, or must do well on several rewards "
    "at once, each used in its own way.",
)
def inference_aware(inputs: AdvantageInputs, options: InferenceAwareOptions) -> Tensor:
    """First variation of g(R_1 .. R_m) at the group's empirical distribution (arXiv 2602.01603).

    R_i is the expected reward of the policy under transform i, so that a sample's reward is
    sum_i dg/dR_i * dR_i/dpi(sample), up to a constant that the group's mean takes off. Group by group, because R_i is
    an expectation over answers to one prompt. The KL term of the paper's objective is the recipe's own (`kl`).

    A sample without a term's component is left out of that term's distribution and gets nothing from it; a term none
    of the group's samples have is left out of g. Equal smallest terms share the derivative of the minimum equally.

    Args:
        inputs: the batch; `components`, `is_present` and `component_names` where a term names a component, `answers`
            where a term compares answers.
        options: the terms and how they combine.
    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal.
    Raises:
        NonFiniteError: a component is NaN or infinite; names the sample.
        ValueError: a term's component or the answers aren't there.
    """
    groups = _Groups.of(inputs.group)
    found = [_term_of_batch(inputs, term, groups) for term in options.terms]
    slopes = _slopes(torch.stack([term.value for term in found], -1), options)
    total = torch.zeros_like(inputs.rewards)
    for term, slope in zip(found, slopes.unbind(-1), strict=True):
        total += slope[groups.index] * term.variation
    centred = groups.centre(total)
    if options.normalise == "mean":
        return centred
    std = (groups.sum(centred.square()) / (groups.size - 1).clamp(min=1)).sqrt()
    return centred / (std[groups.index] + STD_EPSILON)


@dataclass(frozen=True)
class Variation:
    """An expected reward and how it changes as a sample gains probability.

    Attributes:
        value: [groups] float, the expected reward under the transform; NaN for a group without a sample.
        variation: [samples] float, its first variation, up to a constant of the group.
    """

    value: Tensor
    variation: Tensor


def first_variation(rewards: Tensor, group: Tensor, term: Term, answers: Tensor | None = None) -> Variation:
    """Expected reward under a term's transform and its first variation at each group's empirical distribution.

    With p the probability of a sample (1 / group size), F the distribution function of the rewards and E the mean:
    identity: R = E r; d = r.
    best_of_n: R = E of the largest of n; d_j = -sum_{k >= j} (r_{k+1} - r_k) n F_k^{n-1} over sorted rewards.
    soft_best_of_n: R = E[r e^{r/t}] / Z with Z = E e^{r/t}; d = r e^{r/t} / Z - e^{r/t} E[r e^{r/t}] / Z^2. This is
        the limit of many candidates, of which one is picked by a softmax of reward / t.
    tempered: answers a of share p_a drawn in proportion to p_a^s, s = 1/t: R = sum_a p_a^s r_a / sum_a p_a^s;
        d = p_a^{s-1} ((s - 1) r_a + r - s R) / sum_a p_a^s. Samples count by answer, not by text: completions that
        all differ have an empirical distribution that no temperature changes.
    pass_at_k: R = 1 - (1 - E[r >= threshold])^n; d = n (1 - E[r >= threshold])^{n-1} [r >= threshold].
    majority: the answer most of n samples give, ties by a fair draw; see majority.py.

    Args:
        rewards: [samples] float, finite.
        group: [samples] int64, the prompt each sample answers.
        term: the transform and its options.
        answers: [samples] int64, as in AdvantageInputs; only for tempered and majority.
    Returns:
        Equal rewards (with equal answers, where those count) have exactly equal variations.
    Raises:
        ValueError: the transform compares answers and there are none.
    """
    return _first_variation(rewards, _Groups.of(group), term, answers)


def _first_variation(rewards: Tensor, groups: _Groups, term: Term, answers: Tensor | None) -> Variation:
    if term.transform in _NEEDS_ANSWERS:
        if answers is None:
            raise ValueError(
                f"the transform {term.transform} needs to know which samples give the same answer, and the batch has "
                "no `answers`. Let the reward function report each completion's final answer, or use best_of_n or "
                "pass_at_k, which look at rewards alone."
            )
        # Rewards from the group's highest down, so that equal rewards leave exactly nothing to gain from any answer.
        highest = groups.highest(rewards)
        lowered = rewards - highest[groups.index]
        found = _BY_ANSWER[term.transform](lowered, groups, _Clusters.of(groups, answers, lowered), term)
        return Variation(found.value + highest, found.variation)
    return _BY_REWARD[term.transform](rewards, groups, term)


def _term_of_batch(inputs: AdvantageInputs, term: Term, groups: _Groups) -> Variation:
    """A term over all samples: those without its component have 0, the mean of the others'."""
    if term.component is None:
        plain = _first_variation(inputs.rewards, groups, term, inputs.answers)
        return Variation(plain.value, groups.centre(plain.variation))
    rewards, is_present = _component(inputs, term.component)
    variation = torch.zeros_like(inputs.rewards)
    if not bool(is_present.any()):
        return Variation(variation.new_full((len(groups.size),), torch.nan), variation)
    own = _Groups(groups.index[is_present], groups.size.new_zeros(len(groups.size)))
    own.size.index_add_(0, own.index, torch.ones_like(own.index, dtype=own.size.dtype))
    answers = None if inputs.answers is None else inputs.answers[is_present]
    found = _first_variation(rewards[is_present], own, term, answers)
    variation[is_present] = own.centre(found.variation).to(variation)
    return Variation(found.value.where(own.size > 0, torch.nan).to(variation), variation)


def _component(inputs: AdvantageInputs, name: str) -> tuple[Tensor, Tensor]:
    """[samples] the rewards of a component, and whether each sample has it."""
    names = inputs.component_names or ()
    if inputs.components is None or name not in names:
        raise ValueError(
            f"algorithm.advantage_options.terms names the reward component {name!r}, but the batch has "
            f"{', '.join(names) or 'none by name'}. Name one of these, or leave component out for the combined reward."
        )
    column = names.index(name)
    rewards = inputs.components[:, column]
    everywhere = torch.ones_like(rewards, dtype=torch.bool)
    is_present = everywhere if inputs.is_present is None else inputs.is_present[:, column]
    require_finite(f"the reward component {name!r}", rewards, is_present, index_name="sample")
    return rewards, is_present


def _slopes(values: Tensor, options: InferenceAwareOptions) -> Tensor:
    """[groups, terms] dg/dR at R = values [groups, terms]; 0 where a term is NaN because the group doesn't have it."""
    is_absent = values.isnan()
    weights = values.new_tensor([term.weight for term in options.terms]).expand_as(values)
    if options.combine == "weighted_sum":
        slopes = weights
    elif options.combine == "minimum":
        known = values.masked_fill(is_absent, torch.inf)
        is_least = (known == known.amin(-1, keepdim=True)) & ~is_absent
        slopes = is_least / is_least.sum(-1, keepdim=True).clamp(min=1)
    else:
        assert options.gamma is not None
        slopes = (weights.log() - options.gamma * values).masked_fill(is_absent, -torch.inf).softmax(-1)
    return slopes.masked_fill(is_absent, 0.0)


@dataclass(frozen=True)
class _Groups:
    """Samples by group: `index` [samples] int64 from 0, `size` [groups] float."""

    index: Tensor
    size: Tensor

    @classmethod
    def of(cls, group: Tensor) -> _Groups:
        _, index, size = group.unique(return_inverse=True, return_counts=True)
        return cls(index, size.double())

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.size)).index_add_(0, self.index, values)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.size.to(values)

    def highest(self, values: Tensor) -> Tensor:
        least = values.new_full((len(self.size),), -torch.inf)
        return least.scatter_reduce(0, self.index, values, "amax")

    def centre(self, values: Tensor) -> Tensor:
        """Values without their group's mean; exactly 0 where they are equal, because the largest is taken off first."""
        shifted = values - self.highest(values)[self.index]
        return shifted - self.mean(shifted)[self.index]


@dataclass(frozen=True)
class _Clusters:
    """Samples of a group that give the same answer.

    Attributes:
        index: [samples] int64, the cluster of each, sorted by group.
        group: [clusters] int64.
        share: [clusters] float, of the group's samples.
        reward: [clusters] float, mean of its samples.
    """

    index: Tensor
    group: Tensor
    share: Tensor
    reward: Tensor

    @classmethod
    def of(cls, groups: _Groups, answers: Tensor, rewards: Tensor) -> _Clusters:
        alone = answers.amax().clamp(min=-1) + 1 + torch.arange(len(answers), device=answers.device)
        _, answer = answers.where(answers >= 0, alone).unique(return_inverse=True)
        key, index, size = (groups.index * (answer.amax() + 1) + answer).unique(return_inverse=True, return_counts=True)
        group = key // (answer.amax() + 1)
        reward = rewards.new_zeros(len(size)).index_add_(0, index, rewards) / size
        return cls(index, group, size / groups.size[group].to(rewards), reward)


def _identity(rewards: Tensor, groups: _Groups, term: Term) -> Variation:
    return Variation(groups.mean(rewards), rewards)


def _best_of_n(rewards: Tensor, groups: _Groups, term: Term) -> Variation:
    assert term.n is not None
    order = rewards.argsort(stable=True)
    order = order[groups.index[order].argsort(stable=True)]
    ordered, group = rewards[order], groups.index[order]
    size = groups.size.to(rewards)
    place = torch.arange(1, len(order) + 1, dtype=rewards.dtype, device=rewards.device)
    share = (place - (size.cumsum(0) - size)[group]) / size[group]
    is_last = torch.ones_like(group, dtype=torch.bool)
    is_last[:-1] = group[:-1] != group[1:]
    gap = torch.zeros_like(ordered)
    gap[:-1] = (ordered[1:] - ordered[:-1]).masked_fill(is_last[:-1], 0.0)
    lost = _suffix_sums(gap * term.n * share.pow(term.n - 1), group)
    # Equal rewards are one step of F: all take the figure of the last, so that rounding can't tell them apart.
    is_step_end = is_last | (gap > 0)
    step = is_step_end.cumsum(0) - is_step_end.long()
    variation = torch.empty_like(rewards)
    variation[order] = -lost[is_step_end][step]
    value = groups.highest(rewards) - torch.zeros_like(size).index_add_(0, group, gap * share.pow(term.n))
    return Variation(value, variation)


def _suffix_sums(values: Tensor, group: Tensor) -> Tensor:
    """Sum from each place to the end of its group, by doubling, so that no group's figures touch another's.

    Args:
        values: [samples] float; group: [samples] int64, sorted.
    """
    largest = int(group.bincount().max())
    reach = 1
    while reach < largest:
        further = torch.zeros_like(values)
        further[:-reach] = values[reach:].where(group[reach:] == group[:-reach], 0.0)
        values, reach = values + further, 2 * reach
    return values


def _soft_best_of_n(rewards: Tensor, groups: _Groups, term: Term) -> Variation:
    assert term.temperature is not None
    tilt = ((rewards - groups.highest(rewards)[groups.index]) / term.temperature).exp()
    z = groups.mean(tilt)
    value = groups.mean(rewards * tilt) / z
    return Variation(value, tilt / z[groups.index] * (rewards - value[groups.index]))


def _pass_at_k(rewards: Tensor, groups: _Groups, term: Term) -> Variation:
    assert term.n is not None
    is_solved = (rewards >= term.threshold).to(rewards)
    failed = 1 - groups.mean(is_solved)
    return Variation(1 - failed.pow(term.n), (term.n * failed.pow(term.n - 1))[groups.index] * is_solved)


def _tempered(rewards: Tensor, groups: _Groups, clusters: _Clusters, term: Term) -> Variation:
    assert term.temperature is not None
    sharpness = 1 / term.temperature
    share = clusters.share[clusters.index]
    # Relative to the group's most frequent answer, or a low temperature would underflow.
    weight = (share / groups.highest(share)[groups.index]).pow(sharpness - 1)
    mass = groups.mean(weight)
    value = groups.mean(weight * rewards) / mass
    average, expected = clusters.reward[clusters.index], value[groups.index]
    gain = (sharpness - 1) * (average - expected) + rewards - expected
    return Variation(value, weight / mass[groups.index] * gain)


def _majority(rewards: Tensor, groups: _Groups, clusters: _Clusters, term: Term) -> Variation:
    assert term.n is not None
    counts = clusters.group.bincount(minlength=len(groups.size))
    slot = torch.arange(len(clusters.group), device=rewards.device) - (counts.cumsum(0) - counts)[clusters.group]
    table = torch.zeros(len(groups.size), int(counts.max()), dtype=torch.float64, device=rewards.device)
    at = (clusters.group, slot)
    shares, averages = table.index_put(at, clusters.share.double()), table.index_put(at, clusters.reward.double())
    value, by_share, by_reward = majority_gradients(shares, averages, term.n)
    of_cluster = by_share[at].to(rewards)[clusters.index]
    of_sample = (by_reward[at].to(rewards) / clusters.share)[clusters.index]
    apart = rewards - clusters.reward[clusters.index]
    return Variation(value.to(rewards), of_cluster + of_sample * apart)


_BY_REWARD: dict[str, Callable[[Tensor, _Groups, Term], Variation]] = {
    "identity": _identity,
    "best_of_n": _best_of_n,
    "soft_best_of_n": _soft_best_of_n,
    "pass_at_k": _pass_at_k,
}
_BY_ANSWER: dict[str, Callable[[Tensor, _Groups, _Clusters, Term], Variation]] = {
    "tempered": _tempered,
    "majority": _majority,
}
