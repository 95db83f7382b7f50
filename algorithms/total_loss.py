"""The policy's loss over a micro-batch, put together from the choices of a recipe: policy loss, KL and entropy.

Everything it returns is a part of the whole batch's figure: parts add up over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.aggregation import Denominators, token_weights
from algorithms.config import AlgorithmConfig, CorrectionConfig
from algorithms.correction import correction_sums, finish_correction, importance_correction
from algorithms.finite import require_finite
from algorithms.inputs import LossInputs, TokenLoss
from algorithms.kl import kl_estimate
from algorithms.losses import ratio_of
from algorithms.objective_metrics import ObjectiveMetrics
from algorithms.registry import KL_ESTIMATORS, POLICY_LOSSES, PolicyLoss

UNCORRECTED = CorrectionConfig(method="none")
"""For losses that weigh by the behaviour policy themselves, and for those that learn from no rollouts."""


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch, aligned with the log-probabilities of its tokens. Entries outside `mask` may be anything.

    Attributes:
        mask: [B, T] bool, the trained tokens.
        advantages: [B, T] float; None for a loss that doesn't learn from rollouts.
        behaviour_log_probs: [B, T] float, nats, of the distribution sampled from; None as for `advantages`.
        proximal_log_probs: [B, T] float, nats, the trainer's own at the start of the update; None takes the detached
            current ones.
        reference_log_probs: [B, T] float, nats; None where no reference model takes part.
        marks: [B, T] float, what the loss's `prepare` made of the whole optimiser batch; None where it has none.
    """

    mask: Tensor
    advantages: Tensor | None = None
    behaviour_log_probs: Tensor | None = None
    proximal_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    marks: Tensor | None = None


def total_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    batch: TokenBatch,
    config: AlgorithmConfig,
    denominators: Denominators,
    kl_coefficient: float,
    full_kl: Tensor | None = None,
) -> tuple[Tensor, ObjectiveMetrics]:
    """Importance weight x policy loss + KL - entropy bonus, summed by the aggregation's weights.

    The loss is already divided by the whole batch's denominators: add it up over micro-batches and ranks (a trainer
    whose ranks average gradients multiplies by their number). Tokens outside the mask contribute exactly 0 to the loss
    and its gradient, even if they hold NaN. The correction and the mismatch metrics compare proximal with behaviour
    log-probabilities; a loss that weighs by the behaviour policy itself isn't corrected, whatever the recipe says. The
    KL term isn't weighted by the correction.

    Args:
        log_probs: [B, T] float, nats, of the policy being trained; carries the gradient.
        entropy: [B, T] float, nats, of its distribution at each token; None where it wasn't computed.
        batch: what else is known of each token.
        denominators: sizes of the whole optimiser batch.
        kl_coefficient: weight of the KL, from the controller; used where the recipe places the KL in the loss.
        full_kl: [B, T] float, nats, the exact KL to the reference at each token, carrying its gradient; for estimators
            that need whole distributions, in place of the reference's log-probabilities.
    Returns:
        The loss, a scalar of float32 (float64 if `log_probs` is), and the metrics.
    Raises:
        RegistryError: a method the recipe names isn't registered, or has no such switch.
        NonFiniteError: an input, or the loss made of them, is NaN or infinite inside the mask; names the tensor and
            the token.
        ValueError: shapes differ, or a term is asked for whose input is missing.
    """
    mask = batch.mask
    current = _inside("log_probs", log_probs, mask)
    entry = POLICY_LOSSES.get(config.loss)
    inputs = _loss_inputs(current, batch, entry)
    token_loss = entry.function(inputs, entry.read_options(config.loss_options, "algorithm.loss_options"))
    needs_correction = entry.uses_rollouts and not entry.corrects_mismatch
    correction = importance_correction(
        inputs.proximal_log_probs,
        inputs.behaviour_log_probs,
        mask,
        config.correction if needs_correction else UNCORRECTED,
    )
    weights = token_weights(mask, config, denominators, current)

    values = _inside(f"the loss {entry.name!r}", token_loss.values, mask)
    policy_loss = (correction.weights * values * weights).sum()
    kl, kl_loss = _kl_term(current, batch, config, weights, kl_coefficient, full_kl)
    entropy_inside, entropy_loss = _entropy_term(entropy, mask, current, config, weights)
    loss = policy_loss + kl_loss - entropy_loss

    sums = {"loss": loss, "policy_loss": policy_loss}
    sums |= _token_means(inputs, token_loss, denominators) | correction_sums(correction, mask, denominators)
    if kl is not None:
        sums |= {"kl_loss": kl_loss, "kl_reference": kl.sum() / denominators.tokens}
    if entropy_inside is not None:
        sums["entropy"] = entropy_inside.sum() / denominators.tokens
    maxima = {
        "max_ratio": (ratio_of(current, inputs.proximal_log_probs) * mask).amax(),
        "max_logprob_gap": correction.gap.amax(),
    }
    return loss, ObjectiveMetrics(
        {name: value.detach() for name, value in sums.items()},
        {name: value.detach() for name, value in maxima.items()},
    )


