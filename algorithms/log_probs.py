"""Log-probability, entropy and divergence from hidden states and the output head, a tile of the vocabulary at a time.

No tensor of [tokens, vocabulary] exists at any time: the backward pass computes each tile of logits again.
A :class:`LogitTransform` is what a model family applies to its logits behind the head.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from algorithms.logit_tiles import Head, LogitSettings, LogitTransform, tiles, work_dtype

BUDGET_BYTES = 256 << 20
"""Logits that may exist at once. Where all of them fit, the plain computation is both exact and faster."""
TILE_SHARE = 4
"""A tile has at most this part of the budget: larger ones aren't faster."""
_LIGER_VERSION = (0, 8, 5)
"""The oldest one whose gradient with `reduction="none"` was read and found right."""
_DRIFT_FLOOR = -1e4
"""exp of anything below is 0 in float64 too; keeps 0 times infinity out of the running sums."""


class TokenStatistics(NamedTuple):
    """Statistics of each drawn token under its distribution over the vocabulary.

    Attributes:
        log_probs: [N] float32 (float64 from float64 inputs), nats, of the token.
        entropy: [N], nats, -sum_v p_v log p_v; None where not asked for.
        collision: [N], sum_v p_v^2, the chance of drawing the same token twice; None where not asked for. Carries no
            gradient.
    """

    log_probs: Tensor
    entropy: Tensor | None
    collision: Tensor | None


def fits_whole(tokens: int, vocabulary: int, budget_bytes: int = BUDGET_BYTES) -> bool:
    """Whether all logits, [tokens, vocabulary] in float32, are within the budget."""
    return 4 * tokens * vocabulary <= budget_bytes


def statistics_of_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    banned_token_ids: tuple[int, ...] = (),
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    with_collision: bool = False,
) -> TokenStatistics:
    """The plain computation, from logits that exist: log softmax(logits / temperature) at each row's token.

    Args:
        logits: [N, V] float; computed in float32, or in float64 where they are that.
        tokens: [N] int64, in [0, V).
        temperature: above 0.
        banned_token_ids: of probability 0.
        with_entropy: also return the entropies.
        entropy_gradient: let gradients flow through them.
        with_collision: also return the sums of squared probabilities.
    Returns:
        The statistics; a NaN among a row's logits makes that row NaN, and no other.
    """
    _check(temperature)
    logits = logits.to(work_dtype(logits.dtype)) / temperature
    finite_logits = logits
    if banned_token_ids:
        banned = torch.tensor(banned_token_ids, device=logits.device)
        # The least number times a gradient above 1 would be infinite, and that times a probability of 0 NaN.
        finite_logits = logits.index_fill(-1, banned, 0.0) if with_entropy and entropy_gradient else logits
        logits = logits.index_fill(-1, banned, torch.finfo(logits.dtype).min)
    log_normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, tokens[:, None])[:, 0] - log_normaliser
    entropy = collision = None
    if with_entropy:
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
            expected_logit = ((logits - log_normaliser[:, None]).exp() * finite_logits).sum(-1)
            entropy = log_normaliser - expected_logit
    if with_collision:
        with torch.no_grad():
            collision = (logits - log_normaliser[:, None]).exp().square().sum(-1)
    return TokenStatistics(log_probs, entropy, collision)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    transform: LogitTransform | None = None,
    banned_token_ids: tuple[int, ...] = (),
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    with_collision: bool = False,
    budget_bytes: int = BUDGET_BYTES,
) -> TokenStatistics:
    """log softmax(transform(hidden weight^T + bias) / temperature) at each token, in bounded memory.

    The normaliser is summed tile by tile over the vocabulary, relative to the greatest logit so far (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867, algorithm 3). With p the probabilities
    and g, h the gradients of log-probability and entropy, the backward pass computes each tile again and takes
    g (1[v = token] - p_v) - h p_v (log p_v + entropy) as the gradient of logit v. It flows to `hidden`, `weight` and
    `bias`, as far as they want one; a sum over tiles or blocks of tokens is kept in float32.

    Equal to :func:`statistics_of_logits` of the whole logits up to rounding. In bfloat16 a logit is rounded to bfloat16
    as the head itself rounds it, and everything behind the head is in float32, where families have it in bfloat16.

    On CUDA, Liger's fused kernel takes its place where it is installed and computes the same: temperature 1, nothing
    banned, no scale, neither entropy nor collision, a weight that isn't sharded by ZeRO-3. That path has never been
    run here.

    Args:
        hidden: [N, H] float.
        weight: [V, H], of the same type as `hidden`.
        tokens: [N] int64, in [0, V).
        bias: [V].
        temperature: above 0.
        transform: of the logits, before the temperature.
        banned_token_ids: of probability 0.
        with_entropy: also return the entropies.
        entropy_gradient: let gradients flow through them.
        with_collision: also return the sums of squared probabilities.
        budget_bytes: of logits at once. Where all fit, they are computed as a whole and kept for the backward pass.
    Returns:
        The statistics. NaN in a row of `hidden` makes that row NaN, and no other: raising here, on one rank of a
        sharded model, would leave the others waiting. The loss refuses it by name.
    Raises:
        ValueError: a temperature that isn't above 0, or a token outside of the vocabulary.
    """
    _check(temperature)
    transform = transform or LogitTransform()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(weight):
        raise ValueError(
            f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}], but the head has {len(weight)} rows: "
            f"they must lie in [0, {len(weight) - 1}]."
        )
    is_plain = temperature == 1 and transform.scale == 1 and not (banned_token_ids or with_entropy or with_collision)
    if is_plain and hidden.is_cuda and not hasattr(weight, "ds_id") and _has_liger():
        return TokenStatistics(_liger_log_probs(hidden, weight, tokens, bias, transform.softcap), None, None)
    if fits_whole(len(tokens), len(weight), budget_bytes):
        logits = transform(torch.nn.functional.linear(hidden, weight, bias).to(work_dtype(hidden.dtype)))
        return statistics_of_logits(
            logits,
            tokens,
            temperature=temperature,
            banned_token_ids=banned_token_ids,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
            with_collision=with_collision,
        )
    settings = LogitSettings(transform, temperature, tuple(sorted(set(banned_token_ids))))
    log_probs, entropy, collision = _TokenLogProbs.apply(
        hidden, weight, bias, tokens, settings, with_entropy, entropy_gradient, with_collision, budget_bytes
    )
    return TokenStatistics(log_probs, entropy, collision)


