"""KL divergence from a reference: estimators by token, the penalty in the reward, and controllers of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from algorithms.config import KLConfig
from algorithms.finite import require_finite
from algorithms.losses import MAX_LOG_RATIO

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """KL(policy || reference) by token from samples of the policy (Schulman, "Approximating KL divergence", 2020).

    With d = log pi_reference - log pi:
    k1 = -d: unbiased, may be negative. In a loss its gradient is 0 in expectation: it belongs in the reward.
    k2 = d^2 / 2: biased in value; its gradient is that of the KL, in expectation.
    k3 = exp(d) - 1 - d: unbiased and never negative; its gradient is that of KL(reference || policy), in expectation.

    Args:
        log_probs: float, nats, any shape; carries the gradient.
        reference_log_probs: float, nats, of the same shape.
    Returns:
        float, nats, of the same shape. In k3, d is cut at ±20 nats.
    """
    difference = reference_log_probs - log_probs
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return difference.square() / 2
        case "k3":
            bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            # exp(d) - 1 would round to multiples of 1e-7, which is more than the KL of two engines that agree.
            return bounded.expm1() - bounded


def kl_penalised_rewards(
    rewards: Tensor, log_probs: Tensor, reference_log_probs: Tensor, sample: Tensor, coefficient: float
) -> tuple[Tensor, Tensor]:
    """Rewards less coefficient times the sample's KL, to be called before advantages are taken over groups.

    The KL of a sample is the sum of k1 over its tokens, log pi(completion) - log pi_reference(completion): unbiased,
    and the policy gradient of it is that of the KL (Ziegler et al., arXiv 1909.08593, eq. 2).

    Args:
        rewards: [samples] float.
        log_probs: [tokens] float, nats, of the policy that sampled, the trained tokens of all samples end to end.
        reference_log_probs: [tokens] float, nats.
        sample: [tokens] int64, index into `rewards` of the sample each token belongs to.
    Returns:
        [samples] float, the rewards less the penalty; [samples] float, nats, the KL of each sample.
    Raises:
        NonFiniteError: a log-probability is NaN or infinite; names the tensor and the token.
    """
    require_finite("the sampled log-probability", log_probs, index_name="token")
    require_finite("the reference log-probability", reference_log_probs, index_name="token")
    by_token = kl_estimate(log_probs, reference_log_probs, "k1").to(rewards.dtype)
    by_sample = torch.zeros_like(rewards).index_add_(0, sample, by_token)
    return rewards - coefficient * by_sample, by_sample


class KLController(Protocol):
    """Chooses the KL's weight from update to update. Immutable: :meth:`update` returns the next one."""

    @property
    def coefficient(self) -> float:
        """Weight of the KL in the next update."""

    def update(self, observed_kl: float) -> KLController:
        """The controller after an update in which `observed_kl` nats a token were seen."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""


@dataclass(frozen=True)
class FixedKL:
    """The weight never changes."""

    coefficient: float

    def update(self, observed_kl: float) -> FixedKL:
        """Itself, whatever was seen."""
        return self

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}


@dataclass(frozen=True)
class AdaptiveKL:
    """Steers the weight so that the KL stays near a target (Ziegler et al., arXiv 1909.08593, section 2.2).

    coefficient *= 1 + clip(observed / target - 1, -0.2, 0.2) / horizon. The paper has a gain of 0.1 for each batch;
    here it is 1 / horizon for each update.

    Attributes:
        coefficient: weight of the KL in the next update.
        target_nats: KL a token to steer to.
        horizon: updates over which the weight can change by about a fifth.
    """

    coefficient: float
    target_nats: float
    horizon: int

    def update(self, observed_kl: float) -> AdaptiveKL:
        """The controller after an update in which `observed_kl` nats a token were seen.

        Raises:
            NonFiniteError: `observed_kl` is NaN or infinite.
        """
        require_finite("the observed KL", torch.tensor([observed_kl]), index_name="update")
        error = min(max(observed_kl / self.target_nats - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error / self.horizon))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; target and horizon come from the settings."""
        return {"coefficient": self.coefficient}


def make_kl_controller(config: KLConfig, state: Mapping[str, float] | None = None) -> FixedKL | AdaptiveKL:
    """The controller a recipe asks for, at its start, or where a checkpoint's `state` left it.

    A fixed weight is the recipe's even when a checkpoint is loaded, so that a run can be resumed with another.
    """
    if config.controller == "fixed":
        return FixedKL(config.coefficient)
    coefficient = config.coefficient if state is None else state["coefficient"]
    return AdaptiveKL(coefficient, config.target_nats, config.horizon)
