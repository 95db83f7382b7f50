"""Methods that weigh the gradients of several objectives: the w_k of the sum Σ_k w_k g_k over K losses.

Every method here but FAMO sees the gradients only through their Gram matrix G_ij = <g_i, g_j>, a sum over parameters:
under ZeRO each rank adds up its own shard, the K × K sums are all-reduced, and every rank computes the same weights.
FAMO takes losses instead. The trainer computes and holds the gradients (actors/trainer/gradient_combiner.py).

Gradients are of losses, so training steps along minus the combination. A gradient that is exactly zero (a reward all of
whose groups were equal) has no say: the methods leave it out, where the papers divide by its norm or stop at it. The
Gram matrix squares lengths: gradients whose hull comes within 1e-6 of their length of zero can't be told from opposed
ones, even in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.gradients.famo import FAMOOptions, FAMOState, famo_update, famo_weights
from algorithms.gradients.shards import combine, gram_matrix, require_finite_gram
from algorithms.gradients.solvers import bargaining_point, equal_projections, fairest_step, nearest_point
from algorithms.registry import GRADIENT_COMBINATIONS, Options, method

__all__ = [
    "CAGradOptions",
    "FAMOOptions",
    "FAMOState",
    "GradientInputs",
    "MGDAOptions",
    "PCGradOptions",
    "cagrad",
    "combine",
    "famo",
    "famo_update",
    "gradient_weights",
    "gram_matrix",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "project_conflicts",
]


@dataclass(frozen=True)
class GradientInputs:
    """Inputs of a gradient combination at one step; the same on every rank.

    Attributes:
        gram: [K, K] float, G_ij = <g_i, g_j> over all parameters, symmetric.
        step: the number of the step, from which seeded orders are drawn.
        losses: [K] float, the losses themselves, each above its lower bound; for FAMO.
        famo: FAMO's state; None before the first step.
    Raises:
        ValueError: `gram` isn't square or symmetric or has a negative diagonal, or `losses` isn't [K].
        NonFiniteError: an entry is NaN or infinite; names the objective.
    """

    gram: Tensor
    step: int = 0
    losses: Tensor | None = None
    famo: FAMOState | None = None

    def __post_init__(self) -> None:
        gram = self.gram
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
            raise ValueError(f"gram must be [objectives, objectives], at least 1, got {list(gram.shape)}")
        require_finite_gram(gram)
        gram = gram.detach().to("cpu", torch.float64)
        norms = gram.diagonal().clamp_min(0).sqrt()
        if bool((gram.diagonal() < 0).any()):
            raise ValueError(f"gram must have squared norms on its diagonal, got {float(gram.diagonal().min())}")
        if bool(((gram - gram.T).abs() > 1e-6 * torch.outer(norms, norms)).any()):
            raise ValueError("gram must be symmetric: gram[i, j] and gram[j, i] differ by more than rounding")
        object.__setattr__(self, "gram", (gram + gram.T) / 2)
        if self.losses is not None and self.losses.shape != gram.shape[:1]:
            raise ValueError(f"losses must be [{len(gram)}], one an objective, got {list(self.losses.shape)}")


def gradient_weights(name: str, inputs: GradientInputs, options: Mapping[str, Any] | None = None) -> Tensor:
    """Weights by the gradient combination called `name`.

    Args:
        name: a registered gradient combination.
        inputs: what it sees of the step.
        options: of the method, by name.
    Returns:
        [K] float64 on the CPU, finite.
    Raises:
        RegistryError: no such combination, or no such option.
        NonFiniteError: a loss or a weight is NaN or infinite; names the objective.
    """
    combination = GRADIENT_COMBINATIONS.get(name)
    weights = combination.function(inputs, combination.read_options(options or {}, "algorithm.gradient_options"))
    require_finite(f"the weight by {name!r}", weights, index_name="objective")
    return weights


class MGDAOptions(Options):
    """Options of MGDA."""

    normalise: bool = Field(
        False,
        description="Find the point among the gradients scaled to length 1, so that the smallest doesn't dominate.",
    )
    zero_gradient: Literal["ignore", "stop"] = Field(
        "ignore",
        description="What a gradient of exactly zero does: nothing, or hold the step at zero as the definition has it.",
    )


@method(
    GRADIENT_COMBINATIONS,
    "mgda",
    options=MGDAOptions,
    formula="w = argmin |Σ w_k g_k|² over the simplex",
    source="Désidéri, Multiple-gradient descent algorithm, 2012; Sener and Koltun, arXiv 1810.04650, section 3",
    use_when="Every objective must improve on every step, and the pace may be that of the smallest gradient.",
)
def mgda(inputs: GradientInputs, options: MGDAOptions) -> Tensor:
    """The shortest convex combination d of the gradients: <g_k, d> ≥ |d|² for all k, and d = 0 where no step improves
    all (MGDA; Désidéri, 2012; arXiv 1810.04650, section 3).

    Solved by an active-set method to rounding, where that paper's Algorithm 2 stops Frank-Wolfe early. Its code, given
    normalised gradients, applies the weights to the raw ones, which points elsewhere; here the combination keeps the
    direction of the one that was found, and its weights still sum to 1.

    Args:
        inputs: `gram`.
        options: of the method.
    Returns:
        [K] float64, not negative, summing to 1; all zero where every gradient is.
    """
    alive, norms, cosines = _directions(inputs.gram)
    if options.zero_gradient == "stop" and len(alive) < len(inputs.gram):
        is_zero = torch.ones(len(inputs.gram), dtype=torch.float64).index_fill_(0, alive, 0.0)
        return is_zero / is_zero.sum()
    if len(alive) == 0:
        return torch.zeros(len(inputs.gram), dtype=torch.float64)
    inverse_norms = norms.min() / norms
    constraint = torch.ones_like(norms) if options.normalise else inverse_norms
    weights = nearest_point(cosines, constraint) * inverse_norms
    return _spread(weights / weights.sum(), alive, len(inputs.gram))


class PCGradOptions(Options):
    """Options of PCGrad."""

    seed: int = Field(0, ge=0, lt=2**31, description="Of the orders in which conflicts are projected away.")
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="Whether the projected gradients are added up, as in the paper, or averaged."
    )


@method(
    GRADIENT_COMBINATIONS,
    "pcgrad",
    options=PCGradOptions,
    formula="Σ_i g̃_i; for j ≠ i in random order: g̃_i ← g̃_i − min(0, <g̃_i, g_j>) / |g_j|² · g_j",
    source="Yu et al., Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, Algorithm 1",
    use_when="Objectives conflict on some steps only, and the plain sum is right on the others.",
)
def pcgrad(inputs: GradientInputs, options: PCGradOptions) -> Tensor:
    """Each gradient loses its component against every other that it conflicts with, one after another in random order,
    then all are added (PCGrad, arXiv 2001.06782, Algorithm 1).

    The projected gradients are kept as coefficients over the g_k, so that the Gram matrix suffices. The orders follow
    from `options.seed` and `inputs.step` alone: every rank and every resumed run draws the same.

    Args:
        inputs: `gram` and `step`.
        options: of the method.
    Returns:
        [K] float64, at least 1 each (1 / K for "mean"); 1 for a single objective.
    """
    gram = inputs.gram
    generator = torch.Generator().manual_seed((options.seed << 32) + inputs.step)
    orders = torch.stack([torch.randperm(len(gram), generator=generator) for _ in range(len(gram))])
    coefficients = project_conflicts(gram, orders)
    return coefficients.sum(0) if options.reduction == "sum" else coefficients.mean(0)


def project_conflicts(gram: Tensor, orders: Tensor) -> Tensor:
    """PCGrad's projected gradients for given orders.

    Args:
        gram: [K, K] float64.
        orders: [K, K] int64; row i is the order in which the others are taken for gradient i (i itself is passed over).
    Returns:
        [K, K] float64; row i holds the coefficients of the i-th projected gradient over the g_k.
    """
    count = len(gram)
    rows = torch.arange(count)
    coefficients = torch.eye(count, dtype=gram.dtype)
    squared_norms = gram.diagonal()
    for others in orders.T:
        products = (coefficients * gram[others]).sum(1)
        is_conflict = (products < 0) & (others != rows) & (squared_norms[others] > 0)
        removed = torch.where(is_conflict, products / squared_norms[others].clamp_min(1e-300), 0.0)
        coefficients[rows, others] -= removed
    return coefficients


class CAGradOptions(Options):
    """Options of CAGrad."""

    c: float = Field(
        0.4, ge=0, lt=1, description="How far the step may be from the mean gradient, as a share of its length."
    )
    rescale: bool = Field(False, description="Divide by 1 + c², as the authors' code does.")


@method(
    GRADIENT_COMBINATIONS,
    "cagrad",
    options=CAGradOptions,
    formula="d = argmax min_k <g_k, d> with |d − g₀| ≤ c |g₀|, g₀ = Σ g_k / K",
    source="Liu et al., Conflict-Averse Gradient Descent, arXiv 2110.14048, Algorithm 1",
    use_when="The mean of the objectives is the aim, but the one that gains least should gain more on the way.",
)
def cagrad(inputs: GradientInputs, options: CAGradOptions) -> Tensor:
    """The step within c |g₀| of the mean gradient g₀ whose worst objective improves most (CAGrad, arXiv 2110.14048,
    Algorithm 1): d = g₀ + c |g₀| g_w / |g_w| with w = argmin <g_w, g₀> + c |g₀| |g_w| over the simplex.

    The dual is solved to a certified gap of about 1e-10, where the authors' code runs a general optimiser. Where g_w
    vanishes the paper's formula is 0 / 0, and the limit of a softened length is taken: a best step all the same. A
    zero gradient counts in g₀ and not in the worst.

    Args:
        inputs: `gram`.
        options: of the method.
    Returns:
        [K] float64, positive; 1 / K each for c = 0 and where the mean gradient is zero; 1 + c for a single objective.
    """
    gram, count = inputs.gram, len(inputs.gram)
    mean = torch.full((count,), 1.0 / count, dtype=torch.float64)
    alive, norms, cosines = _directions(gram)
    length = (mean @ gram @ mean).clamp_min(0).sqrt()
    # Below this the mean gradient is what rounding left of gradients that cancel.
    if options.c == 0 or len(alive) == 0 or length <= 1e-8 * norms.max() / count:
        return mean
    toward = ((gram @ mean)[alive] / (norms * length)).clamp(-1, 1)
    u, softened = fairest_step(cosines, norms.min() / norms, toward, options.c)
    weights = mean + _spread(options.c * length * u / (norms * softened), alive, count)
    return weights / (1 + options.c**2) if options.rescale else weights


@method(
    GRADIENT_COMBINATIONS,
    "nash_mtl",
    formula="w > 0 with G w = 1 / w",
    source="Navon et al., Multi-Task Learning as a Bargaining Game, arXiv 2202.01017, Algorithm 1",
    use_when="Objectives differ in scale and each should gain in proportion; the step's length is then always √K.",
)
def nash_mtl(inputs: GradientInputs, options: Options) -> Tensor:
    """The bargaining solution: the direction d that maximises Σ log <g_k, d>, where G w = 1 / w entry by entry
    (Nash-MTL, arXiv 2202.01017, Algorithm 1).

    Solved by Newton's method on ½ wᵀGw − Σ log w_k, whose minimum it is, where the authors' code iterates convex
    programs and may stop short. |d|² = wᵀGw = K: the step's length says nothing about the gradients'. Scaling a
    gradient changes its weight and not d.

    Args:
        inputs: `gram`.
        options: none.
    Returns:
        [K] float64, positive; 0 for a zero gradient; all zero (stay) where the others are Pareto-stationary: 0 in the
        convex hull of the unit gradients, where there is no solution.
    """
    alive, norms, cosines = _directions(inputs.gram)
    if len(alive) == 0:
        return torch.zeros(len(inputs.gram), dtype=torch.float64)
    return _spread(bargaining_point(cosines) / norms, alive, len(inputs.gram))


@method(
    GRADIENT_COMBINATIONS,
    "imtl_g",
    formula="Σ w_k = 1 with <d, g_k> / |g_k| equal for all k",
    source="Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, gradient balance (IMTL-G)",
    use_when="All objectives should gain alike for the length of their gradients, whatever their scale.",
)
def imtl_g(inputs: GradientInputs, options: Options) -> Tensor:
    """The combination whose projections onto all unit gradients are equal (IMTL-G; Liu et al., Towards Impartial
    Multi-task Learning, ICLR 2021): with C u = 1 over the cosines C, w_k = u_k / |g_k|, scaled to Σ w_k = 1.

    Weights can be negative for three objectives and more. Where their sum is, the paper's Σ w_k = 1 would turn the
    direction round, to worsen every objective; here their sum is then -1 and the direction improves all. Its formula
    also divides by that sum when it vanishes: here by no less than 1e-6 of Σ |w_k|.

    Args:
        inputs: `gram`.
        options: none.
    Returns:
        [K] float64; 0 for a zero gradient; all zero (stay) where the only combination with equal projections is zero,
        as for opposed gradients.
    """
    alive, norms, cosines = _directions(inputs.gram)
    if len(alive) == 0:
        return torch.zeros(len(inputs.gram), dtype=torch.float64)
    weights = equal_projections(cosines) * (norms.min() / norms)
    scale = torch.maximum(weights.sum().abs(), 1e-6 * weights.abs().sum())
    return _spread(weights / scale if scale > 0 else weights, alive, len(inputs.gram))


@method(
    GRADIENT_COMBINATIONS,
    "famo",
    options=FAMOOptions,
    formula="w_k ∝ z_k / ℓ_k, z = softmax(ξ); ξ ← ξ − β (Jᵀ(log ℓ_t − log ℓ_{t+1}) + γ ξ)",
    source="Liu et al., FAMO: Fast Adaptive Multitask Optimization, arXiv 2306.03792, Algorithm 1",
    use_when="Losses have known lower bounds and one backward pass for all objectives must do.",
)
def famo(inputs: GradientInputs, options: FAMOOptions) -> Tensor:
    """FAMO's weights before a step, see :func:`famo_weights`; :func:`famo_update` is for after it.

    Args:
        inputs: `losses`, and `famo`, the state.
        options: of the method.
    Returns:
        [K] float64, positive, summing to 1. The Gram matrix plays no part.
    Raises:
        ValueError: there are no losses, or one is below its bound.
    """
    if inputs.losses is None:
        raise ValueError("gradient combination 'famo' weighs by the losses themselves: pass inputs.losses [K]")
    return famo_weights(inputs.losses, inputs.famo or FAMOState.initial(len(inputs.losses)), options)


def _directions(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the gradients that aren't zero [M], their norms [M] and the cosines between them [M, M]."""
    alive = (gram.diagonal() > 0).nonzero().squeeze(1)
    norms = gram.diagonal()[alive].sqrt()
    # Divided one after the other: the product of two small norms could underflow.
    cosines = (gram[alive][:, alive] / norms[:, None] / norms[None, :]).clamp(-1, 1)
    return alive, norms, cosines.fill_diagonal_(1.0)


def _spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_copy_(0, places, values)
