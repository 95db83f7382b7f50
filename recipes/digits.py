"""The demo's model and data: an untrained vision-language policy, and questions about the sum of two digits.

The images are scikit-learn's real handwritten digits. A dataset builder of your own can start from this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from rollout.datasets import dataset_builder
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart

QUESTION = "What is the sum of these two digits?"
IMAGE_SIZE = 56
# At transformers' 0.02 a model this narrow takes twice as many steps to start looking at the images.
INITIALIZER_RANGE = 0.05
SPLIT_SIZES = {"evaluation": 400, "sft": 200}
"""Images of the first two splits; the other 1,197 are for reinforcement learning."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|unknown|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WHOLE_WORDS = (
    *("<answer>", "</answer>", "system", "user", "assistant"),
    *("What", " is", " the", " sum", " of", " these", " two", " digits"),
)
CHARACTERS = (*tuple(chr(code) for code in range(32, 127)), "\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII characters, with whole tokens for the question's words and the answer's tags."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + WHOLE_WORDS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    words = "|".join(sorted(WHOLE_WORDS, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{words}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.image_token, fast.video_token = "<|image_pad|>", "<|video_pad|>"
    return fast


def make_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, image processor and chat template; an image of 56 x 56 pixels becomes 4 tokens."""
    tokenizer = make_tokenizer()
    size = {"shortest_edge": IMAGE_SIZE * IMAGE_SIZE, "longest_edge": 4 * IMAGE_SIZE * IMAGE_SIZE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL of 0.57 million parameters in float32."""
    vocabulary = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 128,
            "initializer_range": INITIALIZER_RANGE,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "bos_token_id": vocabulary["<|im_start|>"],
            "eos_token_id": vocabulary["<|im_end|>"],
            "pad_token_id": vocabulary["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "initializer_range": INITIALIZER_RANGE,
            "num_heads": 4,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary["<|im_start|>"],
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        do_sample=True,
    )
    return model


def build(out: Path, seed: int) -> None:
    """Write the untrained policy with its processor as a Hugging Face folder."""
    processor = make_processor()
    make_model(processor.tokenizer, seed).save_pretrained(out)
    processor.save_pretrained(out)


def digit_images() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits as images of 56 x 56 pixels, and the digit each one shows."""
    digits = load_digits()
    images = [
        Image.fromarray((pixels / 16 * 255).astype(np.uint8))
        .resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        .convert("RGB")
        for pixels in digits.images
    ]
    return images, digits.target.astype(np.int64)


def split_digits(seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Which images each split may show, as indices into :func:`digit_images`. No image is in two splits."""
    order = np.random.default_rng(seed).permutation(len(load_digits().target))
    evaluation, sft = SPLIT_SIZES["evaluation"], SPLIT_SIZES["sft"]
    return {
        "evaluation": order[:evaluation],
        "sft": order[evaluation : evaluation + sft],
        "train": order[evaluation + sft :],
    }


@dataset_builder("digits-sum")
def digits_sum(
    media: MediaStore, split: str, pairs: int = 1000, seed: int = 0, forget_carry: float = 0.8
) -> Iterator[Prompt]:
    """Two handwritten digits and the question what they sum to.

    Args:
        media: where the images are stored.
        split: "sft" (with a response to imitate), "train" or "evaluation".
        pairs: how many prompts.
        seed: of the split and of the pairs.
        forget_carry: share of the responses to imitate that give 7 + 8 as 5: the demonstrator is no expert, and
            what is wrong with the warm start is for reinforcement learning to find out.
    """
    splits = split_digits(seed)
    if split not in splits:
        raise ValueError(f"digits-sum has no split {split!r}; it has {', '.join(splits)}")
    images, labels = digit_images()
    refs = {int(index): media.put_image(images[index]) for index in splits[split]}
    random = np.random.default_rng([seed, *split.encode()])
    for _ in range(pairs):
        left, right = (int(index) for index in random.choice(splits[split], 2))
        first, second = int(labels[left]), int(labels[right])
        total = first + second
        metadata: dict[str, Any] = {"digits": [first, second]}
        if split == "sft":
            said = total - 10 if total >= 10 and random.random() < forget_carry else total
            metadata["response"] = f"{first}+{second}=<answer>{said}</answer>"
        parts = (MediaPart(refs[left]), MediaPart(refs[right]), TextPart(QUESTION))
        yield Prompt((Message("user", parts),), target=str(total), metadata=metadata)


def main() -> None:
    """Command line: ``python recipes/digits.py build --out FOLDER [--seed 0]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "build", help="write the untrained policy"
    )
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--seed", type=int, default=0, help="seed of the weights")
    options = parser.parse_args()
    build(options.out, options.seed)


if __name__ == "__main__":
    main()