def full_kl(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float = 1.0,
    transform: LogitTransform | None = None,
    reference_transform: LogitTransform | None = None,
    banned_token_ids: tuple[int, ...] = (),
    budget_bytes: int = BUDGET_BYTES,
) -> Tensor:
    """KL(policy || reference) = sum_v p_v (log p_v - log q_v) over the whole vocabulary, in bounded memory.

    The definition of the divergence (Kullback and Leibler, "On Information and Sufficiency", 1951), which the
    estimators from one token approximate. Its gradient at logit v, p_v (log p_v - log q_v - KL), is computed tile by
    tile like the value and flows to the policy's `hidden`, `weight` and `bias`; none flows to the reference.

    Args:
        hidden: [N, H] float, the policy's.
        weight: [V, H], the policy's head.
        reference_hidden: [N, H'] float.
        reference_weight: [V, H'].
        bias, reference_bias: [V].
        temperature: above 0, of both.
        transform, reference_transform: of each model's logits, before the temperature.
        banned_token_ids: of probability 0 in both; they add nothing.
        budget_bytes: of logits of both models at once.
    Returns:
        [N] float32 (float64 from float64 inputs), nats, up to rounding never negative. NaN where either model's row
        has one.
    Raises:
        ValueError: a temperature that isn't above 0, or vocabularies or numbers of tokens that differ.
    """
    _check(temperature)
    if len(weight) != len(reference_weight) or len(hidden) != len(reference_hidden):
        raise ValueError(
            f"the policy has {len(hidden)} tokens over a vocabulary of {len(weight)}, the reference "
            f"{len(reference_hidden)} over {len(reference_weight)}: they must agree."
        )
    banned = tuple(sorted(set(banned_token_ids)))
    settings = LogitSettings(transform or LogitTransform(), temperature, banned)
    reference_settings = LogitSettings(reference_transform or LogitTransform(), temperature, banned)
    divergence: Tensor = _FullKL.apply(
        hidden, weight, bias, reference_hidden, reference_weight, reference_bias, settings, reference_settings,
        budget_bytes,
    )  # fmt: skip
    return divergence


