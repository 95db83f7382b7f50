"""What follows from a configuration and the registered methods together: whether the run has a critic."""

from __future__ import annotations

from orchestrator.config.schema import Config


def has_critic(config: Config) -> bool:
    """Whether the advantage estimator or the loss needs values; False for a method that isn't registered yet.

    A method of the user's own is registered once its file has been imported, which preflight does.
    """
    from algorithms import choices  # it loads torch, which the schema does without
    from algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, Need

    algorithm = config.algorithm
    is_known = algorithm.advantage in ADVANTAGE_ESTIMATORS and algorithm.loss in POLICY_LOSSES
    return is_known and Need.VALUES in choices.needs(algorithm)
