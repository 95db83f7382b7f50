"""Worse images for preference losses: each supports its answer less than the true image. Adversarial ones are in
adversarial_images.py.

Images are [B, C, H, W] floats in 0..1, before the processor's normalisation; images of different sizes go in one at a
time (B = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from algorithms.finite import require_finite
from algorithms.registry import IMAGE_NEGATIVES, Options, method

HALF_STEP = 0.5 / 255
"""Half the distance of two 8-bit values: images nearer than this are the same once they are stored."""

LogProbFunction = Callable[[Tensor], Tensor]
"""`(images: [B, C, H, W]) -> [B]`, nats: the log-probability of each image's chosen answer, differentiable."""


@dataclass(frozen=True)
class ImageInputs:
    """True images, and what making worse ones may need.

    Attributes:
        images: [B, C, H, W] float, from 0 to 1.
        generator: source of every random choice, so that a seed gives the same images. It may live on the CPU while the
            images don't; then the result is the same on every device.
        group: [B] int64, equal where two rows show the same image (samples of one prompt); None where all differ.
        log_prob_fn: the chosen answers' log-probabilities as a function of the images, for adversarial ones.
    """

    images: Tensor
    generator: torch.Generator
    group: Tensor | None = None
    log_prob_fn: LogProbFunction | None = None

    def __post_init__(self) -> None:
        images = self.images
        if images.dim() != 4 or 0 in images.shape or not images.dtype.is_floating_point:
            raise ValueError(
                f"images are {list(images.shape)} {images.dtype}; they should be [B, C, H, W] floats, none of the "
                "sizes 0"
            )
        require_finite("images", images.detach(), index_name="(image, channel, row, column)")
        lowest, highest = float(images.detach().min()), float(images.detach().max())
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"images range from {lowest:g} to {highest:g}; they should lie in 0..1: divide 8-bit values by 255, "
                "and normalise only after"
            )
        if self.group is not None and self.group.shape != images.shape[:1]:
            raise ValueError(f"group has the shape {list(self.group.shape)}; it should be [{len(images)}]")

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws from 0 to 1, float32 on the images' device."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device).to(self.images.device)

    def normal(self) -> Tensor:
        """Standard normal draws in the images' shape, float32 on their device."""
        draws = torch.randn(self.images.shape, generator=self.generator, device=self.generator.device)
        return draws.to(self.images.device)


@dataclass(frozen=True)
class NegativeImages:
    """Worse images.

    Attributes:
        images: [B, C, H, W], of the true images' dtype and device, in 0..1; no gradient.
        is_changed: [B] bool, whether each differs from its true image anywhere by half an 8-bit step (1/510) or more. A
            crop of an even surface doesn't; such a pair of images has next to nothing to say.
    """

    images: Tensor
    is_changed: Tensor


def negative_images(name: str, inputs: ImageInputs, options: Mapping[str, Any] | Options) -> NegativeImages:
    """Worse images, made by the registered method `name`.

    Args:
        options: of the method, by name or as read before.
    Raises:
        RegistryError: no such method, or no such option.
        ValueError: the method can't make one of these images; gives the reason.
    """
    entry = IMAGE_NEGATIVES.get(name)
    read = options if isinstance(options, Options) else entry.read_options(options)
    made: Tensor = entry.function(inputs, read)
    images = made.detach().to(inputs.images.dtype).clamp(0.0, 1.0)
    return NegativeImages(images, ((images - inputs.images.detach()).abs() >= HALF_STEP).flatten(1).any(1))


def _single(images: Tensor) -> Tensor:
    """In float32 at least: half precision is too coarse to interpolate and convolve in."""
    return images.detach().to(torch.promote_types(images.dtype, torch.float32))


