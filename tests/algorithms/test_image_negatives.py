"""Worse images: they keep shape, range and seed, differ from the true ones, and do what their names say."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from algorithms.finite import NonFiniteError
from algorithms.preferences import adversarial_images  # noqa: F401  registers pgd
from algorithms.preferences.image_negatives import ImageInputs, NegativeImages, negative_images
from algorithms.registry import IMAGE_NEGATIVES, RegistryError

WITHOUT_MODEL = ("crop", "noise", "diffusion", "blur", "mask", "blank", "swap")
RANDOM = ("crop", "noise", "diffusion", "mask", "swap", "pgd")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)).to(dtype)


class Reader(nn.Module):
    """A small convolutional network that gives each image's answer a log-probability."""

    def __init__(self, channels: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 8, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
            ).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        log_probs: Tensor = self.layers(4 * images - 2).log_softmax(-1)[:, 1]
        return log_probs


def make(name: str, images: Tensor, seed: int = 0, **options: Any) -> NegativeImages:
    inputs = ImageInputs(images, seeded(seed), log_prob_fn=Reader(images.shape[1], dtype=images.dtype))
    return negative_images(name, inputs, options)


def test_the_names_are_registered_with_formula_source_and_use() -> None:
    assert set(IMAGE_NEGATIVES) == {*WITHOUT_MODEL, "pgd"}
    for name in IMAGE_NEGATIVES:
        entry = IMAGE_NEGATIVES.get(name)
        assert entry.formula
        assert entry.source
        assert entry.use_when
        assert all(field.description for field in entry.options.model_fields.values())


