"""Advantage estimators that give each sample one advantage. Samples without a reward are dropped before them.

Estimators that give each token an advantage are in returns.py, those of pass@k in pass_at_k.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from algorithms.group_statistics import Groups, centre
from algorithms.inputs import AdvantageInputs
from algorithms.registry import Need, Options, advantage_estimator

STD_EPSILON = 1e-6
"""Added to standard deviations before a division, so that rounding noise stays small."""


@advantage_estimator(
    "grpo",
    compares_group=True,
    formula="(r − mean(group)) / (std(group) + 1e-6)",
    source="GRPO, arXiv 2402.03300, section 4.1.2",
    use_when="The usual choice for verifiable rewards without a critic, in groups of 4 and more.",
)
def grpo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """(r - mean of group) / standard deviation of group (GRPO, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample one (n - 1), plus 1e-6 so that rounding noise isn't blown up to size 1.

    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    centred = centre(inputs.rewards, Groups.of(inputs.group))
    return centred.values / (centred.std + STD_EPSILON)


@advantage_estimator(
    "dr_grpo",
    compares_group=True,
    formula="r − mean(group)",
    source="Dr. GRPO, arXiv 2503.20783, section 3.2",
    use_when="As grpo, without its up-weighting of prompts that are nearly always or never solved.",
)
def dr_grpo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of group (Dr. GRPO, arXiv 2503.20783, section 3.2). Shapes and edge cases as :func:`grpo`."""
    return centre(inputs.rewards, Groups.of(inputs.group)).values


@advantage_estimator(
    "rloo",
    compares_group=True,
    formula="r − mean(other samples of the group)",
    source="RLOO, arXiv 2402.14740, eq. 8",
    use_when="An unbiased baseline for any reward scale; small groups.",
)
def rloo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of the group's other samples (RLOO, arXiv 2402.14740, eq. 8). Shapes and edge cases as :func:`grpo`.

    Computed as n / (n - 1) times the difference from the group's mean, which is the same.
    """
    centred = centre(inputs.rewards, Groups.of(inputs.group))
    return centred.values * centred.size / (centred.size - 1).clamp(min=1)


@advantage_estimator(
    "reinforce",
    formula="r − mean(batch)",
    source="Williams, Machine Learning 8, 1992, section 4",
    use_when="One sample a prompt, rewards of one scale over all prompts.",
)
def reinforce(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of the whole batch (REINFORCE with a mean baseline; Williams, 1992, section 4).

    Groups play no part, so a group of one isn't 0 here; a batch whose rewards are all equal is.

    Returns:
        [samples] float.
    """
    return centre(inputs.rewards, Groups.one(inputs.group)).values


@advantage_estimator(
    "reinforce_plus_plus_baseline",
    compares_group=True,
    formula="(r − mean(group)) / (std(batch of r − mean(group)) + 1e-6)",
    source="REINFORCE++, arXiv 2501.03262, the variant with a group baseline",
    use_when="As grpo, but one scale for all prompts, which small groups can't estimate each for itself.",
)
def reinforce_plus_plus_baseline(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - mean of group, normalised over the batch (REINFORCE++ with a baseline, arXiv 2501.03262).

    The batch's statistics are taken over samples. Their mean is 0 already, group by group, so only the standard
    deviation (n - 1) is divided by. Public implementations take both over tokens, where the mean isn't 0 as soon as
    lengths go with rewards: groups whose rewards are all equal then get an advantage. Here they don't.

    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    return _over_batch_std(centre(inputs.rewards, Groups.of(inputs.group)).values)


@advantage_estimator(
    "remax",
    needs=frozenset({Need.GREEDY_REWARDS}),
    formula="r − r(greedy completion of the prompt)",
    source="ReMax, arXiv 2310.10505, algorithm 1",
    use_when="One sample a prompt: a baseline per prompt for the price of one greedy completion.",
)
def remax(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - reward of the greedy completion of the same prompt (ReMax, arXiv 2310.10505, algorithm 1).

    Groups play no part: a group of one has an advantage, and equal rewards that differ from the greedy one too.

    Returns:
        [samples] float. Exactly 0 where the reward equals the greedy one.
    """
    assert inputs.greedy_rewards is not None
    return inputs.rewards - inputs.greedy_rewards


@advantage_estimator(
    "opo",
    compares_group=True,
    formula="r − Σ(length · r) / Σ length, over the group",
    source="OPO, arXiv 2505.23585, the length-weighted optimal baseline",
    use_when="Lengths vary a lot within a group and updates are exactly on-policy.",
)
def opo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """r - length-weighted mean of the group (OPO, arXiv 2505.23585).

    The baseline of least variance weighs each reward by its squared gradient norm; with gradients of different tokens
    about orthogonal, that grows with the length. The length counts the tokens the policy chose.

    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal. Weighted by length,
        not as they stand, those of a group sum to 0.
    """
    groups = Groups.of(inputs.group)
    shifted = inputs.rewards - groups.least(inputs.rewards)[groups.index]
    weights = inputs.actions.to(shifted.dtype)
    baseline = groups.sum(weights * shifted) / groups.sum(weights).clamp(min=1)
    return shifted - baseline[groups.index]


class GPGOptions(Options):
    """What the difference from the group's mean is divided by."""

    divide_by: Literal["none", "std"] = Field(
        "none", description="none leaves the difference from the group's mean; std divides it as GRPO does."
    )


@advantage_estimator(
    "gpg",
    options=GPGOptions,
    compares_group=True,
    formula="α · (r − mean(group)) / F, α = samples / samples in groups whose rewards differ, F = 1 or std(group)",
    source="GPG, arXiv 2504.02546, the advantage with accurate gradient estimation",
    use_when="Without dynamic filtering: a larger step on the other groups makes up for groups of equal rewards.",
)
def gpg(inputs: AdvantageInputs, options: GPGOptions) -> Tensor:
    """alpha (r - mean of group) / F (GPG, arXiv 2504.02546).

    alpha undoes the shrinking of the batch's mean gradient by groups whose rewards are all equal, which add nothing
    to it but count in its denominator. A public implementation counts samples whose reward isn't 0 instead, which
    changes with a shift of the rewards; here it is the samples of groups whose rewards differ.

    Returns:
        [samples] float. Exactly 0 for a group of one and for a group whose rewards are all equal.
    """
    groups = Groups.of(inputs.group)
    centred = centre(inputs.rewards, groups)
    differs = groups.largest(inputs.rewards) > groups.least(inputs.rewards)
    teaching = int(differs[groups.index].sum())
    values = centred.values / (centred.std + STD_EPSILON) if options.divide_by == "std" else centred.values
    return values * (len(values) / max(1, teaching))


@advantage_estimator(
    "maxrl",
    compares_group=True,
    formula="(r − mean(group)) / mean(group)",
    source="Maximum likelihood RL, arXiv 2602.02710",
    use_when="Rewards of 0 and 1 and hard prompts: a rare success weighs as much as many frequent ones.",
)
def maxrl(inputs: AdvantageInputs, options: Options) -> Tensor:
    """(r - mean of group) / mean of group (MaxRL, arXiv 2602.02710): the policy gradient of log E[r].

    Returns:
        [samples] float, between -1 and n - 1 for a group of n. Exactly 0 for a group of one, for a group whose rewards
        are all equal, and so for one without a success.
    Raises:
        ValueError: a reward is below 0, so that E[r] is no likelihood.
    """
    rewards = inputs.rewards
    if bool((rewards < 0).any()):
        worst = int(rewards.argmin())
        raise ValueError(
            f"algorithm.advantage = maxrl takes the logarithm of the expected reward, so no reward may be below 0, but "
            f"that of sample {worst} is {float(rewards[worst]):g}. Shift the rewards to 0 and above (a penalty in the "
            "reward lowers them too: place it in the loss), or choose another estimator."
        )
    centred = centre(rewards, Groups.of(inputs.group))
    return torch.where(centred.mean > 0, centred.values / centred.mean, torch.zeros_like(rewards))


@advantage_estimator(
    "gdpo",
    compares_group=True,
    needs=frozenset({Need.COMPONENTS}),
    formula="a / (std(batch of a) + 1e-6), a = Σₖ wₖ · (rₖ − mean(group of rₖ)) / (std(group of rₖ) + 1e-6)",
    source="GDPO, arXiv 2601.05242, section 3",
    use_when="Several rewards of different scale or difficulty, each of which must keep its influence.",
)
def gdpo(inputs: AdvantageInputs, options: Options) -> Tensor:
    """Each component normalised over its group, their weighted sum normalised over the batch (GDPO, arXiv 2601.05242).

    A component that a sample doesn't have is left out of that component's mean and standard deviation and adds nothing
    to the sample. The batch's statistics are over samples, as in the paper (public implementations take them over
    tokens); the weighted sums have mean 0 already, group by group, so only the standard deviation is divided by.

    Returns:
        [samples] float. Exactly 0 for a group of one and where all components of a group are equal.
    """
    assert inputs.components is not None
    assert inputs.is_present is not None
    assert inputs.component_weights is not None
    groups = Groups.of(inputs.group)
    total = torch.zeros_like(inputs.rewards)
    for column, weight in enumerate(inputs.component_weights.tolist()):
        has_it = inputs.is_present[:, column]
        owners = Groups.of(groups.index[has_it])
        centred = centre(inputs.components[has_it, column], owners)
        total[has_it] += weight * centred.values / (centred.std + STD_EPSILON)
    return _over_batch_std(total)


def _over_batch_std(values: Tensor) -> Tensor:
    """Values whose mean is 0, divided by their standard deviation over the batch (n - 1)."""
    std = (values.square().sum() / max(1, len(values) - 1)).sqrt()
    return values / (std + STD_EPSILON)
