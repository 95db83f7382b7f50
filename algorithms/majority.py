"""The exact expected reward of a majority vote, differentiable in the shares of the answers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_VOTES = 64
"""Up to this many votes the sums below stay well within float64, and their cost within reason."""


def majority_reward(shares: Tensor, rewards: Tensor, votes: int) -> Tensor:
    """Expected reward of the answer that most of `votes` independent draws give, equal counts broken by a fair draw.

    sum_a r_a P(a wins), with P(a wins) = sum over its count c of P(count of a = c, no other above c) / (1 + ties),
    under a multinomial with the given shares. Written as votes! times the coefficient of x^votes in a product over
    answers, with the factor sum_{i<c} (p x)^i / i! + z (p x)^c / c! for each other answer, integrated over z from 0 to
    1: the integral of z^ties is 1 / (1 + ties). The coefficient is the mean of the product over a circle, to within
    rounding. The vote itself is self-consistency: Wang et al., arXiv 2203.11171.

    Args:
        shares: [groups, answers] float64, the probability of each answer; 0 where a group has fewer of them.
        rewards: [groups, answers] float64, the expected reward of a sample that gives the answer.
        votes: draws, 1 to 64.
    Returns:
        [groups] float64. With one vote or two, the plain expected reward.
    """
    counts, levels, weights = (part.to(shares.device) for part in _wins(votes))
    steps = torch.arange(votes + 1, device=shares.device)
    factorials = torch.lgamma(steps.to(shares) + 1).exp()
    circle, circle_weights = _circle(votes, shares.device)
    orders = circle[:, None].pow(steps) / factorials
    # Products over the answers so far: with no winner among them, and with one.
    without = torch.ones(len(shares), len(counts), len(circle), dtype=circle.dtype, device=shares.device)
    won = torch.zeros_like(without)
    for slot in range(shares.shape[1]):
        terms = (shares[:, slot, None].pow(steps)[:, None] * orders).movedim(-1, 1)
        at_count = terms[:, counts]
        others = terms.cumsum(1)[:, counts - 1] + levels[:, None] * at_count
        won = won * others + without * at_count * rewards[:, slot, None, None]
        without = without * others
    return factorials[-1] * (weights.to(won) @ won @ circle_weights).real


def majority_gradients(shares: Tensor, rewards: Tensor, votes: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`majority_reward` and its derivatives by the shares and by the rewards, a bounded part of the groups at a
    time.

    Returns:
        [groups], [groups, answers] and [groups, answers] float64, detached.
    """
    per_group = len(_wins(votes)[0]) * len(_circle(votes, shares.device)[0]) * shares.shape[1]
    parts = []
    for some in torch.arange(len(shares), device=shares.device).split(max(1, 2**22 // per_group)):
        with torch.enable_grad():
            p, r = shares[some].detach().requires_grad_(), rewards[some].detach().requires_grad_()
            value = majority_reward(p, r, votes)
            by_share, by_reward = torch.autograd.grad(value.sum(), (p, r))
        parts.append((value.detach(), by_share, by_reward))
    value, by_share, by_reward = (torch.cat(part) for part in zip(*parts, strict=True))
    return value, by_share, by_reward


def _wins(votes: int) -> tuple[Tensor, Tensor, Tensor]:
    """[wins] int64 each count an answer can win with, [wins] z, [wins] weight: nodes that integrate over z exactly.

    With count c at most votes // c - 1 others can have as many, so the polynomial in z is of at most that degree.
    """
    counts, levels, weights = [], [], []
    for count in range(1, votes + 1):
        z, weight = _gauss_legendre(math.ceil(votes // count / 2))
        counts += [count] * len(z)
        levels.append(z)
        weights.append(weight)
    return torch.tensor(counts), torch.cat(levels), torch.cat(weights)


def _circle(votes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[points] complex128 on the upper half of the circle of radius `votes`, and weights that make the coefficient of
    x^votes of a real polynomial out of its values there, as the real part.

    Coefficients that are further up by a multiple of the number of points n would be counted along with it. They weigh
    as a Poisson count of votes + n does against one of votes, when votes are expected: below 1e-16 with this n.
    """
    half = 12 + math.ceil(4 * math.sqrt(votes))
    angles = torch.arange(half + 1, dtype=torch.float64, device=device) * (math.pi / half)
    weights = torch.full_like(angles, 1 / half)
    weights[0] = weights[-1] = 0.5 / half
    points = torch.polar(torch.full_like(angles, votes), angles)
    return points, weights * points.pow(-votes)


def _gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1] that integrate polynomials of degree 2 nodes - 1 (Golub and Welsch, 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (values + 1) / 2, vectors[0].square()