@pytest.mark.parametrize("name", [*WITHOUT_MODEL, "pgd"])
@given(
    count=st.integers(2, 4),
    channels=st.integers(1, 3),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_negatives_keep_shape_and_range_follow_the_seed_and_differ(
    name: str, count: int, channels: int, height: int, width: int, seed: int
) -> None:
    images = random_images(count, channels, height, width, seed=seed)
    before = images.clone()
    made = make(name, images, seed)
    assert made.images.shape == images.shape
    assert made.images.dtype == images.dtype
    assert made.images.device == images.device
    assert not made.images.requires_grad
    assert 0.0 <= float(made.images.min()) <= float(made.images.max()) <= 1.0
    assert bool(made.is_changed.all())
    assert bool((made.images != images).flatten(1).any(1).all())
    assert torch.equal(images, before)
    assert torch.equal(make(name, images, seed).images, made.images)


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_gives_other_images(name: str) -> None:
    images = random_images(5, 3, 16, 16)
    options = {"patch": 4} if name == "mask" else {}
    made = [make(name, images, seed, **options).images for seed in range(3)]
    assert not (torch.equal(made[0], made[1]) and torch.equal(made[0], made[2]))


@pytest.mark.parametrize("name", WITHOUT_MODEL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back_as_they_were(name: str, dtype: torch.dtype) -> None:
    made = make_without_model(name, random_images(2, 3, 16, 16, dtype=dtype))
    assert made.images.dtype == dtype
    assert 0.0 <= float(made.images.min()) <= float(made.images.max()) <= 1.0
    assert bool(made.is_changed.all())


def make_without_model(name: str, images: Tensor, seed: int = 0, **options: Any) -> NegativeImages:
    return negative_images(name, ImageInputs(images, seeded(seed)), options)


@pytest.mark.parametrize("name", ["crop", "noise", "diffusion", "blur", "mask", "blank"])
def test_one_image_alone_is_enough(name: str) -> None:
    assert bool(make_without_model(name, random_images(1, 3, 16, 20)).is_changed.all())


@pytest.mark.parametrize("name", ["crop", "blur", "blank"])
def test_an_even_image_is_reported_as_unchanged_by_what_cant_change_it(name: str) -> None:
    images = torch.cat([torch.full((1, 3, 16, 16), 0.5), random_images(1, 3, 16, 16)])
    assert make_without_model(name, images).is_changed.tolist() == [False, True]


def test_crop_keeps_a_region_of_the_share_asked_for() -> None:
    # Columns rise from 0 to 1; the crop's own range is its side, which is the square root of the area's share.
    width = 400
    images = ((torch.arange(width) + 0.5) / width).expand(64, 1, 8, width)
    made = make_without_model("crop", images, least_share=0.09, most_share=0.25).images[:, 0, 0]
    side = (made[:, -1] - made[:, 0]) * width / (width - 1)
    assert 0.3 - 0.01 <= float(side.min()) <= float(side.max()) <= 0.5 + 0.01
    assert float(side.max() - side.min()) > 0.1
    # Regions lie anywhere: some near the left end, some near the right one.
    assert float(made[:, 0].min()) < 0.15
    assert float(made[:, -1].max()) > 0.85
    torch.testing.assert_close(made.diff(dim=1).amin(1), made.diff(dim=1).amax(1), atol=1e-4, rtol=0)


def test_crop_refuses_bounds_the_wrong_way_round() -> None:
    with pytest.raises(RegistryError, match=r"least_share 0\.5 is above most_share 0\.2; swap them"):
        make("crop", random_images(2, 3, 8, 8), least_share=0.5, most_share=0.2)


def test_noise_has_the_deviation_asked_for() -> None:
    images = torch.full((1, 1, 200, 200), 0.5)
    difference = make_without_model("noise", images, std=0.05).images - images
    assert float(difference.std()) == pytest.approx(0.05, rel=0.02)
    assert float(difference.mean()) == pytest.approx(0.0, abs=1e-3)


def test_diffusion_is_the_forward_process_worked_by_hand() -> None:
    # Step 1: a = 1 - 1e-4; values map to -1..1, so 0.75 becomes 0.5 and its mean sqrt(a) / 2 = 0.499975, back
    # 0.7499875; the deviation is sqrt(1e-4) = 0.01 there and 0.005 in 0..1.
    images = torch.full((1, 1, 300, 300), 0.75)
    made = make_without_model("diffusion", images, step=1).images
    assert float(made.mean()) == pytest.approx(0.7499875, abs=1e-4)
    assert float(made.std()) == pytest.approx(0.005, rel=0.02)


def test_diffusion_leaves_less_of_the_image_with_every_step_and_nothing_at_the_end() -> None:
    images = random_images(1, 1, 64, 64).round()
    kept = []
    for step in (1, 250, 500, 1000):
        made = make_without_model("diffusion", images, seed=1, step=step).images
        kept.append(float(torch.corrcoef(torch.stack([images.flatten(), made.flatten()]))[0, 1]))
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.99
    assert abs(kept[-1]) < 0.05


def test_blur_of_a_point_is_the_gaussian_written_out() -> None:
    images = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    images[0, 0, 10, 10] = 1.0
    made = make_without_model("blur", images, std=1.5).images[0, 0]
    weights = [math.exp(-0.5 * (k / 1.5) ** 2) for k in range(-5, 6)]
    total = sum(weights)
    for row in range(21):
        for column in range(21):
            inside = abs(row - 10) <= 5 and abs(column - 10) <= 5
            expected = weights[row - 5] * weights[column - 5] / total**2 if inside else 0.0
            assert float(made[row, column]) == pytest.approx(expected, abs=1e-12)


def test_blur_wider_than_the_image_still_stays_within_its_range() -> None:
    images = random_images(2, 3, 4, 5)
    made = make_without_model("blur", images, std=30.0).images
    assert bool((made.amax((2, 3)) <= images.amax((2, 3)) + 1e-6).all())
    assert bool((made.amin((2, 3)) >= images.amin((2, 3)) - 1e-6).all())


@given(
    height=st.integers(3, 30),
    width=st.integers(3, 30),
    patch=st.integers(1, 12),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_mask_hides_whole_patches_of_the_number_asked_for(
    height: int, width: int, patch: int, share: float, seed: int
) -> None:
    images = random_images(2, 1, height, width, seed=seed).clamp(min=0.01)
    made = make_without_model("mask", images, seed, patch=patch, share=share, fill="black").images
    rows, columns = math.ceil(height / patch), math.ceil(width / patch)
    for image, result in zip(images, made, strict=True):
        hidden = 0
        for row in range(rows):
            for column in range(columns):
                place = (0, slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch))
                is_hidden = bool((result[place] == 0).all())
                assert is_hidden or torch.equal(result[place], image[place])
                hidden += is_hidden
        assert hidden == max(1, round(share * rows * columns))


def test_blank_is_each_images_mean_colour_or_black() -> None:
    images = random_images(3, 3, 7, 9, dtype=torch.float64)
    mean = make_without_model("blank", images).images
    torch.testing.assert_close(mean, images.mean((2, 3), keepdim=True).expand_as(images))
    assert not make_without_model("blank", images, fill="black").images.any()


def sources(images: Tensor, made: Tensor) -> list[int]:
    """Which image each result is."""
    return [next(j for j, each in enumerate(images) if torch.equal(each, result)) for result in made]


@given(count=st.integers(2, 12), seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_swap_is_a_permutation_in_which_none_keeps_its_own(count: int, seed: int) -> None:
    images = random_images(count, 1, 2, 2, seed=seed)
    taken = sources(images, make_without_model("swap", images, seed).images)
    assert sorted(taken) == list(range(count))
    assert all(i != source for i, source in enumerate(taken))


@given(group=st.lists(st.integers(0, 4), min_size=2, max_size=14), seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_swap_never_takes_an_image_of_the_same_group(group: list[int], seed: int) -> None:
    images = random_images(len(group), 1, 2, 2, seed=seed)
    inputs = ImageInputs(images, seeded(seed), torch.tensor(group) * 1000 - 7)
    if len(set(group)) == 1:
        with pytest.raises(ValueError, match=f"at least two groups in a batch, got {len(group)} of one"):
            negative_images("swap", inputs, {})
        return
    taken = sources(images, negative_images("swap", inputs, {}).images)
    assert all(group[i] != group[source] for i, source in enumerate(taken))
    if len({group.count(each) for each in group}) == 1:
        assert sorted(taken) == list(range(len(group)))


def test_swap_refuses_a_batch_of_one_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"at least two groups in a batch, got 1 of one.*choose another negative"):
        make_without_model("swap", random_images(1, 3, 8, 8))


@pytest.mark.parametrize("has_random_start", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pgd_lowers_each_answers_log_probability_within_the_ball(has_random_start: bool, seed: int) -> None:
    images = random_images(4, 3, 12, 12, seed=seed)
    # Values at the very ends of the range, where the ball is cut.
    images[0] = images[0].round()
    reader = Reader(3, seed)
    inputs = ImageInputs(images, seeded(seed), log_prob_fn=reader)
    made = negative_images("pgd", inputs, {"epsilon": 0.03, "step": 0.01, "has_random_start": has_random_start})
    assert bool((reader(made.images) < reader(images)).all())
    assert float((made.images - images).abs().max()) <= 0.03 + 1e-6
    assert 0.0 <= float(made.images.min()) <= float(made.images.max()) <= 1.0


def test_pgd_goes_lower_with_more_steps_and_a_larger_ball() -> None:
    images = random_images(4, 3, 12, 12)
    reader = Reader(3)

    def reached(**options: Any) -> float:
        inputs = ImageInputs(images, seeded(0), log_prob_fn=reader)
        made = negative_images("pgd", inputs, {"has_random_start": False, "step": 0.01, **options})
        return float(reader(made.images).detach().mean())

    few, many = reached(epsilon=0.1, steps=1), reached(epsilon=0.1, steps=10)
    assert many < few
    assert many < reached(epsilon=0.02, steps=10)


def test_pgds_first_step_goes_against_the_gradient_of_finite_differences() -> None:
    images = 0.2 + 0.6 * random_images(1, 1, 4, 4, dtype=torch.float64)
    reader = Reader(1, seed=3, dtype=torch.float64)
    inputs = ImageInputs(images, seeded(0), log_prob_fn=reader)
    options = {"epsilon": 0.01, "step": 0.01, "steps": 1, "has_random_start": False}
    made = negative_images("pgd", inputs, options).images
    for row in range(4):
        for column in range(4):
            nudge = torch.zeros_like(images)
            nudge[0, 0, row, column] = 1e-6
            slope = float((reader(images + nudge) - reader(images - nudge)).detach() / 2e-6)
            assert float(made[0, 0, row, column] - images[0, 0, row, column]) == pytest.approx(
                -math.copysign(0.01, slope), abs=1e-12
            )


def test_pgd_keeps_each_images_worst_step_and_not_the_last() -> None:
    # The log-probability is least at 0.5 + 0.01; steps of 0.03 overshoot, and the first is the nearest.
    images = torch.full((1, 1, 2, 2), 0.5)
    inputs = ImageInputs(images, seeded(0), log_prob_fn=lambda x: (x - 0.51).abs().sum((1, 2, 3)))
    options = {"epsilon": 0.1, "step": 0.03, "steps": 3, "has_random_start": False}
    # 0.5 is 0.01 from the least, 0.53 is 0.02: the image itself was the worst.
    assert negative_images("pgd", inputs, options).is_changed.tolist() == [False]
    # Steps of 0.006 visit 0.5, 0.506, 0.512, 0.506: 0.512 is nearest to 0.51, and isn't the last.
    near = negative_images("pgd", inputs, {**options, "step": 0.006}).images
    torch.testing.assert_close(near, torch.full_like(near, 0.512))


def test_pgd_leaves_the_model_without_gradients_also_where_gradients_are_off() -> None:
    images = random_images(2, 3, 8, 8)
    reader = Reader(3)
    with torch.no_grad():
        made = negative_images("pgd", ImageInputs(images, seeded(0), log_prob_fn=reader), {})
    assert bool(made.is_changed.all())
    assert all(parameter.grad is None for parameter in reader.parameters())


def test_pgd_treats_each_image_alone() -> None:
    images = random_images(3, 3, 8, 8)
    reader = Reader(3)
    options = {"has_random_start": False}
    whole = negative_images("pgd", ImageInputs(images, seeded(0), log_prob_fn=reader), options).images
    for i in range(3):
        alone = negative_images("pgd", ImageInputs(images[i : i + 1], seeded(0), log_prob_fn=reader), options).images
        torch.testing.assert_close(alone[0], whole[i])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (None, "pgd needs log_prob_fn"),
        (lambda x: x.sum(), r"gave the shape \[\]; it should be \[2\]"),
        (lambda x: torch.zeros(2, requires_grad=True), "doesn't depend on the images"),
        (lambda x: x.detach().sum((1, 2, 3)), "doesn't depend on the images"),
    ],
)
def test_pgd_refuses_a_function_it_cant_descend(function: Any, reason: str) -> None:
    inputs = ImageInputs(random_images(2, 3, 8, 8), seeded(0), log_prob_fn=function)
    with pytest.raises(ValueError, match=reason):
        negative_images("pgd", inputs, {})


def test_pgd_refuses_half_precision_with_the_reason() -> None:
    images = random_images(2, 3, 8, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16"):
        negative_images("pgd", ImageInputs(images, seeded(0), log_prob_fn=lambda x: x.sum((1, 2, 3))), {})


def test_pgd_names_the_image_whose_log_probability_isnt_finite() -> None:
    images = random_images(2, 3, 8, 8)
    inputs = ImageInputs(images, seeded(0), log_prob_fn=lambda x: x.sum((1, 2, 3)) + torch.tensor([0.0, math.nan]))
    with pytest.raises(NonFiniteError, match="log_prob_fn's log-probability of image 1 is nan"):
        negative_images("pgd", inputs, {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_arent_finite_are_named(value: float) -> None:
    images = random_images(2, 3, 4, 4)
    images[1, 2, 3, 0] = value
    with pytest.raises(NonFiniteError, match=r"images of \(image, channel, row, column\) \(1, 2, 3, 0\)"):
        ImageInputs(images, seeded(0))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.rand(3, 8, 8), r"\[3, 8, 8\] torch\.float32; they should be \[B, C, H, W\] floats"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"torch\.uint8; they should be"),
        (torch.zeros(0, 3, 8, 8), "none of the sizes 0"),
        (torch.full((1, 3, 4, 4), 200.0), r"range from 200 to 200; they should lie in 0\.\.1: divide 8-bit values"),
        (torch.full((1, 3, 4, 4), -1.0), r"range from -1 to -1"),
    ],
)
def test_tensors_that_arent_images_are_refused_with_what_would_be_right(images: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ImageInputs(images, seeded(0))


def test_a_group_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group has the shape \[3\]; it should be \[2\]"):
        ImageInputs(random_images(2, 3, 4, 4), seeded(0), torch.zeros(3, dtype=torch.int64))


def test_an_unknown_negative_or_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(RegistryError, match=r"no image negative 'crops'.*Did you mean 'crop'"):
        make("crops", random_images(2, 3, 8, 8))
    with pytest.raises(RegistryError, match=r"stdev is not an option of 'noise'.*Did you mean std"):
        make("noise", random_images(2, 3, 8, 8), stdev=0.1)
