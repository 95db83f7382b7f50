"""Policy losses that limit the few tokens whose log-probability covaries with the advantage.

Those tokens make the entropy collapse (Cui et al., arXiv 2505.22617). They are chosen once, from the whole optimiser
batch at the start of the update, so that the result doesn't depend on micro-batches and ranks.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.inputs import BatchTokens, LossInputs, TokenLoss
from algorithms.losses import MAX_LOG_RATIO, ClipOptions, clip, marks_of
from algorithms.registry import Options, policy_loss


def token_covariances(tokens: BatchTokens) -> Tensor:
    """(log pi - its mean) (A - its mean) of each trained token, means over all of them (arXiv 2505.22617, section 4.2).

    Their mean is the covariance of log-probability and advantage. The log-probabilities are the proximal ones.

    Returns:
        [trained tokens] float64, in order.
    Raises:
        NonFiniteError: a log-probability or an advantage is NaN or infinite inside the mask.
    """
    require_finite("proximal_log_probs", tokens.proximal_log_probs, tokens.mask, index_name="token")
    require_finite("advantages", tokens.advantages, tokens.mask, index_name="token")
    log_probs = tokens.proximal_log_probs[tokens.mask].double()
    advantages = tokens.advantages[tokens.mask].double()
    return (log_probs - log_probs.mean()) * (advantages - advantages.mean())


def _marks(tokens: BatchTokens, chosen: Tensor) -> Tensor:
    """[tokens] float32, 1 on the `chosen` of the trained tokens."""
    marks = torch.zeros_like(tokens.mask, dtype=torch.float32)
    marks[tokens.mask.nonzero().squeeze(-1)[chosen]] = 1.0
    return marks


def _data_seed(tokens: BatchTokens) -> int:
    """A seed made of the data: the same on every rank, another for every batch.

    The bits are added as integers, which is exact whatever the order.
    """
    values = torch.cat([tokens.proximal_log_probs[tokens.mask], tokens.advantages[tokens.mask]]).float().contiguous()
    return int(values.view(torch.int32).long().sum()) % 2**63


class ClipCovOptions(ClipOptions):
    """Bounds of the ratio, and which tokens are left out."""

    share: float = Field(2e-4, gt=0.0, le=1.0, description="Share of the trained tokens that are left out.")
    covariance_low: float = Field(1.0, description="Tokens of lower covariance are never left out.")
    covariance_high: float = Field(5.0, description="Tokens of higher covariance are never left out.")

    @model_validator(mode="after")
    def _is_in_order(self) -> ClipCovOptions:
        if self.covariance_low >= self.covariance_high:
            raise ValueError(
                f"covariance_low = {self.covariance_low:g} isn't below covariance_high = {self.covariance_high:g}, so "
                f"no token is within. Lower covariance_low below {self.covariance_high:g}"
            )
        return self


def clip_cov_marks(tokens: BatchTokens, options: ClipCovOptions) -> Tensor:
    """1 on the tokens that clip-cov leaves out, 0 elsewhere: drawn from those within the covariance bounds.

    As many as `share` of the trained tokens, rounded down, and at least one where one qualifies (the paper's code; its
    formula would leave out none in a small batch). Drawn without replacement by a generator seeded by the data.

    Returns:
        [tokens] float32.
    Raises:
        NonFiniteError: a log-probability or an advantage is NaN or infinite inside the mask.
    """
    covariances = token_covariances(tokens)
    within = ((covariances > options.covariance_low) & (covariances < options.covariance_high)).nonzero().squeeze(-1)
    count = max(int(options.share * len(covariances)), 1)
    generator = torch.Generator().manual_seed(_data_seed(tokens))
    drawn = torch.randperm(len(within), generator=generator)[:count]
    return _marks(tokens, within[drawn.to(within.device)])


@policy_loss(
    "clip_cov",
    options=ClipCovOptions,
    prepare=clip_cov_marks,
    formula="clip's; no gradient on a random `share` of tokens with covariance_low < cov(log π, A) < covariance_high",
    source="Clip-Cov, arXiv 2505.22617, section 4.2",
    use_when="Entropy collapses under clip and clip-higher doesn't hold it.",
)
def clip_cov(inputs: LossInputs, options: ClipCovOptions) -> TokenLoss:
    """The clipped loss, without a gradient on the tokens that :func:`clip_cov_marks` drew.

    Clip-Cov (Cui et al., arXiv 2505.22617, section 4.2). The covariances are those at the start of the update; the
    paper's code takes them anew in each micro-batch. The tokens left out aren't counted as clipped.
    """
    loss = clip(inputs, options)
    values = torch.where(marks_of(inputs), loss.values.detach(), loss.values)
    return TokenLoss(values, loss.is_clipped_low, loss.is_clipped_high)


class KlCovOptions(Options):
    """Which tokens are held back, and how hard."""

    share: float = Field(2e-3, gt=0.0, le=1.0, description="Share of the trained tokens that are held back.")
    coefficient: float = Field(1.0, gt=0.0, description="Weight of their KL to the policy before the update.")


def kl_cov_marks(tokens: BatchTokens, options: KlCovOptions) -> Tensor:
    """1 on the `share` of trained tokens (rounded down, at least one) of greatest covariance, 0 elsewhere.

    Returns:
        [tokens] float32.
    Raises:
        NonFiniteError: a log-probability or an advantage is NaN or infinite inside the mask.
    """
    covariances = token_covariances(tokens)
    count = min(max(int(options.share * len(covariances)), 1), len(covariances))
    return _marks(tokens, torch.sort(covariances, descending=True, stable=True).indices[:count])


@policy_loss(
    "kl_cov",
    options=KlCovOptions,
    prepare=kl_cov_marks,
    formula="−r·A; plus coefficient·KL(π_proximal‖π) on the `share` of tokens with the greatest cov(log π, A)",
    source="KL-Cov, arXiv 2505.22617, section 4.2",
    use_when="As clip_cov, with the steadier entropy of the two; few updates a batch, for nothing is clipped.",
)
def kl_cov(inputs: LossInputs, options: KlCovOptions) -> TokenLoss:
    """-r A, with r = pi / pi_proximal, plus beta KL(pi_proximal || pi) on the tokens of :func:`kl_cov_marks`.

    KL-Cov (Cui et al., arXiv 2505.22617, section 4.2). The KL at a token is estimated by r - 1 - log r, which is
    right in expectation under pi_proximal, never negative, and pulls the token back from either side. The paper's code
    has |log r|, which isn't an estimate of the KL and pulls with the same force however near the token is. Covariances
    are those at the start of the update. Nothing is clipped.
    """
    log_ratio = (inputs.log_probs - inputs.proximal_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = (log_ratio.expm1() - log_ratio).masked_fill(~marks_of(inputs), 0.0)
    return TokenLoss(-log_ratio.exp() * inputs.advantages + options.coefficient * kl)
