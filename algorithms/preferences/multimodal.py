"""Preference losses on images and text: pairs of images, anchors, and supervised terms beside DPO.

Losses whose beta moves with the data are in dynamic.py, those that look at tokens and spans in
spans.py; the worse images are made in image_negatives.py.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preferences.inputs import AnswerLogProbs, PreferenceInputs, PreferenceOutcome, preference_loss
from algorithms.preferences.text import BetaOptions, log_ratio_margin, paired_outcome
from algorithms.preferences.unpaired import RewardShift, shifted_classification


class ImageDPOOptions(BetaOptions):
    """Options of Image-DPO."""

    image_weight: float = Field(1.0, ge=0.0, description="Weight of the preference for the true image.")
    answer_weight: float = Field(0.0, ge=0.0, description="Weight of DPO on the two answers, beside it.")


class MDPOOptions(BetaOptions):
    """Options of mDPO."""

    image_weight: float = Field(1.0, ge=0.0, description="Weight of the preference for the true image.")
    anchor_weight: float = Field(1.0, ge=0.0, description="Weight of the anchor.")
    anchor: float = Field(
        0.0, description="Implicit reward that the anchor asks of the chosen answer (the paper's delta)."
    )


class AdPOOptions(BetaOptions):
    """Options of AdPO."""

    adversarial_weight: float = Field(
        1.0, ge=0.0, description="Weight of the chosen answer under the adversarial image (the paper's lambda)."
    )
    has_confidence_weights: bool = Field(
        True, description="Weigh each token there by its probability, without gradient; else plain NLL."
    )
    is_length_averaged: bool = Field(False, description="Take the mean over the answer's tokens, not their sum.")


class HADPOOptions(BetaOptions):
    """Options of HA-DPO."""

    nll_weight: float = Field(
        0.5, ge=0.0, description="Weight of the chosen answer's NLL a token (the paper's lambda)."
    )


class MIADPOOptions(BetaOptions):
    """Options of MIA-DPO."""

    nll_weight: float = Field(0.1, ge=0.0, description="Weight of the chosen answer's NLL a token (the paper's gamma).")


class MPOOptions(BetaOptions):
    """Options of MPO."""

    preference_weight: float = Field(0.8, ge=0.0, description="Weight of DPO, which of the two is better.")
    quality_weight: float = Field(0.2, ge=0.0, description="Weight of BCO, whether each is good.")
    generation_weight: float = Field(1.0, ge=0.0, description="Weight of the chosen answer's NLL a token.")
    decay: float = Field(
        0.9, ge=0.0, le=1.0, description="What is left after a step of the past in the reward shift; 1 keeps all of it."
    )


def negative_image(inputs: PreferenceInputs, name: str, which: str = "chosen_negative_image") -> AnswerLogProbs:
    """The answers read under the worse image.

    Raises:
        ValueError: they weren't given.
    """
    answers: AnswerLogProbs | None = getattr(inputs, which)
    if answers is None:
        raise ValueError(f"the loss {name} needs {which}: log-probabilities of those answers under a worse image")
    return answers


def image_margin(inputs: PreferenceInputs, name: str) -> Tensor:
    """[pairs] float, nats: log pi/pi_reference of the chosen answer under its image, less that under the worse one."""
    return inputs.chosen.log_ratio - negative_image(inputs, name).log_ratio


@preference_loss(
    "image_dpo",
    options=ImageDPOOptions,
    needs_negative_image=True,
    formula="−log σ(β h_I),  h_I = log π(y|I)/π_ref(y|I) − log π(y|I⁻)/π_ref(y|I⁻)",
    source="Luo et al., “Probing visual language priors in VLMs”, arXiv 2501.00569, the Image-DPO loss",
    use_when="Answers come from the language prior: the same answer should be likelier with its image than without.",
)
def image_dpo(inputs: PreferenceInputs, options: ImageDPOOptions) -> PreferenceOutcome:
    """Image-DPO: a pair is one answer under its image I and under a corrupted one I- (Luo et al., arXiv 2501.00569).

    -log sigmoid(beta h_I), h_I = log pi(y|I)/pi_ref(y|I) - log pi(y|I-)/pi_ref(y|I-), y the chosen answer. The
    rejected answer plays a part only where `answer_weight` is above 0; without rejected answers, give
    `chosen_negative_image` as `rejected` too.

    Returns:
        values [pairs]; DPO at image_weight 0 and answer_weight 1. Where both images are the same, h_I is 0 and has no
        gradient.
    """
    margin = image_margin(inputs, "image_dpo")
    chosen, rejected = options.beta * inputs.chosen.log_ratio, options.beta * inputs.rejected.log_ratio
    values = -options.image_weight * logsigmoid(options.beta * margin)
    if options.answer_weight > 0:
        values = values - options.answer_weight * logsigmoid(chosen - rejected)
    return paired_outcome(inputs, values, chosen, rejected, image_margin=options.beta * margin)


@preference_loss(
    "mdpo",
    options=MDPOOptions,
    needs_negative_image=True,
    formula="−log σ(β h) − w_I log σ(β h_I) − w_A log σ(β log π(y_w)/π_ref(y_w) − δ)",
    source="Wang et al., arXiv 2406.11839, the conditional and anchored objectives",
    use_when="Pairs with images; the usual first choice against answers that overlook the image.",
)
def mdpo(inputs: PreferenceInputs, options: MDPOOptions) -> PreferenceOutcome:
    """mDPO: DPO, plus a preference for the true image, plus an anchor (Wang et al., arXiv 2406.11839).

    -log sigmoid(beta h) - w_I log sigmoid(beta h_I) - w_A log sigmoid(beta log pi(y_w|I)/pi_ref(y_w|I) - delta), h_I
    as in :func:`image_dpo`. The anchor keeps the chosen answer from growing less likely while its margin grows. The
    paper's worse image is a small random crop; its published code hides visual tokens from the model instead. Either
    way the loss is the same; make it with `crop` or `mask` of the image negatives.

    Returns:
        values [pairs]; DPO with both weights at 0.
    """
    margin = image_margin(inputs, "mdpo")
    chosen, rejected = options.beta * inputs.chosen.log_ratio, options.beta * inputs.rejected.log_ratio
    values = (
        -logsigmoid(chosen - rejected)
        - options.image_weight * logsigmoid(options.beta * margin)
        - options.anchor_weight * logsigmoid(chosen - options.anchor)
    )
    return paired_outcome(inputs, values, chosen, rejected, image_margin=options.beta * margin)


def _adversarial_nll(answers: AnswerLogProbs, options: AdPOOptions) -> Tensor:
    """[pairs] float, the chosen answer's NLL under the adversarial image, tokens weighted by their probability."""
    if answers.by_token is None:
        if options.has_confidence_weights:
            raise ValueError(
                "the loss adpo weighs tokens: give chosen_negative_image.by_token, or set has_confidence_weights: false"
            )
        nll = -answers.policy
    else:
        log_probs, mask = answers.by_token.log_probs, answers.by_token.mask
        weights = log_probs.detach().exp() if options.has_confidence_weights else torch.ones_like(log_probs)
        nll = -torch.where(mask, weights * log_probs, 0.0).sum(-1)
    return nll / answers.tokens if options.is_length_averaged else nll