class CropOptions(Options):
    """Options of crop."""

    least_share: float = Field(0.05, gt=0.0, lt=1.0, description="Least share of the image's area that is kept.")
    most_share: float = Field(0.2, gt=0.0, lt=1.0, description="Largest share of the image's area that is kept.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least_share > self.most_share:
            raise ValueError(f"least_share {self.least_share:g} is above most_share {self.most_share:g}; swap them")
        return self


@method(
    IMAGE_NEGATIVES,
    "crop",
    options=CropOptions,
    formula="a random region of share s ∈ [least, most] of the area, resized to the whole",
    source="mDPO, arXiv 2406.11839, the conditional preference's negative",
    use_when="The usual choice: looks real, and lacks most of what the answer speaks of.",
)
def crop(inputs: ImageInputs, options: CropOptions) -> Tensor:
    """A random region of each image, as large as the whole image again (bilinear), its aspect kept (mDPO, 2406.11839).

    Place and share of the area are uniform.

    Returns:
        [B, C, H, W] in the range of each image's values.
    """
    images = _single(inputs.images)
    draws = inputs.uniform(len(images), 3).to(images.dtype)
    side = (options.least_share + (options.most_share - options.least_share) * draws[:, 0]).sqrt()
    # In coordinates from -1 to 1: the region's half side is `side`, so its centre lies within 1 - side of the middle.
    centre = (2 * draws[:, 1:] - 1) * (1 - side)[:, None]
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = centre
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class NoiseOptions(Options):
    """Options of noise."""

    std: float = Field(0.5, gt=0.0, description="Standard deviation of the noise; pixel values span 0 to 1.")


@method(
    IMAGE_NEGATIVES,
    "noise",
    options=NoiseOptions,
    formula="clip(x + std·ε, 0, 1),  ε ~ N(0, 1)",
    source="additive Gaussian noise; Image-DPO, arXiv 2501.00569, pixel-level corruption",
    use_when="A cheap negative whose strength is one number.",
)
def noise(inputs: ImageInputs, options: NoiseOptions) -> Tensor:
    """Each value plus independent Gaussian noise, cut to 0..1.

    Returns:
        [B, C, H, W].
    """
    images = _single(inputs.images)
    return (images + options.std * inputs.normal().to(images.dtype)).clamp(0.0, 1.0)


class DiffusionOptions(Options):
    """Options of diffusion."""

    step: int = Field(500, ge=1, le=1000, description="Steps of noising, of 1,000; at 1,000 nothing is left.")


@method(
    IMAGE_NEGATIVES,
    "diffusion",
    options=DiffusionOptions,
    formula="√ā_t·x + √(1 − ā_t)·ε,  ā_t = Π(1 − β_s),  β from 1e-4 to 0.02 in 1,000 steps",
    source="DDPM, arXiv 2006.11239, eq. 4; as a negative: CHiP, arXiv 2501.16629",
    use_when="As noise, where the image should fade with it.",
)
def diffusion(inputs: ImageInputs, options: DiffusionOptions) -> Tensor:
    """Step t of a diffusion model's forward process on values mapped to -1..1 (DDPM, arXiv 2006.11239, eq. 4).

    sqrt(a_t) x + sqrt(1 - a_t) eps, with the paper's linear schedule of 1,000 steps; mapped back and cut to 0..1.

    Returns:
        [B, C, H, W].
    """
    images = _single(inputs.images)
    left = float((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[: options.step]).prod())
    noised = math.sqrt(left) * (2 * images - 1) + math.sqrt(1 - left) * inputs.normal().to(images.dtype)
    return ((noised + 1) / 2).clamp(0.0, 1.0)


class BlurOptions(Options):
    """Options of blur."""

    std: float = Field(8.0, gt=0.0, description="Standard deviation of the Gaussian, in pixels.")


@method(
    IMAGE_NEGATIVES,
    "blur",
    options=BlurOptions,
    formula="x ∗ Gaussian(std), cut at 3·std",
    source="Gaussian blur; Image-DPO, arXiv 2501.00569, pixel-level corruption",
    use_when="Answers that hang on detail: text, counts, small objects.",
)
def blur(inputs: ImageInputs, options: BlurOptions) -> Tensor:
    """Each image convolved with a Gaussian, one axis after the other; border values are repeated outwards.

    Returns:
        [B, C, H, W] in the range of each image's values. The same at an even surface.
    """
    images = _single(inputs.images)
    radius = max(1, math.ceil(3 * options.std))
    places = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (places / options.std).square()).exp()
    kernel = kernel / kernel.sum()
    batch, channels, height, width = images.shape
    flat = images.reshape(batch * channels, 1, height, width)
    flat = functional.pad(flat, (radius, radius, 0, 0), mode="replicate")
    flat = functional.conv2d(flat, kernel.reshape(1, 1, 1, -1))
    flat = functional.pad(flat, (0, 0, radius, radius), mode="replicate")
    return functional.conv2d(flat, kernel.reshape(1, 1, -1, 1)).reshape(images.shape)


