"""Checks that the methods a recipe chooses exist, have the options it sets, and can be combined. Importing it registers
every built-in method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from algorithms import (
    advantages,
    aggregation,
    correction,
    inference_aware,
    kl,
    losses,
    losses_behaviour,
    losses_covariance,
    losses_sequence,
    pass_at_k,
    returns,
    reward_combination,
    reward_models,
    shaping,
)
from algorithms.config import AlgorithmConfig
from algorithms.gradients import gradient_weights
from algorithms.preferences import adversarial_images, dynamic, image_negatives, multimodal, spans, text, unpaired
from algorithms.registry import (
    ADVANTAGE_ESTIMATORS,
    AGGREGATIONS,
    CORRECTIONS,
    GRADIENT_COMBINATIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REWARD_COMBINATIONS,
    REWARD_SHAPES,
    AdvantageEstimator,
    Need,
    PolicyLoss,
    Registry,
    RegistryError,
    incompatibility,
)

BUILT_IN = (
    *(advantages, inference_aware, pass_at_k, returns),
    *(losses, losses_behaviour, losses_covariance, losses_sequence),
    *(aggregation, correction, kl),
    *(reward_combination, gradient_weights, shaping),
    *(adversarial_images, dynamic, image_negatives, multimodal, spans, text, unpaired, reward_models),
)
"""The modules that register methods by being imported."""
PLAIN_COMBINATION = "weighted_sum"


def problems(config: AlgorithmConfig, *, modules_imported: bool = True) -> list[str]:
    """What is wrong with the choices, one sentence each: the setting, its value, the reason, and what would be right.

    Args:
        config: the choices.
        modules_imported: whether the user's files have been imported. Before that, a name that isn't registered may
            yet become so, where the recipe names files.
    """
    may_come = bool(config.modules) and not modules_imported
    found = [problem for choice in _choices(config) for problem in choice(may_come)]
    if not (config.advantage in ADVANTAGE_ESTIMATORS and config.loss in POLICY_LOSSES):
        return found
    estimator, loss = ADVANTAGE_ESTIMATORS.get(config.advantage), POLICY_LOSSES.get(config.loss)
    return [
        *found,
        *_loss_problems(config, estimator, loss),
        *_credit_problems(config, estimator, loss),
        *_reward_problems(config, estimator),
        *_kl_problems(config),
    ]


def needs(config: AlgorithmConfig) -> frozenset[Need]:
    """What the advantage estimator and the loss need besides rewards and the sampled log-probabilities.

    Raises:
        RegistryError: one of them isn't registered.
    """
    return ADVANTAGE_ESTIMATORS.get(config.advantage).needs | POLICY_LOSSES.get(config.loss).needs


def _choices(config: AlgorithmConfig) -> list[Callable[[bool], list[str]]]:
    """A check of each method that the recipe names and of its options."""
    named: list[tuple[Registry[Any], str, Mapping[str, Any], str, str]] = [
        (ADVANTAGE_ESTIMATORS, config.advantage, config.advantage_options, "", "algorithm.advantage_options"),
        (POLICY_LOSSES, config.loss, config.loss_options, "", "algorithm.loss_options"),
        (AGGREGATIONS, config.aggregation, config.aggregation_options, "", "algorithm.aggregation_options"),
        (KL_ESTIMATORS, config.kl.estimator, {}, "", ""),
        (CORRECTIONS, config.correction.method, config.correction.options, "", "algorithm.correction.options"),
        (REWARD_COMBINATIONS, config.combination, config.combination_options, "", "algorithm.combination_options"),
    ]
    if config.gradient_combination is not None:
        named.append(
            (
                GRADIENT_COMBINATIONS,
                config.gradient_combination,
                config.gradient_options,
                "",
                "algorithm.gradient_options",
            )
        )
    for index, shape in enumerate(config.shaping):
        key = f"algorithm.shaping.{index}"
        named.append((REWARD_SHAPES, shape.name, shape.options, f"{key}.name", f"{key}.options"))
    return [partial(_named, *each) for each in named]


def _named(
    registry: Registry[Any], name: str, options: Mapping[str, Any], place: str, options_place: str, may_come: bool
) -> list[str]:
    if name not in registry and may_come:
        return []
    try:
        registry.get(name).read_options(options, options_place)
    except RegistryError as error:
        message = str(error)
        return (message.replace(registry.setting, place, 1) if place else message).split("\n")
    return []


def _loss_problems(config: AlgorithmConfig, estimator: AdvantageEstimator, loss: PolicyLoss) -> list[str]:
    found = []
    if reason := incompatibility(estimator, loss):
        hint = " Use `counterpoint sft` for it, or a policy loss such as clip." if not loss.uses_rollouts else ""
        found.append(
            f"algorithm.loss = {loss.name} can't be combined with algorithm.advantage = {estimator.name}: {reason}."
            f"{hint}"
        )
    if loss.corrects_mismatch and config.correction.method != "none":
        found.append(
            f"algorithm.loss = {loss.name} weighs by the behaviour policy itself, so algorithm.correction.method = "
            f"{config.correction.method} would correct the mismatch twice. Set it to none."
        )
    if loss.corrects_mismatch and config.correction.veto is not None:
        found.append(
            f"algorithm.correction.veto = {config.correction.veto:g} belongs to a rollout correction, and "
            f"algorithm.loss = {loss.name} has its own. Leave it out."
        )
    return found


def _reward_problems(config: AlgorithmConfig, estimator: AdvantageEstimator) -> list[str]:
    found = []
    takes_components = Need.COMPONENTS in estimator.needs
    if takes_components and config.combination != PLAIN_COMBINATION:
        found.append(
            f"algorithm.combination = {config.combination} makes one reward of the components, but algorithm.advantage "
            f"= {estimator.name} combines them itself. Set it to {PLAIN_COMBINATION}, or choose another estimator."
        )
    if config.gradient_combination is not None:
        if takes_components or config.combination != PLAIN_COMBINATION:
            found.append(
                f"algorithm.gradient_combination = {config.gradient_combination} keeps the components apart up to "
                f"their gradients, but algorithm.combination = {config.combination} with algorithm.advantage = "
                f"{estimator.name} makes one of them before. Use {PLAIN_COMBINATION} and an estimator of one reward."
            )
        if config.kl.placement == "reward" and config.kl.coefficient > 0:
            found.append(
                f"algorithm.gradient_combination = {config.gradient_combination} has no one reward that "
                "algorithm.kl.placement = reward could lower. Set it to loss."
            )
    if takes_components and config.kl.placement == "reward" and config.kl.coefficient > 0:
        found.append(
            f"algorithm.kl.placement = reward lowers the combined reward, but algorithm.advantage = {estimator.name} "
            "looks at the components. Set it to loss."
        )
    return found


def _credit_problems(config: AlgorithmConfig, estimator: AdvantageEstimator, loss: PolicyLoss) -> list[str]:
    if config.credit == "trajectory":
        return []
    found, key = [], "algorithm.credit = turn"
    if estimator.level == "token":
        found.append(
            f"{key} can't be combined with algorithm.advantage = {estimator.name}, which gives each token a credit of "
            "its own. Set it to trajectory."
        )
    elif whole := estimator.needs & {Need.COMPONENTS, Need.GREEDY_REWARDS}:
        what = " and ".join(sorted(each.value.replace("_", " ") for each in whole))
        found.append(
            f"{key} can't be combined with algorithm.advantage = {estimator.name}, whose {what} are of whole "
            "completions. Set it to trajectory."
        )
    if loss.unit == "sequence":
        found.append(
            f"{key} gives a sequence several advantages, but algorithm.loss = {loss.name} has one ratio for all of it. "
            "Use gspo_token, or set it to trajectory."
        )
    return found


def _kl_problems(config: AlgorithmConfig) -> list[str]:
    settings = config.kl
    if settings.coefficient == 0.0:
        if settings.controller == "adaptive":
            return [
                "algorithm.kl.controller = adaptive multiplies algorithm.kl.coefficient, and 0 stays 0. Set a "
                "coefficient above 0 to start from."
            ]
        return []
    if settings.estimator not in KL_ESTIMATORS:
        return []
    entry = KL_ESTIMATORS.get(settings.estimator)
    reason = entry.wrong_in_loss if settings.placement == "loss" else entry.wrong_in_reward
    return [f"algorithm.kl.estimator = {settings.estimator} {reason}"] if reason else []
