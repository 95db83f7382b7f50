"""FAMO: weights of several losses from how fast each falls, without the gradient of any single loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.registry import Options

LOSS_FLOOR = 1e-8
"""The least distance from its lower bound that FAMO credits a loss with, so that its logarithm is finite."""


@dataclass(frozen=True)
class FAMOState:
    """FAMO's state from step to step, which checkpoints hold.

    Attributes:
        logits: ξ of each objective; all zero, equal shares, before the first step.
    """

    logits: tuple[float, ...]

    @classmethod
    def initial(cls, objectives: int) -> FAMOState:
        """Equal shares of all objectives."""
        return cls((0.0,) * objectives)


class FAMOOptions(Options):
    """Options of FAMO."""

    rate: float = Field(0.025, gt=0, description="Step size β of the logits.")
    decay: float = Field(0.001, ge=0, description="Pull γ of the logits towards equal shares.")
    lower_bound: float = Field(
        0.0, description="What no loss can be below; FAMO works on the losses' distance from it."
    )


def famo_weights(losses: Tensor, state: FAMOState, options: FAMOOptions) -> Tensor:
    """Shares z = softmax(ξ) of the decrease of log-losses, as weights of the losses: w_k = (z_k / ℓ_k) / Σ_i z_i / ℓ_i
    (FAMO, arXiv 2306.03792, Algorithm 1). One backward pass through Σ w_k ℓ_k gives the combination.

    Args:
        losses: [K] float, each at least `options.lower_bound`. Of a policy, something that falls to the bound as it
            gets better: the best possible reward less the mean one, not the surrogate whose gradient is taken.
        state: the logits.
        options: of the method.
    Returns:
        [K] float64, positive, summing to 1.
    Raises:
        ValueError: a loss is below its bound, or the state is of another number of objectives.
        NonFiniteError: a loss is NaN or infinite; names the objective.
    """
    distance = _above_bound(losses, state, options)
    shares = torch.tensor(state.logits, dtype=torch.float64).softmax(0) / distance
    return shares / shares.sum()


def famo_update(state: FAMOState, losses_before: Tensor, losses_after: Tensor, options: FAMOOptions) -> FAMOState:
    """The logits after a step: ξ ← ξ − β (δ + γ ξ), δ = Jᵀ(log ℓ_t − log ℓ_{t+1}), J the Jacobian of the softmax at ξ
    (FAMO, arXiv 2306.03792, Algorithm 1). An objective whose log-loss fell less than the share-weighted mean gains.

    This is the paper's plain step; the authors' code passes δ through Adam, which keeps its sign and not its size.

    Args:
        state: the logits before.
        losses_before, losses_after: [K] float, on the same samples before and after the parameters moved. Batch means
            of one step and the next stand in where a second evaluation costs too much, with the batches' noise.
        options: of the method.
    Returns:
        The new state.
    Raises:
        ValueError: a loss is below its bound, or the sizes differ.
        NonFiniteError: a loss is NaN or infinite; names the objective.
    """
    fall = _above_bound(losses_before, state, options).log() - _above_bound(losses_after, state, options).log()
    logits = torch.tensor(state.logits, dtype=torch.float64)
    shares = logits.softmax(0)
    change = shares * (fall - shares @ fall)
    return FAMOState(tuple((logits - options.rate * (change + options.decay * logits)).tolist()))


def _above_bound(losses: Tensor, state: FAMOState, options: FAMOOptions) -> Tensor:
    if losses.shape != (len(state.logits),):
        raise ValueError(f"losses must be [{len(state.logits)}], as FAMO's state is, got {list(losses.shape)}")
    require_finite("the loss", losses, index_name="objective")
    distance = losses.detach().to("cpu", torch.float64) - options.lower_bound
    if bool((distance < 0).any()):
        lowest = int(distance.argmin())
        raise ValueError(
            f"the loss of objective {lowest} is {float(losses[lowest]):g}, below algorithm.gradient_options.lower_bound"
            f" = {options.lower_bound:g}. FAMO takes its logarithm above that bound: lower the bound."
        )
    return distance.clamp_min(LOSS_FLOOR)
