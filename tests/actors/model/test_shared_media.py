"""Images shared by several completions go through the vision tower once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors.config import ModelConfig
from actors.model.batches import model_batch
from actors.model.forward import completion_log_probs
from actors.model.loading import load_model
from actors.model.shared_media import SharedImages
from rollout.encoding import ExpandedPrompt, PromptEncoder
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from tests.tiny_model import build_tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vlm(tmp_path_factory.mktemp("model") / "vlm")


@pytest.fixture(scope="module")
def prompts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ExpandedPrompt]:
    """Two images of different sizes, no image, one image."""
    media = MediaStore(tmp_path_factory.mktemp("media"))
    generator = np.random.default_rng(0)

    def prompt(*sizes: tuple[int, int]) -> Prompt:
        images = [
            MediaPart(media.put_image(Image.fromarray(generator.integers(0, 255, (*s, 3), dtype=np.uint8))))
            for s in sizes
        ]
        return Prompt((Message("user", (*images, TextPart(f"how many? {len(sizes)}"))),))

    encoder = PromptEncoder.from_pretrained(folder, media)
    return [encoder.expand(p) for p in (prompt((56, 56), (84, 112)), prompt(), prompt((112, 56)))]


def log_probs_and_gradients(
    folder: Path, prompts: list[ExpandedPrompt], completions: list[np.ndarray], calls: list[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = ModelConfig(path=folder, precision="float32", max_length=512)
    model = load_model(config).double()
    tower = model.model.visual
    tower.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    batch = model_batch(prompts, completions, pad_token_id=0, token_features=("mm_token_type_ids",))
    found = completion_log_probs(model, batch, temperature=1.0)
    (
        found.log_probs.double() * torch.linspace(0.5, 1.5, found.log_probs.numel()).view_as(found.log_probs)
    ).sum().backward()
    return found.log_probs.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_shared_images_run_once_and_change_neither_log_probabilities_nor_gradients(
    folder: Path, prompts: list[ExpandedPrompt]
) -> None:
    generator = np.random.default_rng(1)
    order = [2, 0, 1, 0, 2, 0]
    completions = [generator.integers(10, 100, size).astype(np.int32) for size in (3, 5, 4, 2, 6, 1)]
    apart = [ExpandedPrompt(prompts[i].token_ids, dict(prompts[i].features)) for i in order]
    calls: list[int] = []
    expected, gradients = log_probs_and_gradients(folder, apart, completions, calls)
    found, shared_gradients = log_probs_and_gradients(folder, [prompts[i] for i in order], completions, calls)
    assert calls[1] == sum(len(prompts[i].features["pixel_values"]) for i in (0, 2))
    assert calls[0] > 2 * calls[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_of_merged_patches_follow_their_images() -> None:
    shared = SharedImages(torch.tensor([[1, 2, 2], [1, 2, 4]]), torch.tensor([1, 0, 1]))
    rows = shared.rows(3)
    assert rows is not None
    assert rows.tolist() == [1, 2, 0, 1, 2]
    patches = shared.rows(12)
    assert patches is not None
    assert patches.tolist() == [*range(4, 12), *range(4), *range(4, 12)]


def test_an_output_that_is_not_by_patch_is_refused() -> None:
    shared = SharedImages(torch.tensor([[1, 2, 2], [1, 2, 4]]), torch.tensor([0, 1]))
    assert shared.rows(5) is None
