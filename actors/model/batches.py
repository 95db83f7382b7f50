"""Makes tensors of token sequences: right-padded ids, joined media features, and where the completions' logits lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.model.shared_media import SharedImages, share_images
from actors.model.shared_prompts import RowLayout, row_layout
from algorithms.packing import Packing
from rollout.encoding import ExpandedPrompt, PromptEncoder
from rollout.failures import DataError
from rollout.samples import TokenSequence

TOKEN_FEATURES = frozenset({"mm_token_type_ids", "token_type_ids"})
"""Features with one value a token, [1, tokens]; 0 means text."""
MEDIA_FEATURES = frozenset(
    {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "image_sizes"}
)
"""Features with one row a medium (or a patch), so that a batch's are the concatenation of its prompts'."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelBatch:
    """A micro-batch for one forward pass.

    Attributes:
        inputs: keyword arguments of the model's forward: `input_ids` [R, L], `attention_mask`, and features.
        rows: [N] int64, the row of `input_ids` of each completion token.
        positions: [N] int64, where in the row the logits that predict it lie.
        samples: [N] int64, the sequence the token belongs to; without shared prompts the same as `rows`.
        columns: [N] int64, its index in the completion.
        tokens: [N] int64, the token itself.
        shape: (B, T), sequences and longest completion.
        layout: where tokens stand in rows of several completions; None where every row has one.
        shared: which images the sequences share, where they do; `pixel_values` then holds each once.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    positions: Tensor
    samples: Tensor
    columns: Tensor
    tokens: Tensor
    shape: tuple[int, int]
    layout: RowLayout | None = None
    shared: SharedImages | None = None

    def to(self, device: torch.device | str) -> ModelBatch:
        """The same batch on another device."""
        return ModelBatch(
            {name: value.to(device) for name, value in self.inputs.items()},
            self.rows.to(device),
            self.positions.to(device),
            self.samples.to(device),
            self.columns.to(device),
            self.tokens.to(device),
            self.shape,
            self.layout.to(device) if self.layout is not None else None,
            self.shared.to(device) if self.shared is not None else None,
        )


def model_batch(
    prompts: Sequence[ExpandedPrompt],
    completions: Sequence[NDArray[np.int32]],
    *,
    pad_token_id: int,
    token_features: Collection[str] = (),
    rows: Sequence[int] | None = None,
) -> ModelBatch:
    """Put prompts and completions together, padded on the right.

    Args:
        prompts: one a sequence; sequences may share one.
        rows: [sequences] ascending from 0: sequences of equal number have the same prompt and share a row, in which
            it stands once; the model must be one that :func:`actors.model.shared_prompts.can_share_prompts` knows. By
            default each sequence has a row of its own.
        completions: [tokens] int32 each, not empty.
        pad_token_id: fills the ends; masked out of attention.
        token_features: features a token that the model wants even where no prompt of the batch has media.
    Raises:
        DataError: `media_layout_unknown` for features that aren't known to concatenate.
    """
    row_of = np.arange(len(completions)) if rows is None else np.asarray(rows)
    firsts = np.flatnonzero(np.diff(row_of, prepend=-1))
    members = np.split(np.arange(len(completions)), firsts[1:])
    sequences = [np.concatenate([prompts[row[0]].token_ids, *(completions[index] for index in row)]) for row in members]
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        attention_mask[row, : len(sequence)] = 1
    prompt_lengths = [len(prompts[row[0]].token_ids) for row in members]
    lengths = np.array([len(completion) for completion in completions])
    layout = None
    if len(members) < len(completions):
        layout = row_layout(prompt_lengths, [[int(lengths[index]) for index in row] for row in members], longest)
        attention_mask = layout.attention_mask()
    samples = np.repeat(np.arange(len(completions)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    starts = np.concatenate(
        [prompt + np.cumsum(lengths[row]) - lengths[row] for prompt, row in zip(prompt_lengths, members, strict=True)]
    )
    # The first token of a completion is predicted at the end of the prompt, which may stand far before it.
    positions = np.where(columns == 0, np.array(prompt_lengths)[row_of][samples], (starts[samples] + columns)) - 1
    features, shared = share_images([prompts[index] for index in firsts])
    return ModelBatch(
        {"input_ids": input_ids, "attention_mask": attention_mask} | _features(features, longest, token_features),
        rows=torch.from_numpy(row_of[samples]),
        positions=torch.from_numpy(positions),
        samples=torch.from_numpy(samples),
        columns=torch.from_numpy(columns),
        tokens=torch.from_numpy(np.concatenate(completions).astype(np.int64)),
        shape=(len(completions), int(lengths.max())),
        layout=layout,
        shared=shared,
    )


def token_matrix(values: Sequence[NDArray[np.generic]], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Values by completion token as [B, T], zeros behind each completion's end and in rows without values.

    Args:
        values: [tokens] of each of the first rows; at most B of them.
    """
    lengths = torch.tensor([len(value) for value in values] + [0] * (shape[0] - len(values)))
    packed = np.concatenate([np.zeros(0, np.bool_), *values])
    return Packing.of(lengths, shape[1]).to_rows(torch.from_numpy(packed).to(dtype))


def expand_prompts(sequences: Sequence[TokenSequence], encoder: PromptEncoder) -> list[ExpandedPrompt]:
    """The trainer's own expansion of each sequence's prompt, proven equal to the generator's.

    Raises:
        DataError: `prompt_expansion_mismatch` where they differ; training on them would pair log-probabilities with
            other tokens than were sampled.
    """
    expanded = [encoder.expand(sequence.prompt) for sequence in sequences]
    for sequence, prompt in zip(sequences, expanded, strict=True):
        if not np.array_equal(sequence.prompt_token_ids, prompt.token_ids):
            raise DataError(
                "prompt_expansion_mismatch",
                f"prompt {sequence.prompt.prompt_id}: the generator used {len(sequence.prompt_token_ids)} tokens, the "
                f"trainer's processor makes {len(prompt.token_ids)}. Both must read the same processor and chat "
                "template, and media placeholders must be expanded only once.",
            )
    return expanded


def _features(
    features: Sequence[Mapping[str, Tensor]], longest: int, token_features: Collection[str]
) -> dict[str, Tensor]:
    names = {name for feature in features for name in feature}
    unknown = names - TOKEN_FEATURES - MEDIA_FEATURES
    if unknown:
        raise DataError(
            "media_layout_unknown",
            f"the model's processor returns {', '.join(sorted(unknown))}; how these of several prompts are put into "
            f"one batch isn't known. Known: {', '.join(sorted(TOKEN_FEATURES | MEDIA_FEATURES))}.",
        )
    batch = {}
    for name in sorted((names & TOKEN_FEATURES) | set(token_features)):
        batch[name] = torch.zeros((len(features), longest), dtype=torch.long)
        for row, feature in enumerate(features):
            if name in feature:
                batch[name][row, : feature[name].shape[1]] = feature[name][0]
    for name in sorted(names & MEDIA_FEATURES):
        parts = [feature[name] for feature in features if name in feature]
        if len({part.shape[1:] for part in parts}) > 1:
            raise DataError(
                "media_layout_unknown",
                f"{name} of the prompts of a batch have the shapes {sorted({tuple(part.shape) for part in parts})}, "
                "which don't concatenate. Resize the images to one size, or use a model whose processor flattens "
                "patches (such as Qwen-VL).",
            )
        batch[name] = torch.cat(parts)
    return batch