@preference_loss(
    "adpo",
    options=AdPOOptions,
    needs_negative_image=True,
    needs=frozenset({"rejected_negative_image"}),
    formula="−log σ(β [log π(y_w|I)/π_ref − log π(y_l|I_adv)/π_ref]) − λ Σ_t sg(π_t) log π_t(y_w|I_adv)",
    source="Liu et al., arXiv 2504.01735, preferred and adversarial image optimisation",
    use_when="The model should keep its answers under adversarial images; the worse image is made with `pgd`.",
)
def adpo(inputs: PreferenceInputs, options: AdPOOptions) -> PreferenceOutcome:
    """AdPO: the clean image's answer beats the one the adversarial image led to, and holds under it (arXiv 2504.01735).

    -log sigmoid(beta [log pi(y_w|I)/pi_ref(y_w|I) - log pi(y_l|I_adv)/pi_ref(y_l|I_adv)]) - lambda sum_t sg(pi_t) log
    pi_t, with pi_t the probability of token t of y_w under I_adv (Liu, Gui, Liu and Xu). Unlike in the other losses
    here the worse image isn't a reason to find the chosen answer less likely: the second term raises it there.

    `chosen_negative_image` and `rejected_negative_image` hold both answers under I_adv. `rejected`, the rejected answer
    under the clean image, isn't used; give `rejected_negative_image` for it again to save the pass.

    Returns:
        values [pairs]; with adversarial_weight 0, DPO between the chosen answer and `rejected_negative_image`.
    Raises:
        ValueError: the answers under the adversarial image are absent, or tokens are to be weighed and by_token is.
    """
    chosen = options.beta * inputs.chosen.log_ratio
    rejected = options.beta * negative_image(inputs, "adpo", "rejected_negative_image").log_ratio
    nll = _adversarial_nll(negative_image(inputs, "adpo"), options)
    values = -logsigmoid(chosen - rejected) + options.adversarial_weight * nll
    return paired_outcome(inputs, values, chosen, rejected, adversarial_nll=nll)


