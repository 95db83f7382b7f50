"""Registries of methods by name, from which a recipe chooses and docs/algorithms.md is written.

A user adds one from their own file (`algorithm.modules`) with the same decorators and names it in the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from algorithms.inputs import BatchTokens


class RegistryError(ValueError):
    """A name that is unknown or taken, or options that a method doesn't have."""


class Options(BaseModel):
    """The options of a method, each a field with a description. Methods without any take this class itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Need(StrEnum):
    """What a method needs besides rewards and log-probabilities; the orchestrator provides it."""

    COMPONENTS = "components"
    """Rewards by component."""
    GREEDY_REWARDS = "greedy_rewards"
    """The reward of a greedy completion of each prompt."""
    VALUES = "values"
    """A critic's value of each token."""
    PROXIMAL_LOG_PROBS = "proximal_log_probs"
    """The trainer's own log-probabilities at the start of the update, one more forward pass."""
    COLLISION = "collision"
    """The sum of squared probabilities at each token, from that same pass."""


@dataclass(frozen=True)
class Method:
    """A registered method, with its formula, its source and when to use it.

    Attributes:
        name: as a recipe picks it.
        function: what computes it; called with its options last.
        options: the class of its options.
        formula: in one line.
        source: the paper, with its number and equation.
        use_when: when to use it.
    """

    name: str
    function: Callable[..., Any]
    options: type[Options] = Options
    formula: str = ""
    source: str = ""
    use_when: str = ""

    def read_options(self, values: Mapping[str, Any], setting: str = "options") -> Any:
        """The options as an instance of `options`.

        Args:
            values: by name, as a recipe gives them.
            setting: where they stand in a recipe, for errors.
        Raises:
            RegistryError: an option is unknown or its value is wrong; names it, and what there is.
        """
        try:
            return self.options.model_validate(dict(values))
        except ValidationError as error:
            raise RegistryError("\n".join(self._problem(each, setting) for each in _telling(error))) from error

    def _problem(self, error: dict[str, Any], setting: str) -> str:
        place = ".".join(str(part) for part in error["loc"])
        key = f"{setting}.{place}" if place else setting
        if error["type"] == "missing" and place in self.options.model_fields:
            return f"{key} of {self.name!r} must be set: {self.options.model_fields[place].description}"
        if error["type"] != "extra_forbidden":
            return f"{key} = {error['input']!r} of {self.name!r}: {error['msg']}."
        known = list(self.options.model_fields)
        nearest = difflib.get_close_matches(place, known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        return f"{key} is not an option of {self.name!r}.{hint} It has: {', '.join(known) or 'none'}."


def _telling(error: ValidationError) -> list[dict[str, Any]]:
    """The errors, without "the list is too short" where entries of the list have errors of their own."""
    found: list[dict[str, Any]] = [dict(each) for each in error.errors()]
    inner = {each["loc"][:depth] for each in found for depth in range(len(each["loc"]))}
    return [each for each in found if each["type"] != "too_short" or each["loc"] not in inner]


@dataclass(frozen=True)
class AdvantageEstimator(Method):
    """`(inputs: AdvantageInputs, options) -> [samples] float`, or [tokens] where its level is "token".

    Attributes:
        level: whether it gives one advantage a sample or one a token.
        compares_group: whether it compares the samples of a prompt, and so needs at least two of them.
        needs: what must be in the inputs besides rewards.
    """

    level: Literal["sample", "token"] = "sample"
    compares_group: bool = False
    needs: frozenset[Need] = frozenset()


@dataclass(frozen=True)
class PolicyLoss(Method):
    """`(inputs: LossInputs, options) -> TokenLoss`.

    Attributes:
        uses_rollouts: whether it learns from sampled completions, so that behaviour log-probabilities, advantages and
            the rollout correction mean something; False for supervised losses.
        unit: "sequence" where its ratio is one of the whole sequence, which can carry only one advantage a sequence.
        corrects_mismatch: whether it weighs by the behaviour policy itself, so that a correction would count twice.
        prepare: `(tokens: BatchTokens, options) -> [tokens] float`, made once from the whole optimiser batch and
            handed to the function as `marks`; for losses that rank or average over the batch.
        needs: what must be known of each token besides advantages and behaviour log-probabilities.
    """

    uses_rollouts: bool = True
    unit: Literal["token", "sequence"] = "token"
    corrects_mismatch: bool = False
    prepare: Callable[[BatchTokens, Any], Tensor] | None = None
    needs: frozenset[Need] = frozenset()


@dataclass(frozen=True)
class KLEstimator(Method):
    """`(log_probs: [...], reference_log_probs: [...]) -> [...]`, nats by token.

    Attributes:
        wrong_in_loss, wrong_in_reward: why it can't be placed there, in the words of an error; empty where it can.
        needs_distributions: whether it needs both models' whole distributions at each token; its function then takes
            log-probabilities [..., vocabulary].
    """

    wrong_in_loss: str = ""
    wrong_in_reward: str = ""
    needs_distributions: bool = False


@dataclass(frozen=True)
class PreferenceLoss(Method):
    """`(inputs: PreferenceInputs or UnpairedInputs, options) -> PreferenceOutcome`; see algorithms/preferences.

    Attributes:
        is_paired: whether it compares a chosen with a rejected answer; otherwise each answer has a label of its own.
        needs_reference: whether it needs a reference model's log-probabilities.
        needs_negative_image: whether it needs log-probabilities under a worse image.
        needs: names of the optional fields of the inputs it can't do without ("reward_margins", "kl_baseline",
            "by_token").
        initial_state: `(options) -> state` before the first step, for a loss that remembers; the state after a step is
            `state.after(sums)`, with the sums of the whole batch.
    """

    is_paired: bool = True
    needs_reference: bool = True
    needs_negative_image: bool = False
    needs: frozenset[str] = frozenset()
    initial_state: Callable[[Any], Any] | None = None


Entry = TypeVar("Entry", bound=Method)
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Generic[Entry]):
    """Methods of one kind by name.

    Args:
        kind: what is registered, in the words of an error message ("advantage estimator").
        setting: the setting of a recipe that picks one ("algorithm.advantage").
    """

    def __init__(self, kind: str, setting: str) -> None:
        self.kind = kind
        self.setting = setting
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Register a method under its name.

        Raises:
            RegistryError: the name is taken.
        """
        taken = self._entries.get(entry.name)
        if taken is not None:
            raise RegistryError(
                f"the {self.kind} {entry.name!r} is registered already, as {taken.function.__module__}."
                f"{taken.function.__qualname__}. Choose another name."
            )
        self._entries[entry.name] = entry

    def adding(self, make: Callable[[Callable[..., Any]], Entry]) -> Callable[[Function], Function]:
        """A decorator that registers what `make` makes of a function, and leaves the function as it is."""

        def register(function: Function) -> Function:
            self.add(make(function))
            return function

        return register

    def get(self, name: str) -> Entry:
        """The method called `name`.

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


