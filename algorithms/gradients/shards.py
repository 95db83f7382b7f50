"""Gradients of K losses in the shards that each rank holds: their inner products over all ranks, and their weighted sum
in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from algorithms.finite import require_finite

BLOCK = 1 << 20
"""Entries of each gradient that are converted to float64 at a time."""


def gram_matrix(
    gradients: Sequence[Sequence[Tensor]],
    *,
    group: dist.ProcessGroup | None = None,
    is_replicated: Sequence[bool] | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Inner products of the gradients of K losses, over all parameters and all ranks.

    Extra memory is 2K · `block` float64 numbers. Called by every rank of `group` at the same point of the step, with
    the same K; a rank that isn't there is found by the group's own timeout. All ranks return the same bits, and all of
    them raise if any holds a NaN.

    Args:
        gradients: K sequences of tensors: this rank's shard of each objective's gradient, the same tensors in the same
            order in all K. A rank without any passes an empty tensor on its device.
        group: the ranks over which the gradients are split, to sum over; None where this rank holds them whole.
        is_replicated: for each tensor, True where every rank of `group` holds the same whole tensor rather than a shard
            of its own, so that it counts once. None for all shards.
        block: entries converted at a time.
    Returns:
        [K, K] float64 on the CPU, symmetric.
    Raises:
        ValueError: no objectives, or their tensors differ in number or shape.
        NonFiniteError: a gradient holds NaN or an infinity, or its square overflows; names the objective.
    """
    _check_shards(gradients, is_replicated)
    first = gradients[0]
    device = first[0].device if first else torch.device("cpu")
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=device)
    counts_replicas = group is None or dist.get_rank(group) == 0
    for index, tensor in enumerate(first):
        if is_replicated is not None and is_replicated[index] and not counts_replicas:
            continue
        flat = _flat(gradients, index)
        for start in range(0, tensor.numel(), block):
            piece = torch.stack([each[start : start + block].to(torch.float64) for each in flat])
            gram.addmm_(piece, piece.T)
    if group is not None:
        dist.all_reduce(gram, group=group)
    gram = gram.cpu()
    require_finite_gram(gram)
    return (gram + gram.T) / 2


def combine(gradients: Sequence[Sequence[Tensor]], weights: Tensor, *, block: int = BLOCK) -> Sequence[Tensor]:
    """Σ_k w_k g_k, written over the first objective's gradient.

    Summed in float64, a block at a time, and rounded once: where objectives nearly cancel, weights are large and sums
    in the gradients' own precision would be noise.

    Args:
        gradients: K sequences of tensors, as for :func:`gram_matrix`. The first is overwritten.
        weights: [K] float.
        block: entries converted at a time.
    Returns:
        The first sequence.
    Raises:
        ValueError: the number of weights isn't K, or the tensors differ in number or shape.
        NonFiniteError: a weight is NaN or infinite.
    """
    _check_shards(gradients, None)
    if weights.shape != (len(gradients),):
        raise ValueError(f"weights must be [{len(gradients)}], one an objective, got {list(weights.shape)}")
    require_finite("the weight", weights, index_name="objective")
    coefficients = weights.detach().to(torch.float64)
    for index, target in enumerate(gradients[0]):
        flat = _flat(gradients, index)
        coefficients = coefficients.to(target.device)
        for start in range(0, target.numel(), block):
            pieces = torch.stack([each[start : start + block].to(torch.float64) for each in flat])
            flat[0][start : start + block] = (coefficients @ pieces).to(target.dtype)
        if not target.is_contiguous():
            target.detach().copy_(flat[0].view(target.shape))
    return gradients[0]


def require_finite_gram(gram: Tensor) -> None:
    """Raise NonFiniteError, naming the objective, unless every entry of a [K, K] Gram matrix is finite."""
    # An objective that is finite itself has NaN beside one that isn't, so the diagonal says whose fault it is.
    require_finite("the squared norm of the gradient", gram.diagonal(), index_name="objective")
    require_finite("the inner product of the gradients", gram, index_name="objectives")


def _check_shards(gradients: Sequence[Sequence[Tensor]], is_replicated: Sequence[bool] | None) -> None:
    if not gradients:
        raise ValueError("gradients must hold at least one objective, got none")
    shapes = [tensor.shape for tensor in gradients[0]]
    for index, objective in enumerate(gradients):
        if [tensor.shape for tensor in objective] != shapes:
            raise ValueError(
                f"gradients of objective {index} must have the tensors of objective 0, {[list(s) for s in shapes]}, "
                f"got {[list(tensor.shape) for tensor in objective]}"
            )
    if is_replicated is not None and len(is_replicated) != len(shapes):
        raise ValueError(f"is_replicated must have {len(shapes)} entries, one a tensor, got {len(is_replicated)}")


def _flat(gradients: Sequence[Sequence[Tensor]], index: int) -> list[Tensor]:
    """The tensor at `index` of every objective as [numel]: the same memory, or a copy where it isn't contiguous."""
    return [objective[index].detach().reshape(-1) for objective in gradients]
