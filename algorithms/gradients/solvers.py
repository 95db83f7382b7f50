"""Solvers of the problems in gradient_weights.py, over unit gradients: [K, K] cosines in, coefficients out.

They work in float64 on the CPU; every solver ends after a bounded number of iterations and never divides by zero.

Unit gradients keep objectives whose norms differ by sixteen orders of magnitude apart from the arithmetic: norms enter
only as `inverse_norms`, the smallest norm over each, in (0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
"""Squared length of a combination of unit gradients below which it can't be told from zero: cosines carry an error of
about 1e-16 an objective, and the solvers divide by this."""


def nearest_point(cosines: Tensor, inverse_norms: Tensor) -> Tensor:
    """The point of least norm in the convex hull: min |Σ u_k e_k|² with u ≥ 0 and Σ q_k u_k = 1.

    Solved as non-negative least squares, min uᵀCu + (qᵀu - 1)², whose solution points the same way, by the active-set
    method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23): exact after finitely many steps.

    Args:
        cosines: [K, K] float64, between the gradients.
        inverse_norms: [K] float64, q.
    Returns:
        [K] float64, u.
    """
    count = len(cosines)
    system = cosines + torch.outer(inverse_norms, inverse_norms)
    u = torch.zeros_like(inverse_norms)
    is_used = torch.zeros(count, dtype=torch.bool)
    for _ in range(10 * count):
        slack = inverse_norms * (1 - inverse_norms @ u) - cosines @ u
        slack[is_used] = -torch.inf
        entering = int(slack.argmax())
        # The rounding error of the slack grows with the coefficients.
        if slack[entering] <= 1e-14 * (1 + u.max()):
            break
        is_used[entering] = True
        u, is_used = _shrink_to_positive(system, inverse_norms, u, is_used)
        if not is_used[entering]:
            break
    return u / (inverse_norms @ u)


def _shrink_to_positive(system: Tensor, target: Tensor, u: Tensor, is_used: Tensor) -> tuple[Tensor, Tensor]:
    """The inner loop: least squares on the used columns, leaving out those that it would make negative."""
    while bool(is_used.any()):
        wanted = torch.zeros_like(u)
        used = is_used.nonzero().squeeze(1)
        # gelsd allows a singular system: gradients that are copies of one another.
        solution = torch.linalg.lstsq(system[used][:, used], target[used, None], driver="gelsd").solution
        wanted[used] = solution[:, 0]
        is_blocking = is_used & (wanted <= 0)
        if not bool(is_blocking.any()):
            return wanted, is_used
        step = (u[is_blocking] / (u[is_blocking] - wanted[is_blocking])).nan_to_num(0.0).min()
        u = u + step * (wanted - u)
        is_used = is_used & (u > 0) & ~(is_blocking & (u <= 1e-14 * u.max()))
        u = torch.where(is_used, u, torch.zeros_like(u))
    return u, is_used


def bargaining_point(cosines: Tensor) -> Tensor:
    """The u > 0 with u_k (C u)_k = 1 for all k: the minimum of ½uᵀCu - Σ log u_k.

    That function is strictly convex and self-concordant, so damped Newton steps reach its one minimum from anywhere.

    Args:
        cosines: [K, K] float64.
    Returns:
        [K] float64; all zero where 0 is in the convex hull of the gradients (to sqrt(FLOOR) of their length), for then
        there is no minimum.
    """
    hull = nearest_point(cosines, torch.ones(len(cosines), dtype=cosines.dtype))
    if hull @ cosines @ hull <= FLOOR:
        return torch.zeros_like(hull)
    factor = _factor(cosines)
    identity = torch.eye(len(cosines), dtype=cosines.dtype)
    u = torch.ones_like(hull) * (len(cosines) / cosines.sum().clamp_min(FLOOR)).sqrt()
    for _ in range(500):
        columns = factor * u
        gradient = columns.T @ (factor @ u) - 1
        upper = torch.linalg.qr(torch.cat([columns, identity])).R
        direction = -torch.cholesky_solve(gradient[:, None], upper, upper=True)[:, 0]
        decrement = float((-gradient @ direction).clamp_min(0).sqrt())
        u = u * (1 + direction * _step_length(decrement))
        if decrement < 1e-12:
            break
    return u


def equal_projections(cosines: Tensor) -> Tensor:
    """The u with (C u)_k = 1 for all k: the combination whose projections onto all unit gradients are 1.

    Args:
        cosines: [K, K] float64.
    Returns:
        [K] float64, of least norm where there are several; all zero where no combination does it.
    """
    values, vectors = torch.linalg.eigh(cosines)
    kept = values > FLOOR
    values, vectors = values[kept], vectors[:, kept]
    ones = torch.ones(len(cosines), dtype=cosines.dtype)
    u = vectors @ ((vectors.T @ ones) / values)
    u = u + vectors @ ((vectors.T @ (ones - cosines @ u)) / values)
    return u if float((cosines @ u - 1).abs().max()) <= 1e-6 else torch.zeros_like(u)


def fairest_step(cosines: Tensor, inverse_norms: Tensor, toward: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The dual of max_d min_k <g_k, d> with |d - g₀| ≤ radius · |g₀|: min aᵀu + radius · |Σ u_k e_k|, u ≥ 0, qᵀu = 1.

    A cone program, solved along its central path (Boyd and Vandenberghe, Convex Optimization, 2004, chapter 11) by
    damped Newton steps. With t the barrier's stand-in for |Σ u_k e_k|, d = g₀ + radius · |g₀| Σ u_k e_k / t keeps the
    constraint at every iterate, and the distance of its worst objective from the dual's value bounds the error: the
    iterate with the least bound is returned, at once when it is 1e-10 of the value.

    Args:
        cosines: [K, K] float64.
        inverse_norms: [K] float64, q.
        toward: [K] float64, a: the cosine of each gradient with g₀.
        radius: above 0.
    Returns:
        ([K], []) float64, u and t > |Σ u_k e_k|.
    """
    factor = _factor(cosines)
    u = torch.ones_like(inverse_norms) / inverse_norms.sum()
    best, best_length, least = u, torch.ones((), dtype=u.dtype), torch.inf
    barrier = 1.0
    while barrier > 1e-12:
        barrier *= 0.2
        for _ in range(60):
            u, decrement = _central_step(factor, inverse_norms, toward, radius, barrier, u)
            if decrement < 1e-6:
                break
        combination = factor @ u
        length, softened = _soft_length(combination, barrier / radius)
        value = toward @ u + radius * combination.norm()
        projections = (toward + radius * (factor.T @ combination) / softened) / inverse_norms
        gap = float((value - projections.min()) / max(1.0, float((toward * u).abs().sum() + radius * length)))
        if gap < least:
            best, best_length, least = u, softened, gap
        if least <= 1e-10:
            break
    return best, best_length


