"""Constraints on the mean of reward components, each with a multiplier that is learned while the policy trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, field_validator, model_validator

from algorithms.finite import NonFiniteError
from algorithms.registry import Options

SMALLEST = 1e-4
"""Where a softplus multiplier stops falling, so that it can rise again within a few steps."""


class Constraint(Options):
    """The mean of a component must be at least, or at most, a threshold."""

    component: str = Field(description="The reward component.")
    threshold: float = Field(description="Where its mean must be.")
    direction: Literal["at_least", "at_most"] = Field("at_least", description="On which side of it.")

    def shortfall(self, value: float) -> float:
        """How far a value is on the wrong side; below 0 on the right one."""
        return self.threshold - value if self.direction == "at_least" else value - self.threshold


class ConstrainedOptions(Options):
    """The other components are maximised as far as the constraints allow."""

    constraints: tuple[Constraint, ...] = Field(min_length=1, description="What must hold.")
    step_size: float = Field(0.1, gt=0.0, description="Change of a multiplier for each unit of shortfall and update.")
    initial: float = Field(1.0, ge=0.0, description="Each multiplier's first value.")
    ceiling: float = Field(10.0, gt=0.0, description="Each multiplier's largest value.")
    rule: Literal["projected", "softplus"] = Field(
        "projected",
        description="projected clips the multiplier at 0; softplus moves its argument, so that it shrinks ever more "
        "slowly and never is 0.",
    )
    is_rescaled: bool = Field(
        True, description="Divide by 1 + the sum of the multipliers, so that the reward's size doesn't grow with them."
    )

    @field_validator("constraints")
    @classmethod
    def _one_a_component(cls, constraints: tuple[Constraint, ...]) -> tuple[Constraint, ...]:
        names = [constraint.component for constraint in constraints]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is constrained twice; give each component one constraint")
        return constraints

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> ConstrainedOptions:
        if self.initial > self.ceiling:
            raise ValueError(f"initial = {self.initial:g} is above ceiling = {self.ceiling:g}; lower it")
        return self


@dataclass(frozen=True)
class LagrangeMultipliers:
    """One multiplier a constraint, learned by dual ascent: it rises while the constraint is broken. Immutable.

    Attributes:
        options: the constraints and how multipliers move.
        arguments: by component; the multiplier itself under `projected`, its inverse softplus under `softplus`.
    """

    options: ConstrainedOptions
    arguments: Mapping[str, float]

    @classmethod
    def of(cls, options: ConstrainedOptions) -> LagrangeMultipliers:
        """Multipliers at their initial value."""
        first = options.initial if options.rule == "projected" else _inverse_softplus(max(options.initial, SMALLEST))
        return cls(options, {constraint.component: first for constraint in options.constraints})

    @property
    def values(self) -> dict[str, float]:
        """The multiplier of each constrained component, from 0 to the ceiling."""
        if self.options.rule == "projected":
            return dict(self.arguments)
        return {name: min(_softplus(argument), self.options.ceiling) for name, argument in self.arguments.items()}

    def update(self, means: Mapping[str, float]) -> LagrangeMultipliers:
        """One step of dual ascent.

        projected: lambda <- clip(lambda + step_size * shortfall, 0, ceiling).
        softplus: x <- x + step_size * shortfall, lambda = log(1 + e^x), kept within [1e-4, ceiling].
        Both rest where the shortfall is 0, or where the multiplier is at its end of the range.

        Args:
            means: the mean of each component over the batch, as `component_means` gives it; those without a
                constraint play no part.
        Returns:
            The multipliers after it. One whose component the batch didn't have stays.
        Raises:
            NonFiniteError: a constrained mean is NaN or infinite; names the component.
        """
        moved = dict(self.arguments)
        for constraint in self.options.constraints:
            name = constraint.component
            if name not in means:
                continue
            if not math.isfinite(means[name]):
                raise NonFiniteError(
                    f"the mean of the constrained component {name!r} is {means[name]}. Its multiplier can't follow it: "
                    "look for the reward that returned it."
                )
            low, high = self._range()
            moved[name] = min(max(moved[name] + self.options.step_size * constraint.shortfall(means[name]), low), high)
        return replace(self, arguments=moved)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self.arguments)

    def restored(self, state: Mapping[str, float]) -> LagrangeMultipliers:
        """The multipliers of a checkpoint under this run's options.

        Raises:
            ValueError: the checkpoint has other constraints; names them.
        """
        if set(state) != set(self.arguments):
            raise ValueError(
                f"the checkpoint's multipliers are of {', '.join(state) or 'no component'}, but "
                f"algorithm.combination_options.constraints names {', '.join(self.arguments)}. Resume with the "
                "constraints that the run had."
            )
        low, high = self._range()
        return replace(self, arguments={name: min(max(state[name], low), high) for name in self.arguments})

    def _range(self) -> tuple[float, float]:
        if self.options.rule == "projected":
            return 0.0, self.options.ceiling
        return _inverse_softplus(SMALLEST), _inverse_softplus(max(self.options.ceiling, SMALLEST))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _inverse_softplus(y: float) -> float:
    """log(e^y - 1), without overflow."""
    return y + math.log(-math.expm1(-y))