def finish_metrics(sums: Mapping[str, float], maxima: Mapping[str, float]) -> dict[str, float]:
    """The batch's metrics from the added-up sums and the combined maxima.

    Turns mean squares of the importance weights, which add up, into effective sample sizes, which don't; see
    :func:`algorithms.correction.finish_correction`.
    """
    return finish_correction({**sums, **maxima})


def _loss_inputs(current: Tensor, batch: TokenBatch, entry: PolicyLoss) -> LossInputs:
    """The loss's inputs, checked, with 0 outside the mask."""
    mask = batch.mask
    proximal = current.detach()
    if batch.proximal_log_probs is not None:
        proximal = _inside("proximal_log_probs", batch.proximal_log_probs, mask, current)
    if not entry.uses_rollouts:
        # Nothing was sampled: proximal stands in for behaviour, so that every importance weight is 1.
        return LossInputs(current, proximal, proximal, torch.zeros_like(proximal), mask)
    if batch.behaviour_log_probs is None or batch.advantages is None:
        raise ValueError(
            f"the loss {entry.name!r} learns from rollouts, but the batch has no advantages or behaviour_log_probs"
        )
    behaviour = _inside("behaviour_log_probs", batch.behaviour_log_probs, mask, current)
    advantages = _inside("advantages", batch.advantages, mask, current)
    if entry.prepare is not None and batch.marks is None:
        raise ValueError(
            f"the loss {entry.name!r} needs marks, which its prepare makes of the whole optimiser batch, but the batch "
            "has none"
        )
    marks = None if batch.marks is None else _inside("marks", batch.marks, mask, current)
    return LossInputs(current, proximal, behaviour, advantages, mask, marks)


def _inside(name: str, values: Tensor, mask: Tensor, like: Tensor | None = None) -> Tensor:
    """`values` in full precision with 0 outside the mask; without gradient and in the dtype of `like`, if given."""
    if values.shape != mask.shape:
        raise ValueError(f"{name} is {list(values.shape)}, but the mask is {list(mask.shape)}")
    require_finite(name, values.detach(), mask, index_name="(sequence, token)")
    dtype = torch.promote_types(values.dtype, torch.float32) if like is None else like.dtype
    values = values if like is None else values.detach()
    # where, not a product: NaN times 0 is NaN, in the value and in the gradient.
    return torch.where(mask, values, torch.zeros_like(values)).to(dtype)


def _kl_term(
    current: Tensor,
    batch: TokenBatch,
    config: AlgorithmConfig,
    weights: Tensor,
    coefficient: float,
    full_kl: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """KL to the reference by token (None without one), and its part of the loss."""
    in_loss = config.kl.placement == "loss" and coefficient > 0
    is_exact = KL_ESTIMATORS.get(config.kl.estimator).needs_distributions
    if (full_kl if is_exact else batch.reference_log_probs) is None and in_loss:
        missing = "no full_kl was given" if is_exact else "the batch has no reference_log_probs"
        raise ValueError(f"the KL has weight {coefficient} in the loss by {config.kl.estimator}, but {missing}")
    if is_exact and full_kl is not None:
        kl = _inside("full_kl", full_kl, batch.mask)
    elif not is_exact and batch.reference_log_probs is not None:
        reference = _inside("reference_log_probs", batch.reference_log_probs, batch.mask, current)
        kl = kl_estimate(current, reference, config.kl.estimator)
        # An estimator of the user's own may not be 0 where both are, as they are on padding.
        kl = _inside(f"the KL {config.kl.estimator!r}", kl, batch.mask)
    else:
        return None, current.new_zeros(())
    return kl, coefficient * (kl * weights).sum() if in_loss else current.new_zeros(())


def _entropy_term(
    entropy: Tensor | None, mask: Tensor, current: Tensor, config: AlgorithmConfig, weights: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Entropy by token (None where it wasn't computed), and the bonus."""
    if entropy is None:
        if config.entropy_coefficient > 0:
            raise ValueError(f"algorithm.entropy_coefficient is {config.entropy_coefficient}, but no entropy was given")
        return None, current.new_zeros(())
    inside = _inside("entropy", entropy, mask)
    if config.entropy_coefficient == 0:
        return inside, current.new_zeros(())
    return inside, config.entropy_coefficient * (inside * weights).sum()


def _token_means(inputs: LossInputs, token_loss: TokenLoss, denominators: Denominators) -> dict[str, Tensor]:
    """Parts of means over all trained tokens of the batch."""

    def mean(values: Tensor) -> Tensor:
        return torch.where(inputs.mask, values.detach().to(inputs.log_probs.dtype), 0.0).sum() / denominators.tokens

    never = torch.zeros_like(inputs.mask)
    return {
        "clip_low_share": mean(never if token_loss.is_clipped_low is None else token_loss.is_clipped_low),
        "clip_high_share": mean(never if token_loss.is_clipped_high is None else token_loss.is_clipped_high),
        "ratio_mean": mean(ratio_of(inputs.log_probs, inputs.proximal_log_probs)),
        "advantage_mean": mean(inputs.advantages),
        "advantage_abs": mean(inputs.advantages.abs()),
    }