class _TokenLogProbs(torch.autograd.Function):
    """Forward: one sweep over the tiles. Backward: another, which computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        settings: LogitSettings,
        with_entropy: bool,
        entropy_gradient: bool,
        with_collision: bool,
        budget_bytes: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        head = Head(hidden, weight, bias, settings, budget_bytes // TILE_SHARE, extra_buffers=int(with_entropy))
        sums = _RunningSums(head, with_product=with_entropy)
        squares = head.zeros() if with_collision else None
        chosen = head.zeros()
        for rows, columns in tiles(head):
            logits = head.logits(rows, columns)
            place, is_inside = _place(tokens[rows], columns)
            chosen[rows] += logits.gather(1, place[:, None])[:, 0].masked_fill_(~is_inside, 0.0)
            product = head.buffer(0, rows, columns) if with_entropy else None
            exponentials, rescale = sums.add(rows, logits, factor=logits, product=product, is_shifted=True)
            if squares is not None:
                squares[rows] = squares[rows] * rescale.square() + _row_products(exponentials, exponentials)
        log_normaliser = sums.log_normaliser()
        log_probs = chosen - log_normaliser
        entropy = sums.total.log() - sums.product / sums.total if with_entropy else None
        collision = squares / sums.total.square() if squares is not None else None
        ctx.save_for_backward(hidden, weight, bias, tokens, log_normaliser, entropy if entropy_gradient else None)
        ctx.settings, ctx.tile_bytes = settings, budget_bytes // TILE_SHARE
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(part for part in (collision, None if entropy_gradient else entropy) if part is not None)
        )
        return log_probs, entropy, collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, log_normaliser, entropy = ctx.saved_tensors
        of_log_prob, of_entropy = gradients[0], gradients[1] if entropy is not None else None
        if of_log_prob is None:
            of_log_prob = torch.zeros_like(log_normaliser)
        extra_buffers = int(of_entropy is not None)
        head = Head(hidden, weight, bias, ctx.settings, ctx.tile_bytes, extra_buffers=extra_buffers)
        head.expect_gradients(*ctx.needs_input_grad[:3])
        for rows, columns in tiles(head):
            values = head.logits(rows, columns, keeps_slope=True).sub_(log_normaliser[rows, None])
            if of_entropy is None:
                values.exp_().mul_(-of_log_prob[rows, None])
            else:
                probabilities = torch.exp(values, out=head.buffer(0, rows, columns))
                # -(g + h (log p + entropy)) p; a banned token has p = 0 and a finite log p.
                slope, offset = -of_entropy[rows, None], -(of_log_prob + of_entropy * entropy)[rows, None]
                values.mul_(slope).add_(offset).mul_(probabilities)
            place, is_inside = _place(tokens[rows], columns)
            values.scatter_add_(1, place[:, None], of_log_prob[rows].masked_fill(~is_inside, 0.0)[:, None])
            head.pull_back(values, rows, columns)
        return (*head.gradients(), None, None, None, None, None, None)


class _FullKL(torch.autograd.Function):
    """KL = E_p[l - r] - log Z_p + log Z_q, with l and r the logits of policy and reference."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
        settings: LogitSettings,
        reference_settings: LogitSettings,
        budget_bytes: int,
    ) -> Tensor:
        tile_bytes = budget_bytes // TILE_SHARE // 2
        policy = Head(hidden, weight, bias, settings, tile_bytes, extra_buffers=1)
        reference = Head(
            reference_hidden, reference_weight, reference_bias, reference_settings, tile_bytes, like=policy
        )
        sums, reference_sums = _RunningSums(policy, with_product=True), _RunningSums(reference)
        for rows, columns in tiles(policy):
            logits, reference_logits = policy.logits(rows, columns), reference.logits(rows, columns)
            difference = torch.sub(logits, reference_logits, out=policy.buffer(0, rows, columns))
            sums.add(rows, logits, factor=difference, product=None, is_shifted=False)
            reference_sums.add(rows, reference_logits)
        log_normaliser, reference_log_normaliser = sums.log_normaliser(), reference_sums.log_normaliser()
        divergence = sums.product / sums.total - log_normaliser + reference_log_normaliser
        ctx.save_for_backward(
            hidden, weight, bias, reference_hidden, reference_weight, reference_bias, log_normaliser,
            reference_log_normaliser, divergence,
        )  # fmt: skip
        ctx.settings, ctx.reference_settings, ctx.tile_bytes = settings, reference_settings, tile_bytes
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, reference_hidden, reference_weight, reference_bias, *by_token = ctx.saved_tensors
        log_normaliser, reference_log_normaliser, divergence = by_token
        policy = Head(hidden, weight, bias, ctx.settings, ctx.tile_bytes)
        reference = Head(
            reference_hidden, reference_weight, reference_bias, ctx.reference_settings, ctx.tile_bytes, like=policy
        )
        policy.expect_gradients(*ctx.needs_input_grad[:3])
        for rows, columns in tiles(policy):
            log_probs = policy.logits(rows, columns, keeps_slope=True).sub_(log_normaliser[rows, None])
            reference_log_probs = reference.logits(rows, columns).sub_(reference_log_normaliser[rows, None])
            difference = torch.sub(log_probs, reference_log_probs, out=reference_log_probs)
            difference.sub_(divergence[rows, None]).mul_(gradient[rows, None])
            policy.pull_back(log_probs.exp_().mul_(difference), rows, columns)
        return (*policy.gradients(), None, None, None, None, None, None)


