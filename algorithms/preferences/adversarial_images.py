"""Adversarial images by projected gradient descent: the least visible change that makes the chosen answer unlikely."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.preferences.image_negatives import ImageInputs, LogProbFunction
from algorithms.registry import IMAGE_NEGATIVES, Options, method


class PGDOptions(Options):
    """Options of PGD."""

    epsilon: float = Field(4 / 255, gt=0.0, le=1.0, description="Largest change of any value; values span 0 to 1.")
    step: float = Field(1 / 255, gt=0.0, le=1.0, description="Change of each value in a step.")
    steps: int = Field(10, ge=1, description="Gradient steps; each costs a forward and a backward pass.")
    has_random_start: bool = Field(True, description="Start at a random point of the ball, not at the image.")


def _log_probs(function: LogProbFunction, images: Tensor) -> Tensor:
    """[B] float, nats, checked."""
    values = function(images)
    if values.shape != images.shape[:1]:
        raise ValueError(
            f"log_prob_fn gave the shape {list(values.shape)}; it should be [{len(images)}], one log-probability an "
            "image"
        )
    require_finite("log_prob_fn's log-probability", values.detach(), index_name="image")
    return values


@method(
    IMAGE_NEGATIVES,
    "pgd",
    options=PGDOptions,
    formula="x ← clip(x − step·sign ∇_x log π(y_w|x)) to |x − x₀| ≤ ε and 0..1",
    source="Madry et al., arXiv 1706.06083, section 2.1; as a negative: AdPO, arXiv 2504.01735",
    use_when="Robustness against attacks (adpo), or the hardest negative that looks like the true image.",
)
def pgd(inputs: ImageInputs, options: PGDOptions) -> Tensor:
    """Images within epsilon of the true ones that lower the chosen answer's log-probability (arXiv 1706.06083, 2.1).

    x <- project(x - step sign(grad log pi(y_w | x))) onto |x - x_0| <= epsilon and 0..1, from a random point of that
    box. Of the images of all steps each sample keeps its own worst. AdPO attacks the vision tower's features instead;
    the answer's log-probability is what its loss and the others' are made of, and needs no tower of its own.

    The model's parameters get no gradient, but it should be in the mode it is trained in, without dropout.

    Returns:
        [B, C, H, W], float32 or float64.
    Raises:
        ValueError: there is no log_prob_fn, it gives the wrong shape or doesn't depend on the images, or images are in
            half precision, which can't tell a point of the ball from its neighbours outside.
        NonFiniteError: a log-probability is NaN or infinite; names the image.
    """
    function, clean = inputs.log_prob_fn, inputs.images.detach()
    if function is None:
        raise ValueError("pgd needs log_prob_fn: the chosen answers' log-probabilities as a function of the images")
    if clean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"pgd needs images in float32 or float64, got {clean.dtype}: the ball is finer than its steps")
    lowest, highest = (clean - options.epsilon).clamp(min=0.0), (clean + options.epsilon).clamp(max=1.0)
    current = clean
    if options.has_random_start:
        current = lowest + (highest - lowest) * inputs.uniform(*clean.shape).to(clean.dtype)
    worst, least = current, torch.full((len(clean),), float("inf"), dtype=clean.dtype, device=clean.device)
    with torch.enable_grad():
        for _ in range(options.steps):
            leaf = current.clone().requires_grad_()
            values = _log_probs(function, leaf)
            slope = _slope(values, leaf)
            worst, least = _keep_worse(worst, least, current, values.detach())
            current = (current - options.step * slope.sign()).clamp(lowest, highest)
    with torch.no_grad():
        return _keep_worse(worst, least, current, _log_probs(function, current))[0]


def _slope(values: Tensor, images: Tensor) -> Tensor:
    """[B, C, H, W], the gradient of each image's log-probability by its pixels."""
    slope = torch.autograd.grad(values.sum(), images, allow_unused=True)[0] if values.requires_grad else None
    if slope is None:
        raise ValueError("log_prob_fn doesn't depend on the images: give the model the pixels that are passed in")
    require_finite("the gradient by the images", slope, index_name="(image, channel, row, column)")
    return slope


def _keep_worse(worst: Tensor, least: Tensor, images: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's image of the least log-probability so far, and that log-probability."""
    is_worse = log_probs.to(least) < least
    return torch.where(is_worse[:, None, None, None], images, worst), torch.where(is_worse, log_probs.to(least), least)