ADVANTAGE_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage estimator", "algorithm.advantage")
POLICY_LOSSES: Registry[PolicyLoss] = Registry("policy loss", "algorithm.loss")
AGGREGATIONS: Registry[Method] = Registry("aggregation", "algorithm.aggregation")
KL_ESTIMATORS: Registry[KLEstimator] = Registry("KL estimator", "algorithm.kl.estimator")
CORRECTIONS: Registry[Method] = Registry("rollout correction", "algorithm.correction.method")
REWARD_COMBINATIONS: Registry[Method] = Registry("reward combination", "algorithm.combination")
REWARD_SHAPES: Registry[Method] = Registry("reward shape", "algorithm.shaping.*.name")
GRADIENT_COMBINATIONS: Registry[Method] = Registry("gradient combination", "algorithm.gradient_combination")
PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry("preference loss", "preference.loss")
REWARD_MODEL_LOSSES: Registry[Method] = Registry("reward-model loss", "reward_model.loss")
IMAGE_NEGATIVES: Registry[Method] = Registry("image negative", "preference.image_negative")


def advantage_estimator(
    name: str,
    *,
    options: type[Options] = Options,
    level: Literal["sample", "token"] = "sample",
    compares_group: bool = False,
    needs: frozenset[Need] = frozenset(),
    formula: str = "",
    source: str = "",
    use_when: str = "",
) -> Callable[[Function], Function]:
    """Register the decorated function as the advantage estimator `name`; see :class:`AdvantageEstimator`."""
    return ADVANTAGE_ESTIMATORS.adding(
        lambda function: AdvantageEstimator(
            name, function, options, formula, source, use_when, level, compares_group, needs
        )
    )


def policy_loss(
    name: str,
    *,
    options: type[Options] = Options,
    uses_rollouts: bool = True,
    unit: Literal["token", "sequence"] = "token",
    corrects_mismatch: bool = False,
    prepare: Callable[[BatchTokens, Any], Tensor] | None = None,
    needs: frozenset[Need] = frozenset(),
    formula: str = "",
    source: str = "",
    use_when: str = "",
) -> Callable[[Function], Function]:
    """Register the decorated function as the policy loss `name`; see :class:`PolicyLoss`."""
    return POLICY_LOSSES.adding(
        lambda function: PolicyLoss(
            name,
            function,
            options,
            formula,
            source,
            use_when,
            uses_rollouts,
            unit,
            corrects_mismatch,
            prepare,
            needs,
        )
    )


def method(
    registry: Registry[Method],
    name: str,
    *,
    options: type[Options] = Options,
    formula: str = "",
    source: str = "",
    use_when: str = "",
) -> Callable[[Function], Function]:
    """Register the decorated function as `name` of a kind whose methods have no traits of their own."""
    return registry.adding(lambda function: Method(name, function, options, formula, source, use_when))


def incompatibility(estimator: AdvantageEstimator, loss: PolicyLoss) -> str | None:
    """Why an advantage estimator and a policy loss can't be combined; None where they can."""
    if not loss.uses_rollouts:
        return f"the loss {loss.name} imitates given answers and uses neither rewards nor advantages"
    if estimator.level == "token" and loss.unit == "sequence":
        return (
            f"the loss {loss.name} has one ratio for a whole sequence and can carry only one advantage a sequence, but "
            f"{estimator.name} gives one a token"
        )
    return None
