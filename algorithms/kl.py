"""KL divergence from the reference: estimators by token, the penalty in the reward, and controllers of its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from algorithms.config import KLConfig
from algorithms.finite import require_finite
from algorithms.losses import MAX_LOG_RATIO
from algorithms.registry import KL_ESTIMATORS, Function, KLEstimator, Options

NOT_IN_THE_LOSS = (
    "does nothing in the loss: its gradient is 0 in expectation. Set algorithm.kl.estimator to k2 or k3, or "
    "algorithm.kl.placement to reward."
)
NOT_IN_THE_REWARD = (
    "in the reward doesn't follow the gradient of the KL. Set algorithm.kl.estimator to k1, or algorithm.kl.placement "
    "to loss."
)


def kl_estimator(
    name: str,
    *,
    formula: str = "",
    source: str = "",
    use_when: str = "",
    wrong_in_loss: str = "",
    wrong_in_reward: str = "",
    needs_distributions: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function as the KL estimator `name`; see :class:`KLEstimator`."""
    return KL_ESTIMATORS.adding(
        lambda function: KLEstimator(
            name,
            function,
            Options,
            formula,
            source,
            use_when,
            wrong_in_loss,
            wrong_in_reward,
            needs_distributions,
        )
    )


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) by token, by the estimator of that name.

    Args:
        log_probs: float, nats, any shape; carries the gradient. For an estimator that needs distributions, the whole
            vocabulary's in the last dimension.
        reference_log_probs: float, nats, of the same shape.
        estimator: a registered KL estimator.
    Returns:
        float, nats, of the same shape, without the last dimension where that is the vocabulary.
    Raises:
        RegistryError: no such estimator.
        ValueError: the shapes differ.
    """
    entry = KL_ESTIMATORS.get(estimator)
    if log_probs.shape != reference_log_probs.shape:
        raise ValueError(
            f"log_probs is {list(log_probs.shape)}, but reference_log_probs is {list(reference_log_probs.shape)}"
        )
    return torch.as_tensor(entry.function(log_probs, reference_log_probs))


@kl_estimator(
    "k1",
    formula="log π − log π_ref",
    source="Schulman, Approximating KL divergence, 2020",
    use_when="In the reward, where its policy gradient is that of the KL; in a loss it does nothing.",
    wrong_in_loss=NOT_IN_THE_LOSS,
)
def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log pi - log pi_reference: unbiased, may be negative (Schulman, "Approximating KL divergence", 2020).

    In a loss its gradient is 0 in expectation, because E[grad log pi] = 0; in the reward the score function makes it
    the KL's.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        reference_log_probs: [...] float, nats.
    Returns:
        [...] float, nats.
    """
    return log_probs - reference_log_probs


@kl_estimator(
    "k2",
    formula="½ (log π − log π_ref)²",
    source="Schulman, Approximating KL divergence, 2020",
    use_when="In the loss: its gradient is the KL's in expectation, though its value is biased.",
    wrong_in_reward=NOT_IN_THE_REWARD,
)
def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """(log pi - log pi_reference)^2 / 2: biased in value; its gradient is that of the KL, in expectation.

    Schulman, "Approximating KL divergence", 2020. The gradient is (log pi - log pi_reference) grad log pi, which is
    the score-function gradient of k1.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        reference_log_probs: [...] float, nats.
    Returns:
        [...] float, nats, at least 0.
    """
    return (log_probs - reference_log_probs).square() / 2


@kl_estimator(
    "k3",
    formula="e^d − 1 − d, d = log π_ref − log π",
    source="Schulman, Approximating KL divergence, 2020; GRPO, arXiv 2402.03300, eq. 4",
    use_when="What GRPO's paper has in the loss: low variance, never negative; its gradient is that of KL(π_ref‖π).",
    wrong_in_reward=NOT_IN_THE_REWARD,
)
def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log pi_reference - log pi: unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4).

    Schulman, "Approximating KL divergence", 2020. Its gradient, (1 - exp(d)) grad log pi, is that of
    KL(reference || policy) in expectation and not of what it estimates; `k3_unbiased` mends that.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        reference_log_probs: [...] float, nats.
    Returns:
        [...] float, nats, at least 0. d is cut at ±20 nats, beyond which there is no gradient.
    """
    bounded = (reference_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # exp(d) - 1 would round to multiples of 1e-7, which is more than the KL of two engines that agree.
    return bounded.expm1() - bounded


@kl_estimator(
    "k3_unbiased",
    formula="value e^d − 1 − d, gradient −d ∇log π, d = log π_ref − log π",
    source="DeepSeek-V3.2, arXiv 2512.02556, section 3.1, eq. 7, at a ratio of 1",
    use_when="In the loss: k3's low variance as a figure, and the gradient of the KL itself.",
    wrong_in_reward=NOT_IN_THE_REWARD,
)
def k3_unbiased(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The value of k3 with the gradient of the KL: that of k2, put in its place (a straight-through estimator).

    DeepSeek-V3.2 (arXiv 2512.02556, eq. 7) multiplies k3 by the ratio r = pi / pi_behaviour and differentiates
    both: grad(r k3) = r (k3 + 1 - exp(d)) grad log pi = -r d grad log pi, exact in expectation over the behaviour
    policy. This is that gradient at r = 1, token by token, so the two agree on policy; off policy, multiply by the
    detached ratio. Unlike k3's, the gradient grows only linearly where the policy leaves the reference far behind.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        reference_log_probs: [...] float, nats.
    Returns:
        [...] float, nats, at least 0.
    """
    squared = k2(log_probs, reference_log_probs)
    return k3(log_probs, reference_log_probs).detach() + (squared - squared.detach())


