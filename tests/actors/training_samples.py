"""Samples for trainer tests: two-image, one-image and text-only prompts with completions of many lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from rollout.samples import TrainingSample


def make_samples(
    model: Path, media_folder: Path, count: int = 12, *, seed: int = 0, with_images: bool = True
) -> list[TrainingSample]:
    """Random but plausible samples; every third prompt is text only, every third has two images."""
    store = MediaStore(media_folder)
    encoder = PromptEncoder.from_pretrained(model, store)
    random = np.random.default_rng(seed)
    images = [
        MediaPart(store.put_image(Image.fromarray(random.integers(0, 255, (56, 56, 3), dtype=np.uint8))))
        for _ in range(4)
    ]
    return [
        _sample(encoder, random, index, [images[i % 4] for i in range(index % 3)] if with_images else [])
        for index in range(count)
    ]


def _sample(encoder: PromptEncoder, random: np.random.Generator, index: int, images: list[MediaPart]) -> TrainingSample:
    prompt = Prompt((Message("user", (*images, TextPart("question " + "?" * (index % 4)))),), target=index)
    tokens = int(random.integers(2, 20))
    loss_mask = np.ones(tokens, np.bool_)
    loss_mask[0] = index % 4 != 0
    return TrainingSample(
        prompt=prompt,
        prompt_token_ids=encoder.expand(prompt).token_ids,
        token_ids=random.integers(8, 100, tokens).astype(np.int32),
        loss_mask=loss_mask,
        advantages=np.full(tokens, random.normal(), np.float32),
        behaviour_log_probs=random.normal(-4.8, 0.3, tokens).astype(np.float32),
        policy_versions=np.zeros(tokens, np.int32),
        reference_log_probs=random.normal(-4.8, 0.3, tokens).astype(np.float32),
    )
