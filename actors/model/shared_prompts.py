"""Puts completions of one prompt into one row, so that the prompt is computed once instead of once a completion.

A row holds the prompt and several completions of it, one after another. Each completion sees the prompt and itself, by
a mask, and stands where it would stand behind the prompt alone, by its positions: the log-probabilities are the same.
Groups of 8 to 16 answers to a prompt with images spend most of a plain forward pass on copies of that prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = frozenset({"llama", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"})
"""Model types of which a test has shown that rows give what separate sequences give."""
LINEAR_COST = 6
"""Cost of a token in a layer's matrices over that of a pair of tokens in its attention, in units of its width."""


@dataclass(frozen=True, slots=True, eq=False)
class RowLayout:
    """Where the tokens of rows with several completions stand.

    Attributes:
        segments: [R, L] int64: 0 for the prompt, 1, 2, ... for the completions, -1 behind the end.
        offsets: [R, L] int64: place in the sequence the token belongs to, from 0.
        prompt_lengths: [R] int64.
    """

    segments: Tensor
    offsets: Tensor
    prompt_lengths: Tensor

    def to(self, device: torch.device | str) -> RowLayout:
        """The same on another device."""
        return RowLayout(self.segments.to(device), self.offsets.to(device), self.prompt_lengths.to(device))

    def attention_mask(self) -> Tensor:
        """[R, 1, L, L] bool: what each token may see: what came before it in the prompt or in its own completion."""
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        seen, seeing = self.segments[:, None, :], self.segments[:, :, None]
        return (causal & ((seen == 0) | (seen == seeing)))[:, None]

    def positions(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Position ids: [R, L], or [3, R, L] where the model places image tokens in three dimensions.

        Args:
            model: the Hugging Face model.
            inputs: of the row's forward pass: `input_ids` and features.
        """
        place = getattr(getattr(model, "model", None), "get_rope_index", None)
        if place is None or "image_grid_thw" not in inputs:
            return self.offsets
        longest = int(self.prompt_lengths.max())
        is_prompt = torch.arange(longest, device=self.offsets.device) < self.prompt_lengths[:, None]
        prompts: Tensor = place(
            inputs["input_ids"][:, :longest],
            mm_token_type_ids=inputs["mm_token_type_ids"][:, :longest],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=is_prompt.long(),
        )[0]
        # A completion is text: it goes on, in all three dimensions, from the largest place of the prompt.
        ends = prompts.masked_fill(~is_prompt, -1).amax((0, 2))
        positions = (self.offsets - self.prompt_lengths[:, None] + 1 + ends[:, None]).expand(3, -1, -1).clone()
        positions[:, :, :longest] = torch.where(is_prompt, prompts, positions[:, :, :longest])
        return positions


def row_layout(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], longest: int) -> RowLayout:
    """The layout of rows of a prompt and its completions.

    Args:
        prompt_lengths: [R] tokens.
        completion_lengths: [R] the lengths of each row's completions, in order.
        longest: L, tokens of the longest row.
    """
    segments = torch.full((len(prompt_lengths), longest), -1, dtype=torch.long)
    offsets = torch.zeros_like(segments)
    for row, (prompt, completions) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        segments[row, :prompt] = 0
        offsets[row, :prompt] = torch.arange(prompt)
        start = prompt
        for number, length in enumerate(completions, start=1):
            segments[row, start : start + length] = number
            offsets[row, start : start + length] = torch.arange(prompt, prompt + length)
            start += length
    return RowLayout(segments, offsets, torch.tensor(prompt_lengths))


def can_share_prompts(model: Any) -> bool:
    """Whether the model is of a family, and runs an attention, that rows of several completions are proven for."""
    text = model.config.get_text_config()
    has_window = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ())
    return model.config.model_type in FAMILIES and text._attn_implementation == "sdpa" and not has_window


def token_cost(model: Any) -> int | None:
    """Cost of a token outside the attention, in pairs of tokens inside it, for :mod:`rollout.balance`.

    None where the model takes one sequence a row.
    """
    return LINEAR_COST * int(model.config.get_text_config().hidden_size) if can_share_prompts(model) else None