@kl_estimator(
    "abs",
    formula="|log π − log π_ref|",
    source="the absolute log-ratio; in use without a paper",
    use_when="In the loss, for a pull of constant strength: its gradient is that of the L1 distance of π and π_ref.",
    wrong_in_reward=NOT_IN_THE_REWARD,
)
def absolute(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """|log pi - log pi_reference|: above the KL in expectation.

    Its gradient, sign(log pi - log pi_reference) grad log pi, is in expectation that of sum |pi - pi_reference|, twice
    the total variation; 0 where both agree.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        reference_log_probs: [...] float, nats.
    Returns:
        [...] float, nats, at least 0.
    """
    return (log_probs - reference_log_probs).abs()


@kl_estimator(
    "full",
    formula="Σᵥ πᵥ (log πᵥ − log π_ref,ᵥ)",
    source="the divergence itself; Kullback and Leibler, 1951",
    use_when="In the loss: exact at every token, value and gradient, for a second pass over the vocabulary.",
    wrong_in_reward=NOT_IN_THE_REWARD,
    needs_distributions=True,
)
def full(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """sum over the vocabulary of pi (log pi - log pi_reference): the KL of the next token, with no sampling error.

    In the reward it would be wrong: it doesn't depend on the token sampled, so its own gradient would be lost.

    Args:
        log_probs: [..., V] float, nats, whole distributions; carries the gradient.
        reference_log_probs: [..., V] float, nats.
    Returns:
        [...] float, nats. Tokens that the policy can't sample (-inf) add nothing; infinite where the reference can't
        sample what the policy can.
    """
    is_banned = log_probs == -torch.inf
    gap = (log_probs - reference_log_probs).masked_fill(is_banned, 0.0)
    return (log_probs.exp() * gap).sum(-1)


def needs_distributions(config: KLConfig) -> bool:
    """Whether the loss holds a KL over whole distributions, for which each token's log-probability isn't enough.

    Raises:
        RegistryError: no estimator of that name is registered.
    """
    is_in_loss = config.coefficient > 0 and config.placement == "loss"
    return is_in_loss and KL_ESTIMATORS.get(config.estimator).needs_distributions


def kl_token_rewards(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    coefficient: float,
    estimator: str = "k1",
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """-coefficient x KL of each token, to be added to the token rewards.

    With k1, a sequence's sum is log pi_reference(completion) - log pi(completion), whose policy gradient is that of
    the KL (Ziegler et al., arXiv 1909.08593, eq. 2).

    Args:
        log_probs: [tokens] float, nats, of the policy that sampled.
        reference_log_probs: [tokens] float, nats.
        coefficient: weight of the KL.
        estimator: a registered KL estimator.
        mask: [tokens] bool, the tokens the policy chose; None for all.
    Returns:
        [tokens] float64, 0 outside the mask.
    Raises:
        RegistryError: no such estimator.
        NonFiniteError: a log-probability inside the mask is NaN or infinite; names the tensor and the token.
        ValueError: the estimator can't be placed in the reward; says why.
    """
    entry = KL_ESTIMATORS.get(estimator)
    if entry.wrong_in_reward:
        raise ValueError(f"algorithm.kl.estimator = {estimator} {entry.wrong_in_reward}")
    require_finite("the sampled log-probability", log_probs, mask, index_name="token")
    require_finite("the reference log-probability", reference_log_probs, mask, index_name="token")
    kl = kl_estimate(log_probs.double(), reference_log_probs.double(), estimator)
    return -coefficient * (kl if mask is None else kl.masked_fill(~mask, 0.0))


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
        """The same controller, whatever the KL."""
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