class BlankOptions(Options):
    """Options of blank."""

    fill: Literal["mean", "black"] = Field("mean", description="The image's own mean colour, or black.")


class MaskOptions(BlankOptions):
    """Options of mask."""

    patch: int = Field(28, ge=1, description="Side of a patch, in pixels; the vision tower's own hides whole tokens.")
    share: float = Field(0.7, gt=0.0, le=1.0, description="Share of patches that are hidden; at least one is.")


def _fill(images: Tensor, fill: Literal["mean", "black"]) -> Tensor:
    """[B, C, 1, 1], the colour of what is hidden."""
    mean = images.mean((2, 3), keepdim=True)
    return mean if fill == "mean" else torch.zeros_like(mean)


@method(
    IMAGE_NEGATIVES,
    "mask",
    options=MaskOptions,
    formula="a random share of patches takes the fill colour",
    source="random patch masking; hidden visual tokens in mDPO's code, arXiv 2406.11839",
    use_when="As crop, where the place of what is left should stay.",
)
def mask(inputs: ImageInputs, options: MaskOptions) -> Tensor:
    """A random share of each image's square patches takes the fill colour; patches at the edge may be cut.

    Returns:
        [B, C, H, W]; every patch is either hidden as a whole or untouched.
    """
    images = _single(inputs.images)
    batch, _, height, width = images.shape
    rows, columns = math.ceil(height / options.patch), math.ceil(width / options.patch)
    hidden = max(1, round(options.share * rows * columns))
    order = inputs.uniform(batch, rows * columns).argsort(1)
    is_hidden = torch.zeros(batch, rows * columns, dtype=torch.bool, device=images.device)
    is_hidden.scatter_(1, order[:, :hidden], True)
    by_pixel = is_hidden.reshape(batch, 1, rows, columns)
    by_pixel = by_pixel.repeat_interleave(options.patch, 2).repeat_interleave(options.patch, 3)
    return torch.where(by_pixel[:, :, :height, :width], _fill(images, options.fill), images)


@method(
    IMAGE_NEGATIVES,
    "blank",
    options=BlankOptions,
    formula="one colour everywhere: the image's mean, or black",
    source="the image taken away altogether; CHiP, arXiv 2501.16629, the black negative",
    use_when="To tell an answer that needs the image from one that language alone explains.",
)
def blank(inputs: ImageInputs, options: BlankOptions) -> Tensor:
    """An image of one colour, each image's own mean or black. Nothing in it is random.

    Returns:
        [B, C, H, W].
    """
    images = _single(inputs.images)
    return _fill(images, options.fill).expand_as(images)


@method(
    IMAGE_NEGATIVES,
    "swap",
    formula="another group's image of the batch",
    source="a random image as the negative; CHiP, arXiv 2501.16629",
    use_when="Images of one size and kind; the negative is a real image that is just not this one.",
)
def swap(inputs: ImageInputs, options: Options) -> Tensor:
    """The image of another sample, never one of the same group, in a random order.

    Groups are put in a random order in a ring, and each sample takes an image of the group after its own, the one of
    its own rank. With groups of equal size that is a permutation without a fixed point (a derangement); a group larger
    than the one after it takes further on, and round again.

    Returns:
        [B, C, H, W].
    Raises:
        ValueError: there is only one image.
    """
    count = len(inputs.images)
    device = inputs.images.device
    group = torch.arange(count, device=device) if inputs.group is None else inputs.group
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(
            f"swap needs images of at least two groups in a batch, got {count} of one: there is no other image to "
            "take. Put more prompts in a batch, or choose another negative"
        )
    place = inputs.uniform(len(sizes)).argsort().argsort()
    order = place[index].argsort(stable=True)
    sizes_in_order = torch.empty_like(sizes).scatter_(0, place, sizes)
    ends = sizes_in_order.cumsum(0)
    mine = place[index][order]
    rank = torch.arange(count, device=device) - (ends - sizes_in_order)[mine]
    partner = (ends[mine] + rank % (count - sizes_in_order[mine])) % count
    source = torch.empty_like(order).scatter_(0, order, order[partner])
    return inputs.images.detach()[source]
