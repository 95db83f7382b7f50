"""Names under which advantage estimators and policy losses are registered, so that a recipe can pick them.

A user adds one from their own file with the same decorators and names it in the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from algorithms.config import AlgorithmConfig

Entry = TypeVar("Entry")


class RegistryError(ValueError):
    """A name that is unknown, or taken."""


class Registry(Generic[Entry]):
    """Entries of one kind by name.

    Args:
        kind: what is registered, in the words of an error message ("advantage estimator").
        setting: the setting of a recipe that picks one ("algorithm.advantage").
    """

    def __init__(self, kind: str, setting: str) -> None:
        self.kind = kind
        self.setting = setting
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register `entry` under `name`.

        Raises:
            RegistryError: the name is taken.
        """
        if name in self._entries:
            raise RegistryError(
                f"the {self.kind} {name!r} is registered already, as {self._entries[name]!r}. Choose another name."
            )
        self._entries[name] = entry

    def get(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            RegistryError: there is none; lists the names and the nearest spelling.
        """
        if name not in self._entries:
            nearest = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise RegistryError(
                f"{self.setting}: there is no {self.kind} {name!r}.{hint} Registered: {', '.join(self.names())}."
            )
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


AdvantageEstimator = Callable[[Tensor, Tensor], Tensor]
"""`(rewards: [samples] float, group: [samples] int64) -> [samples] float`."""


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss is made of. Entries outside `mask` are 0 in every tensor.

    Attributes:
        log_probs: [B, T] float, nats, of the policy being trained; carries the gradient.
        proximal_log_probs: [B, T] float, of the policy at the start of the update; no gradient.
        behaviour_log_probs: [B, T] float, of the distribution sampled from; no gradient.
        advantages: [B, T] float.
        mask: [B, T] bool, the trained tokens.
    """

    log_probs: Tensor
    proximal_log_probs: Tensor
    behaviour_log_probs: Tensor
    advantages: Tensor
    mask: Tensor


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


@dataclass(frozen=True)
class PolicyLoss:
    """A registered policy loss.

    Attributes:
        function: `(inputs, config) -> TokenLoss`.
        uses_rollouts: whether it learns from sampled completions, so that behaviour log-probabilities, advantages and
            the rollout correction mean something; False for supervised losses.
    """

    function: Callable[[LossInputs, AlgorithmConfig], TokenLoss]
    uses_rollouts: bool = True


ADVANTAGE_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage estimator", "algorithm.advantage")
POLICY_LOSSES: Registry[PolicyLoss] = Registry("policy loss", "algorithm.loss")

LossFunction = TypeVar("LossFunction", bound=Callable[[LossInputs, AlgorithmConfig], TokenLoss])
EstimatorFunction = TypeVar("EstimatorFunction", bound=AdvantageEstimator)


def advantage_estimator(name: str) -> Callable[[EstimatorFunction], EstimatorFunction]:
    """Register the decorated function as the advantage estimator `name`; see :data:`AdvantageEstimator`."""

    def register(function: EstimatorFunction) -> EstimatorFunction:
        ADVANTAGE_ESTIMATORS.add(name, function)
        return function

    return register


def policy_loss(name: str, *, uses_rollouts: bool = True) -> Callable[[LossFunction], LossFunction]:
    """Register the decorated function as the policy loss `name`; see :class:`PolicyLoss`."""

    def register(function: LossFunction) -> LossFunction:
        POLICY_LOSSES.add(name, PolicyLoss(function, uses_rollouts))
        return function

    return register
