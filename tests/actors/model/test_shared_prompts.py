"""Rows of several completions give what separate sequences give, in every family that is trusted with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2VLConfig, Qwen3Config
from transformers import AutoModelForImageTextToText as AutoVision

from actors.config import ModelConfig
from actors.model.batches import model_batch
from actors.model.forward import completion_log_probs
from actors.model.loading import load_model
from actors.model.shared_prompts import FAMILIES, can_share_prompts, row_layout
from rollout.encoding import ExpandedPrompt, PromptEncoder
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from tests.tiny_model import build_tiny_vlm

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vlm(tmp_path_factory.mktemp("model") / "vlm")


@pytest.fixture(scope="module")
def prompts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ExpandedPrompt]:
    """Two images of different sizes, no image, one image."""
    media = MediaStore(tmp_path_factory.mktemp("media"))
    random = np.random.default_rng(0)
    encoder = PromptEncoder.from_pretrained(folder, media)
    found = []
    for sizes in (((56, 56), (84, 112)), (), ((112, 56),)):
        images = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        parts = (*(MediaPart(media.put_image(image)) for image in images), TextPart(f"how many? {len(sizes)}"))
        found.append(encoder.expand(Prompt((Message("user", parts),))))
    return found


def family(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if name == "qwen2_5_vl":
        return load_model(ModelConfig(path=folder, precision="float32", max_length=512)).double()
    if name == "qwen2_vl":
        tiny = load_model(ModelConfig(path=folder, precision="float32", max_length=512)).config
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 14}
        text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        ids = {key: getattr(tiny, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id")}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        return AutoVision.from_config(config, attn_implementation="sdpa").double().eval()
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return AutoModelForCausalLM.from_config(kinds[name](**TEXT), attn_implementation="sdpa").double().eval()


def log_probs_and_gradients(
    model: Any, prompts: list[ExpandedPrompt], completions: list[np.ndarray], rows: list[int] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    features = ("mm_token_type_ids",) if "vl" in model.config.model_type else ()
    batch = model_batch(prompts, completions, pad_token_id=0, token_features=features, rows=rows)
    found = completion_log_probs(model, batch, temperature=1.0).log_probs
    (found * torch.linspace(0.5, 1.5, found.numel()).view_as(found)).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_rows_change_neither_log_probabilities_nor_gradients(
    name: str, folder: Path, prompts: list[ExpandedPrompt]
) -> None:
    model = family(name, folder)
    assert model.config.model_type == name
    assert can_share_prompts(model)
    if "vl" not in name:
        prompts = [ExpandedPrompt(np.arange(5, 5 + n, dtype=np.int32), {}) for n in (9, 4, 13)]
    random = np.random.default_rng(1)
    rows = [0, 0, 0, 1, 2, 2, 3]
    held = [prompts[i] for i in (0, 0, 0, 1, 2, 2, 0)]
    completions = [random.integers(10, 100, size).astype(np.int32) for size in (3, 5, 1, 2, 6, 4, 7)]
    expected, gradients = log_probs_and_gradients(model, held, completions, None)
    found, shared = log_probs_and_gradients(model, held, completions, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == shared.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(shared[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


def test_a_completion_sees_the_prompt_and_itself_and_stands_right_behind_the_prompt() -> None:
    layout = row_layout([2], [[2, 1]], 6)
    assert layout.segments.tolist() == [[0, 0, 1, 1, 2, -1]]
    assert layout.offsets.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert layout.attention_mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_a_model_with_windows_or_another_attention_is_not_trusted_with_rows() -> None:
    windowed = Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert not can_share_prompts(AutoModelForCausalLM.from_config(windowed, attn_implementation="sdpa"))
    assert not can_share_prompts(AutoModelForCausalLM.from_config(LlamaConfig(**TEXT), attn_implementation="eager"))
