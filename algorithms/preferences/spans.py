"""Preference losses on parts of answers: weights on corrected spans, and a hierarchy of response, segment, token and
image."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preferences.inputs import AnswerLogProbs, PreferenceInputs, PreferenceOutcome, preference_loss
from algorithms.preferences.multimodal import image_margin
from algorithms.preferences.text import BetaOptions, log_ratio_margin, paired_outcome


class DDPOOptions(BetaOptions):
    """Options of dense DPO."""

    corrected_weight: float = Field(
        5.0, ge=0.0, description="Weight of a token in a corrected span; others weigh 1 (the paper's gamma)."
    )
    is_length_averaged: bool = Field(
        True, description="Divide by the sum of weights, as the paper does; else take the weighted sum."
    )


class CHiPOptions(BetaOptions):
    """Options of CHiP."""

    image_weight: float = Field(1.0, ge=0.0, description="Weight of the preference for the true image.")
    segment_weight: float = Field(
        1.0, ge=0.0, description="Weight of the preference on corrected spans (the paper's lambda)."
    )
    token_weight: float = Field(
        0.1, ge=0.0, description="Weight of the KL difference inside the response's preference (the paper's gamma)."
    )
    corrected_weight: float = Field(5.0, ge=0.0, description="Weight of a corrected token within the segment's term.")


def span_log_ratio(
    answers: AnswerLogProbs, corrected_weight: float, is_length_averaged: bool, name: str, side: str
) -> Tensor:
    """Log-ratio to the reference with the tokens of corrected spans weighted (RLHF-V, arXiv 2312.00849, DDPO).

    [sum over unchanged tokens + gamma sum over corrected ones] / N, N = |unchanged| + gamma |corrected|.

    Args:
        answers: with by_token, of which reference_log_probs and is_corrected are read.
        corrected_weight: gamma.
        is_length_averaged: whether to divide by N.
        name, side: of the loss and the answers, for errors.
    Returns:
        [answers] float, nats. 0 where no token has a weight.
    Raises:
        ValueError: tokens, their reference log-probabilities or the corrected spans weren't given.
    """
    tokens = answers.by_token
    if tokens is None or tokens.reference_log_probs is None or tokens.is_corrected is None:
        raise ValueError(
            f"the loss {name} weighs spans: give {side}.by_token with reference_log_probs and is_corrected"
        )
    ones = torch.ones_like(tokens.reference_log_probs)
    weights = torch.where(tokens.is_corrected, corrected_weight * ones, ones)
    weights = torch.where(tokens.mask, weights, 0.0)
    ratios = torch.where(tokens.mask, tokens.log_probs - tokens.reference_log_probs, 0.0)
    total = (weights * ratios).sum(-1)
    if not is_length_averaged:
        return total
    size = weights.sum(-1)
    return total / torch.where(size > 0, size, torch.ones_like(size))


@preference_loss(
    "ddpo",
    options=DDPOOptions,
    needs=frozenset({"by_token", "is_corrected"}),
    formula="−log σ(β [d(y_w) − d(y_l)]),  d = [Σ_same + γ Σ_corrected](log π/π_ref)/(|same| + γ|corrected|)",
    source="Yu et al., RLHF-V, arXiv 2312.00849, dense direct preference optimisation",
    use_when="The chosen answer is the rejected one with its wrong spans corrected.",
)
def ddpo(inputs: PreferenceInputs, options: DDPOOptions) -> PreferenceOutcome:
    """Dense DPO: DPO in which tokens of corrected spans weigh gamma times as much (RLHF-V, arXiv 2312.00849).

    -log sigmoid(beta [d(y_w) - d(y_l)]), d as in :func:`span_log_ratio`. Divided by the weights' sum, as in the paper,
    long answers don't outweigh short ones, and beta means something else than in DPO.

    Returns:
        values [pairs]; DPO at corrected_weight 1 without length averaging. An answer without corrected spans is
        averaged plainly.
    Raises:
        ValueError: see :func:`span_log_ratio`.
    """
    chosen, rejected = (
        options.beta
        * span_log_ratio(answers, options.corrected_weight, options.is_length_averaged, name="ddpo", side=side)
        for side, answers in (("chosen", inputs.chosen), ("rejected", inputs.rejected))
    )
    return paired_outcome(inputs, -logsigmoid(chosen - rejected), chosen, rejected)


def _sequence_kl(answers: AnswerLogProbs, side: str) -> Tensor:
    """[pairs] float, nats, sum over the answer's tokens of KL(reference || policy)."""
    tokens = answers.by_token
    if tokens is None or tokens.reference_kl is None:
        raise ValueError(
            f"the loss chip has a token-level term: give {side}.by_token with reference_kl, or set token_weight: 0"
        )
    return torch.where(tokens.mask, tokens.reference_kl, 0.0).sum(-1)


@preference_loss(
    "chip",
    options=CHiPOptions,
    needs_negative_image=True,
    needs=frozenset({"by_token"}),
    formula="−log σ(β h − γβ [KL(y_l) − sg KL(y_w)]) − λ log σ(β h_segment) − w_I log σ(β h_I)",
    source="Fu et al., arXiv 2501.16629; its token level: Zeng et al., TDPO, arXiv 2404.11999, TDPO₂",
    use_when="Descriptions with corrected spans, where response-level DPO doesn't say which words were wrong.",
)
def chip(inputs: PreferenceInputs, options: CHiPOptions) -> PreferenceOutcome:
    """CHiP: preferences of response, segment, token and image at once (Fu et al., arXiv 2501.16629).

    Response and token: -log sigmoid(beta h - gamma beta [KL(y_l) - sg KL(y_w)]), KL(y) the sum over tokens of
    KL(reference || policy), as in TDPO (arXiv 2404.11999). Segment: -lambda log sigmoid(beta [d(y_w) - d(y_l)]), d as
    in :func:`span_log_ratio`. Image: -w_I log sigmoid(beta h_I), h_I as for Image-DPO.

    The paper and its published code differ: the paper adds all terms up, the bare KL difference among them; the code
    puts all logits into one sigmoid. A bare difference has no lower bound and its gradient never fades, so the token
    level is inside the response's sigmoid, as in TDPO and the code; preferences of other levels are terms of their own,
    as in the paper, since in one sigmoid an easy level would silence the others.

    Returns:
        values [pairs]; DPO with the image, segment and token weights at 0.
    Raises:
        ValueError: a level has a weight and its inputs are absent.
    """
    chosen, rejected = options.beta * inputs.chosen.log_ratio, options.beta * inputs.rejected.log_ratio
    logits = options.beta * log_ratio_margin(inputs)
    metrics = {}
    if options.token_weight > 0:
        difference = _sequence_kl(inputs.rejected, "rejected") - _sequence_kl(inputs.chosen, "chosen").detach()
        logits = logits - options.token_weight * options.beta * difference
        metrics["kl_difference"] = difference
    values = -logsigmoid(logits)
    if options.segment_weight > 0:
        better, worse = (
            span_log_ratio(answers, options.corrected_weight, True, "chip", side)
            for side, answers in (("chosen", inputs.chosen), ("rejected", inputs.rejected))
        )
        metrics["segment_margin"] = options.beta * (better - worse)
        values = values - options.segment_weight * logsigmoid(metrics["segment_margin"])
    if options.image_weight > 0:
        metrics["image_margin"] = options.beta * image_margin(inputs, "chip")
        values = values - options.image_weight * logsigmoid(metrics["image_margin"])
    return paired_outcome(inputs, values, chosen, rejected, **metrics)