def _central_step(
    factor: Tensor, inverse_norms: Tensor, toward: Tensor, radius: float, barrier: float, u: Tensor
) -> tuple[Tensor, float]:
    """One Newton step towards the central path, in coordinates scaled by u, and the decrement it started from."""
    combination = factor @ u
    length, softened = _soft_length(combination, barrier / radius)
    gradient = u * (toward + radius * (factor.T @ combination) / softened) / barrier - 1
    columns = factor * u
    squared = combination @ combination
    if float(squared) > 0:
        # The curvature of a length vanishes along it, but for the softening.
        along = 1 - (barrier / radius / length).sqrt()
        columns = columns - torch.outer(combination, combination @ columns) * (along / squared)
    # QR of a square root keeps digits that the product would lose when the combination is nearly zero.
    root = torch.cat([columns * (radius / (softened * barrier)).sqrt(), torch.eye(len(u), dtype=u.dtype)])
    upper = torch.linalg.qr(root).R
    normal = inverse_norms * u
    # The multiplier's share of the gradient changes nothing but would swamp the rest by 1 / barrier.
    gradient = gradient - normal * ((normal @ gradient) / (normal @ normal))
    solved = torch.cholesky_solve(torch.stack([gradient, normal], 1), upper, upper=True)
    multiplier = (normal @ solved[:, 0]) / (normal @ solved[:, 1])
    direction = multiplier * solved[:, 1] - solved[:, 0]
    decrement = float((-gradient @ direction).clamp_min(0).sqrt())
    moved = (u * (1 + direction * _step_length(decrement))).clamp_min(torch.finfo(u.dtype).tiny)
    return moved / (inverse_norms @ moved), decrement


def _soft_length(combination: Tensor, softening: float) -> tuple[Tensor, Tensor]:
    """s = sqrt(softening² + |combination|²), and the barrier's length softening + s."""
    length = (softening**2 + combination @ combination).sqrt()
    return length, softening + length


def _factor(cosines: Tensor) -> Tensor:
    """F with FᵀF = C, of the nearest matrix that has one: rounding can leave an eigenvalue below zero."""
    values, vectors = torch.linalg.eigh(cosines)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _step_length(decrement: float) -> float:
    """Damped far from the minimum, where a full step could leave the domain; whole near it, for quadratic convergence
    (Nesterov and Nemirovskii, Interior-Point Polynomial Algorithms, 1994)."""
    return 1.0 if decrement < 0.25 else 1.0 / (1.0 + decrement)
