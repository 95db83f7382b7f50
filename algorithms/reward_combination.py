"""Combines the reward components of a sample to the one reward that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from algorithms.constraints import ConstrainedOptions, LagrangeMultipliers
from algorithms.finite import require_finite
from algorithms.registry import REWARD_COMBINATIONS, Options, method

STD_EPSILON = 1e-6


@dataclass(frozen=True)
class CombinationInputs:
    """Reward components of a batch. A component with weight 0 is recorded and enters no combination.

    Attributes:
        components: [samples, components] float64; anything where `is_present` is False.
        is_present: [samples, components] bool, whether the sample has the component.
        weights: [components] float64; below 0 for a cost, where the combination is a sum.
        names: of the components, in the order of their columns.
        group: [samples] int64, the prompt each sample answers.
        multipliers: of the constraints, for `constrained`.
    """

    components: Tensor
    is_present: Tensor
    weights: Tensor
    names: tuple[str, ...]
    group: Tensor
    multipliers: LagrangeMultipliers | None = None

    @property
    def counts(self) -> Tensor:
        """[samples, components] bool, present and of a weight other than 0."""
        return self.is_present & (self.weights != 0)

    def column(self, name: str, setting: str) -> int:
        """Where a component stands.

        Raises:
            ValueError: there is none of this name; says which setting named it, and what there is.
        """
        if name not in self.names:
            raise ValueError(f"{setting} names the reward component {name!r}, but there is {', '.join(self.names)}.")
        return self.names.index(name)


def combine_rewards(name: str, inputs: CombinationInputs, options: Mapping[str, Any] | None = None) -> Tensor:
    """One reward a sample, by the combination called `name`.

    Args:
        name: a registered reward combination.
        inputs: the components.
        options: of the method, by name.
    Returns:
        [samples] float64, finite.
    Raises:
        RegistryError: no such combination, or no such option.
        NonFiniteError: a component that is present, or a reward made of them, is NaN or infinite; names the place.
        ValueError: shapes differ, or a sample has no component to be rewarded by; names it.
    """
    combination = REWARD_COMBINATIONS.get(name)
    method_options = combination.read_options(options or {}, "algorithm.combination_options")
    _check(inputs)
    rewards = combination.function(inputs, method_options)
    require_finite(f"the reward by {name!r}", rewards, index_name="sample")
    return rewards


def component_means(inputs: CombinationInputs) -> dict[str, float]:
    """The mean of each component over the samples that have it; nothing for one that none has."""
    present = inputs.is_present.sum(0)
    sums = inputs.components.where(inputs.is_present, 0.0).sum(0)
    return {
        name: total / count
        for name, total, count in zip(inputs.names, sums.tolist(), present.tolist(), strict=True)
        if count
    }


@method(
    REWARD_COMBINATIONS,
    "weighted_sum",
    formula="r = Σ w c",
    source="linear scalarisation",
    use_when="The usual choice: components of known scales, traded off by their weights.",
)
def weighted_sum(inputs: CombinationInputs, options: Options) -> Tensor:
    """sum of weight times component, over the components the sample has.

    A component that a sample doesn't have adds nothing to its sum. That suits components that belong to some prompts
    only; where samples of one prompt differ in what they have, `normalised` compares like with like.

    Returns:
        [samples] float.
    """
    return _weighted(inputs, inputs.components, inputs.counts)


class NormalisedOptions(Options):
    """What a component is normalised over."""

    over: Literal["group", "batch"] = Field("group", description="The samples of one prompt, or the whole batch.")


@method(
    REWARD_COMBINATIONS,
    "normalised",
    options=NormalisedOptions,
    formula="r = Σ w (c − mean) / (std + 1e-6)",
    source="GDPO, arXiv 2601.05242, the normalisation of each reward before they are summed",
    use_when="Components of different or unknown scales, so that each keeps its influence.",
)
def normalised(inputs: CombinationInputs, options: NormalisedOptions) -> Tensor:
    """Weighted sum of components, each less its mean and divided by its standard deviation (n - 1) plus 1e-6.

    Mean and deviation are over the samples of the group (or batch) that have the component; one that lacks it stands
    at its mean. A component that is equal for all of them counts exactly 0.

    Returns:
        [samples] float.
    """
    group = inputs.group if options.over == "group" else torch.zeros_like(inputs.group)
    groups, index = group.unique(return_inverse=True)
    counts = inputs.counts
    rows = index[:, None].expand_as(inputs.components)
    table = inputs.components.new_zeros(len(groups), inputs.components.shape[1])
    size = table.scatter_add(0, rows, counts.to(table))
    # The smallest is taken off first, so that equal values give exactly 0.
    lowest = torch.full_like(table, torch.inf).scatter_reduce(
        0, rows, inputs.components.masked_fill(~counts, torch.inf), "amin"
    )
    shifted = (inputs.components - lowest[index]).where(counts, 0.0)
    mean = table.scatter_add(0, rows, shifted) / size.clamp(min=1)
    centred = (shifted - mean[index]).where(counts, 0.0)
    std = (table.scatter_add(0, rows, centred.square()) / (size - 1).clamp(min=1)).sqrt()
    return _weighted(inputs, centred / (std[index] + STD_EPSILON), counts)


@method(
    REWARD_COMBINATIONS,
    "minimum",
    formula="r = min c",
    source="egalitarian scalarisation",
    use_when="Every component must be good, on one common scale.",
)
def minimum(inputs: CombinationInputs, options: Options) -> Tensor:
    """The smallest of the components the sample has. Weights must be 1, or 0 for a component that is left out.

    Returns:
        [samples] float.
    Raises:
        ValueError: a weight is neither 0 nor 1, or a sample has no component that counts.
    """
    if not bool(((inputs.weights == 0) | (inputs.weights == 1)).all()):
        raise ValueError(
            f"algorithm.combination = minimum takes no weights, but the components' are {inputs.weights.tolist()}. "
            "Set them to 1 (0 leaves a component out), or use tchebycheff."
        )
    _require_component(inputs.counts)
    return inputs.components.masked_fill(~inputs.counts, torch.inf).amin(-1)


class TchebycheffOptions(Options):
    """The ideal that distances are measured from."""

    ideal: float | dict[str, float] = Field(
        1.0, description="The best value of each component: one for all, or by name."
    )


class SmoothTchebycheffOptions(TchebycheffOptions):
    """The ideal, and how smooth the largest distance is."""

    smoothness: float = Field(0.1, gt=0.0, description="mu; towards 0 it becomes the plain Tchebycheff reward.")


@method(
    REWARD_COMBINATIONS,
    "tchebycheff",
    options=TchebycheffOptions,
    formula="r = −max w (z − c)",
    source="Bowman, 1976; as in arXiv 2402.19078, Tchebycheff scalarisation",
    use_when="A trade-off that a weighted sum can't reach, because the attainable rewards aren't convex.",
)
def tchebycheff(inputs: CombinationInputs, options: TchebycheffOptions) -> Tensor:
    """Minus the largest weighted distance below the ideal, over the components the sample has.

    Returns:
        [samples] float. Above 0 only where every component is above its ideal.
    Raises:
        ValueError: `ideal` is by name and lacks a component, or names one that isn't there; a weight is below 0; a
            sample has no component that counts.
    """
    return -_distances(inputs, options).amax(-1)


@method(
    REWARD_COMBINATIONS,
    "smooth_tchebycheff",
    options=SmoothTchebycheffOptions,
    formula="r = −μ log Σ exp(w (z − c) / μ)",
    source="Lin et al., arXiv 2402.19078, smooth Tchebycheff scalarisation",
    use_when="As tchebycheff, with some credit for the components that aren't the worst.",
)
def smooth_tchebycheff(inputs: CombinationInputs, options: SmoothTchebycheffOptions) -> Tensor:
    """-mu log sum exp(w (z - c) / mu), over the components the sample has (Lin et al., arXiv 2402.19078).

    Below the Tchebycheff reward by at most mu times the logarithm of the number of components.

    Returns:
        [samples] float.
    Raises:
        ValueError: `ideal` is by name and lacks a component, or names one that isn't there; a weight is below 0; a
            sample has no component that counts.
    """
    return -options.smoothness * (_distances(inputs, options) / options.smoothness).logsumexp(-1)


class GatedOptions(Options):
    """The gates, and the reward of a sample that a gate stops."""

    gates: dict[str, float] = Field(min_length=1, description="Thresholds that components must reach, by name.")
    floor: float = Field(0.0, description="The reward of a sample that a gate stops.")


@method(
    REWARD_COMBINATIONS,
    "gated",
    options=GatedOptions,
    formula="r = Σ w c if every gate ≥ its threshold, else floor",
    source="format × correctness, as with the rule-based rewards of DeepSeek-R1, arXiv 2501.12948",
    use_when="A component only counts if another holds: correctness given the format, quality given safety.",
)
def gated(inputs: CombinationInputs, options: GatedOptions) -> Tensor:
    """Weighted sum of the components that aren't gates, where every gate reaches its threshold; otherwise the floor.

    A gate only opens or shuts: its value isn't part of the sum, and its weight plays no part.

    Returns:
        [samples] float.
    Raises:
        ValueError: a gate isn't a component; a sample has no value for a gate, or passes them all and has nothing
            else; names the sample.
    """
    columns = [inputs.column(name, "algorithm.combination_options.gates") for name in options.gates]
    absent = (~inputs.is_present[:, columns]).nonzero()
    if len(absent):
        sample, gate = absent[0].tolist()
        raise ValueError(
            f"the reward component {inputs.names[columns[gate]]!r} is a gate, but sample {sample} has no value for it "
            f"({len(absent)} missing). A gate needs a value of every sample: report one for each."
        )
    thresholds = inputs.components.new_tensor(list(options.gates.values()))
    passes = (inputs.components[:, columns] >= thresholds).all(-1)
    counts = inputs.counts.clone()
    counts[:, columns] = False
    _require_component(counts, "that isn't a gate", passes)
    return _weighted(inputs, inputs.components, counts).where(passes, options.floor)


@method(
    REWARD_COMBINATIONS,
    "constrained",
    options=ConstrainedOptions,
    formula="r = (Σ w c of the unconstrained + Σ ±λ (c − threshold)) / (1 + Σ λ), − for at_most",
    source="Lagrangian relaxation as in Safe RLHF, arXiv 2310.12773",
    use_when="Some components must only reach a level (safety, length), and the others should be as high as possible.",
)
def constrained(inputs: CombinationInputs, options: ConstrainedOptions) -> Tensor:
    """Weighted sum of the unconstrained components, plus each multiplier times how far its component is on the right
    side of its threshold, over 1 plus the sum of the multipliers (Safe RLHF, arXiv 2310.12773).

    A constrained component counts through its multiplier alone, which `LagrangeMultipliers.update` learns from the
    batch's means; its weight plays no part. One that a sample doesn't have adds nothing.

    Returns:
        [samples] float.
    Raises:
        ValueError: there are no multipliers, or they are of other options; a constrained name isn't a component; a
            sample has no component that counts.
    """
    if inputs.multipliers is None:
        raise ValueError("algorithm.combination = constrained needs multipliers; start with LagrangeMultipliers.of")
    if inputs.multipliers.options != options:
        raise ValueError("the multipliers were made with other options than algorithm.combination_options")
    multipliers = inputs.multipliers.values
    setting = "algorithm.combination_options.constraints"
    columns = [inputs.column(constraint.component, setting) for constraint in options.constraints]
    factors = [multipliers[c.component] * (1 if c.direction == "at_least" else -1) for c in options.constraints]
    thresholds = inputs.components.new_tensor([constraint.threshold for constraint in options.constraints])
    counts = inputs.counts.clone()
    counts[:, columns] = False
    held = inputs.is_present[:, columns]
    _require_component(torch.cat([counts, held], -1))
    slack = (inputs.components[:, columns] - thresholds).where(held, 0.0)
    rewards = _weighted(inputs, inputs.components, counts) + slack @ slack.new_tensor(factors)
    return rewards / (1 + sum(multipliers.values())) if options.is_rescaled else rewards


def _weighted(inputs: CombinationInputs, values: Tensor, counts: Tensor) -> Tensor:
    return values.where(counts, 0.0) @ inputs.weights.to(values)


def _distances(inputs: CombinationInputs, options: TchebycheffOptions) -> Tensor:
    """[samples, components] w (z - c); minus infinity where the component doesn't count."""
    if bool((inputs.weights < 0).any()):
        raise ValueError(
            f"a Tchebycheff distance takes weights of at least 0, but the components' are {inputs.weights.tolist()}. "
            "Change the sign of the component itself."
        )
    _require_component(inputs.counts)
    if isinstance(options.ideal, dict):
        setting = "algorithm.combination_options.ideal"
        for name in options.ideal:
            inputs.column(name, setting)
        used = [name for name, weight in zip(inputs.names, inputs.weights.tolist(), strict=True) if weight]
        missing = [name for name in used if name not in options.ideal]
        if missing:
            raise ValueError(f"{setting} has no value for {', '.join(missing)}. Give one for every component.")
        ideal = inputs.components.new_tensor([options.ideal.get(name, 0.0) for name in inputs.names])
    else:
        ideal = inputs.components.new_full((len(inputs.names),), options.ideal)
    distances = inputs.weights.to(inputs.components) * (ideal - inputs.components)
    return distances.masked_fill(~inputs.counts, -torch.inf)


def _require_component(counts: Tensor, which: str = "of a weight other than 0", among: Tensor | None = None) -> None:
    """Raise unless every sample (of those in `among` [samples]) has a component that counts."""
    has_none = ~counts.any(-1)
    if among is not None:
        has_none = has_none & among
    if bool(has_none.any()):
        sample = int(has_none.nonzero()[0])
        raise ValueError(
            f"sample {sample} has no reward component {which} ({int(has_none.sum())} such samples), so it has no "
            "reward. Drop it with the reason its scoring failed for, or report a component for it."
        )


def _check(inputs: CombinationInputs) -> None:
    samples, count = len(inputs.group), len(inputs.names)
    shapes = [list(t.shape) for t in (inputs.components, inputs.is_present, inputs.weights, inputs.group)]
    if shapes != [[samples, count], [samples, count], [count], [samples]]:
        raise ValueError(
            f"components and is_present must be [samples, components], weights [components] and group [samples], with "
            f"{count} names, got {shapes[0]}, {shapes[1]}, {shapes[2]} and {shapes[3]}"
        )
    require_finite("the component weight", inputs.weights, index_name="component")
    require_finite("the reward component", inputs.components, inputs.is_present, index_name="(sample, component)")
    _require_component(inputs.is_present, "at all")