@preference_loss(
    "mia_dpo",
    options=MIADPOOptions,
    formula="−log σ(β h) − γ log π(y_w)/|y_w|",
    source="Liu et al., arXiv 2410.17637, DPO with an NLL term",
    use_when="Prompts with several images, where the rejected answer looked at the wrong one.",
)
@preference_loss(
    "ha_dpo",
    options=HADPOOptions,
    formula="−log σ(β h) − λ log π(y_w)/|y_w|",
    source="Zhao et al., arXiv 2311.16839, DPO with an auxiliary language-modelling term",
    use_when="Pairs of a hallucinated and a corrected description, where DPO alone makes the language worse.",
)
def dpo_with_nll(inputs: PreferenceInputs, options: HADPOOptions | MIADPOOptions) -> PreferenceOutcome:
    """DPO plus the chosen answer's negative log-likelihood a token, weighted (HA-DPO, MIA-DPO).

    -log sigmoid(beta h) - weight log pi(y_w) / |y_w| (Zhao et al., arXiv 2311.16839; Liu et al., arXiv 2410.17637).
    HA-DPO's paper takes the second term over supervised data, of which the chosen answers are the part that is always
    there; for other data, add its NLL in the training loop.

    Returns:
        values [pairs]; DPO at nll_weight 0.
    """
    chosen, rejected = options.beta * inputs.chosen.log_ratio, options.beta * inputs.rejected.log_ratio
    nll = -inputs.chosen.token_mean
    values = -logsigmoid(options.beta * log_ratio_margin(inputs)) + options.nll_weight * nll
    return paired_outcome(inputs, values, chosen, rejected, nll=nll)


def _first_shift(options: Any) -> RewardShift:
    return RewardShift(options.decay)


@preference_loss(
    "mpo",
    options=MPOOptions,
    initial_state=_first_shift,
    formula="−w_p log σ(r_w − r_l) − w_q [log σ(r_w − δ) + log σ(δ − r_l)] − w_g log π(y_w)/|y_w|",
    source="Wang et al., arXiv 2411.10442, the MPO objective",
    use_when="Reasoning with images from pairs of right and wrong solutions; keeps the chain of thought fluent.",
)
def mpo(inputs: PreferenceInputs, options: MPOOptions) -> PreferenceOutcome:
    """Mixed preference optimisation: which answer is better, whether each is good, and how to write the better one.

    w_p DPO + w_q BCO + w_g NLL (Wang et al., arXiv 2411.10442): -log sigmoid(r_w - r_l), then -log sigmoid(r_w - delta)
    - log sigmoid(delta - r_l), then -log pi(y_w)/|y_w|, with r = beta log pi/pi_ref. The reward shift delta is the mean
    of rewards of the steps before, decayed and of whole batches, so that it doesn't depend on micro-batches; the
    published code moves it by the very batch it is applied to.

    Returns:
        values [pairs]; DPO with the weights 1, 0, 0. Sums of desirable_reward and undesirable_reward, which the state
        learns from.
    """
    chosen, rejected = options.beta * inputs.chosen.log_ratio, options.beta * inputs.rejected.log_ratio
    shift = inputs.state.value if isinstance(inputs.state, RewardShift) else 0.0
    is_good = torch.ones_like(chosen, dtype=torch.bool)
    quality = shifted_classification(chosen, is_good, shift) + shifted_classification(rejected, ~is_good, shift)
    nll = -inputs.chosen.token_mean
    values = (
        -options.preference_weight * logsigmoid(chosen - rejected)
        + options.quality_weight * quality
        + options.generation_weight * nll
    )
    return paired_outcome(
        inputs,
        values,
        chosen,
        rejected,
        desirable_reward=chosen,
        undesirable_reward=rejected,
        reward_shift=torch.full_like(chosen, shift),
        quality=quality,
        nll=nll,
    )
