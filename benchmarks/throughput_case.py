"""What both engines of the throughput benchmark are given: a policy whose lengths are known, and prompts with images.

Lengths are a property of the weights: after every token the policy ends its turn with the same, chosen probability.
So both engines draw lengths from the same distribution without any setting of theirs taking part.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
NEVER_LOGIT = -60.0
CHANNEL = 8.0
"""Height of the constant channel. At 8 the other 127 together change its share of the norm by about a percent."""


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        name: names its folder.
        max_tokens: the token limit.
        mean_tokens: mean length where nothing limited it (geometric); None never ends, so that all reach the limit.
        prompts_per_step: prompts of a training step.
        group_size: completions a prompt.
    """

    name: str
    max_tokens: int
    mean_tokens: float | None
    prompts_per_step: int = 32
    group_size: int = 8

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def expected_tokens(self) -> float:
        """Mean length under the limit: the sum over k < max_tokens of (1 - p)^k."""
        if self.mean_tokens is None:
            return float(self.max_tokens)
        return self.mean_tokens * (1 - (1 - 1 / self.mean_tokens) ** self.max_tokens)


CASES = (
    Case("fixed-32", max_tokens=32, mean_tokens=None),
    Case("unequal-256", max_tokens=256, mean_tokens=64.0),
)


def _digits() -> ModuleType:
    """The demo's own file, for its model, processor and images."""
    spec = importlib.util.spec_from_file_location("digits_recipe", ROOT / "recipes" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def set_end_probability(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, probability: float
) -> None:
    """Make the policy end its turn with this probability after every token, and never sample another special token.

    A channel of the residual stream is made constant: every embedding and image feature holds the same there, and no
    layer writes to it. It outweighs the others, so after the last norm it is about sqrt(width) whatever the context.
    The output head, untied from the embeddings, reads it with one weight a token, which acts as a bias on the logit.

    Args:
        model: a freshly initialised policy.
        tokenizer: its tokenizer; its vocabulary is the model's.
        probability: of the end of turn after each token; 0 never ends.
    """
    language = model.model.language_model
    width = language.embed_tokens.embedding_dim
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = language.config.tie_word_embeddings = False
    language.embed_tokens.weight[:, 0] = CHANNEL
    merger = model.model.visual.merger.mlp[-1]
    merger.weight[0], merger.bias[0] = 0.0, CHANNEL
    for layer in language.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    vocabulary = model.lm_head.out_features
    special = sorted(set(tokenizer.all_special_ids) | set(range(len(tokenizer), vocabulary)))
    # The head's other weights keep their small random values, so tokens differ as they would in any policy.
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[special] = 0.0
    model.lm_head.weight[special, 0] = NEVER_LOGIT / math.sqrt(width)
    if probability > 0:
        ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
        contexts = ordinary[torch.randint(len(ordinary), (8, 64), generator=torch.Generator().manual_seed(0))]
        hidden = language(input_ids=contexts).last_hidden_state
        others = model.lm_head(hidden)[..., ordinary].logsumexp(-1).mean()
        end = others + math.log(probability / (1 - probability))
        model.lm_head.weight[tokenizer.eos_token_id, 0] = end / hidden[..., 0].mean()


def write_case(case: Case, folder: Path, prompts: int, seed: int = 0) -> None:
    """Write the policy to `folder`/model and the prompts, with their images beside them, to `folder`/prompts.jsonl."""
    digits = _digits()
    processor = digits.make_processor()
    model = digits.make_model(processor.tokenizer, seed)
    set_end_probability(model, processor.tokenizer, 1 / case.mean_tokens if case.mean_tokens else 0.0)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    images, labels = digits.digit_images()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{index:04d}.png" for index in range(len(images))]
    for image, name in zip(images, names, strict=True):
        image.save(folder / name)
    pairs = np.random.default_rng(seed).integers(0, len(images), (prompts, 2))
    with (folder / "prompts.jsonl").open("w") as file:
        for left, right in pairs.tolist():
            row = {
                "prompt": f"<image><image>{digits.QUESTION}",
                "images": [names[left], names[right]],
                "target": int(labels[left] + labels[right]),
            }
            file.write(json.dumps(row) + "\n")