class _RunningSums:
    """Sums of exp(logit - maximum) over the tiles seen so far, and of those times a factor."""

    def __init__(self, head: Head, *, with_product: bool = False) -> None:
        self.maximum = head.zeros().fill_(torch.finfo(head.dtype).min)
        self.total = head.zeros()
        self.product = head.zeros()
        self._with_product = with_product

    def add(
        self,
        rows: slice,
        logits: Tensor,
        *,
        factor: Tensor | None = None,
        product: Tensor | None = None,
        is_shifted: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Take in a tile.

        Args:
            rows: of the tile.
            logits: [rows, width]; overwritten.
            factor: [rows, width], to multiply the exponentials with, where `product` sums were asked for.
            product: a buffer for the exponentials where `factor` is `logits` itself.
            is_shifted: the factor is logit - maximum, so the sum moves with the maximum.
        Returns:
            [rows, width] the exponentials; [rows] what earlier sums were multiplied with.
        """
        before = self.maximum[rows]
        maximum = torch.maximum(before, logits.amax(1))
        drift = (before - maximum).clamp_(min=_DRIFT_FLOOR)
        rescale = drift.exp()
        logits.sub_(maximum[:, None])
        exponentials = torch.exp(logits, out=product) if product is not None else logits.exp_()
        if self._with_product:
            assert factor is not None
            moved = self.product[rows] + self.total[rows] * drift if is_shifted else self.product[rows]
            self.product[rows] = moved * rescale + _row_products(exponentials, factor)
        self.total[rows] = self.total[rows] * rescale + exponentials.sum(1)
        self.maximum[rows] = maximum
        return exponentials, rescale

    def log_normaliser(self) -> Tensor:
        """[N] log-sum-exp of all logits."""
        return self.maximum + self.total.log()


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """[rows] inner products of the rows, without a tensor of the products."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]


def _place(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each token's place in a tile, and whether it lies there; places of those that don't are in range too."""
    place = tokens - columns.start
    width = columns.stop - columns.start
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def _check(temperature: float) -> None:
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"log-probabilities need a temperature above 0, got {temperature}")


def _has_liger() -> bool:
    """Whether Liger's kernels are installed, in a version whose gradient for each token is right."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    parts = importlib.metadata.version("liger_kernel").split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts) >= _LIGER_VERSION


def _liger_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    loss: Tensor = functional.liger_fused_linear_cross_entropy(
        hidden, weight, tokens, bias=bias, reduction="none", softcap=softcap, accum_dtype=torch.float32
    )
    return -loss
