"""Tiny models in Hugging Face folders, made from configs in about a second, for tests that start real engines."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHARACTERS = (*(chr(code) for code in range(32, 127)), "\n")
VOCABULARY = {token: index for index, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}
VOCABULARY_SIZE = 128
MAX_POSITIONS = 1024

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_vlm(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL of 0.5 million parameters (float32, random) with tokenizer, chat template and processor.

    Its tokens are single characters; an image of 56 x 56 pixels becomes 4 placeholder tokens.

    Args:
        folder: where to write it; made if need be.
        tied: whether the output head shares the input embeddings.
        seed: of the weights; torch's global random state is left as it was.
    Returns:
        The folder.
    """
    config = Qwen2_5_VLConfig(
        text_config={
            **_text_shape(tied),
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=VOCABULARY["<|image_pad|>"],
        video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"],
        vision_end_token_id=VOCABULARY["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    _set_generation_defaults(model)
    model.save_pretrained(folder)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}),
        tokenizer=_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return Path(folder)


def build_tiny_lm(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write a text-only Llama of 0.3 million parameters (float32, random) with the same tokenizer.

    Args:
        folder: where to write it; made if need be.
        tied: whether the output head shares the input embeddings.
        seed: of the weights; torch's global random state is left as it was.
    Returns:
        The folder.
    """
    config = LlamaConfig(**_text_shape(tied), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    _set_generation_defaults(model)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return Path(folder)


def _text_shape(tied: bool) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tied,
        "bos_token_id": VOCABULARY["<|im_start|>"],
        "eos_token_id": VOCABULARY["<|im_end|>"],
        "pad_token_id": VOCABULARY["<|endoftext|>"],
    }


def _set_generation_defaults(model: torch.nn.Module) -> None:
    generation_config = model.generation_config
    generation_config.bos_token_id = VOCABULARY["<|im_start|>"]
    generation_config.eos_token_id = VOCABULARY["<|im_end|>"]
    generation_config.pad_token_id = VOCABULARY["<|endoftext|>"]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )
